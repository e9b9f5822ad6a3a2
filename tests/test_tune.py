"""Sweeps: a real study on a real Ray, its survival, its record, and early refusals."""

from __future__ import annotations

import io
import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ray_sql import cluster, finetune, preflight, tracking, tune
from ray_sql.cluster.events import Note, TrainPoint, TrialEvent
from ray_sql.config import CheckConfig, Config, SweepConfig, load
from ray_sql.display import Display
from ray_sql.errors import ConfigError, StoreError
from ray_sql.finetune import prepare
from ray_sql.store import checkpoints, storage
from ray_sql.store.run_folder import RunFolder
from ray_sql.train import trainer
from ray_sql.tune import champion, search, session, space, study, sweep
from ray_sql.tune.objective import Objective
from ray_sql.tune.session import (
    StudySession,
    begin_trial_record,
    concurrent_trials,
    plan,
    trial_capacity,
    trial_spool,
)
from ray_sql.tune.study import StepScore, Study, TrialRecord, open_or_begin, trial_name
from tests.conftest import removal_cut_off

SWEEP = {
    "output_name": "sweep",
    "task_type": "sql",
    "learning_rate": 1e-3,
    "data.validation_fraction": 0.2,
    "train.max_steps": 4,
    "save_steps": 2,
    "lora.lora_dropout": 0.0,
    "evaluate.limit": 2,
    "tune.num_samples": 4,
    "tune.objective": "eval_loss",  # of a model of random weights no answer is right
    "tune.reduction_factor": 2,
    "tune.space": {"learning_rate": {"loguniform": [1e-4, 1e-1]}, "lora.r": {"choice": [2, 4, 8]}},
}


def one(make_config: Any, **changes: Any) -> Config:
    """The settings of a study."""
    (config,) = make_config(SweepConfig, **(SWEEP | changes)).studies()
    return config


def runs(uri: str) -> list[Any]:
    from mlflow.tracking import MlflowClient

    return list(MlflowClient(uri).search_runs(["1"], order_by=["attributes.start_time"]))


# The space


def test_the_first_trial_is_the_settings_and_alpha_keeps_its_ratio_to_the_rank(
    make_config: Any,
) -> None:
    config = one(make_config, **{"lora.r": 4, "lora.lora_alpha": 8})
    axes = space.read(config)
    assert axes.start == {"learning_rate": 1e-3, "lora.r": 4}
    assert config.changed(axes.changes(axes.start)).identity() == config.identity()
    assert axes.changes({"learning_rate": 0.1, "lora.r": 8}) == {
        "learning_rate": 0.1,
        "lora.r": 8,
        "lora.lora_alpha": 16,
    }
    free = one(
        make_config,
        **{"tune.space": {"lora.r": {"choice": [2, 4]}, "lora.lora_alpha": {"choice": [8, 16]}}},
    )
    assert space.read(free).changes({"lora.r": 2, "lora.lora_alpha": 8}) == {
        "lora.r": 2,
        "lora.lora_alpha": 8,
    }


def test_the_default_space_holds_the_default_settings() -> None:
    config = load(Config, ["--model_name", "m", "--output_name", "o", "--task_type", "sql"])
    axes = space.read(config)
    assert axes.start == {"learning_rate": 1e-4, "lora.r": 64}
    assert [axis.text for axis in axes.axes] == [
        "learning_rate loguniform 2e-05 … 0.002",
        "lora.r choice 8, 16, 32, 64, 128",
    ]


@pytest.mark.parametrize(
    "given,message",
    [
        ({"lora.rank": {"choice": [4, 8]}}, "lora.rank is no setting; did you mean lora.r?"),
        (
            {"learning_rat": {"uniform": [0, 1]}},
            "learning_rat is no setting; did you mean learning_rate?",
        ),
        (
            {"lora.r": {"choices": [4, 8]}},
            "give it one of choice, uniform, loguniform, randint, lograndint",
        ),
        (
            {"lora.r": {"choice": [4, 0]}},
            "lora.r: 0 given; input should be greater than or equal to 1",
        ),
        ({"lora.r": {"choice": [4]}}, "choice takes two or more different values, given [4]"),
        ({"lora.r": {"loguniform": [2, 8]}}, "lora.r is a whole number: use lograndint"),
        (
            {"learning_rate": {"randint": [0.1, 0.2]}},
            "learning_rate is no whole number: use uniform",
        ),
        ({"learning_rate": {"loguniform": [0.1, 0.01]}}, "the lower one first, given [0.1, 0.01]"),
        (
            {"learning_rate": {"loguniform": [0.01, 0.1]}},
            "learning_rate 0.001 is not in loguniform 0.01 … 0.1: widen the axis",
        ),
        ({"train.optim": {"uniform": ["a", "b"]}}, "train.optim is not a number: give it a choice"),
        (
            {"prompt.serializer": {"choice": ["ddl", "compact"]}},
            "prompt.serializer cannot be an axis: trials read the same rows",
        ),
        ({"train.max_steps": {"choice": [4, 8]}}, "train.max_steps cannot be an axis"),
        ({"lora.target_modules": {"choice": [["q"], ["k"]]}}, "['q'] is not a single value"),
        ({}, "tune.space is empty"),
    ],
)
def test_an_axis_that_cannot_be_is_refused_with_its_name(
    make_config: Any, given: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        tune.run(make_config(SweepConfig, **(SWEEP | {"tune.space": given})))
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"tune.scheduler": "pbt"}, "pbt copies weights between trials or pauses them"),
        ({"tune.scheduler": "hyperband"}, "Use asha or fifo"),
        ({"tune.scheduler": "median"}, "input should be 'asha' or 'fifo'"),
        (
            {"tune.objective": "f2"},
            "tune.objective: 'f2' given; input should be 'answers', 'chosen' or 'eval_loss'",
        ),
        ({"task_type": "sql,poetry"}, "input should be 'sql' or 'schema'"),
        ({"resume": True, "overwrite": True}, "leave one of the two out"),
        ({"hub.push_checkpoints": "all"}, "a sweep pushes its best adapter only"),
    ],
)
def test_settings_that_cannot_be_are_refused(
    make_config: Any, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        make_config(SweepConfig, **(SWEEP | changes))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_two_tasks_are_two_studies_in_folders_of_their_own(make_config: Any) -> None:
    for given in ("sql,schema", ["sql", "schema"], ["sql", "sql", "schema"]):
        studies = make_config(SweepConfig, **(SWEEP | {"task_type": given})).studies()
        assert [(one.task_type, one.output_name) for one in studies] == [
            ("sql", "sweep-sql"),
            ("schema", "sweep-schema"),
        ]
        assert [one.hub.repo_id for one in studies] == [None, None]
    assert one(make_config).output_name == "sweep"
    pushed = SWEEP | {"task_type": "sql,schema", "hub.repo_id": "me/own", "hub.license": "mit"}
    studies = make_config(SweepConfig, **pushed).studies()
    assert [(one.hub.repo_id, one.hub.license) for one in studies] == [
        ("me/own-sql", "mit"),
        ("me/own-schema", "mit"),
    ]
    assert one(make_config, **{"hub.repo_id": "me/own"}).hub.repo_id == "me/own"


def test_every_configuration_and_the_page_on_sweeps_can_be_swept() -> None:
    import yaml

    root = Path(__file__).parent.parent
    for path in sorted((root / "jobs" / "configs").glob("*.yaml")):
        for config in load(SweepConfig, ["--config", str(path)]).studies():
            assert space.read(config).start["learning_rate"] == config.learning_rate, path
    (shown,) = re.findall(
        r"```yaml\n(.*?)```", (root / "docs" / "sweeps.md").read_text(), re.DOTALL
    )
    given = {"model_name": "m", "output_name": "o", "task_type": "sql", **yaml.safe_load(shown)}
    assert [axis.name for axis in space.read(load(Config, [], **given)).axes][2:] == [
        "lora.lora_dropout",
        "train.lr_scheduler_type",
    ]


# What fits


def capacity_of(config: Config) -> cluster.Capacity:
    return trial_capacity(config.scaling, config.tune)


def test_trials_that_cannot_be_scheduled_are_refused(
    make_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster.resources, "cluster_nodes", lambda: [{"CPU": 64.0, "GPU": 4.0}])
    two = one(make_config, **{"scaling.num_workers": 2})
    room = cluster.training_capacity(two.scaling)
    assert concurrent_trials(two.tune, room) == 2
    assert concurrent_trials(one(make_config, **{"tune.max_concurrent_trials": 1}).tune, room) == 1
    with pytest.raises(
        ConfigError, match=r"no trial can be scheduled: 4 GPU here / 8 a trial \(8 x 1\) = 0; lower"
    ):
        capacity_of(one(make_config, **{"scaling.num_workers": 8}))
    with pytest.raises(
        ConfigError, match=r"max_concurrent_trials 9, but only 4 fit: 4 GPU here / 1 a trial"
    ):
        capacity_of(one(make_config, **{"tune.max_concurrent_trials": 9}))


def test_trials_on_several_nodes_need_a_shared_folder(
    make_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        cluster.resources,
        "cluster_nodes",
        lambda: [{"CPU": 8.0, "GPU": 3.0}, {"CPU": 8.0, "GPU": 3.0}, {"CPU": 4.0}],
    )
    both = one(make_config, **{"scaling.resources_per_worker": {"GPU": 2}})
    room = cluster.training_capacity(both.scaling)
    with pytest.raises(
        ConfigError, match=r"no trial can be scheduled: 0 workers of 4 GPU .*\(the largest has 3\)"
    ):
        capacity_of(one(make_config, **{"scaling.resources_per_worker": {"GPU": 4}}))
    axes, prepared = space.read(both), prepare.prepare(both)
    shared = f"on 2 nodes: {both.run_dir} must be a folder that they share; else give"
    assert shared in "\n".join(plan(prepared, axes, room))
    stored = both.changed({"scaling.storage_path": "s3://runs"})
    assert "on 2 nodes" not in "\n".join(plan(replace(prepared, config=stored), axes, room))


def test_a_sweep_that_cannot_choose_is_refused_before_it_starts(make_config: Any) -> None:
    for changes, message in (
        ({"data.validation_fraction": 0.0}, "no validation questions to choose trials by"),
        ({"evaluate.select_examples": 0}, "no validation questions to choose trials by"),
        (
            {"prev_checkpoint": "/somewhere"},
            "--prev_checkpoint: the trials of a sweep start from the base model",
        ),
    ):
        config = one(make_config, **changes)
        with pytest.raises(ConfigError, match=message):
            tune.run(make_config(SweepConfig, **(SWEEP | changes)))
        assert not os.path.exists(config.run_dir)


# The search


def optuna_points(
    config: Config, known: list[tuple[dict[str, Any], float]], number: int
) -> list[dict[str, Any]]:
    """The points of a study whose trials so far had these values."""
    asked = Study(
        RunFolder("/nowhere"),
        "",
        {},
        trials=[TrialRecord(n, point) for n, (point, _) in enumerate(known)],
    )
    asked.save = lambda: None  # type: ignore[method-assign]
    searching = search.StudySearch(space.read(config), asked, config.tune.num_samples, config.seed)
    for n in range(number):
        searching.suggest(str(n))
        searching.on_trial_complete(
            str(n),
            {"score": known[n][1] if n < len(known) else -asked.trials[n].point["learning_rate"]},
        )
    return [trial.point for trial in asked.trials]


def test_a_resumed_search_goes_on_as_the_unbroken_one(make_config: Any) -> None:
    config = one(make_config, **{"tune.num_samples": 16})
    whole = optuna_points(config, [], 12)
    assert whole[0] == space.read(config).start
    for cut in (1, 5, 11):
        known = [(point, -point["learning_rate"]) for point in whole[:cut]]
        assert optuna_points(config, known, 12) == whole
    assert optuna_points(config.changed({"seed": 15}), [], 12)[1:] != whole[1:]


def test_no_point_is_tried_twice_while_there_are_others(make_config: Any) -> None:
    config = one(
        make_config,
        **{
            "tune.space": {
                "lora.r": {"choice": [2, 4, 8, 16]},
                "learning_rate": {"choice": [1e-3, 1e-2]},
            }
        },
    )
    points = optuna_points(config, [], 8)
    assert len({json.dumps(point, sort_keys=True) for point in points}) == 8


def test_rungs_are_where_trials_are_measured(make_config: Any) -> None:
    config = one(make_config, **{"save_steps": 5, "tune.reduction_factor": 3})

    def rungs(steps: int, **changes: Any) -> list[int]:
        changed = config.changed({f"tune.{name}": value for name, value in changes.items()})
        return search.rungs(changed.tune, steps, changed.eval_every)

    assert rungs(100) == [5, 15, 45]
    assert rungs(100, grace_period=12) == [15, 40]
    assert rungs(100, scheduler="fifo") == []
    assert rungs(4) == []


# What a study knows


def test_scores_order_as_objective_and_then_tie_break() -> None:
    measures = [
        StepScore(1, right / 8, tie / 8, {"validation/n": 8})
        for right in range(9)
        for tie in range(9)
    ]
    assert [one.score for one in measures] == sorted(one.score for one in measures)
    assert sorted(measures, key=lambda one: one.rank) == measures


def test_of_equal_checkpoints_a_study_names_the_one_that_is_kept(tmp_path: Path) -> None:
    local = tmp_path / "local"
    local.mkdir()
    (local / "a.bin").write_text("x")
    for step in (1, 2, 3, 4):
        scores = {"objective": {1: 0.25, 4: 0.0}.get(step, 0.5), "tie_break": None, "metrics": {}}
        checkpoints.save(local, RunFolder(str(tmp_path / "run")), step, scores)
        checkpoints.prune(RunFolder(str(tmp_path / "run")))
    study.write_scores(
        RunFolder(str(tmp_path / "run")),
        [StepScore(s, 0.25 if s == 1 else 0.5, None, {}) for s in (1, 2, 3)],
    )
    best = max(study.read_scores(RunFolder(str(tmp_path / "run"))), key=lambda one: one.rank)
    kept = checkpoints.best(checkpoints.complete(RunFolder(str(tmp_path / "run"))))
    assert kept and kept.step == best.step == 3


def test_the_winner_is_the_earliest_of_equals_and_no_failed_trial(make_config: Any) -> None:
    good = StepScore(2, 0.5, 0.5, {})
    trials = [TrialRecord(n, {}, "finished", good) for n in range(3)]
    assert Study(RunFolder("/x"), "", {}, trials=trials).best() == trials[0]
    later = replace(trials[2], best=replace(good, step=4))
    assert Study(RunFolder("/x"), "", {}, trials=[*trials[:2], later]).best() == trials[0]
    better = replace(trials[2], best=replace(good, tie_break=0.6))
    assert Study(RunFolder("/x"), "", {}, trials=[*trials[:2], better]).best() == better
    assert (
        Study(RunFolder("/x"), "", {}, trials=[*trials[:2], replace(better, state="failed")]).best()
        == trials[0]
    )
    assert Study(RunFolder("/x"), "", {}, trials=[TrialRecord(0, {})]).best() is None


def test_a_study_is_found_again_and_one_of_other_settings_refused(
    make_config: Any, tmp_path: Path
) -> None:
    config = one(make_config)
    begun = study.begin(config)
    begun.trial_at(0, {"learning_rate": 1e-3})
    begun.change(0, state="finished", best=StepScore(2, -1.5, None, {"validation/loss": 1.5}))
    assert study.load(config) == begun
    assert study.load(config.changed({"tune.num_samples": 9})) == begun, (
        "a study may be given more trials later"
    )
    with pytest.raises(
        ConfigError,
        match=r"study of other settings \(.*seed 14 there, 15 here.*--output_name.*--overwrite",
    ):
        study.load(config.changed({"seed": 15}))
    with pytest.raises(
        ConfigError,
        match=r"was cut off, with 1 of 4 trials settled: --resume goes on with it, --overwrite",
    ):
        open_or_begin(config, resume=False)
    assert open_or_begin(config, resume=True) == begun
    other = config.changed({"output_name": "thesis", "overwrite": True})
    Path(other.run_dir).mkdir(parents=True)
    (Path(other.run_dir) / "thesis.tex").write_text("years of work")
    with pytest.raises(StoreError, match="is no study"):
        open_or_begin(other, resume=False)


def test_a_study_that_was_cut_off_before_its_first_trial_goes_on(
    make_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = one(make_config)
    for start in ("start_ray", "start_ray_in_background"):
        monkeypatch.setattr(cluster, start, lambda: None)

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as cut, pytest.raises(KeyboardInterrupt):
        cut.setattr(session, "write_inputs", killed)
        sweep.run_study(config, resume=False)
    begun = study.load(config)
    assert begun and open_or_begin(config, resume=True) == begun
    prepare.write_inputs(prepare.prepare(config))
    storage.remove(f"{config.run_dir}/study.json")  # as earlier versions could leave it
    for given, resume in (
        (config, False),
        (config, True),
        (config.changed({"overwrite": True}), False),
    ):
        assert open_or_begin(given, resume).trials == []
    storage.write_text(f"{config.run_dir}/adapter/adapter_model.safetensors", "a week's work")
    for overwrite in (True, False):
        with pytest.raises(StoreError, match="is no study"):
            open_or_begin(config.changed({"overwrite": overwrite}), resume=False)


def test_what_a_removal_that_was_cut_off_left_is_taken_for_no_study(make_config: Any) -> None:
    config = one(make_config)
    prepared, point = prepare.prepare(config), space.read(config).start
    for after in itertools.count():
        prepare.write_inputs(prepared)
        begun = study.begin(config)
        begun.trial_at(0, point)
        begun.finished = True
        begun.save()
        for file in (
            "adapter/adapter_model.safetensors",
            "trials/trial-000/config.json",
            "inputs/finished",
        ):
            storage.write_text(f"{config.run_dir}/{file}", "{}")
        assert study.load(config) == begun
        if not removal_cut_off(config.run_dir, after):
            break
        again = config.changed({"overwrite": after % 2 == 0})
        assert open_or_begin(again, resume=True).trials == [] and not os.path.exists(config.run_dir)
    assert after > 3 and not os.path.exists(config.run_dir)


def test_overwriting_a_study_that_was_cut_off_ends_its_runs_and_begins_others(
    make_config: Any, tmp_path: Path
) -> None:
    from mlflow.tracking import MlflowClient

    store = {"tracking.enabled": True, "tracking.uri": f"sqlite:///{tmp_path}/mlflow.db"}
    config = one(make_config, **store)
    away, axes = config.changed({"tracking.uri": "http://127.0.0.1:9"}), space.read(config)

    def begun(known: Study) -> tracking.Run:
        for number in range(2):
            known.trial_at(number, axes.start)
        record = tracking.start(
            config.tracking, {}, name="sweep", tags={}, own=known.tags, spool=finetune.spool(config)
        )
        known.mlflow_run_id = record.run_id
        known.save()
        return record

    def measured(
        under: Config, trial: TrialRecord, parent: tracking.Run, objective: float
    ) -> tracking.Run:
        run = begin_trial_record(under, axes, trial, parent.run_id)
        run.log(2, {"objective": objective})
        return run

    old = study.begin(config)
    first = begun(old)
    running = measured(config, old.trials[0], first, 0.1)
    measured(
        away, old.trials[1], first, 0.2
    )  # began while MLflow was away, so that only its file knows of it
    StudySession(config, Display(), study.begin(config), axes).remove_earlier()
    client = MlflowClient(config.tracking.uri)
    assert {run.info.run_id: run.info.status for run in client.search_runs(["1"])} == {
        first.run_id: "KILLED",
        running.run_id: "KILLED",
    }

    new = open_or_begin(config, resume=False)
    second = begun(new)
    for trial in new.trials:
        measured(config, trial, second, 0.7).end("FINISHED")
    found = {run.info.run_id: run for run in client.search_runs(["1"])}
    assert len(found) == 5 and found[running.run_id].data.metrics == {"objective": 0.1}
    children = [
        run for run in found.values() if run.data.tags.get("mlflow.parentRunId") == second.run_id
    ]
    assert [(run.info.status, run.data.metrics) for run in children] == [
        ("FINISHED", {"objective": 0.7})
    ] * 2
    assert not any(trial_spool(config, trial.number).exists() for trial in new.trials)


def test_what_a_trial_that_was_cut_off_kept_waits_for_the_study_to_go_on(
    make_config: Any, tmp_path: Path
) -> None:
    store = {"tracking.enabled": True, "tracking.uri": f"sqlite:///{tmp_path}/mlflow.db"}
    config = one(make_config, **store)
    begun = study.begin(config)
    begun.trial_at(0, space.read(config).start)
    trial = begun.change(0, state="running")
    away = config.changed({"tracking.uri": "http://127.0.0.1:9"})
    begin_trial_record(away, space.read(config), trial, "").log(2, {"objective": 0.5})
    kept = trial_spool(config, trial.number).read_text()
    with pytest.raises(
        StoreError, match=r"records of trial-000 wait for the study to go on: .*--resume"
    ):
        preflight.replay(make_config(CheckConfig, **(SWEEP | store | {"replay": True})))
    assert trial_spool(config, trial.number).read_text() == kept and "0.5" in kept


def test_a_trial_starts_while_mlflow_is_away(make_config: Any) -> None:
    config = one(make_config, **{"tracking.enabled": True, "tracking.uri": "http://127.0.0.1:9"})
    axes, parent = space.read(config), tracking.null_run()
    run = begin_trial_record(config, axes, TrialRecord(0, axes.start), parent.run_id)
    run.log(2, {"objective": 0.5})
    run.end("FINISHED")
    assert run.run_id == "" and len(trial_spool(config, 0).read_text().splitlines()) == 3


def test_what_trials_kept_for_mlflow_is_sent_on_request(
    make_config: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from mlflow.tracking import MlflowClient

    store = {"tracking.enabled": True, "tracking.uri": f"sqlite:///{tmp_path}/mlflow.db"}
    config = one(make_config, **store)
    parent = tracking.start(
        config.tracking, {}, name="sweep", tags={}, spool=finetune.spool(config)
    )
    parent.end("FINISHED")
    begun = study.begin(config)
    begun.trial_at(0, {})
    begun.mlflow_run_id = parent.run_id
    begun.change(0, state="finished")
    away = config.changed({"tracking.uri": "http://127.0.0.1:9"})
    run = begin_trial_record(away, space.read(config), begun.trials[0], parent.run_id)
    run.log(2, {"objective": 0.5})
    run.end("FINISHED")
    assert trial_spool(config, begun.trials[0].number).is_file()
    preflight.replay(make_config(CheckConfig, **(SWEEP | store | {"replay": True})))
    assert "all that was recorded of sweep is in MLflow" in capfd.readouterr().out
    assert not trial_spool(config, begun.trials[0].number).exists()
    client = MlflowClient(config.tracking.uri)
    family = {found.info.run_id: found for found in client.search_runs(["1"])}
    (child,) = (found for key, found in family.items() if key != parent.run_id)
    assert child.data.tags["mlflow.parentRunId"] == parent.run_id
    assert (child.info.status, child.data.metrics) == ("FINISHED", {"objective": 0.5})
    assert study.load(config).trials[0].mlflow_run_id == child.info.run_id  # type: ignore[union-attr]


def test_a_win_needs_the_paired_test() -> None:
    def rows(right: int) -> list[dict[str, Any]]:
        return [
            {"split": "dev", "verdict": "correct" if n < right else "wrong", "error_kind": "none"}
            for n in range(40)
        ]

    assert champion.judge({"base": rows(0), "tuned": rows(20)})[0]
    assert not champion.judge({"base": rows(18), "tuned": rows(20)})[0], (
        "two questions more are no win"
    )
    assert champion.judge({"base": rows(0), "default": rows(21), "tuned": rows(20)})[0], (
        "nor is one more a loss"
    )
    won, verdict = champion.judge({"base": rows(0), "default": rows(40), "tuned": rows(20)})
    assert not won and "against the default settings 0 to 20" in verdict
    assert not champion.judge({"tuned": rows(20)})[0]


# The driver's view


def test_the_table_is_there_from_the_start_and_moves_with_training(make_config: Any) -> None:
    from rich.console import Console

    from ray_sql.tune.callback import SweepCallback

    config, out = one(make_config), io.StringIO()
    begun = study.begin(config)
    begun.trial_at(0, {"learning_rate": 1e-3, "lora.r": 4})
    display = Display(Console(file=out, force_terminal=True, highlight=False, width=120))
    axes, unit, now = space.read(config), ("CPU", 1.0), [0.0]
    watch = SweepCallback(
        begun,
        axes,
        Objective.of(config),
        4,
        unit,
        lambda _: tracking.null_run(),
        display,
        clock=lambda: now[0],
    )

    def shown() -> str:
        with display.console.capture() as captured:
            display.console.print(display._below)
        return re.sub(r"\x1b\[[0-9;]*m", "", captured.get())

    assert "trial-000" in shown() and "waiting" in shown()
    tuned = SimpleNamespace(config={"trial": 0}, last_result={"failure": "diverged by step 3"})
    watch.on_trial_start(0, [], tuned)
    assert "running" in shown()
    watch.on_event(TrialEvent(0, TrainPoint(3, 4, {"loss": 1.0})))
    assert re.search(r" 4 │ +3 │.*running", shown()) and begun.trials[0].steps == 0, (
        "none of them measured"
    )
    now[0] += 3600
    assert watch.hours() == pytest.approx(1)
    watch.on_trial_recover(0, [], tuned)
    watch.on_trial_start(0, [], tuned)
    assert watch.hours() == pytest.approx(1), "what the process that died has used"
    watch.on_event(TrialEvent(0, Note("out of memory: once more")))
    watch.on_trial_complete(0, [], tuned)
    assert "trial-000: out of memory: once more" in out.getvalue()
    assert "trial-000: failed: diverged by step 3" in out.getvalue(), (
        "a terminal's table goes when the sweep ends"
    )
    assert begun.trials[0].steps == 3 and begun.trials[0].seconds == pytest.approx(3600)


# A trial, without Tune


class Alone:
    """A trial driven by hand, as Ray Tune drives it: steps, and a stop."""

    def __init__(self, config: Config, settled: str | None = None, **changes: Any) -> None:
        from ray_sql.tune.trial import TrialJob, TrialTrainable

        prepared = prepare.prepare(config)
        prepare.write_inputs(prepared)
        self._events: list[TrialEvent] = []
        self.folder = RunFolder(config.run_dir).trial("trial-001")
        steps = prepared.steps
        job = TrialJob(config.for_workers(), prepared.model_folder, steps, self._events.append)
        self._trial = TrialTrainable.__new__(TrialTrainable)
        self._trial.setup({"trial": 1, "changes": changes, "settled": settled}, job=job)

    def steps(self, most: int = 99) -> list[dict[str, Any]]:
        """The results of so many steps, or until it is done."""
        found: list[dict[str, Any]] = []
        while len(found) < most and not (found and found[-1].get("done")):
            found.append(self._trial.step())
        return found

    def said(self, kind: type) -> list[Any]:
        """The events of a type."""
        return [said.event for said in self._events if isinstance(said.event, kind)]

    def stop(self) -> None:
        """As a scheduler stops it."""
        self._trial.cleanup()


def test_a_trial_stops_where_it_is_told_and_goes_on_later(make_config: Any) -> None:
    config = one(make_config, **{"train.max_steps": 8})
    trial = Alone(config, **{"lora.r": 2})
    assert [result["step"] for result in trial.steps(2)] == [2, 4]
    trial.stop()
    assert [checkpoint.step for checkpoint in checkpoints.complete(trial.folder)][-1] == 4, (
        "no step after the decision"
    )
    assert storage.exists(f"{trial.folder}/adapter/adapter_model.safetensors"), (
        "what it has is kept"
    )
    again = Alone(config, **{"lora.r": 2})
    results = again.steps()
    assert [result["step"] for result in results] == [2, 4, 6, 8] and results[-1]["done"]
    assert min(event.step for event in again.said(TrainPoint)) == 5, (
        "the first four are not repeated"
    )
    best = max(results, key=lambda result: result["objective"])
    assert results[-1]["score"] == best["objective"] == results[-1]["best"]["objective"]
    for state, score in (("finished", best["objective"]), ("failed", study.WORST)):
        told = Alone(config, state, **{"lora.r": 2}).steps()
        assert (told[-1]["score"], told[-1]["done"]) == (score, True), "as the first attempt said"


def test_the_winner_is_measured_as_this_command_says(make_config: Any) -> None:
    config = one(make_config)
    begun = study.begin(config)
    trial = begun.trial_at(0, {"learning_rate": 1e-2, "lora.r": 8})
    again = config.changed({"split": ["validation"], "evaluate.limit": 500})
    chosen = again.changed(space.read(again).changes(trial.point))
    assert (chosen.split, chosen.evaluate.limit, chosen.run_dir) == (
        ("validation",),
        500,
        config.run_dir,
    )
    assert (chosen.learning_rate, chosen.lora.r, chosen.lora.lora_alpha) == (1e-2, 8, 16)


def test_a_trial_without_memory_says_why_and_scores_worst(
    make_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> Any:
        raise RuntimeError("CUDA out of memory, whatever the layout")

    monkeypatch.setattr(trainer, "train", never)
    trial = Alone(one(make_config, **{"grad_accum_steps": 8}))
    (result,) = trial.steps()
    assert result["done"]
    assert result["failure"].startswith(
        "out of memory with one example in a forward pass: CUDA out of memory, whatever the "
        "layout; lower --eval_batch_size"
    )
    assert result["score"] == study.WORST
    notes = [event.text for event in trial.said(Note)]
    assert len(notes) == 3 and all(text.startswith("out of memory") for text in notes), (
        "8, 4, 2, and 1 at a time"
    )


# Real sweeps


@pytest.fixture
def tracked(tmp_path: Path) -> dict[str, Any]:
    return {"tracking.enabled": True, "tracking.uri": f"sqlite:///{tmp_path / 'mlflow.db'}"}


@pytest.fixture
def own_ray() -> Iterator[None]:
    yield
    cluster.leave_ray()


def test_a_trial_shadows_no_name_of_rays_trainable() -> None:
    from ray.tune import Trainable

    from ray_sql.tune.trial import TrialTrainable

    names = (*vars(TrialTrainable), *TrialTrainable.setup.__code__.co_names)
    ours = {name for name in names if name.startswith("_") and not name.startswith("__")}
    assert "_final_result" in ours and "_outbox" in ours
    assert ours & {*vars(Trainable()), *dir(Trainable)} == set(), "ray sets its own over ours"


@pytest.mark.slow
def test_a_sweep_from_its_space_to_its_champion(
    make_config: Any, tracked: dict[str, Any], own_ray: None, capfd: pytest.CaptureFixture[str]
) -> None:
    from mlflow.tracking import MlflowClient

    # the second trial diverges: what it cannot do must not keep the others
    extra = {
        "tune.space": {"learning_rate": {"choice": [1e-3, 1e8, 1e-2]}},
        "tune.num_samples": 3,
        "train.max_grad_norm": 1e12,
        "train.lr_scheduler_type": "constant",
    }
    given = make_config(SweepConfig, **(SWEEP | tracked | extra))
    (config,) = given.studies()
    metrics = tune.run(given)["sql"]
    out = capfd.readouterr().out
    assert "trials    3, 1 at a time:" in out
    assert re.search(r"time +\d+ s for all trials, one by one, of them the best one \d+ s", out)
    known = study.load(config)
    assert known and known.finished and [trial.number for trial in known.trials] == [0, 1, 2]
    assert known.trials[0].point == {"learning_rate": 1e-3}, "the first trial is the settings"
    by_rate = {trial.point["learning_rate"]: trial for trial in known.trials}
    assert by_rate[1e8].state == "failed" and "diverged by step" in str(by_rate[1e8].reason)
    best = known.best()
    assert best and best.best and best.best.objective >= known.trials[0].best.objective  # type: ignore[union-attr]
    assert metrics["sweep"]["trial"] == best.number and metrics["best_step"] == best.best.step

    place = Path(config.run_dir)
    assert {path.name for path in place.iterdir()} >= {
        *("adapter", "base_predictions.jsonl", "config.json", "contract.json", "metrics.json"),
        *("predictions.jsonl", "report.html", "study.json", "sweep.html", "trials"),
    }
    saved = json.loads((place / "config.json").read_text())
    assert saved["learning_rate"] == best.point["learning_rate"] and saved["output_name"] == "sweep"
    assert (place / "adapter" / "ray_sql_config.json").read_text() == (
        place / "config.json"
    ).read_text()
    page = (place / "sweep.html").read_text()
    assert "diverged by step" in page and "http://" not in page and page.count("<tr class=") == 3

    client = MlflowClient(tracked["tracking.uri"])
    children = {
        run.data.tags["trial"]: run
        for run in runs(tracked["tracking.uri"])
        if "trial" in run.data.tags
    }
    (parent,) = (run for run in runs(tracked["tracking.uri"]) if "trial" not in run.data.tags)
    assert len(children) == 3 and {
        run.data.tags["mlflow.parentRunId"] for run in children.values()
    } == {parent.info.run_id}
    assert parent.info.status == "FINISHED" and parent.data.tags["winner"].startswith(
        trial_name(best.number)
    )
    for trial in known.trials:
        run = children[str(trial.number)]
        assert run.info.status == ("FAILED" if trial.state == "failed" else "FINISHED")
        assert float(run.data.params["learning_rate"]) == trial.point["learning_rate"]
    curve = client.get_metric_history(children["0"].info.run_id, tracking.VALIDATED)
    measured = study.read_scores(known.trial_folder(0))
    assert [point.step for point in curve] == [one.step for one in measured]
    assert curve[-1].value == max(one.objective for one in measured)
    assert children["0"].info.run_name.endswith("trial-000 of sweep: learning_rate 0.001")
    starred = [key for key, run in children.items() if run.info.run_name.startswith("★ ")]
    assert starred == [str(best.number)]
    told = parent.data.tags["mlflow.note.content"]
    won = f"{trial_name(best.number)} won of 3 trials: "
    assert won in told and f"{parent.info.run_id}/artifacts/sweep.html)" in told
    told = children["0"].data.tags["mlflow.note.content"]
    assert told.endswith("with learning_rate 0.001: finished, after 4 of 4 steps")
    assert client.get_metric_history(children["0"].info.run_id, "train/loss")
    adapter = f"adapter-{trial_name(best.number)}-step-{best.best.step}"
    names = {
        item.path
        for folder in ("", "figures")
        for item in client.list_artifacts(parent.info.run_id, folder)
    }
    assert names >= {"sweep.html", "trials.json", "figures/objective.png"}
    assert not client.search_model_versions("name='ray-sql-sql'"), (
        "no answer was right, so nothing is crowned"
    )
    (model,) = client.search_logged_models([parent.info.experiment_id], f"name = '{adapter}'")
    assert model.source_run_id == parent.info.run_id
    assert model.tags["over_base"].startswith("+0.0 points: not shown to beat its base")

    before = [trial.seconds for trial in known.trials]
    assert tune.run(given)["sql"] == metrics, "a finished study is shown, not repeated"
    with pytest.raises(ConfigError, match=r"scored otherwise \(evaluate.limit 2 there, 1 here"):
        tune.run(make_config(SweepConfig, **(SWEEP | tracked | extra | {"evaluate.limit": 1})))
    assert [trial.seconds for trial in study.load(config).trials] == before  # type: ignore[union-attr]


class Driver:
    """`jobs.tune` as a process of its own, which may be killed."""

    def __init__(self, config: SweepConfig, tmp_path: Path) -> None:
        self._file = tmp_path / "sweep.json"
        settings = config.public() | {"task_type": ["sql"]}
        self._file.write_text(
            json.dumps({name: value for name, value in settings.items() if name != "resume"})
        )
        self._log = tmp_path / "driver.log"

    def start(self, *flags: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "jobs.tune", "--config", str(self._file), *flags]
        root = Path(__file__).parent.parent
        return subprocess.Popen(
            command,
            cwd=root,
            stdout=self._log.open("ab"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def start_and_measure(self, config: Config) -> subprocess.Popen[bytes]:
        """A driver whose first trial has been measured."""
        process, deadline = self.start(), time.monotonic() + 200
        while not study.read_scores(RunFolder(f"{config.run_dir}/trials/trial-000")):
            assert process.poll() is None and time.monotonic() < deadline, self._log.read_text()[
                -3000:
            ]
            time.sleep(0.1)
        return process

    def finish(self, *flags: str) -> None:
        code = self.start(*flags).wait(timeout=300)
        assert code == 0, self._log.read_text()[-3000:]


def settled(known: Study | None) -> int:
    return sum(trial.state in study.SETTLED for trial in known.trials) if known else 0


def gone(process: subprocess.Popen[bytes], timeout: float = 8) -> None:
    """Kill a driver, and wait until its trials have ended; its Ray's agents may outlive it."""
    import psutil

    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    process.wait()
    _, alive = psutil.wait_procs(children, timeout=timeout)
    for child in alive:
        child.kill()  # each by its id: those of this driver alone


def left(process: subprocess.Popen[bytes], timeout: float) -> list[Any]:
    """Kill a driver alone, and return the processes of its Ray that are there after a while."""
    import psutil

    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    process.wait()
    return psutil.wait_procs(children, timeout=timeout)[1]


def check_survived(config: Config, uri: str, reference: Study | None = None) -> Study:
    """A study that is complete, and recorded as one parent and one child a trial, all ended."""
    known = study.load(config)
    assert known and known.finished and settled(known) == config.tune.num_samples
    found = runs(uri)
    assert all(run.info.status in ("FINISHED", "FAILED") for run in found), [
        run.info.status for run in found
    ]
    assert sorted(run.data.tags["trial"] for run in found if "trial" in run.data.tags) == [
        str(trial.number) for trial in known.trials
    ]
    assert len(found) == len(known.trials) + 1
    if reference:
        assert [trial.point for trial in known.trials] == [
            trial.point for trial in reference.trials
        ]
        assert [trial.state for trial in known.trials] == [
            trial.state for trial in reference.trials
        ]
        assert known.best().number == reference.best().number  # type: ignore[union-attr]
    return known


@pytest.mark.slow
@pytest.mark.cluster
def test_a_killed_driver_resumes_its_study(
    make_config: Any, tracked: dict[str, Any], tmp_path: Path
) -> None:
    from mlflow.tracking import MlflowClient

    given = make_config(
        SweepConfig, **(SWEEP | tracked | {"tune.num_samples": 3, "evaluate.baseline": False})
    )
    (config,) = given.studies()
    driver = Driver(given, tmp_path)
    first = driver.start()
    deadline = time.monotonic() + 200
    while True:
        assert first.poll() is None and time.monotonic() < deadline, (
            tmp_path / "driver.log"
        ).read_text()[-3000:]
        text = storage.read_text(f"{config.run_dir}/study.json")
        known = study.load(config) if text else None
        if (
            settled(known) == 1
            and len(known.trials) == 2
            and study.read_scores(known.trial_folder(1))
        ):  # type: ignore[union-attr]
            break
        time.sleep(0.02)
    gone(first)
    before = study.load(config)
    assert before and before.trials[0].state == "finished"
    weights = Path(before.trial_folder(0).uri, "checkpoint-4", "adapter_model.safetensors")
    trained = weights.stat().st_mtime_ns
    refused = driver.start()
    assert refused.wait(timeout=120) == 2
    assert "--resume goes on with it" in (tmp_path / "driver.log").read_text()
    driver.finish("--resume")
    after = check_survived(config, tracked["tracking.uri"])
    assert weights.stat().st_mtime_ns == trained, "a finished trial is not run again"
    assert [trial.point for trial in after.trials[:2]] == [trial.point for trial in before.trials]
    (run,) = (run for run in runs(tracked["tracking.uri"]) if run.data.tags.get("trial") == "1")
    curve = MlflowClient(tracked["tracking.uri"]).get_metric_history(
        run.info.run_id, tracking.VALIDATED
    )
    assert [point.step for point in curve] == [
        one.step for one in study.read_scores(after.trial_folder(1))
    ]
    assert (
        after.trials[0].best == before.trials[0].best
        and after.trials[0].seconds == before.trials[0].seconds
    )


@pytest.mark.slow
@pytest.mark.cluster
def test_a_sweep_that_is_told_to_stop_says_how_to_go_on(
    make_config: Any, tracked: dict[str, Any], tmp_path: Path
) -> None:
    given = make_config(SweepConfig, **(SWEEP | tracked | {"evaluate.baseline": False}))
    (config,) = given.studies()
    process = Driver(given, tmp_path).start_and_measure(config)
    process.terminate()
    assert process.wait(timeout=60) == 128 + signal.SIGTERM, (tmp_path / "driver.log").read_text()[
        -3000:
    ]
    assert (
        (tmp_path / "driver.log").read_text().endswith("the same command with --resume goes on\n")
    )
    assert (
        {"KILLED"}
        <= {run.info.status for run in runs(tracked["tracking.uri"])}
        <= {"KILLED", "FINISHED"}
    )


@pytest.mark.slow
@pytest.mark.cluster
def test_five_kills_at_random_moments_change_nothing(
    make_config: Any, tracked: dict[str, Any], tmp_path: Path
) -> None:
    whole = make_config(
        SweepConfig, **(SWEEP | tracked | {"output_name": "whole", "tracking.enabled": False})
    )
    tune.run(whole)
    reference = study.load(whole.studies()[0])
    given = make_config(SweepConfig, **(SWEEP | tracked))
    (config,) = given.studies()
    driver, draw = Driver(given, tmp_path), random.Random(14)
    for _ in range(5):
        process = driver.start("--resume")
        try:
            process.wait(timeout=draw.uniform(8, 45))
        except subprocess.TimeoutExpired:
            gone(process)
    driver.finish("--resume")
    check_survived(config, tracked["tracking.uri"], reference)


@pytest.mark.slow
@pytest.mark.cluster
def test_the_trials_of_a_killed_driver_end_by_themselves(make_config: Any, tmp_path: Path) -> None:
    given = make_config(SweepConfig, **(SWEEP | {"evaluate.baseline": False}))
    (config,) = given.studies()
    process = Driver(given, tmp_path).start_and_measure(config)
    stayed = left(process, timeout=60)
    names = [child.name() for child in stayed]
    for child in stayed:
        child.kill()  # each by its id, so that a failing test leaves nothing either
    # measured: Ray's two agents per node outlive its raylet, idle; no trial, raylet or GCS does
    assert set(names) <= {"ray::RuntimeEnvAgent", "ray::DashboardAgent"}, (
        f"still there after a minute: {names}"
    )


@pytest.mark.slow
@pytest.mark.cluster
def test_trials_of_ray_train_workers_are_stopped_and_leave_nothing_behind(make_config: Any) -> None:
    import ray
    from ray.util import placement_group_table

    settings = SWEEP | {
        "scaling.num_workers": 1,
        "tune.num_samples": 2,
        "train.max_steps": 6,
        "evaluate.baseline": False,
    }
    given = make_config(SweepConfig, **settings)
    ray.init(address="local", num_cpus=2, logging_level="ERROR")
    try:
        tune.run(given)
        known = study.load(given.studies()[0])
        assert known and [trial.state for trial in known.trials] == ["finished", "stopped"]
        deadline = time.monotonic() + 60
        while ray.available_resources().get("CPU") != 2 and time.monotonic() < deadline:
            time.sleep(0.5)
        assert ray.available_resources()["CPU"] == 2
        assert {group["state"] for group in placement_group_table().values()} == {"REMOVED"}
    finally:
        ray.shutdown()


def test_a_dry_run_shows_the_space_and_the_arithmetic_and_starts_nothing(
    make_config: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    given = make_config(SweepConfig, **(SWEEP | {"dry_run": True}))
    tune.dry_run(given)
    out = capfd.readouterr().out
    for line in (
        "space     learning_rate loguniform 0.0001 … 0.1",
        "start     learning_rate 0.001, lora.r 4: the settings, as the first trial",
        "trials    4, 1 at a time: ",
        "objective validation loss on 5 validation questions, every 2 of 4 steps",
        "stopping  those that fall behind, at step 2 (1 of 2 goes on)",
    ):
        assert line in out
    assert not os.path.exists(given.run_dir)
    (config,) = given.studies()
    assert finetune.finished_metrics(config) is None
    crowned = study.begin(config)
    crowned.finished = True
    crowned.save()
    storage.write_text(
        f"{config.run_dir}/config.json", json.dumps(config.changed({"lora.r": 8}).public())
    )
    tune.dry_run(given)
    assert "trials    4, 1 at a time: " in capfd.readouterr().out, (
        "its winner has other settings than the first trial"
    )
    with pytest.raises(ConfigError, match="holds a study of other settings"):
        tune.dry_run(given.changed({"seed": 15}))


def test_a_sweep_is_checked_task_by_task(
    make_config: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    given = make_config(CheckConfig, **(SWEEP | {"task_type": "sql,schema"}))
    study.begin(given.studies()[0]).save()
    preflight.run(given)
    out = capfd.readouterr().out
    assert (
        "--- sweep-sql ---" in out
        and "--- sweep-schema ---" in out
        and out.count("ok    memory") == 2
    )
    assert (
        f"ok    output: {given.run_dir}-sql can be written and holds a study of these settings"
        in out
    )
    run = make_config(CheckConfig, **{"hub.push_checkpoints": "all"})
    assert run.studies()[0].output_name == "run", "what jobs.finetune takes is checked too"
