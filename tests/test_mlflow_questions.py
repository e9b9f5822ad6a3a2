"""Scored questions in MLflow, as its page shows them beside another run's."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from ray_sql import tracking
from ray_sql.config.sections import TrackingSection
from ray_sql.tracking import ScoredQuestion
from ray_sql.tracking.store import is_final

SCORED = [
    ScoredQuestion(
        {"question": "How many Bücher?", "database": "mall"}, "SELECT 1", "SELECT 2", True, "", {}
    ),
    ScoredQuestion(
        {"question": "long " * 900, "database": "mall"},
        None,
        "SELECT 2",
        False,
        "no SQL in the answer",
        {"split": "dev", "hardness": "easy"},
    ),
    ScoredQuestion(
        {"question": "", "database": ""}, "x" * 3000, "SELECT no", None, "no such column: no", {}
    ),
]


@pytest.fixture
def settings(empty_mlflow: Path, tmp_path: Path) -> TrackingSection:
    shutil.copy(empty_mlflow, tmp_path / "mlflow.db")
    return TrackingSection(uri=f"sqlite:///{tmp_path}/mlflow.db", questions=True)


def begin(settings: TrackingSection, root: Path, name: str) -> tracking.Run:
    return tracking.start(settings, {}, name=name, tags={}, spool=root / f"{name}.jsonl")


def known(run: tracking.Run) -> list[Any]:
    """Return the questions of a run, the newest first."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(run.uri)
    experiment = client.get_run(run.run_id).info.experiment_id
    return list(client.search_traces(locations=[experiment], run_id=run.run_id))


def test_questions_have_answer_gold_and_verdict_with_its_reason(
    settings: TrackingSection, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    random.seed(14)
    first = begin(settings, tmp_path, "first")
    first.questions("execution_accuracy", SCORED)
    random.seed(14)  # as a run does: names must differ all the same
    second = begin(settings, tmp_path, "second")
    second.questions("execution_accuracy", SCORED)
    assert capfd.readouterr().out == "", "MLflow writes nothing"
    assert len(known(second)) == 3
    told = {trace.info.request_preview: trace for trace in known(first)}
    assert sorted(map(len, told)) == [3, 23, 1000]
    right, wrong, gold = (
        told[next(words for words in told if words.startswith(begins))]
        for begins in ("How", "long", " · ")
    )
    assert right.info.response_preview == "SELECT 1"
    assert json.loads(right.data.request) == {"question": "How many Bücher?", "database": "mall"}
    verdict, expected = right.info.assessments
    assert (verdict.name, verdict.value, verdict.rationale) == ("execution_accuracy", True, None)
    assert (expected.name, expected.value) == ("gold", "SELECT 2")
    assert verdict.metadata == {"mlflow.assessment.sourceRunId": first.run_id}
    verdict = wrong.info.assessments[0]
    assert (verdict.value, verdict.rationale) == (False, "no SQL in the answer")
    assert wrong.info.tags["split"] == "dev" and len(wrong.data.request) > 4500
    assert gold.info.assessments[0].error.error_message == "no such column: no"
    assert len(gold.info.response_preview) == 1000 and json.loads(gold.data.response) == "x" * 3000


def test_questions_that_waited_stand_once_and_go_with_their_run(
    settings: TrackingSection, tmp_path: Path
) -> None:
    run = begin(settings, tmp_path, "run")
    run.questions("execution_accuracy", SCORED)
    spool = tmp_path / "spool.jsonl"
    spool.write_text(json.dumps([run.run_id, "questions", ["execution_accuracy", *SCORED]]) + "\n")
    assert tracking.replay(settings, spool) == 0
    assert len(known(run)) == 3
    tracking.remove(settings, run.run_id)
    assert known(run) == []


def test_questions_are_recorded_where_asked_for_only(
    settings: TrackingSection, tmp_path: Path
) -> None:
    run = begin(settings.model_copy(update={"questions": False}), tmp_path, "run")
    run.questions("execution_accuracy", SCORED)
    assert known(run) == []


def test_a_store_that_holds_no_questions_drops_them_with_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from mlflow.tracking import MlflowClient

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    files = TrackingSection(uri=(tmp_path / "store").as_uri(), questions=True)
    run = begin(files, tmp_path, "run")
    run.questions("execution_accuracy", SCORED)
    run.log(1, {"score": 1.0})
    run.end("FINISHED")
    (line,) = [one.getMessage() for one in caplog.records if one.name.startswith("ray_sql")]
    assert "refused a record, which is dropped: " in line
    read = MlflowClient(run.uri).get_run(run.run_id)
    assert (read.info.status, read.data.metrics) == ("FINISHED", {"score": 1.0})
    assert not (tmp_path / "run.jsonl").exists()


@pytest.mark.parametrize(("code", "final"), [("NOT_IMPLEMENTED", True), ("INTERNAL_ERROR", False)])
def test_what_a_server_does_not_know_is_not_sent_again(code: str, final: bool) -> None:
    from mlflow.exceptions import MlflowException
    from mlflow.protos import databricks_pb2

    assert is_final(MlflowException("log_spans", databricks_pb2.ErrorCode.Value(code))) is final
