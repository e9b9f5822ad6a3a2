"""A sweep from end to end: one study a task, its trials on the cluster, its champion measured, registered and, if asked for, published.

`run` is what jobs/tune.py calls. A study that was cut off, whenever and however, goes on with `--resume` (see `study`); a finished one is
shown, not repeated.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ray_sql import cluster, finetune, publish, tracking
from ray_sql.cluster import Capacity
from ray_sql.config import Config, SweepConfig
from ray_sql.display import Display
from ray_sql.errors import ConfigError, RaySqlError, StoreError
from ray_sql.finetune import prepare
from ray_sql.finetune.prepare import Prepared
from ray_sql.store.run_folder import RunFolder
from ray_sql.tasks import TASKS
from ray_sql.tune import champion, space, sweep_report
from ray_sql.tune.objective import Objective
from ray_sql.tune.space import Space, shown
from ray_sql.tune.study import SETTLED, Study, Trial, begin, check_free, load, name, settings

ENVIRONMENT = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # MLflow is the record
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Tune's would end the sweep as if it were complete
    "RAY_AIR_NEW_OUTPUT": "0",  # the table is ours
}


def run(config: SweepConfig) -> dict[str, dict[str, Any]]:
    """Run the study of every task; returns what each one's `metrics.json` holds, by task.

    Raises `RaySqlError` for what the user can fix.
    """
    studies = config.studies()
    # what is wrong with the second, or could not be published, should be known before the first has run
    for one in studies:
        space.read(one)
        if one.publish:
            publish.check(one)
    try:
        found: dict[str, dict[str, Any]] = {
            one.task_type: _run(one, config.resume) for one in studies
        }
    finally:
        cluster.leave_ray()
    if config.publish:
        _publish(studies, found)
    return found


def replay(config: Config) -> list[Path]:
    """Send MLflow what a study and its settled trials kept while it did not answer; returns the files that still wait.

    Raises `StoreError` where trials that were cut off kept something, too: they have to go on first.
    """
    own, study = finetune.spool(config), load(config)
    tracking.replay(config.tracking, own)
    trials = []
    if study:
        parent = tracking.reopen(config.tracking, study.mlflow_run_id or "", own)
        _replay(config, space.read(config), study, parent)
        cut_off = [
            one for one in study.trials if one.state not in SETTLED and _spool(config, one).exists()
        ]
        if cut_off:
            raise StoreError(
                f"records of {', '.join(name(one.number) for one in cut_off)} wait for the study to go on: give its command with --resume"
            )
        trials = [_spool(config, trial) for trial in study.trials]
    return [spool for spool in (own, *trials) if spool.exists()]


def dry_run(config: SweepConfig) -> None:
    """Show what a sweep would do: one rendered example, the space, how many trials at a time and why, and the plan."""
    for one in config.studies():
        axes = space.read(one)
        _study(
            one, resume=True
        )  # what its name holds must be a study of these settings, whoever its winner is
        with Display() as display:
            prepared = finetune.preview(one, display)
            _check(one, prepared)
            for line in plan(one, axes, prepared, _room(one)):
                display.line(line)


def _publish(studies: list[Config], found: Mapping[str, Mapping[str, Any]]) -> None:
    """Push every champion; one that is refused does not keep the others back."""
    refused = []
    for one in studies:
        try:
            url = publish.publish(one)
            if run_id := found[one.task_type].get("mlflow_run_id"):
                tracking.reopen(one.tracking, run_id, finetune.spool(one)).tag({"hub_url": url})
        except RaySqlError as error:
            refused.append(error)
    if len(refused) > 1:
        raise RaySqlError("; ".join(map(str, refused)))
    if refused:
        raise refused[0]


def plan(config: Config, axes: Space, prepared: Prepared, room: Capacity) -> Iterator[str]:
    """What a study would do, in lines for people."""
    from ray_sql.tune.search import rungs

    steps, count = config.batching.steps(prepared.audit.rows), len(prepared.validation(config))
    for number, axis in enumerate(axes.axes):
        yield f"{'space' if number == 0 else '':<9} {axis.text}"
    yield f"start     {', '.join(f'{key} {shown(value)}' for key, value in axes.start().items())}: the settings, as the first trial"
    yield f"trials    {config.tune.num_samples}, {at_once(config, room)} at a time: {room.arithmetic}"
    if room.nodes > 1 and not config.scaling.storage_path:
        yield f"          on {room.nodes} nodes: {config.run_dir} must be a folder that they share; else give --scaling.storage_path"
    every = config.evaluate.eval_steps or config.save_steps
    yield f"objective {Objective.of(config).label} on {count} validation questions, every {every} of {steps} steps"
    stops = rungs(config, steps)
    if stops:
        yield f"stopping  those that fall behind, at step {', '.join(map(str, stops))} (1 of {config.tune.reduction_factor:g} goes on)"
    else:
        yield "stopping  none: every trial is trained to the end"
        if config.tune.scheduler != "fifo":
            yield "          (measured only at the end; lower --evaluate.eval_steps and --save_steps to stop trials early)"


def at_once(config: Config, room: Capacity) -> int:
    """Trials at a time."""
    return min(
        room.trainings, config.tune.max_concurrent_trials or room.trainings, config.tune.num_samples
    )


def _room(config: Config) -> Capacity:
    """What fits; raises `ConfigError` if no trial does, or fewer at a time than asked for."""
    room = cluster.training_capacity(config.scaling)
    if not room.trainings:
        raise ConfigError(
            f"no trial can be scheduled: {room.arithmetic}; lower --scaling.num_workers or --scaling.resources_per_worker, or add nodes"
        )
    wanted = config.tune.max_concurrent_trials or 0
    if wanted > room.trainings:
        raise ConfigError(
            f"--tune.max_concurrent_trials {wanted}, but only {room.trainings} fit: {room.arithmetic}; lower it, or what a worker takes "
            "(--scaling.resources_per_worker)"
        )
    return room


def _check(config: Config, prepared: Prepared) -> None:
    if config.prev_checkpoint:
        raise ConfigError(
            "--prev_checkpoint: the trials of a sweep start from the base model; leave it out"
        )
    by_loss = config.tune.objective == "eval_loss"
    if not (prepared.validation_rows(config) if by_loss else prepared.validation(config)):
        raise ConfigError(
            "there are no validation questions to choose trials by: raise --data.validation_fraction and --evaluate.select_examples"
            + (", and give their databases" if TASKS[config.task_type].executes_sql else "")
        )


def _run(config: Config, resume: bool) -> dict[str, Any]:
    with Display() as display:
        study = _study(config, resume)
        if study.finished and len(study.trials) >= config.tune.num_samples:
            folder = RunFolder(config.run_dir)
            winner = Config(**folder.read_settings())
            prepare.check_scored_alike(winner, config)
            display.line(
                f"{config.run_dir} holds a finished study of these settings; --overwrite runs it again."
            )
            metrics = folder.read_metrics() or {}
            finetune.show(metrics, config, display)
            return metrics
        axes = space.read(config)
        tracking.require_store(config.tracking)
        prepared = prepare.prepare(config, display.counter("reading data"))
        prepare.check_same_data(prepared.corpus, config)
        _check(config, prepared)
        prepared.questions(config)  # what cannot be asked should be known before training
        cluster.start_ray()
        room = _room(config)
        for line in [*prepare.plan(prepared, config), *plan(config, axes, prepared, room)]:
            display.line(line)
        if config.overwrite:
            _remove(config)
        study.finished = False
        study.save()  # before all else: whatever is cut off from here on is a study that goes on
        prepare.write_inputs(prepared, config.changed({"overwrite": False}))
        record = finetune.begin(config, prepared, study.tags)
        study.mlflow_run_id = record.run_id or None
        study.save()
        metrics = _recorded(config, axes, study, prepared, room, record, display)
        finetune.show(metrics, config, display)
        display.line(f"sweep        {RunFolder(config.run_dir).sweep_report}")
    return metrics


def _study(config: Config, resume: bool) -> Study:
    """The study to go on with, or a new one. Raises `ConfigError` where one was cut off and `resume` was not said."""
    if config.overwrite:
        check_free(config)
        return begin(config)
    found = load(config)
    if found and not found.finished and not resume:
        settled = found.settled(config.tune.num_samples)
        raise ConfigError(
            f"{config.run_dir} holds a study that was cut off, with {settled} of {config.tune.num_samples} trials settled: --resume "
            "goes on with it, --overwrite starts afresh"
        )
    return found or begin(config)


def _remove(config: Config) -> None:
    """Remove the study that is there; nothing of it stays open in MLflow."""
    folder = RunFolder(config.run_dir)
    earlier = folder.read_study()
    if earlier:
        own = {"study": earlier.get("id", "")}
        tracking.close(config.tracking, earlier["mlflow_run_id"], own)
    folder.remove()


def _recorded(
    config: Config,
    axes: Space,
    study: Study,
    prepared: Prepared,
    room: Capacity,
    record: tracking.Run,
    display: Display,
) -> dict[str, Any]:
    """The trials, then the champion, and the study's MLflow run ended whatever happens."""
    from ray_sql.tune.callback import Watch

    steps = config.batching.steps(prepared.audit.rows)
    watch = Watch(
        study, axes, steps, room.unit, lambda trial: _child(config, axes, trial, record), display
    )
    status: tracking.Status = "FAILED"
    try:
        _replay(config, axes, study, record)
        _trials(config, axes, study, prepared, room, watch)
        display.below("")
        display.console.print(watch.table())
        used = f"{watch.hours():.2f} {room.unit[0]}-hours"
        drawn = sweep_report.write(config, axes, study, used)
        facts = {
            "hours": round(watch.hours(), 3),
            "unit": room.unit[0],
            "steps": sum(trial.steps for trial in study.trials),
        }
        metrics = champion.crown(config, study, prepared, record, facts, display)
        _record_study(record, study, axes, metrics, drawn)
        study.finished = True
        study.save()
        status = "FINISHED"
    except (KeyboardInterrupt, SystemExit):
        status = "KILLED"
        settled = study.settled(config.tune.num_samples)
        display.line(
            f"stopped with {settled} of {config.tune.num_samples} trials settled; the same command with --resume goes on"
        )
        raise
    finally:
        watch.end("KILLED" if status == "KILLED" else "FAILED")
        record.end_children(
            "KILLED"
        )  # those that an earlier attempt left, and this one, of fewer trials, did not go on with
        record.end(status)
    return metrics


def _trials(
    config: Config, axes: Space, study: Study, prepared: Prepared, room: Capacity, watch: Any
) -> None:
    """Let Ray Tune run what is left of the study."""
    if study.settled(config.tune.num_samples) >= config.tune.num_samples:
        return
    for trial in study.trials[config.tune.num_samples :]:
        if trial.state == "running":  # until the study is given as many trials again
            study.change(trial.number, state="waiting")
    os.environ |= ENVIRONMENT
    from ray import tune

    from ray_sql.tune import search
    from ray_sql.tune.trial import Trial as Trainable

    steps = config.batching.steps(prepared.audit.rows)
    with cluster.Channel(watch.on_event) as channel:
        plan = {
            "config": config.changed(room.settings).for_workers(),
            "model_folder": prepared.model_folder,
            "inputs": config.run_dir,
            "steps": steps,
            "sender": channel.sender(),
        }
        # in this process a trial trains with what it takes; else it only drives its workers, who take it, and needs next to nothing
        takes = room.per_training if config.scaling.num_workers == 0 else {"memory": 1.0}
        tuner = tune.Tuner(
            tune.with_resources(
                tune.with_parameters(Trainable, plan=plan), tune.PlacementGroupFactory([takes])
            ),
            tune_config=tune.TuneConfig(
                search_alg=search.Search(axes, study),
                scheduler=search.scheduler(config, steps),
                num_samples=config.tune.num_samples,
                max_concurrent_trials=at_once(config, room),
                # a process that trained on a GPU takes what its CUDA context went through along; others save their imports
                reuse_actors=bool(config.scaling.num_workers) or room.unit[0] == "CPU",
            ),
            run_config=tune.RunConfig(
                name=f"tune-{int(time.time())}",
                storage_path=RunFolder(config.run_dir).ray,
                verbose=0,
                callbacks=[watch],
                failure_config=tune.FailureConfig(max_failures=config.scaling.max_failures),
            ),
        )
        logging.getLogger("ray.tune.analysis.experiment_analysis").setLevel(
            logging.ERROR
        )  # it misses the loggers we do without
        tuner.fit()


def _child(config: Config, axes: Space, trial: Trial, parent: tracking.Run) -> tracking.Run:
    """A trial's MLflow run, a child of the study's: the one that an earlier attempt began, or a new one. MLflow may be away just then."""
    own = settings(config, axes.settings(trial.point), trial.number)
    return tracking.start(
        config.tracking,
        own.public(),
        name=f"{name(trial.number)} of {config.output_name}",  # in this order: MLflow shows the first words
        tags={"task_type": config.task_type},
        spool=_spool(config, trial),
        run_id=trial.mlflow_run_id,
        own={"mlflow.parentRunId": parent.run_id, "trial": str(trial.number)},
        required=False,
    )


def _spool(config: Config, trial: Trial) -> Path:
    return (
        config.cache
        / "spool"
        / f"{config.output_name}-{config.identity()}-{name(trial.number)}.jsonl"
    )


def _replay(config: Config, axes: Space, study: Study, parent: tracking.Run) -> None:
    """Send what MLflow did not take of trials that were settled by an earlier attempt."""
    for trial in study.trials:
        if config.tracking.enabled and trial.state in SETTLED and _spool(config, trial).exists():
            run = _child(config, axes, trial, parent)
            run.end("FAILED" if trial.state == "failed" else "FINISHED")
            study.change(trial.number, mlflow_run_id=run.run_id or None)


def _record_study(
    record: tracking.Run, study: Study, axes: Space, metrics: dict[str, Any], drawn: dict[str, Any]
) -> None:
    """Space, winner and budget as tags and metrics of the study's MLflow run, the table of trials, figures and page."""
    sweep = metrics["sweep"]
    record.tag(
        {
            "space": "; ".join(axis.text for axis in axes.axes),
            "winner": f"{name(sweep['trial'])}: {', '.join(f'{key} {shown(value)}' for key, value in sweep['point'].items())}",
            "verdict": sweep["verdict"],
        }
    )
    record.log(
        len(study.trials),
        {
            "best_objective": sweep["objective"],
            "trials": float(len(study.trials)),
            f"{sweep['unit']}_hours": sweep["hours"],
            "steps_of_all_trials": float(sweep["steps"]),
        },
        replace=True,
    )
    record.table(
        [
            {
                "trial": t.number,
                **{
                    axis.replace(".", "/"): value for axis, value in t.point.items()
                },  # the UI takes a dot for a path
                "steps": t.steps,
                "objective": t.best and t.best.objective,
                "state": t.state,
                "reason": t.reason,
            }
            for t in study.trials
        ],
        "trials.json",
    )
    for file, figure in drawn.items():
        record.figure(figure, f"figures/{file}")
    if "://" not in study.run_dir:
        record.artifact(Path(RunFolder(study.run_dir).sweep_report))
