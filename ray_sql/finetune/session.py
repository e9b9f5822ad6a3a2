"""A recorded run: what a training run and a sweep need around their work, in one order.

    with Session(config, display, clock) as session:
        ...  # session.prepared, session.questions, session.folder, session.record

Entering checks whatever would fail later, starts Ray, reads the data, shows the plan, lays out the
folder and begins the MLflow run. Leaving ends the MLflow run with the status that fits. A sweep
overrides the steps in which it differs (`tune/session.py`).
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from ray_sql import cluster, tracking, train
from ray_sql.cluster.stop import said_when_slow, signals_later
from ray_sql.config import Config, mask_password
from ray_sql.display import Display
from ray_sql.errors import DamagedFile, StoreError, TakenOver
from ray_sql.finetune import plan
from ray_sql.finetune.earlier import require_same_data
from ray_sql.finetune.prepare import Prepared, find, prepare, write_inputs
from ray_sql.generate import Question
from ray_sql.report.progress import StartupClock
from ray_sql.store.run_folder import RunFolder

FOLDER_TAG = "folder"
"""The tag of an MLflow run that names the folder which it is the record of."""


class Session:
    """One recorded run. Raises `RaySqlError` on entering for whatever the user can fix."""

    prepared: Prepared
    questions: list[Question]
    """The questions that will be scored."""
    record: tracking.Run

    def __init__(self, config: Config, display: Display, clock: StartupClock | None = None) -> None:
        self.config, self.display = config, display
        self.clock = clock or StartupClock()
        self.folder = RunFolder(config.run_dir)

    def __enter__(self) -> Self:
        config = self.config
        self.folder.require_writable()
        if config.tracking.enabled:
            self.display.starting("MLflow")
            tracking.require_store(config.tracking)
            self.clock.mark("MLflow")
        self.display.starting("data and tokenizer")
        found = find(config)
        self.clock.mark("data and tokenizer")
        self.begin_ray()
        self.display.starting("rows")
        self.prepared = prepare(config, self.display.counter("reading data"), found)
        self.display.end("reading data")
        require_same_data(self.prepared.corpus, config)
        self.check()
        self.questions = self.prepared.questions(self.display)
        self.see_cluster()
        self.display.lines(self.plan())  # among them is a measurement, which takes seconds
        self.clock.mark("rows and plan")
        self.display.starting("run folder")
        if config.overwrite:
            self.remove_earlier()
        self.lay_out()
        self.display.starting("")
        # else it would stay open in MLflow
        with signals_later(lambda: self.end("KILLED"), self._say_ending):
            self.record = self.begin_record()
            self.clock.mark("run folder and MLflow run")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.end("FINISHED")
        elif issubclass(kind, KeyboardInterrupt | SystemExit):
            with said_when_slow(self._say_ending):
                self.end("KILLED")
        elif not issubclass(kind, TakenOver):  # the MLflow run is the other driver's now
            self.end("FAILED")

    def _say_ending(self) -> None:
        self.display.line("ending the MLflow run …; once more stops at once")

    # The steps in which a sweep differs

    def check(self) -> None:
        """Raise for settings that do not fit the data, before anything is written."""
        require_start(self.prepared)

    def begin_ray(self) -> None:
        """Start or join Ray, whose processes start beside whatever comes next."""
        if self.config.scaling.num_workers:
            cluster.start_ray_in_background()

    def see_cluster(self) -> None:
        """Raise where the cluster is too small, if that must be known before a worker starts."""

    def plan(self) -> Iterable[str]:
        """Return the lines that tell people what will be done."""
        return plan.lines(self.prepared)

    def remove_earlier(self) -> None:
        """Remove an earlier run of this name; nothing of it stays open in MLflow."""
        with suppress(DamagedFile):  # a damaged run, too, is replaced
            if run_id := self.earlier_run_id():
                tracking.close(self.config.tracking, run_id, {})
        self.folder.remove()

    def lay_out(self) -> None:
        """Write the settings, and all that workers read."""
        write_inputs(self.prepared)

    def tags(self) -> dict[str, str]:
        """Return tags that no other MLflow run has: they find this one, should its id be lost."""
        return {}

    def end(self, status: tracking.Status) -> None:
        """End the MLflow run."""
        self.record.end(status)

    # The MLflow run

    def begin_record(self) -> tracking.Run:
        """Begin the MLflow run, or go on with the one that an earlier attempt began."""
        config, run_id = self.config, self.earlier_run_id()
        if run_id is None and self.folder.read_mlflow_run_id() and config.tracking.enabled:
            self.display.line("          a copy of another folder: with an MLflow run of its own")
        record = tracking.start(
            config.tracking,
            config.public(),
            name=self._title(),
            tags=self._facts(),
            spool=spool(config),
            run_id=run_id,
            own=self.tags(),
        )
        record.tag({FOLDER_TAG: self.folder.uri})  # anew where the folder was moved
        if record.run_id:
            self.folder.write_mlflow_run(record.run_id, mask_password(record.uri))
        corpus = self.prepared.corpus
        for split in ("train", "validation", *config.split):
            if corpus.splits[split]:
                name = f"{config.dataset_id[:480]}: {split}"
                record.dataset(name, corpus.fingerprint(), config.dataset_id, split)
        return record

    def earlier_run_id(self) -> str | None:
        """Return the MLflow run of an earlier attempt; without tracking its file is not read.

        None also for a folder that was copied from the one which the MLflow run is of.
        """
        run_id = self.folder.read_mlflow_run_id() if self.config.tracking.enabled else None
        if run_id is None:
            return None
        place = tracking.read_tag(self.config.tracking, run_id, FOLDER_TAG)
        is_copy = place is not None and still_holds(RunFolder(place), run_id, self.folder)
        return None if is_copy else run_id

    def _title(self) -> str:
        """Name the run for people: its own name, then the model, the task and the data."""
        config = self.config
        parts = (config.model_name, config.task_type, config.dataset_id)
        words = [part.rstrip("/").rpartition("/")[2] for part in parts]
        return f"{config.output_name}: {', '.join(words)}"

    def _facts(self) -> dict[str, str]:
        """Return the tags that say what the run was made from and by."""
        facts = {
            "task_type": self.config.task_type,
            "data_fingerprint": self.prepared.corpus.fingerprint(),
            "template_hash": str(self.prepared.contract["template_hash"]),
            "git_commit": _git_commit(),
            "ray_job_id": cluster.submission() or "",
        }
        return {name: value for name, value in facts.items() if value}


def require_start(prepared: Prepared) -> None:
    """Raise unless the checkpoint that `prev_checkpoint` names, if any, fits this run."""
    config = prepared.config
    train.starting_point(
        config.prev_checkpoint,
        RunFolder(config.run_dir),
        prepared.contract,
        config.lora,
        prepared.steps,
    )


def still_holds(folder: RunFolder, run_id: str, other: RunFolder) -> bool:
    """Tell whether a folder other than `other` is the one that an MLflow run is the record of."""
    if os.path.realpath(folder.uri) == os.path.realpath(other.uri):  # of a URI, the URI itself
        return False
    try:
        return folder.read_mlflow_run_id() == run_id
    except (OSError, StoreError):  # there is one, which is another user's
        return True


def spool(config: Config) -> Path:
    """Return where a run's records wait while MLflow does not answer."""
    return config.cache / "spool" / f"{config.output_name}-{config.identity()}.jsonl"


def _git_commit() -> str:
    """Return the commit of the folder that the job runs in, if it is one and git is installed."""
    command = ["git", "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
