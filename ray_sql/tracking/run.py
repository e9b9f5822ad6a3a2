"""MLflow as the record of a run: one MLflow run per training run, whatever restarts, always ended.

Only the driver talks to MLflow. A configured store must answer at the start. Afterwards nothing
here raises: records that cannot be sent are kept in a spool file, and one warning is printed. The
spool is replayed when the run ends, or when it continues after a restart. A record that is refused
stays there, too, and holds up none that come after it. A run that belongs to another one, such as a
sweep's trial, may even begin while the store is away. Points carry their
step, and a step that was logged before is not logged again. Where tracking is off, no function
does anything, so callers need not ask. This module is a sink: it knows none of the stages.
"""

from __future__ import annotations

import json
import logging
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from ray_sql.config import mask_password
from ray_sql.config.files import parse_json
from ray_sql.config.sections import TrackingSection
from ray_sql.errors import DamagedFile, StoreError
from ray_sql.tracking.checkpoints import remove_checkpoints
from ray_sql.tracking.models import LoggedModel
from ray_sql.tracking.questions import ScoredQuestion
from ray_sql.tracking.senders import SENDERS, create, end_children, logged_points
from ray_sql.tracking.spool import Record, run_ids_waiting, spooled
from ray_sql.tracking.store import (
    client_of,
    experiment_id_of,
    find_run,
    is_final,
    is_refusal,
    reason,
    refusing,
    require_store,
    run_exists,
    store_uri,
)

log = logging.getLogger(__package__)

Status = Literal["FINISHED", "FAILED", "KILLED"]
METRICS_PER_CALL = 1000
"""Metrics that MLflow takes in one call."""
RETRY_SECONDS = 60.0
"""Seconds for which records go straight to the spool after a failure: each try costs seconds."""


class Run:
    """One MLflow run, or none where tracking is off.

    Every method but `open` is safe to call, from any thread. `begin` finds or creates the run
    before its first record goes out. Until `begin` has succeeded, records wait in the spool under
    the name `waiting`.
    """

    def __init__(
        self,
        uri: str,
        spool: Path,
        begin: Callable[[Run], tuple[Any, str]] | None = None,
        waiting: str = "",
        records_questions: bool = False,
    ) -> None:
        self.uri, self.run_id = uri, ""
        self._spool, self._begin, self._waiting = spool, begin, waiting
        self._records_questions = records_questions
        self._client: Any = None
        self._logged: set[tuple[str, int]] = set()
        self._stored: set[tuple[str, int]] = set()
        self._kept: list[tuple[int, str]] = []
        self._warned = False
        self._refusals: set[str] = set()
        self._retry_at = 0.0
        self._lock = threading.RLock()

    def open(self) -> None:
        """Find or create the run. Raises `StoreError` if the store does not answer."""
        if self._client is None and self._begin is not None:
            self._client, self.run_id = self._begin(self)
            if self.run_id:
                self._stored = logged_points(self._client, self.run_id)
                self._logged |= self._stored

    def log(self, step: int, values: Mapping[str, float], replace: bool = False) -> None:
        """Log metrics of one step. A key that was logged at this step before, as after a restart,
        is skipped unless `replace` is set."""
        new = {
            key: float(value)
            for key, value in values.items()
            if replace or (key, step) not in self._logged
        }
        self._logged |= {(key, step) for key in new}
        points = [(key, value, int(time.time() * 1000), step) for key, value in new.items()]
        for start in range(0, len(points), METRICS_PER_CALL):
            self._send("metrics", points[start : start + METRICS_PER_CALL])

    def tag(self, tags: Mapping[str, str]) -> None:
        """Set or replace tags."""
        for key, value in tags.items():
            self._send("tag", [key, value])

    def describe(self, text: str, metric: str | None) -> None:
        """Give the run a description in Markdown, in which `THIS_RUN` stands for its own page.

        The experiment gets the main `metric`, and a view of its runs in which its score is a
        column. MLflow's list of runs takes no columns from the server otherwise.
        """
        self._send("description", [text, metric])

    def table(self, rows: Sequence[Mapping[str, Any]], file: str) -> None:
        """Write a table for the UI, replacing an earlier one of that name.

        Each mapping is a row. All rows have the same keys.
        """
        if rows:
            columns = {key: [row.get(key) for row in rows] for key in rows[0]}
            self._send("table", [columns, file])

    def artifact(self, path: Path, folder: str = "") -> None:
        """Store a local file or folder."""
        self._send("artifact", [str(path), folder])

    def model(self, path: Path, model: LoggedModel) -> None:
        """Store an adapter's folder as a model that MLflow loads, with the final scores so far."""
        self._send("model", [str(path), *model])

    def checkpoints(self, kept: Mapping[int, str]) -> None:
        """Name the checkpoints that the run keeps, by step their folders, as models with scores.

        Their weights are not copied. Those that were named before and are not kept are deleted.
        """
        self._kept = [*kept.items()]
        self._send("checkpoints", self._kept)

    def questions(self, score: str, scored: Iterable[ScoredQuestion]) -> None:
        """Store scored questions, judged by `score`, for MLflow to show beside another run's."""
        if self._records_questions:
            self._send("questions", [score, *scored])

    def figure(self, figure: Any, file: str) -> None:
        """Store a matplotlib figure as an image."""
        with self._lock:
            if not self._try(lambda: self._client.log_figure(self.run_id, figure, file)):
                copy = self._spool.with_suffix("") / file
                with self._spooling("figure", copy):
                    figure.savefig(copy)
                self._keep("artifact", [str(copy), str(Path(file).parent)])

    def dataset(self, name: str, digest: str, source: str, split: str) -> None:
        """Name the data of a split as an input of the run."""
        self._send("dataset", [name, digest, source, split])

    def register(
        self, model: str, folder: str, tags: Mapping[str, str], alias: str, won: bool
    ) -> None:
        """Register the run's model `folder` as a version of `model`, if it `won`.

        The version gets `alias`. It leaves the alias to a version that was measured on the same
        (tag `measured_on`) with a higher score (tag `score`). One that won before and did not win
        now loses the alias.
        """
        self._send("version", [model, folder, dict(tags), alias, won])

    def end(self, status: Status) -> None:
        """Replay the spool, then set the final status."""
        replays = self._spool.exists()
        self.replay()
        if replays and self._kept:  # an older list of checkpoints was among what waited
            self._send("checkpoints", self._kept)
        self._send("end", [status])

    def end_children(self, status: Status) -> None:
        """Set the final status of every child run that was left running."""
        self._send("children", [status])

    def replay(self) -> int:
        """Send the spool's records, oldest first. Returns the number of records that still wait.

        One that is refused waits on, and those behind it are sent. An outage keeps all that follow.
        """
        with self._lock:
            if self._begin is None or not self._spool.exists():
                return 0
            self._retry_at = 0.0
            # behind an outage the rest waits by the clock, without a call
            lines = [line for line in spooled(self._spool) if not self._replay_line(line)]
            with self._spooling("replayed", self._spool):
                self._spool.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
            if not lines:
                self._spool.unlink()
                # the files that its records named
                shutil.rmtree(self._spool.with_suffix(""), ignore_errors=True)
            return len(lines)

    def _replay_line(self, line: str) -> bool:
        """Return True once the record is settled."""
        try:
            run_id, kind, values = parse_json(Record, line, str(self._spool), "")
        except DamagedFile:  # the process was killed while it wrote this line
            return True
        if " " in run_id and run_id != self._waiting:
            return True  # the record of a run that never began, and was replaced since
        if not self._try(self.open):
            return False
        if run_id and run_id == self._waiting:
            run_id = self.run_id
            if kind == "metrics":
                # spooled when nobody could say which points an earlier attempt had sent
                values = [point for point in values if (point[0], point[3]) not in self._stored]
        if run_id == self.run_id and kind == "metrics":
            self._logged |= {(point[0], point[3]) for point in values}
        return self._try(lambda: SENDERS[kind](self._client, run_id, *values))

    def _send(self, kind: str, values: list[Any]) -> None:
        with self._lock:
            if not self._try(lambda: SENDERS[kind](self._client, self.run_id, *values)):
                self._keep(kind, values)

    def _keep(self, kind: str, values: list[Any]) -> None:
        with self._spooling(kind, self._spool), self._spool.open("a", encoding="utf-8") as stream:
            # with the run's id: a later run of the same name shares the file
            stream.write(json.dumps([self.run_id or self._waiting, kind, values]) + "\n")

    @contextmanager
    def _spooling(self, kind: str, file: Path) -> Iterator[None]:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            yield
        except OSError as error:
            log.warning("a %s record is lost: %s cannot be written (%s)", kind, file, error)

    def _try(self, action: Callable[[], object]) -> bool:
        """Return True if a record is settled: sent, or refused for good."""
        if self._begin is None:
            return True
        if time.monotonic() < self._retry_at:
            return False
        try:
            self.open()
            action()
        except Exception as error:  # any backend's: an outage of the record must not end the run
            place, why = mask_password(self.uri), reason(error)
            if is_final(error):
                log.warning("MLflow at %s refused a record, which is dropped: %s", place, why)
                return True
            if is_refusal(error):
                self._warn_of_refusal(why)
                return False
            if not self._warned:
                log.warning(
                    "MLflow at %s stopped answering (%s); points are kept in %s",
                    place,
                    why,
                    self._spool,
                )
            self._warned = True
            self._retry_at = time.monotonic() + RETRY_SECONDS
            return False
        return True

    def _warn_of_refusal(self, why: str) -> None:
        """Say once for each reason that a record is refused, and how it can still be sent."""
        if why not in self._refusals:
            self._refusals.add(why)
            log.warning(
                "MLflow at %s refused a record, which waits in %s: %s; once the server takes it, "
                "`ray-sql check --replay` with the run's settings sends it",
                mask_password(self.uri),
                self._spool,
                why,
            )


def null_run() -> Run:
    """Return a run that records nothing."""
    return Run("", Path())


def start(
    settings: TrackingSection,
    params: Mapping[str, Any],
    *,
    name: str,
    tags: Mapping[str, str],
    spool: Path,
    run_id: str | None = None,
    own: Mapping[str, str] | None = None,
    required: bool = True,
) -> Run:
    """Begin a run, or continue `run_id`. Where tracking is off, the run records nothing.

    `params` are flattened. `own` are tags that no other run has: they find the run if its id was
    lost. Raises `StoreError` if the store does not answer. A run that is not `required` begins
    later in that case.
    """
    if not settings.enabled:
        return null_run()
    tags = {"mlflow.runName": name, **tags, **(own or {})}

    def begin(run: Run) -> tuple[Any, str]:
        run.uri = require_store(settings)
        with refusing(run.uri):
            client = client_of(run.uri)
            experiment_id = experiment_id_of(client, settings.experiment, run.uri)
            earlier = find_run(client, experiment_id, run_id, own)
            return client, earlier or create(client, experiment_id, name, tags, params)

    # with clients of its own: mlflow.set_tracking_uri would also set MLFLOW_TRACKING_URI, for
    # whatever this process does next
    waiting = " ".join((own or {}).values())
    run = Run(store_uri(settings.uri), spool, begin, waiting, settings.questions)
    if required:
        run.open()
    run.replay()
    run._send("running", [])
    return run


def reopen(settings: TrackingSection, run_id: str, spool: Path) -> Run:
    """Return a run that has ended, to add something to it."""
    if not settings.enabled:
        return null_run()

    def begin(run: Run) -> tuple[Any, str]:
        run.uri = require_store(settings)
        return client_of(run.uri), run_id

    run = Run(store_uri(settings.uri), spool, begin)
    run.run_id = run_id
    return run


def close(settings: TrackingSection, run_id: str | None, own: Mapping[str, str]) -> None:
    """Mark a run that was cut off, and its children, as killed: nobody will continue them.

    Its checkpoints are deleted, for its folder is removed.
    """
    if not settings.enabled:
        return
    uri = require_store(settings)
    with refusing(uri):
        client = client_of(uri)
        experiment = client.get_experiment_by_name(settings.experiment)
        experiment_id = experiment.experiment_id if experiment else None
        earlier = find_run(client, experiment_id, run_id, own)
        if earlier:
            if client.get_run(earlier).info.status == "RUNNING":
                client.set_terminated(earlier, "KILLED")
            end_children(client, earlier, "KILLED")
            remove_checkpoints(client, earlier)


def read_tag(settings: TrackingSection, run_id: str, key: str) -> str | None:
    """Return a tag of a run; None where the store has no such run or tag."""
    uri = require_store(settings)
    with refusing(uri):
        client = client_of(uri)
        if not run_exists(client, run_id):
            return None
        tag: str | None = client.get_run(run_id).data.tags.get(key)
    return tag


def replay(settings: TrackingSection, spool: Path) -> int:
    """Send the records that an earlier run left in its spool. Returns the number that still wait.

    Raises `StoreError` if the store does not answer, or if the records are for another one.
    """
    if not settings.enabled or not spool.exists():
        return 0
    run = reopen(settings, "", spool)
    run.open()
    waiting = run_ids_waiting(spool)
    with refusing(run.uri):
        is_the_store = any(run_exists(run._client, run_id) for run_id in waiting)
    if waiting and not is_the_store:  # it would refuse all records, and they would be gone
        raise StoreError(
            f"--tracking.uri {mask_password(run.uri)}: has no run {waiting.pop()}, whose "
            f"records wait in {spool}; give the place where it was recorded, or remove the file "
            "if it was deleted there"
        )
    return run.replay()
