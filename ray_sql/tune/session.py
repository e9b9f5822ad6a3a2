"""A recorded study: the session of a run, with the steps in which a sweep differs.

Its MLflow run has a child for every trial.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from ray_sql import cluster, tracking
from ray_sql.cluster import Capacity
from ray_sql.config import Config
from ray_sql.config.sections import ScalingSection, TuneSection
from ray_sql.display import Display
from ray_sql.errors import ConfigError, DamagedFile
from ray_sql.finetune import plan as run_plan
from ray_sql.finetune.prepare import Prepared, write_inputs
from ray_sql.finetune.session import Session, spool
from ray_sql.report import commands
from ray_sql.tasks import TASKS
from ray_sql.tune.callback import SweepCallback
from ray_sql.tune.objective import Objective
from ray_sql.tune.space import Space, shown_point
from ray_sql.tune.study import SETTLED, SavedStudy, Study, TrialRecord, trial_name, trial_settings


class StudySession(Session):
    """The session of a study. `callback` shows its trials, and has their MLflow runs."""

    callback: SweepCallback
    capacity: Capacity

    def __init__(self, config: Config, display: Display, study: Study, space: Space) -> None:
        super().__init__(config, display)
        self.study, self.space = study, space

    @property
    def steps(self) -> int:
        """The optimizer steps of a whole trial."""
        return self.prepared.steps

    def check(self) -> None:
        """Raise `ConfigError` where there is nothing to choose trials by."""
        require_choosable(self.prepared)

    def begin_ray(self) -> None:
        """Start or join Ray, which drives trials also where they train without it."""
        cluster.start_ray_in_background()

    def see_cluster(self) -> None:
        """See how many trials fit. Raises `ConfigError` if none does."""
        cluster.start_ray()
        self.capacity = trial_capacity(self.config.scaling, self.config.tune)

    def plan(self) -> Iterator[str]:
        """Yield the plan of a run, then that of the sweep."""
        yield from run_plan.lines(self.prepared)
        yield from plan(self.prepared, self.space, self.capacity)

    def remove_earlier(self) -> None:
        """Remove the study that is there; nothing of it stays open in MLflow."""
        with suppress(DamagedFile):  # a damaged study, too, is replaced
            earlier = self.folder.read_study(SavedStudy)
            if earlier and not self._is_copy():
                own = {"study": earlier["id"]}
                tracking.close(self.config.tracking, earlier["mlflow_run_id"], own)
        self.folder.remove()

    def lay_out(self) -> None:
        """Write the study, then all that trials read: once cut off, it is a study that goes on."""
        if self._is_copy():
            self.study.begin_records_anew()
        self.study.finished = False
        self.study.save()
        write_inputs(self.prepared)

    def _is_copy(self) -> bool:
        """Tell a folder that was copied from that of a study, whose MLflow runs are not its own."""
        has_record = self.config.tracking.enabled and self.folder.read_mlflow_run_id()
        return bool(has_record) and self.earlier_run_id() is None

    def tags(self) -> dict[str, str]:
        """Return the tag that finds the study's MLflow run."""
        return self.study.tags

    def begin_record(self) -> tracking.Run:
        """Begin the study's MLflow run, and what receives its trials' events."""
        record = super().begin_record()
        self.study.mlflow_run_id = record.run_id or None
        self.study.save()
        if line := commands.watch(cluster.dashboard(), record.run_id, record.uri):
            self.display.line(line)
        self.callback = SweepCallback(
            self.study,
            self.space,
            Objective.of(self.config),
            self.steps,
            self.capacity.unit,
            lambda trial: begin_trial_record(self.config, self.space, trial, record.run_id),
            self.display,
        )
        return record

    def mark_winner(self, winner: TrialRecord) -> None:
        """Put a star before the name of the winner's MLflow run, and before no other trial's."""
        for trial in self.study.trials:
            if trial.mlflow_run_id:
                spool_of_trial = trial_spool(self.config, trial.number)
                run = tracking.reopen(self.config.tracking, trial.mlflow_run_id, spool_of_trial)
                star = "★ " if trial.number == winner.number else ""
                run.tag({"mlflow.runName": star + _run_name(self.config.output_name, trial)})

    def end(self, status: tracking.Status) -> None:
        """End the MLflow runs of trials that were cut off, then that of the study."""
        self.callback.end("KILLED" if status == "KILLED" else "FAILED")
        # those that an earlier attempt left, and this one, with fewer trials, did not go on with
        self.record.end_children("KILLED")
        self.record.end(status)
        if status == "KILLED":
            count = self.config.tune.num_samples
            instead = " in place of --overwrite" if self.config.overwrite else ""
            self.display.line(
                f"stopped with {self.study.settled(count)} of {count} trials settled; the same "
                f"command with --resume{instead} goes on"
            )


def require_choosable(prepared: Prepared) -> None:
    """Raise `ConfigError` for settings under which trials could not be chosen between."""
    config = prepared.config
    if config.prev_checkpoint:
        raise ConfigError(
            "--prev_checkpoint: the trials of a sweep start from the base model; leave it out"
        )
    by_loss = config.tune.objective == "eval_loss"
    if prepared.validation_rows() if by_loss else prepared.validation():
        return
    databases = ", and give their databases" if TASKS[config.task_type].executes_sql else ""
    raise ConfigError(
        "there are no validation questions to choose trials by: raise --data.validation_fraction "
        f"and --evaluate.select_examples{databases}"
    )


def trial_capacity(scaling: ScalingSection, tune: TuneSection) -> Capacity:
    """Return how many trials fit. Raises `ConfigError` if none does, or fewer than asked for."""
    capacity = cluster.training_capacity(scaling)
    if not capacity.trainings:
        raise ConfigError(
            f"no trial can be scheduled: {capacity.arithmetic}; lower --scaling.num_workers or "
            "--scaling.resources_per_worker, or add nodes"
        )
    wanted = tune.max_concurrent_trials or 0
    if wanted > capacity.trainings:
        raise ConfigError(
            f"--tune.max_concurrent_trials {wanted}, but only {capacity.trainings} fit: "
            f"{capacity.arithmetic}; lower it, or what a worker takes "
            "(--scaling.resources_per_worker)"
        )
    return capacity


def concurrent_trials(tune: TuneSection, capacity: Capacity) -> int:
    """Return how many trials run at a time."""
    most = tune.max_concurrent_trials or capacity.trainings
    return min(capacity.trainings, most, tune.num_samples)


def plan(prepared: Prepared, space: Space, capacity: Capacity) -> Iterator[str]:
    """Yield what a study would do, a line each."""
    from ray_sql.tune.search import rungs  # here: it loads Ray Tune and Optuna

    config, steps, questions = prepared.config, prepared.steps, len(prepared.validation())
    titles = ["space", *[""] * len(space.axes)]
    for title, axis in zip(titles, space.axes, strict=False):
        yield f"{title:<9} {axis.text}"
    yield f"start     {shown_point(space.start)}: the settings, as the first trial"
    at_once = concurrent_trials(config.tune, capacity)
    yield f"trials    {config.tune.num_samples}, {at_once} at a time: {capacity.arithmetic}"
    if capacity.nodes > 1 and not config.scaling.storage_path:
        yield (
            f"          on {capacity.nodes} nodes: {config.run_dir} must be a folder that they "
            "share; else give --scaling.storage_path"
        )
    yield (
        f"objective {Objective.of(config).label} on {questions} validation questions, every "
        f"{config.eval_every} of {steps} steps"
    )
    stops = rungs(config.tune, steps, config.eval_every)
    if stops:
        listed = ", ".join(map(str, stops))
        kept = f"1 of {config.tune.reduction_factor:g} goes on"
        yield f"stopping  those that fall behind, at step {listed} ({kept})"
        return
    yield "stopping  none: every trial is trained to the end"
    if config.tune.scheduler != "fifo":
        yield (
            "          (measured only at the end; lower --evaluate.eval_steps and --save_steps to "
            "stop trials early)"
        )


def begin_trial_record(
    config: Config, space: Space, trial: TrialRecord, parent_run_id: str
) -> tracking.Run:
    """Begin a trial's MLflow run, a child of the study's, or go on with an earlier attempt's.

    MLflow may be away just then: the run begins when it is back.
    """
    return tracking.start(
        config.tracking,
        trial_settings(config, space.changes(trial.point), trial.number).public(),
        name=_run_name(config.output_name, trial),
        tags={"task_type": config.task_type},
        spool=trial_spool(config, trial.number),
        run_id=trial.mlflow_run_id,
        own={"mlflow.parentRunId": parent_run_id, "trial": str(trial.number)},
        required=False,
    )


def _run_name(study: str, trial: TrialRecord) -> str:
    return f"{trial.name} of {study}: {shown_point(trial.point)}"


def trial_spool(config: Config, number: int) -> Path:
    """Return where a trial's records wait while MLflow does not answer."""
    study = spool(config)
    return study.with_name(f"{study.stem}-{trial_name(number)}.jsonl")


def replay_settled(config: Config, space: Space, study: Study, parent_run_id: str) -> None:
    """Send what MLflow did not take of trials that an earlier attempt settled."""
    for trial in study.trials:
        waits = trial.state in SETTLED and trial_spool(config, trial.number).exists()
        if waits and config.tracking.enabled:
            run = begin_trial_record(config, space, trial, parent_run_id)
            run.end("FAILED" if trial.state == "failed" else "FINISHED")
            study.change(trial.number, mlflow_run_id=run.run_id or None)
