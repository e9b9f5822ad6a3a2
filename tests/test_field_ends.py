"""A run or a sweep with nothing to measure ends well, with its reasons."""

from __future__ import annotations

import io
import json
import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from ray_sql import cli, evaluate, finetune
from ray_sql.config import EvaluateConfig
from ray_sql.display import Display
from ray_sql.errors import DataError, ModelError, TrainingError
from ray_sql.evaluate import results
from ray_sql.publish import bundle
from ray_sql.report import figures, html, terminal
from ray_sql.store import storage
from ray_sql.store.run_folder import RunFolder
from ray_sql.tasks import SQL
from ray_sql.tune import champion, space, study, sweep_report
from ray_sql.tune.objective import Objective
from ray_sql.tune.study import StepScore
from tests.conftest import QUESTIONS
from tests.test_tune import one

kind = pytest.mark.kind("runs with nothing to measure")


def image(figure: Any) -> bytes:
    """The figure as it is drawn, where any warning is an error."""
    drawn = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure.savefig(drawn, format="png")
    return drawn.getvalue()


@kind
@pytest.mark.parametrize("objective", [None, float("nan"), float("inf"), 0.0])
@pytest.mark.parametrize(
    "axes",
    [
        [("learning_rate", "log")],
        [("learning_rate", "log"), ("lora.r", "category")],
        [("learning_rate", "log"), ("lora.r", "log")],
        [("lora.r", "linear")],
    ],
)
def test_a_sweep_without_a_measurement_is_drawn(
    axes: list[tuple[str, str]], objective: float | None
) -> None:
    trial = {"trial": 0, "learning_rate": 1e-3, "lora.r": 4, "stopped": False}
    for trials in ([], [{**trial, "objective": objective}]):
        assert image(figures.sweep(trials, axes, "accuracy, %"))


@kind
@pytest.mark.parametrize("curves", [{}, {"trial-000": []}, {"trial-000": [(2, float("nan"))]}])
def test_curves_without_a_point_are_drawn(curves: dict[str, Any]) -> None:
    assert image(figures.learning_curves(curves, "", "accuracy, %"))


@kind
def test_a_sweep_of_which_every_trial_failed_ends_with_the_reasons(make_config: Any) -> None:
    config = one(make_config)
    axes, known = space.read(config), study.begin(config)
    for number in range(2):
        known.trial_at(number, axes.start)
        known.change(number, state="failed", reason="the loss diverged by step 1")
    assert sweep_report.draw(Objective.of(config), axes, known) == {}
    session: Any = SimpleNamespace(study=known, config=config)
    with pytest.raises(TrainingError, match=r"trial-000: the loss diverged by step 1; trial-001"):
        champion.choose(session, {})


@kind
def test_a_trial_whose_checkpoints_are_gone_is_no_champion(make_config: Any) -> None:
    config = one(make_config)
    known = study.begin(config)
    known.trial_at(0, space.read(config).start)
    score = StepScore(2, -1.5, None, {"validation/loss": 1.5})
    known.change(0, state="finished", best=score)
    session: Any = SimpleNamespace(study=known, config=config)
    with pytest.raises(TrainingError, match=r"no trial of .* has a measured checkpoint"):
        champion.choose(session, {})


@kind
@pytest.mark.parametrize("models", [("file",), ("tuned",), ("base", "tuned")])
def test_scores_of_no_question_are_shown_and_refused_to_publish(
    models: tuple[str, ...], make_config: Any, tmp_path: Path
) -> None:
    evaluation: dict[str, Any] = {model: [] for model in models}
    summary = results.summarise(evaluation, SQL, make_config().evaluate)
    metrics = {"task_type": "sql", "dataset_id": "d", **summary}
    out = io.StringIO()
    terminal.show(RunFolder(str(tmp_path)), "x", metrics, Display(Console(file=out)))
    assert "nothing was scored" in out.getvalue()
    drawn = figures.figures(metrics, evaluation)
    for figure in drawn.values():
        assert image(figure)
    assert "<html" in html.page("x", metrics, evaluation, drawn)
    if "base" in models:
        with pytest.raises(ModelError, match="no question was scored"):
            bundle.require_better(metrics, RunFolder(str(tmp_path)))


@kind
def test_two_rows_are_trained_on_and_publishing_is_reached(
    make_config: Any, spider_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "pairs.jsonl"
    rows = [{"db_id": "shop", "question": q, "query": sql} for q, sql in QUESTIONS[:2]]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = make_config(
        **{
            "dataset_id": str(file),
            "data.databases": str(spider_folder / "database"),
            "train.max_steps": 1,
            "evaluate.select_examples": 0,
        }
    )
    metrics = finetune.run(config)
    assert metrics["tuned"] == {} and RunFolder(config.run_dir).is_finished()
    assert storage.exists(RunFolder(config.run_dir).adapter.place("adapter_model.safetensors"))
    assert "nothing was scored" in capfd.readouterr().out
    words = ["publish", "--output_name", "run", "--output_dir", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as ended:
        cli.main(argv=[*words, "--hub.base_model", "someone/base", "--dry_run"])
    assert ended.value.code == 2
    assert "no question was scored, so nobody knows" in capfd.readouterr().err
    shutil.move(tmp_path / "out", tmp_path / "elsewhere")
    given = {"output_dir": str(tmp_path / "elsewhere"), "hub.base_model": "someone/base"}
    there = config.changed(given | {"hub.force": True})
    assert bundle.read(there).config.run_dir == there.run_dir, "the merged model is measured there"


@kind
@pytest.mark.parametrize("dry_run", [True, False])
def test_an_evaluation_of_no_question_ends(
    dry_run: bool,
    make_config: Any,
    spider_folder: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    data = tmp_path / "data"
    shutil.copytree(spider_folder, data)
    (data / "dev.json").write_text("[]")
    config = make_config(EvaluateConfig, dataset_id=str(data), dry_run=dry_run)
    try:
        evaluate.run(config)
    except DataError as error:
        assert "dev" in str(error)
    else:
        shown = capfd.readouterr().out
        assert ("0 of dev" in shown) if dry_run else ("nothing was scored" in shown)
