"""The checkpoints that a run keeps stand in MLflow's list of models, once, with their scores."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from ray_sql import finetune, tracking
from ray_sql.cluster.events import CheckpointSaved, Event
from ray_sql.config import Config
from ray_sql.report.progress import Progress
from ray_sql.store import checkpoints
from ray_sql.store.run_folder import RunFolder

LOSS = "validation/loss"


@pytest.fixture
def config(make_config: Any, empty_mlflow: Path, tmp_path: Path) -> Config:
    """A run of five steps, each of which is saved and evaluated; the best and two more are kept."""
    shutil.copy(empty_mlflow, tmp_path / "mlflow.db")
    changed: Config = make_config(
        **{"train.max_steps": 5, "save_steps": 1, "evaluate.select_examples": 2},
        **{"tune.objective": "eval_loss", "data.validation_fraction": 0.2},
        **{"tracking.enabled": True, "tracking.uri": f"sqlite:///{tmp_path}/mlflow.db"},
    )
    return changed


def listed(config: Config, order_by: list[dict[str, Any]] | None = None) -> list[Any]:
    """The models of the experiment that are checkpoints."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(config.tracking.uri)
    experiment = client.get_experiment_by_name(config.tracking.experiment)
    return list(
        client.search_logged_models(
            [experiment.experiment_id], "model_type = 'checkpoint'", order_by=order_by
        )
    )


def scores(models: list[Any]) -> dict[str, list[tuple[int, float]]]:
    """By name, the (step, value) of each loss."""
    return {
        model.name: [(point.step, point.value) for point in model.metrics if point.key == LOSS]
        for model in models
    }


def require_those_in_the_folder(config: Config) -> list[Any]:
    """The list is that of the folder, each with its own loss once."""
    models, kept = listed(config), checkpoints.complete(RunFolder(config.run_dir))
    assert scores(models) == {saved.name: [(saved.step, saved.metrics[LOSS])] for saved in kept}
    assert len(models) == len(kept) <= 3
    assert {model.tags["folder"] for model in models} == {saved.uri for saved in kept}
    assert {model.params["step"] for model in models} == {str(saved.step) for saved in kept}
    return models


def test_kept_checkpoints_are_listed_and_sorted_by_their_scores(config: Config) -> None:
    from mlflow.tracking import MlflowClient

    metrics = finetune.run(config)
    models = require_those_in_the_folder(config)
    client = MlflowClient(config.tracking.uri)
    for model in models:
        assert str(model.status) == "READY" and model.source_run_id == metrics["mlflow_run_id"]
        assert {point.dataset_name for point in model.metrics} == {
            f"{config.dataset_id}: validation"
        }
        assert not client.list_logged_model_artifacts(model.model_id), "weights are not copied"
    by_loss = listed(config, [{"field_name": f"metrics.{LOSS}", "ascending": True}])
    losses = [points[0][1] for points in scores(by_loss).values()]
    assert losses == sorted(losses) and len(set(losses)) > 1
    curve = client.get_metric_history(metrics["mlflow_run_id"], LOSS)
    assert sorted(point.step for point in curve) == [1, 2, 3, 4, 5], "the run has each point once"


def test_a_run_that_goes_on_lists_none_twice(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    record, seen = Progress.__call__, []

    def killed(self: Progress, event: Event) -> None:
        if isinstance(event, CheckpointSaved) and event.step == 3:
            raise KeyboardInterrupt  # before MLflow hears of the third checkpoint
        record(self, event)
        if isinstance(event, CheckpointSaved):
            seen.append([model.name for model in listed(config)])

    monkeypatch.setattr(Progress, "__call__", killed)
    with pytest.raises(KeyboardInterrupt):
        finetune.run(config)
    assert sorted(seen[-1]) == ["checkpoint-1", "checkpoint-2"], "a run that trains lists them"
    monkeypatch.setattr(Progress, "__call__", record)
    first = {model.name: model.model_id for model in listed(config)}
    finetune.run(config)
    after = {model.name: model.model_id for model in require_those_in_the_folder(config)}
    assert all(after[name] == first[name] for name in first.keys() & after.keys())


def test_a_folder_that_is_replaced_takes_its_checkpoints_with_it(config: Config) -> None:
    finetune.run(config)
    before = {model.model_id for model in listed(config)}
    finetune.run(config.changed({"overwrite": True, "seed": 3}))
    assert not before & {model.model_id for model in require_those_in_the_folder(config)}


def test_an_older_list_that_waited_is_not_the_last_word(config: Config, tmp_path: Path) -> None:
    run = tracking.start(config.tracking, {}, name="x", tags={}, spool=tmp_path / "spool.jsonl")
    for step, retry_at in ((1, float("inf")), (2, 0.0)):  # the first fails, the second does not
        run._retry_at = retry_at
        run.checkpoints({step: f"/out/x/checkpoint-{step}"})
    run.end("FINISHED")
    assert [model.name for model in listed(config)] == ["checkpoint-2"]


def test_what_waited_for_the_store_is_sent_once(config: Config, tmp_path: Path) -> None:
    run = tracking.start(config.tracking, {}, name="x", tags={}, spool=tmp_path / "spool.jsonl")
    run._retry_at = float("inf")  # as after a failure
    for step in (1, 2, 3):
        run.log(step, {LOSS: 1.0 / step, "validation/x": float("nan")})
        run.checkpoints({kept: f"/out/x/checkpoint-{kept}" for kept in (step - 1, step) if kept})
    run.replay()
    models = listed(config)
    assert scores(models) == {"checkpoint-3": [(3, 1 / 3)], "checkpoint-2": [(2, 0.5)]}
    assert {point.key for model in models for point in model.metrics} == {LOSS}, "none that is 0"
