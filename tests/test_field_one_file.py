"""One file of questions is scored whole, and an answer that was cut off is called so."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ray_sql.config import EvaluateConfig
from ray_sql.config.sections import AnswersSection
from ray_sql.errors import DataError
from ray_sql.evaluate import scoring
from ray_sql.evaluate.run import run as evaluate
from ray_sql.evaluate.scored import load_scored
from ray_sql.generate import Answer, Question
from ray_sql.report import html
from ray_sql.report.figures import figures
from ray_sql.tasks import TASKS, TaskName
from tests.conftest import QUESTIONS

MODEL_SETTINGS = {"evaluate.limit": None, "output_name": "scores"}


@pytest.fixture
def one_file(spider_folder: Path, tmp_path: Path) -> Callable[[int], Path]:
    """`one_file(n)`: a file with n questions, and its database beside it."""
    shutil.copytree(spider_folder / "database", tmp_path / "own" / "databases")

    def write(count: int) -> Path:
        rows = [
            {"db_id": "mall", "question": f"{q} ({n})", "query": sql}
            for n in range(count)
            for q, sql in [QUESTIONS[n % len(QUESTIONS)]]
        ]
        file = tmp_path / "own" / "asked.jsonl"
        file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        return file

    return write


@pytest.mark.kind("one file to evaluate")
@pytest.mark.parametrize(("count", "split"), [(1, "dev"), (5, "dev"), (5, "test"), (16, "mine")])
def test_all_of_one_file_is_scored(
    make_config: Any, one_file: Any, tmp_path: Path, capsys: Any, count: int, split: str
) -> None:
    answers = tmp_path / "answers.sql"
    answers.write_text("".join(f"{QUESTIONS[n % 8][1]}\n" for n in range(count)))
    changes = {"dataset_id": str(one_file(count)), "predictions_file": str(answers)}
    changes |= {"split": [split]} | MODEL_SETTINGS
    config = make_config(EvaluateConfig, **changes)
    metrics = evaluate(config)
    scores = metrics["file"][split]
    assert (scores["execution_accuracy"], scores["n"]) == (1.0, count)
    shown = " ".join(capsys.readouterr().out.split())
    assert f"has no splits: all of it, {count} questions, is scored" in shown
    evaluate(make_config(EvaluateConfig, **changes, dry_run=True))
    shown = " ".join(capsys.readouterr().out.split())
    assert f"would score {count} predictions" in shown and f"on {count} of {split}" in shown


@pytest.mark.kind("one file to evaluate")
def test_one_question_is_shown_to_a_model_in_a_dry_run(
    make_config: Any, one_file: Any, capsys: Any
) -> None:
    changes = {"dataset_id": str(one_file(1)), "dry_run": True} | MODEL_SETTINGS
    evaluate(make_config(EvaluateConfig, **changes))
    shown = capsys.readouterr().out
    assert QUESTIONS[0][0] in shown and "on 1 of dev" in shown


@pytest.mark.kind("one file to evaluate")
def test_what_training_set_aside_is_scored_where_the_rest_was_trained_on(
    make_config: Any, one_file: Any, tmp_path: Path
) -> None:
    changes = {"dataset_id": str(one_file(20))} | MODEL_SETTINGS
    config = make_config(EvaluateConfig, **changes)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    counts = {}
    for trained_on in (changes["dataset_id"], "asked.jsonl", "other.jsonl"):
        (adapter / "ray_sql_config.json").write_text(json.dumps({"dataset_id": trained_on}))
        corpus = load_scored(config, str(adapter))
        counts[trained_on] = len(corpus.splits["dev"])
    assert list(counts.values()) == [2, 2, 20]
    (adapter / "ray_sql_config.json").unlink()
    corpus = load_scored(config, str(adapter))
    assert (
        len(corpus.splits["dev"]) == 2 and "the part that training sets aside" in corpus.notes[-1]
    )
    given = make_config(EvaluateConfig, **changes, **{"data.test_fraction": 0.3})
    assert len(load_scored(given).splits["dev"]) == 6
    none = make_config(EvaluateConfig, **changes, **{"data.test_fraction": 0.0})
    with pytest.raises(DataError, match="there is no question to score"):
        load_scored(none)


def answered(task: TaskName, raw: str, new_tokens: int, gold: str, database: str) -> Any:
    question = Question("0", "dev", "mall", "?", gold, "easy", database, [1])
    settings = AnswersSection(max_new_tokens=8, processes=1)
    judged = scoring.score([question], [Answer(raw, 10, new_tokens, 0.1)], TASKS[task], settings)
    return judged[0], scoring.summarise(judged, TASKS[task], settings)


@pytest.mark.kind("one file to evaluate")
@pytest.mark.parametrize(
    ("raw", "new_tokens", "verdict", "kind"),
    [
        ("```sql\nSELECT name FROM customer WHERE city = 'Lis", 8, "error", "cut off"),
        ("```sql\nSELECT name FROM customer", 8, "wrong", "cut off"),
        ("```sql\nSELECT absent FROM customer\n```", 8, "error", "no such column"),
        ("```sql\nSELECT name FROM customer WHERE city = 'Lis", 7, "error", "syntax"),
        ("```sql\nSELECT name FROM customer WHERE id IN (1, 3)", 8, "correct", "none"),
    ],
)
def test_sql_that_was_cut_off_is_called_so(
    spider_folder: Path, raw: str, new_tokens: int, verdict: str, kind: str
) -> None:
    database = str(spider_folder / "database" / "mall" / "mall.sqlite")
    gold = "SELECT name FROM customer WHERE city = 'Lisbon'"
    row, scores = answered("sql", raw, new_tokens, gold, database)
    assert (row["verdict"], row["error_kind"]) == (verdict, kind)
    if kind == "cut off":
        assert row["error"].startswith("cut off at max_new_tokens 8: ")
        assert scores["errors"] == {"cut off": 1}
        metrics = {"task_type": "sql", "dataset_id": "d", "tuned": {"dev": scores}}
        page = html.page("t", metrics, {"tuned": [row]}, figures(metrics, {"tuned": [row]}))
        assert "1 of 1 answers are not right and were cut off" in page
        assert "cut off at max_new_tokens 8" in page


@pytest.mark.kind("one file to evaluate")
def test_links_that_were_cut_off_are_called_so(spider_folder: Path) -> None:
    gold = '{"customer": ["name"], "sale": []}'
    row, _ = answered("schema", '```json\n{"customer": ["na', 8, gold, "")
    assert (row["error_kind"], row["verdict"]) == ("cut off", "error")
    spare = '{"customer": ["name", "id"], "sale": []}'
    assert answered("schema", spare, 8, gold, "")[0]["error_kind"] == "extra names"
