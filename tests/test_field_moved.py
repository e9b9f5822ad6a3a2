"""A folder that was moved or copied is itself, and never writes into another."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ray_sql import finetune
from ray_sql.cluster import Capacity
from ray_sql.config import Config
from ray_sql.display import Display
from ray_sql.errors import ConfigError
from ray_sql.finetune import prepare
from ray_sql.store import checkpoints
from ray_sql.store.run_folder import RunFolder
from ray_sql.train import resume
from ray_sql.tune import space, study
from ray_sql.tune.session import StudySession
from ray_sql.tune.study import StepScore, Study
from tests.test_tune import Alone, one, runs

kind = pytest.mark.kind("moved or copied sweeps")


def take(config: Config, how: str, place: Path) -> Config:
    """Move, copy, link or rename the folder of a run, and return its settings there."""
    if how == "renamed":
        there = config.changed({"output_name": "another"})
        shutil.move(config.run_dir, there.run_dir)
        return there
    there = config.changed({"output_dir": str(place)})
    if how == "linked":
        place.symlink_to(Path(config.run_dir).parent)
        return there
    place.mkdir(exist_ok=True)
    {"moved": shutil.move, "copied": shutil.copytree}[how](config.run_dir, there.run_dir)
    return there


def files(config: Config) -> dict[Path, bytes]:
    """The files of a run, by name."""
    root = Path(config.run_dir)
    return {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def begun(config: Config) -> Study:
    """A study of which one trial has ended and one was cut off."""
    known, point = study.begin(config), space.read(config).start
    for number in range(2):
        known.trial_at(number, point)
    score = StepScore(2, -1.5, None, {"validation/loss": 1.5})
    known.change(0, state="finished", best=score, steps=2)
    known.change(1, state="running")
    return known


@kind
@pytest.mark.parametrize("how", ["moved", "copied", "renamed"])
def test_a_study_writes_where_it_lies(how: str, make_config: Any, tmp_path: Path) -> None:
    config = one(make_config)
    begun(config)
    before = files(config)
    there = take(config, how, tmp_path / "elsewhere")
    known = study.open_or_begin(there, resume=True)
    assert known.settled(2) == 1 and known.folder.uri == there.run_dir
    known.change(1, state="failed", reason="told to")
    assert known.trial_folder(1).uri.startswith(there.run_dir)
    assert files(config) == (before if how == "copied" else {})
    assert study.load(there) == known


@kind
def test_a_study_names_no_folder_of_its_own(make_config: Any, tmp_path: Path) -> None:
    config = one(make_config)
    begun(config)
    text = Path(config.run_dir, "study.json").read_text()
    assert str(tmp_path / "out") not in text and '"run_dir"' not in text


@kind
def test_a_study_of_other_settings_that_was_moved_says_which_differ(
    make_config: Any, tmp_path: Path
) -> None:
    config = one(make_config)
    begun(config)
    there = take(config, "moved", tmp_path / "elsewhere").changed({"seed": 15})
    with pytest.raises(ConfigError, match=r"other settings \(seed 14 there, 15 here\)"):
        study.load(there)


@kind
def test_a_trial_goes_on_with_the_databases_of_the_moved_folder(
    make_config: Any, tmp_path: Path
) -> None:
    place = {"scaling.storage_path": str(tmp_path / "out")}  # so that the databases travel along
    config = one(make_config, **place)
    trial = Alone(config)
    trial.steps(1)
    trial.stop()
    elsewhere = str(tmp_path / "elsewhere")
    there = config.changed({"scaling.storage_path": elsewhere, "output_dir": elsewhere})
    shutil.move(tmp_path / "out", tmp_path / "elsewhere")
    assert Alone(there).steps()[-1]["failure"] is None
    assert not (tmp_path / "out").exists()
    for file in (tmp_path / "elsewhere").rglob("*.json*"):
        assert str(tmp_path / "out") not in file.read_text(), file


def record(config: Config) -> str:
    """Begin the MLflow run of a study, as a sweep does, and cut it off. Returns the run's id."""
    known = study.open_or_begin(config, resume=True)
    session = StudySession(config, Display(), known, space.read(config))
    session.prepared = prepare.prepare(config)
    session.capacity = Capacity(1, 1, {"CPU": 1.0}, {"CPU": 1.0}, "")
    if config.overwrite:
        session.remove_earlier()
    session.lay_out()
    session.record = session.begin_record()
    for trial in known.trials or [known.trial_at(0, space.read(config).start)]:
        session.callback.on_trial_start(1, [], SimpleNamespace(config={"trial": trial.number}))
    session.end("KILLED")
    return session.record.run_id


@kind
@pytest.mark.parametrize("how", ["moved", "copied"])
def test_a_copied_study_has_mlflow_runs_of_its_own(
    how: str, make_config: Any, tmp_path: Path, empty_mlflow: Path
) -> None:
    shutil.copy(empty_mlflow, tmp_path)
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    config = one(make_config, **{"tracking.enabled": True, "tracking.uri": uri})
    first = record(config)
    before = {run.info.run_id: run.info.end_time for run in runs(uri)}
    there = take(config, how, tmp_path / "elsewhere")
    second = record(there)
    after = {run.info.run_id: run.info.end_time for run in runs(uri)}
    if how == "moved":
        assert second == first and set(after) == set(before)
    else:
        assert second != first and len(after) == 4
        assert {run_id: after[run_id] for run_id in before} == before, "none was touched"
        assert record(there) == second and record(config) == first, "each goes on with its own"


@kind
def test_overwriting_a_copy_leaves_the_first_studys_record_open(
    make_config: Any, tmp_path: Path, empty_mlflow: Path
) -> None:
    shutil.copy(empty_mlflow, tmp_path)
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    config = one(make_config, **{"tracking.enabled": True, "tracking.uri": uri})
    first = record(config)
    there = take(config, "copied", tmp_path / "elsewhere")
    from mlflow.tracking import MlflowClient

    MlflowClient(uri).update_run(first, status="RUNNING")  # it goes on meanwhile
    record(there.changed({"overwrite": True}))
    assert MlflowClient(uri).get_run(first).info.status == "RUNNING"


@kind
@pytest.mark.parametrize("how", ["moved", "copied", "renamed", "linked"])
def test_a_run_that_was_cut_off_goes_on_in_its_own_record(
    how: str, make_config: Any, tmp_path: Path, empty_mlflow: Path
) -> None:
    shutil.copy(empty_mlflow, tmp_path)
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    config = make_config(**{"tracking.enabled": True, "tracking.uri": uri})
    ids = []
    for place in (config, None):
        place = place or take(config, how, tmp_path / "elsewhere")
        with finetune.Session(place, Display()) as session:
            ids.append(session.record.run_id)
    assert (ids[0] == ids[1]) == (how != "copied")


@kind
def test_a_moved_run_goes_back_to_a_checkpoint_once(make_config: Any, tmp_path: Path) -> None:
    config = make_config()
    folder = RunFolder(config.run_dir)
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "adapter_model.safetensors").write_text("w")
    for step in (2, 4):
        checkpoints.save(tmp_path / "weights", folder, step, {})
    resume.rewind(folder, folder.checkpoint(2).uri)
    assert [saved.step for saved in checkpoints.complete(folder)] == [2]
    there = RunFolder(take(config, "moved", tmp_path / "elsewhere").run_dir)
    checkpoints.save(tmp_path / "weights", there, 4, {})
    uri = resume.starting_point("checkpoint-2", there, {}, config.lora)
    assert uri == there.checkpoint(2).uri
    resume.rewind(there, uri)
    assert [saved.step for saved in checkpoints.complete(there)] == [2, 4]
