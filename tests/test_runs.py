"""Old runs go with their MLflow runs, after they were shown; MLflow's pages open on the runs."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from benchmarks.mlflow_server import free_port
from ray_sql import tracking
from ray_sql.config import RunsConfig, UiConfig, load
from ray_sql.errors import ConfigError, StoreError
from ray_sql.finetune import runs
from ray_sql.store.run_folder import RunFolder
from ray_sql.tracking import ui
from tests.waiting import HANGS

ROOT = Path(__file__).parent.parent


@pytest.fixture
def store(empty_mlflow: Path, tmp_path: Path) -> str:
    shutil.copy(empty_mlflow, tmp_path / "mlflow.db")
    return f"sqlite:///{tmp_path}/mlflow.db"


def make_run(root: Path, name: str, days: float, store: str) -> tuple[RunFolder, tracking.Run]:
    """Write a run's folder of an age, with its MLflow run and the model of that."""
    folder = RunFolder(str(root / "out" / name))
    section = load(RunsConfig, [], **{"tracking.uri": store}).tracking
    record = tracking.start(section, {}, name=name, tags={}, spool=root / f"{name}.jsonl")
    folder.write_contract({"made": name})
    folder.write_mlflow_run(record.run_id, store)
    (root / "out" / name / "adapter").mkdir()
    (root / "out" / name / "adapter" / "a.bin").write_text("x" * 100)
    record.model(Path(folder.adapter.uri), tracking.LoggedModel("adapter", {}, {}, "dev"))
    record.end("FINISHED")
    then = time.time() - days * 86400
    for path in Path(folder.uri).rglob("*"):
        os.utime(path, (then, then))
    return folder, record


def settings(root: Path, store: str, **given: Any) -> RunsConfig:
    return load(RunsConfig, [], **{"output_dir": str(root / "out"), "tracking.uri": store} | given)


def test_a_run_that_was_cut_off_at_its_first_file_is_listed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    RunFolder(str(tmp_path / "out" / "cut")).write_study({})
    (tmp_path / "out" / "cut" / "study.json").write_text("")
    runs.run(settings(tmp_path, "sqlite:///none.db"))
    assert capsys.readouterr().out == "cut: 0.00 GB, 0 days old\n"


def test_old_runs_are_shown_then_removed_with_their_records(
    tmp_path: Path, store: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(store)
    old, record = make_run(tmp_path, "old", 40, store)
    crowned, crown = make_run(tmp_path, "crowned", 50, store)
    new, _ = make_run(tmp_path, "new", 1, store)
    crown.register(
        "ray-sql-sql", "adapter", {"score": "1", "measured_on": "dev"}, "champion", won=True
    )
    (tmp_path / "out" / "notes").mkdir()  # no run
    runs.run(settings(tmp_path, store, older_than="30d"))
    shown = capsys.readouterr().out
    assert f"old: 0.00 GB, 40 days old, MLflow run {record.run_id}\n" in shown
    assert "stays, for it is ray-sql-sql@champion" in shown and "new" not in shown
    assert "1 would be removed, with their MLflow runs: add --delete" in shown
    runs.run(settings(tmp_path, store, older_than="30d", delete=True, dry_run=True))
    assert old.exists() and client.get_run(record.run_id).info.lifecycle_stage == "active"

    runs.run(settings(tmp_path, store, older_than="30d", delete=True))
    assert not old.exists() and crowned.exists() and new.exists()
    assert client.get_run(record.run_id).info.lifecycle_stage == "deleted"
    assert client.get_run(crown.run_id).info.lifecycle_stage == "active"
    experiment = client.get_run(record.run_id).info.experiment_id
    sources = [model.source_run_id for model in client.search_logged_models([experiment])]
    assert record.run_id not in sources and crown.run_id in sources
    assert "1 removed" in capsys.readouterr().out


def test_a_run_that_the_store_never_held_stays(
    tmp_path: Path, store: str, empty_mlflow: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(empty_mlflow, tmp_path / "other.db")
    crowned, crown = make_run(tmp_path, "crowned", 50, store)
    crown.register("m", "adapter", {"score": "1", "measured_on": "dev"}, "champion", won=True)
    given = {"older_than": "30d", "delete": True}
    elsewhere = settings(tmp_path, f"sqlite:///{tmp_path}/other.db", **given)
    runs.run(elsewhere)
    assert crowned.exists() and "give --tracking.uri of the one" in capsys.readouterr().out
    (tmp_path / "out" / "crowned" / "run.json").write_text("{")
    os.utime(tmp_path / "out" / "crowned" / "run.json", (0, 0))
    runs.run(settings(tmp_path, store, **given))
    assert crowned.exists() and "its run.json is damaged" in capsys.readouterr().out
    runs.run(settings(tmp_path, store, **given, **{"tracking.enabled": False}))
    assert not crowned.exists(), "whoever says so loses it"


def test_of_a_copied_folder_only_the_copy_goes(
    tmp_path: Path, store: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from mlflow.tracking import MlflowClient

    live, record = make_run(tmp_path, "demo", 1, store)
    record.tag({"folder": live.uri})
    backup = shutil.copytree(live.uri, tmp_path / "out" / "backup")
    for path in backup.rglob("*"):
        os.utime(path, (0, 0))
    runs.run(settings(tmp_path, store, older_than="30d", delete=True))
    assert live.exists() and not backup.exists()
    assert MlflowClient(store).get_run(record.run_id).info.lifecycle_stage == "active"
    assert "which stays: the folder is a copy" in capsys.readouterr().out


def test_a_run_that_mlflow_says_is_running_stays(
    tmp_path: Path, store: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from mlflow.tracking import MlflowClient

    client, (folder, record) = MlflowClient(store), make_run(tmp_path, "long", 40, store)
    client.update_run(record.run_id, status="RUNNING")
    runs.run(settings(tmp_path, store, older_than="30d", delete=True))
    assert folder.exists() and "MLflow says that it is running" in capsys.readouterr().out
    client.delete_run(record.run_id)
    runs.run(settings(tmp_path, store, older_than="30d", delete=True))
    assert not folder.exists()


def test_a_studys_trials_go_with_it(tmp_path: Path, store: str) -> None:
    from mlflow.tracking import MlflowClient

    _, record = make_run(tmp_path, "study", 40, store)
    section = settings(tmp_path, store).tracking
    own = {"mlflow.parentRunId": record.run_id, "trial": "0"}
    child = tracking.start(section, {}, name="t", tags={}, own=own, spool=tmp_path / "t.jsonl")
    child.end("FINISHED")
    assert tracking.remove(section, record.run_id) == 2
    assert MlflowClient(store).get_run(child.run_id).info.lifecycle_stage == "deleted"
    assert tracking.remove(section, record.run_id) == 0, "it is gone already"


def make_study(root: Path, store: str) -> tuple[str, set[str], str]:
    """Write a study of three trials; return its run's id, theirs, and the experiment."""
    from mlflow.tracking import MlflowClient

    _, record = make_run(root, "study", 40, store)
    client = MlflowClient(store)
    experiment = client.get_run(record.run_id).info.experiment_id
    tags = {"mlflow.parentRunId": record.run_id}
    trials = {client.create_run(experiment, tags=tags).info.run_id for _ in range(3)}
    return record.run_id, trials, experiment


def test_a_removal_that_was_cut_off_finds_the_rest(
    tmp_path: Path, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.tracking import MlflowClient

    study, trials, experiment = make_study(tmp_path, store)
    section, client = settings(tmp_path, store).tracking, MlflowClient(store)

    def active() -> set[str]:
        return {run.info.run_id for run in client.search_runs([experiment])}

    delete, calls = MlflowClient.delete_run, iter(range(9))

    def cut_off(self: MlflowClient, run_id: str) -> None:
        if next(calls) == 1:
            raise KeyboardInterrupt
        delete(self, run_id)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(MlflowClient, "delete_run", cut_off)
        tracking.remove(section, study)
    assert study in active() and len(active()) == 3, "the study goes last"
    client.delete_run(study)  # as by an earlier version, which began with the study
    assert tracking.remove(section, study) == 2 and not active() & trials


def test_more_trials_than_a_page_holds_are_removed(
    tmp_path: Path, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.tracking import MlflowClient

    study, _, _ = make_study(tmp_path, store)
    search = MlflowClient.search_runs

    def by_two(self: MlflowClient, *given: Any, **named: Any) -> Any:
        return search(self, *given, **named | {"max_results": 2})

    monkeypatch.setattr(MlflowClient, "search_runs", by_two)
    assert tracking.remove(settings(tmp_path, store).tracking, study) == 4


def test_deleting_needs_an_age_and_a_store(tmp_path: Path, store: str) -> None:
    with pytest.raises(ConfigError, match="--delete: needs an age"):
        runs.run(settings(tmp_path, store, delete=True))
    old, _ = make_run(tmp_path, "old", 40, store)
    away = settings(tmp_path, "http://127.0.0.1:9", older_than="30d", delete=True)
    with pytest.raises(StoreError, match="no MLflow server answers"):
        runs.run(away)
    assert old.exists()


@pytest.mark.parametrize("age", ["30", "d", "-1d", "1y", "1.5d"])
def test_an_age_that_is_none_is_refused(age: str, tmp_path: Path, store: str) -> None:
    with pytest.raises(ConfigError, match="older_than"):
        settings(tmp_path, store, older_than=age)


def test_the_address_leads_to_the_runs_with_their_scores(
    tmp_path: Path, store: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {"tracking.uri": store, "dry_run": True, "port": free_port()}
    ui.run(load(UiConfig, [], **given))
    assert capsys.readouterr().out.endswith(f"open http://127.0.0.1:{given['port']}/\n")
    _, record = make_run(tmp_path, "one", 0, store)
    record.describe("words", "execution_accuracy")
    ui.run(load(UiConfig, [], **given))
    page = "#/experiments/1/runs?workflowType=machine_learning&viewStateShareKey=scores"
    assert capsys.readouterr().out.endswith(f":{given['port']}/{page}\n")


def test_a_port_that_is_taken_is_refused(store: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"--port {port}: cannot be listened on"):
            ui.run(load(UiConfig, [], **{"tracking.uri": store, "port": port}))


@pytest.mark.slow
def test_the_pages_answer_from_few_processes_and_end_with_the_job(store: str) -> None:
    import psutil

    port = free_port()
    command = [sys.executable, "-m", "jobs.ui", "--port", str(port), "--tracking.uri", store]
    job = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        # a shell's background jobs are begun without Ctrl-C, and pytest may be one
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert job.stdout and f"open http://127.0.0.1:{port}/" in job.stdout.readline()
    until = time.monotonic() + HANGS
    while True:
        try:
            assert urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=10).status == 200
            break
        except OSError:
            assert time.monotonic() < until and job.poll() is None
            time.sleep(0.5)
    family = psutil.Process(job.pid).children(recursive=True)
    assert len(family) <= 4
    job.send_signal(signal.SIGINT)
    job.wait(timeout=60)
    _, alive = psutil.wait_procs(family, timeout=30)
    assert not alive
