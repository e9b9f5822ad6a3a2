"""A training run while its MLflow server dies: nothing is lost, nothing is there twice, and the run
does not care."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from benchmarks.mlflow_server import Server
from ray_sql import finetune, preflight, tracking
from ray_sql.cluster.events import Event, TrainPoint
from ray_sql.config import CheckConfig, Config
from ray_sql.display import Display
from ray_sql.errors import StoreError, TakenOver
from ray_sql.report import progress
from ray_sql.store.run_folder import RunFolder
from ray_sql.train.resume import claim_run

pytestmark = pytest.mark.slow
STEPS = 8


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for name, value in (
        ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1"),
        ("MLFLOW_HTTP_REQUEST_TIMEOUT", "20"),
    ):
        monkeypatch.setenv(name, value)
    server = Server(tmp_path)
    server.start()
    yield server
    server.kill()


def settings(server: Server) -> dict[str, Any]:
    given = {
        "train.max_steps": STEPS,
        "save_steps": 4,
        "evaluate.select_examples": 2,
        "evaluate.limit": 2,
    }
    return given | {"tracking.enabled": True, "tracking.uri": server.uri}


def at_steps(monkeypatch: pytest.MonkeyPatch, happens: dict[int, Callable[[], None]]) -> None:
    """Let something happen in a run just before the point of a step is recorded."""

    receive = progress.Progress.__call__

    def receive_eventful(self: progress.Progress, event: Event) -> None:
        if isinstance(event, TrainPoint) and event.step in happens:
            happens[event.step]()
        receive(self, event)

    monkeypatch.setattr(progress.Progress, "__call__", receive_eventful)


def recorded(server: Server, run_id: str) -> Any:
    """The run in MLflow, after making sure that it is whole: parameters, every point once, table,
    figures and files."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(server.uri)
    run = client.get_run(run_id)
    assert [one.info.run_id for one in client.search_runs([run.info.experiment_id])] == [run_id], (
        "one run and no other"
    )
    assert (run.info.status, run.data.params["lora.r"]) == ("FINISHED", "4")
    for key in run.data.metrics:
        steps = [point.step for point in client.get_metric_history(run_id, key)]
        assert len(steps) == len(set(steps)), f"{key} is there twice"
    assert [point.step for point in client.get_metric_history(run_id, "train/loss")] == list(
        range(1, STEPS + 1)
    )
    assert [point.step for point in client.get_metric_history(run_id, "validation/loss")] == [4, 8]
    assert {"score/execution_accuracy", "score/execution_accuracy_base", "time/forward"} <= set(
        run.data.metrics
    )
    files = {file.path for file in client.list_artifacts(run_id)}
    assert {"config.json", "metrics.json", "predictions.jsonl", "report.html", "figures"} <= files
    (model,) = client.search_logged_models([run.info.experiment_id], "name = 'adapter'")
    weights = {file.path for file in client.list_logged_model_artifacts(model.model_id)}
    assert model.source_run_id == run_id and "adapter_model.safetensors" in weights
    assert client.list_artifacts(run_id, "figures")
    for file in ("predictions.json", "base_predictions.json"):
        table = json.loads(Path(client.download_artifacts(run_id, file)).read_text())
        assert len(table["data"]) == 2, "two questions, a table for each model"
    return run


def test_a_server_that_is_killed_and_comes_back_has_every_point_once(
    make_config: Any, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_steps(monkeypatch, {3: server.kill, 6: server.start})
    config = make_config(**settings(server))
    metrics = finetune.run(config)
    recorded(server, metrics["mlflow_run_id"])
    assert not list((config.cache / "spool").iterdir())


@pytest.mark.parametrize("remote", [False, True])
@pytest.mark.cluster
def test_what_a_server_that_stays_away_missed_is_sent_later(
    make_config: Any,
    server: Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    remote: bool,
) -> None:
    given = settings(server) | (
        {"scaling.storage_path": (tmp_path / "store").as_uri()} if remote else {}
    )
    at_steps(monkeypatch, {3: server.kill})
    metrics = finetune.run(
        make_config(**given)
    )  # what ends without an exception ends with exit code 0
    again = make_config(CheckConfig, **given | {"task_type": "sql", "replay": True})
    (one,) = again.studies()
    assert type(one) is Config and finetune.spool(one).is_file()
    with pytest.raises(StoreError, match="no MLflow server answers there"):
        preflight.replay(again)

    server.start()
    with pytest.raises(
        StoreError, match=f"has no run {metrics['mlflow_run_id']}, whose records wait in"
    ):
        preflight.replay(again.changed({"tracking.uri": f"sqlite:///{tmp_path}/elsewhere.db"}))
    assert finetune.spool(one).is_file(), "nothing was thrown away"
    preflight.replay(again)
    assert "all that was recorded of run is in MLflow" in capfd.readouterr().out
    recorded(server, metrics["mlflow_run_id"])
    assert not list((one.cache / "spool").iterdir()), "what was kept for MLflow is gone"
    preflight.replay(again)
    assert "nothing of run waits for MLflow" in capfd.readouterr().out


def test_a_run_that_was_taken_over_leaves_its_mlflow_run_to_the_other(
    make_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.tracking import MlflowClient

    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    given = {
        "train.max_steps": STEPS,
        "save_steps": 4,
        "evaluate.select_examples": 0,
        "evaluate.limit": 2,
    }
    config = make_config(**given, **{"tracking.enabled": True, "tracking.uri": uri})
    at_steps(monkeypatch, {6: lambda: claim_run(RunFolder(config.run_dir)) and None})
    with pytest.raises(TakenOver, match="taken over by the same command given again"):
        finetune.run(config)
    client = MlflowClient(uri)
    (run,) = client.search_runs(
        [client.get_experiment_by_name(config.tracking.experiment).experiment_id]
    )
    assert run.info.status == "RUNNING"


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnhandledThreadExceptionWarning"
)  # TensorBoard's thread says it, too
def test_storage_that_fails_costs_tensorboard_some_points_and_not_the_run(
    make_config: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = make_config()
    points, folder = (
        progress.Progress(RunFolder(config.run_dir), tracking.null_run(), Display()),
        Path(config.run_dir),
    )

    def train(step: int) -> None:
        points(TrainPoint(step, 1000, {"loss": 1.0}))

    train(1)
    while not any(b"loss" in file.read_bytes() for file in folder.glob("logs/*")):
        time.sleep(0.01)
    folder.rename(tmp_path / "away")
    folder.symlink_to(folder)  # the kernel refuses every access to it
    step = 1
    while "TensorBoard's logs lack some points" not in caplog.text:  # its thread writes later
        step += 1
        train(step)
        assert step < 500
        time.sleep(0.01)
    train(501)
    folder.unlink()
    (tmp_path / "away").rename(folder)
    train(502)
    points.close()
    assert caplog.text.count("TensorBoard's logs lack some points") == 1
    seen = [
        event.step
        for file in sorted(folder.glob("logs/*"))
        for event in EventFileLoader(str(file)).Load()
        if event.step
    ]
    assert {1, 502} <= set(seen) and 501 not in seen
