"""A sweep from end to end: one study a task, its trials, its champion, and publishing if asked for.

A study that was cut off goes on with `--resume` (see `study`). A finished one is shown, not
repeated.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ray_sql import cluster, publish, tracking
from ray_sql.config import Config, SweepConfig
from ray_sql.display import Display
from ray_sql.errors import RaySqlError, StoreError
from ray_sql.finetune import preview, require_scored_alike
from ray_sql.finetune.session import spool
from ray_sql.report import terminal
from ray_sql.store.run_folder import RunFolder
from ray_sql.tune import champion, space, sweep_report
from ray_sql.tune.session import (
    StudySession,
    concurrent_trials,
    plan,
    replay_settled,
    require_choosable,
    trial_capacity,
    trial_spool,
)
from ray_sql.tune.space import shown_point
from ray_sql.tune.study import SETTLED, Study, load, open_or_begin, trial_name

ENVIRONMENT = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # MLflow is the record
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Tune's would end the sweep as if it were complete
    "RAY_AIR_NEW_OUTPUT": "0",  # the table is ours
}


def run(config: SweepConfig) -> dict[str, dict[str, Any]]:
    """Run the study of every task. Returns the content of each one's `metrics.json`, by task.

    Raises `RaySqlError` for what the user can fix.
    """
    studies = config.studies()
    check(studies)
    try:
        metrics = {study.task_type: run_study(study, config.resume) for study in studies}
    finally:
        cluster.leave_ray()
    if config.publish:
        publish_all(studies, metrics)
    return {str(task): scores for task, scores in metrics.items()}


def check(studies: Sequence[Config]) -> None:
    """Raise for what is wrong with a later study before the first has run."""
    for study in studies:
        space.read(study)
        if study.publish:
            publish.require_publishable(study)


def run_study(config: Config, resume: bool) -> dict[str, Any]:
    """Run one task's study, or show it if it is finished."""
    with Display() as display:
        study = open_or_begin(config, resume)
        if study.finished and len(study.trials) >= config.tune.num_samples:
            return _show_finished(config, display)
        with StudySession(config, display, study, space.read(config)) as session:
            metrics = _search(session)
        display.line(f"sweep        {session.folder.sweep_report}")
        terminal.show(session.folder, config.output_name, metrics, display)
    return metrics


def dry_run(config: SweepConfig) -> None:
    """Show an example, the space, how many trials run at a time and why, and the plan."""
    for study in config.studies():
        axes = space.read(study)
        open_or_begin(
            study, resume=True
        )  # its name must hold a study of these settings, or nothing
        with Display() as display:
            prepared = preview(study, display)
            require_choosable(prepared)
            capacity = trial_capacity(study.scaling, study.tune)
            for line in plan(prepared, axes, capacity):
                display.line(line)


def replay(config: Config) -> list[Path]:
    """Send MLflow what a study kept while no server answered. Returns the files that still wait.

    Raises `StoreError` where trials that were cut off kept something, too: they go on first.
    """
    own, study = spool(config), load(config)
    tracking.replay(config.tracking, own)
    if not study:
        return [own] if own.exists() else []
    replay_settled(config, space.read(config), study, study.mlflow_run_id or "")
    spools = {trial.number: trial_spool(config, trial.number) for trial in study.trials}
    waiting = [trial for trial in study.trials if spools[trial.number].exists()]
    cut_off = [trial.name for trial in waiting if trial.state not in SETTLED]
    if cut_off:
        raise StoreError(
            f"records of {', '.join(cut_off)} wait for the study to go on: give its command with "
            "--resume"
        )
    return [path for path in (own, *spools.values()) if path.exists()]


def _show_finished(config: Config, display: Display) -> dict[str, Any]:
    folder = RunFolder(config.run_dir)
    require_scored_alike(Config(**(folder.read_settings() or {})), config)
    display.line(
        f"{config.run_dir} holds a finished study of these settings; --overwrite runs it again."
    )
    metrics = folder.read_metrics() or {}
    terminal.show(folder, config.output_name, metrics, display)
    return metrics


def publish_all(studies: Sequence[Config], metrics: Mapping[Any, Mapping[str, Any]]) -> None:
    """Push every champion; a refused one does not keep the others back."""
    refused = []
    for study in studies:
        try:
            url = publish.publish(study)
            run_id = metrics[study.task_type].get("mlflow_run_id")
            if run_id:
                tracking.reopen(study.tracking, run_id, spool(study)).tag({"hub_url": url})
        except RaySqlError as error:
            refused.append(error)
    if len(refused) > 1:
        raise RaySqlError("; ".join(map(str, refused)))
    if refused:
        raise refused[0]


def _search(session: StudySession) -> dict[str, Any]:
    """Run the trials, then measure and record the champion."""
    study, callback = session.study, session.callback
    replay_settled(session.config, session.space, study, session.record.run_id)
    _run_trials(session)
    session.display.below("")
    session.display.console.print(callback.table())
    unit = session.capacity.unit[0]
    used = f"{callback.hours():.2f} {unit}-hours"
    figures = sweep_report.write(session, used)
    facts = {
        "hours": round(callback.hours(), 3),
        "unit": unit,
        "steps": sum(trial.steps for trial in study.trials),
    }
    metrics = champion.choose(session, facts)
    _record_study(session, metrics["sweep"], figures)
    study.finished = True
    study.save()
    return metrics


def _run_trials(session: StudySession) -> None:
    """Let Ray Tune run what is left of the study."""
    config, study = session.config, session.study
    count = config.tune.num_samples
    if study.settled(count) >= count:
        return
    for trial in study.trials[count:]:
        if trial.state == "running":  # until the study is given as many trials again
            study.change(trial.number, state="waiting")
    os.environ.update(ENVIRONMENT)
    from ray import tune

    from ray_sql.tune import search  # here: it loads Ray Tune, which reads the environment above
    from ray_sql.tune.trial import TrialJob, TrialTrainable  # as above

    capacity = session.capacity
    on_gpu = capacity.unit[0] == "GPU"
    # in its own process a trial trains with what it takes; else it only drives workers, who take it
    takes = capacity.per_training if config.scaling.num_workers == 0 else {"memory": 1.0}
    with cluster.Channel(session.callback.on_event) as channel:
        settings = config.changed(capacity.settings).for_workers()
        job = TrialJob(settings, session.prepared.model_folder, session.steps, channel.sender())
        trainable = tune.with_parameters(TrialTrainable, job=job)
        tuner = tune.Tuner(
            tune.with_resources(trainable, tune.PlacementGroupFactory([takes])),
            tune_config=tune.TuneConfig(
                search_alg=search.StudySearch(session.space, study, count, config.seed),
                scheduler=search.scheduler(config.tune, session.steps, config.eval_every),
                num_samples=count,
                max_concurrent_trials=concurrent_trials(config.tune, capacity),
                # a process that trained on a GPU would take its CUDA context along
                reuse_actors=bool(config.scaling.num_workers) or not on_gpu,
            ),
            run_config=tune.RunConfig(
                name=f"tune-{int(time.time())}",
                storage_path=session.folder.ray,
                verbose=0,
                callbacks=[session.callback],
                failure_config=tune.FailureConfig(max_failures=config.scaling.max_failures),
            ),
        )
        # it misses the loggers that are switched off above
        analysis = logging.getLogger("ray.tune.analysis.experiment_analysis")
        analysis.setLevel(logging.ERROR)
        tuner.fit()


def _record_study(
    session: StudySession, sweep: Mapping[str, Any], figures: Mapping[str, Any]
) -> None:
    """Record space, winner, budget, trials, figures and page in the study's MLflow run."""
    record, study = session.record, session.study
    winner = f"{trial_name(sweep['trial'])}: {shown_point(sweep['point'])}"
    axes = "; ".join(axis.text for axis in session.space.axes)
    record.tag({"space": axes, "winner": winner, "verdict": sweep["verdict"]})
    totals = {
        "trials": str(len(study.trials)),
        f"{sweep['unit']}_hours": f"{sweep['hours']:.2f}",
        "steps_of_all_trials": str(sweep["steps"]),
    }
    record.tag(totals)
    record.table(_table_rows(study), "trials.json")
    for file, figure in figures.items():
        record.figure(figure, f"figures/{file}")
    if session.folder.is_local:
        record.artifact(Path(session.folder.sweep_report))


def _table_rows(study: Study) -> list[dict[str, Any]]:
    return [
        {
            "trial": trial.number,
            # MLflow's UI takes a dot for a path
            **{axis.replace(".", "/"): value for axis, value in trial.point.items()},
            "steps": trial.steps,
            "objective": trial.best and trial.best.objective,
            "state": trial.state,
            "reason": trial.reason,
        }
        for trial in study.trials
    ]
