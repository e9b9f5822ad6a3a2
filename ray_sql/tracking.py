"""MLflow as the record of a run: one MLflow run per training run, whatever restarts, always ended.

Only the driver talks to MLflow. A configured store must answer at the start; afterwards nothing here raises: what cannot be
sent is kept in a spool file, one warning is printed, and the spool is replayed when the run ends, or when it goes on after a
restart. A run that belongs to another one, as a sweep's trials do, may even begin while the store is away. Points carry their step,
and a step that was logged before is not logged again. This module is a sink: it knows none of the stages.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from ray_sql.config import flatten, mask_password
from ray_sql.errors import StoreError

log = logging.getLogger(__name__)

Status = Literal["FINISHED", "FAILED", "KILLED"]
BATCH = 1000
"""Metrics that MLflow takes in one call; params are 100."""
RETRY_SECONDS = 60.0
"""How long everything goes straight to the spool after a failure; each try costs a training run seconds."""


class Run:
    """One MLflow run, or nothing at all where tracking is off; every method after `start` is safe to call, from any thread.

    Before its first record goes out, `begin` finds or creates it; until that has succeeded, its records wait in the spool under `waiting`.
    """

    def __init__(
        self,
        uri: str,
        spool: Path,
        begin: Callable[[Run], tuple[Any, str]] | None = None,
        waiting: str = "",
    ) -> None:
        self.uri, self.run_id, self._spool, self._begin, self._waiting = (
            uri,
            "",
            spool,
            begin,
            waiting,
        )
        self._client: Any = None
        self._logged: set[tuple[str, int]] = set()
        self._stored: set[tuple[str, int]] = set()
        self._warned = False
        self._retry_at = 0.0
        self._lock = threading.RLock()

    def open(self) -> None:
        """Find or create the run; raises `StoreError` if the store does not answer."""
        if self._client is None and self._begin is not None:
            self._client, self.run_id = self._begin(self)
            if self.run_id:
                self._stored = _logged(self._client, self.run_id)
                self._logged |= self._stored

    def log(self, step: int, values: Mapping[str, float], replace: bool = False) -> None:
        """Metrics of one step; a key whose step was logged already is skipped, as after a restart, unless it is to `replace` that."""
        new = {
            key: float(value)
            for key, value in values.items()
            if replace or (key, step) not in self._logged
        }
        self._logged |= {(key, step) for key in new}
        points = [(key, value, int(time.time() * 1000), step) for key, value in new.items()]
        for start in range(0, len(points), BATCH):
            self._send("metrics", points[start : start + BATCH])

    def tag(self, tags: Mapping[str, str]) -> None:
        """Set or replace tags."""
        for key, value in tags.items():
            self._send("tag", [key, value])

    def table(self, rows: Sequence[Mapping[str, Any]], file: str) -> None:
        """A table that the UI shows, one row a mapping, all with the same keys; in place of an earlier one of that name."""
        if rows:
            columns = {key: [row.get(key) for row in rows] for key in rows[0]}
            self._send("table", [columns, file])

    def artifact(self, path: Path, folder: str = "") -> None:
        """A local file or folder."""
        self._send("artifact", [str(path), folder])

    def figure(self, figure: Any, file: str) -> None:
        """A matplotlib figure as an image."""
        with self._lock:
            if not self._try(lambda: self._client.log_figure(self.run_id, figure, file)):
                kept = self._spool.with_suffix("") / file
                with self._spooling("figure", kept):
                    figure.savefig(kept)
                self._keep("artifact", [str(kept), str(Path(file).parent)])

    def dataset(self, name: str, digest: str, source: str, split: str) -> None:
        """Name the data of a split as an input of the run."""
        self._send("dataset", [name, digest, source, split])

    def register(
        self, model: str, folder: str, tags: Mapping[str, str], alias: str, won: bool
    ) -> None:
        """A version of a registered model from the run's artifact folder, one a folder, with these tags. If it has `won`, `alias` is put
        on it, unless that is on a version whose tag `score` is higher and whose tag `measured_on` is the same; else it loses `alias`."""
        self._send("version", [model, folder, dict(tags), alias, won])

    def end(self, status: Status) -> None:
        """Replay what was spooled, then set the final status."""
        self.replay()
        self._send("end", [status])

    def end_children(self, status: Status) -> None:
        """Set the final status of every run that has this one as its parent and was left running."""
        self._send("children", [status])

    def replay(self) -> int:
        """Send what the spool holds, oldest first; returns how many entries are still there."""
        with self._lock:
            if self._begin is None or not self._spool.exists():
                return 0
            self._retry_at = 0.0
            left = self._spool.read_text(encoding="utf-8").splitlines()
            while left and self._replay_one(left[0]):
                left.pop(0)
            with self._spooling("replayed", self._spool):
                self._spool.write_text("".join(f"{line}\n" for line in left), encoding="utf-8")
            if not left:
                self._spool.unlink()
                shutil.rmtree(
                    self._spool.with_suffix(""), ignore_errors=True
                )  # the files that its records named
            return len(left)

    def _replay_one(self, line: str) -> bool:
        try:
            run_id, kind, values = json.loads(line)
        except ValueError:  # the process was killed while it wrote this line
            return True
        if " " in run_id and run_id != self._waiting:
            return True  # of a run that never began, and was replaced since
        if not self._try(self.open):
            return False
        if run_id and run_id == self._waiting:
            run_id = self.run_id
            if (
                kind == "metrics"
            ):  # kept when nobody could say which points an earlier attempt had sent
                values = [point for point in values if (point[0], point[3]) not in self._stored]
        if run_id == self.run_id and kind == "metrics":
            self._logged |= {(point[0], point[3]) for point in values}
        return self._try(lambda: _SENDERS[kind](self._client, run_id, *values))

    def _send(self, kind: str, values: list[Any]) -> None:
        with self._lock:
            if not self._try(lambda: _SENDERS[kind](self._client, self.run_id, *values)):
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
        """Whether a record is settled: sent, or refused for good; False where it must be kept for later."""
        if self._begin is None:
            return True
        if time.monotonic() < self._retry_at:
            return False
        try:
            self.open()
            action()
        except Exception as error:  # whatever MLflow's backend raises: an outage of the record must not end the run
            if _is_final(error):
                log.warning(
                    "MLflow at %s refused a record: %s", mask_password(self.uri), _reason(error)
                )
                return True
            if not self._warned:
                log.warning(
                    "MLflow at %s stopped answering (%s); points are kept in %s",
                    mask_password(self.uri),
                    _reason(error),
                    self._spool,
                )
            self._warned = True
            self._retry_at = time.monotonic() + RETRY_SECONDS
            return False
        return True


def _reason(error: Exception) -> str:
    """What an error says, in one line: MLflow repeats the whole address, and with it a password."""
    return str(mask_password(" ".join(str(error).split())))[:300]


def _is_final(error: Exception) -> bool:
    """Whether another try would fail in the same way: a malformed record, a deleted run, a file that is gone."""
    from mlflow.exceptions import MlflowException

    if isinstance(error, MlflowException):
        return error.get_http_status_code() in (400, 404)
    return isinstance(error, FileNotFoundError)


def start(
    settings: Mapping[str, Any],
    *,
    name: str,
    uri: str | None,
    experiment: str,
    tags: Mapping[str, str],
    spool: Path,
    run_id: str | None = None,
    own: Mapping[str, str] | None = None,
    required: bool = True,
) -> Run:
    """Begin (or, given `run_id`, go on with) a run; params are the flattened `settings`.

    `own` are tags that no other run has: one that has them is gone on with, should its id have been lost. Raises `StoreError` if the
    tracking store does not answer; unless the run is `required`, it begins later then.
    """
    tags = {"mlflow.runName": name, **tags, **(own or {})}

    def begin(run: Run) -> tuple[Any, str]:
        run.uri = check(uri)
        with _refusing(run.uri):
            client = _client(run.uri)
            filed = _experiment(client, experiment, run.uri)
            known = run_id if run_id and _exists(client, run_id) else _search(client, filed, own)
            return client, known or _create(client, filed, name, tags, settings)

    # through clients of their own: mlflow.set_tracking_uri would also set MLFLOW_TRACKING_URI for whatever this process does next
    run = Run(absolute_uri(uri), spool, begin, " ".join((own or {}).values()))
    if required:
        run.open()
    run.replay()
    run._send("running", [])
    return run


def again(uri: str | None, run_id: str, spool: Path) -> Run:
    """A run that has ended, to which something is added."""

    def begin(run: Run) -> tuple[Any, str]:
        run.uri = check(uri)
        return _client(run.uri), run_id

    run = Run(absolute_uri(uri), spool, begin)
    run.run_id = run_id
    return run


def close(uri: str | None, experiment: str, run_id: str | None, own: Mapping[str, str]) -> None:
    """Mark a run that was cut off, and its children, as killed: nobody will go on with them."""
    place = check(uri)
    with _refusing(place):
        client = _client(place)
        filed = client.get_experiment_by_name(experiment)
        known = (
            run_id
            if run_id and _exists(client, run_id)
            else filed and _search(client, filed.experiment_id, own)
        )
        if known:
            if client.get_run(known).info.status == "RUNNING":
                client.set_terminated(known, "KILLED")
            _end_children(client, known, "KILLED")


def named(values: Mapping[str, float]) -> dict[str, float]:
    """A point's values by the names that MLflow shows them under: `loss` is `train/loss`, what has a group of its own keeps it."""
    return {name if "/" in name else f"train/{name}": value for name, value in values.items()}


def replay(uri: str | None, spool: Path) -> int:
    """Send what an earlier run left in its spool; returns how many records are still there.

    Raises `StoreError` if the store does not answer, or is not the one that the records are for.
    """
    if not spool.exists():
        return 0
    left = again(uri, "", spool)
    left.open()
    runs = waiting(spool)
    with _refusing(left.uri):
        there = any(_exists(left._client, run_id) for run_id in runs)
    if runs and not there:  # it would refuse them all, and they would be gone
        raise StoreError(
            f"--tracking.uri {mask_password(left.uri)}: has no run {runs.pop()}, whose records wait in {spool}; give the place "
            "where it was recorded, or remove the file if it was deleted there"
        )
    return left.replay()


def waiting(spool: Path) -> set[str]:
    """The ids of the runs whose records wait in a spool."""
    runs = set()
    for line in spool.read_text(encoding="utf-8").splitlines():
        with suppress(ValueError):  # the process was killed while it wrote this line
            runs.add(json.loads(line)[0])
    return {run_id for run_id in runs if " " not in run_id}


def disabled(spool: Path) -> Run:
    """A run that records nothing."""
    return Run("", spool)


def check(uri: str | None) -> str:
    """The absolute form of a tracking URI, after making sure that its store answers; raises `StoreError`."""
    uri = absolute_uri(uri)
    shown, parts = mask_password(uri), urlsplit(uri)
    if parts.scheme in ("http", "https"):
        address = (parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80))
        try:
            socket.create_connection(address, timeout=5).close()
        except OSError as error:
            raise StoreError(
                f"--tracking.uri {shown}: no MLflow server answers there ({error}); start it, correct the address "
                "(MLFLOW_TRACKING_URI), or use --no-tracking.enabled"
            ) from None
        # a server that dies later must cost seconds, not MLflow's default of many minutes per call
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        # at the end of a run it would print where to look, with the password of the address
        os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    elif parts.scheme == "sqlite":
        folder = Path(uri.removeprefix("sqlite:///")).parent
        if not os.access(folder, os.W_OK):
            raise StoreError(
                f"--tracking.uri {shown}: the folder {folder} is missing or cannot be written"
            )
    with _refusing(uri):
        _client(uri).search_experiments(max_results=1)
    return uri


def _client(uri: str) -> Any:
    from mlflow.tracking import MlflowClient

    logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    return MlflowClient(uri)


@contextmanager
def _refusing(uri: str) -> Iterator[None]:
    """What MLflow and its database drivers raise at the start, as a `StoreError`."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (MlflowException, SQLAlchemyError, ImportError, OSError) as error:
        raise StoreError(
            f"--tracking.uri {mask_password(uri)}: MLflow cannot use it: {_reason(error)}"
        ) from None


def absolute_uri(uri: str | None) -> str:
    """MLflow reads a relative SQLite path from the working directory, which Ray changes; make it absolute here."""
    if uri is None:
        return f"sqlite:///{Path.cwd() / 'mlflow.db'}"
    if uri.startswith("sqlite:///") and not uri.startswith("sqlite:////"):
        return f"sqlite:///{Path.cwd() / uri.removeprefix('sqlite:///')}"
    return uri


def _experiment(client: Any, name: str, uri: str) -> str:
    found = client.get_experiment_by_name(name)
    if found is not None:
        return str(found.experiment_id)
    if not uri.startswith("sqlite:"):
        return str(client.create_experiment(name))
    # without this, artifacts would go to `mlruns` in whatever folder the process happens to be in
    root = Path(uri.removeprefix("sqlite:///")).parent / "mlartifacts" / name
    return str(client.create_experiment(name, artifact_location=root.as_uri()))


def _exists(client: Any, run_id: str) -> bool:
    from mlflow.exceptions import MlflowException

    try:
        found = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code not in {"RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"}:
            raise  # a server that fails for a moment has not lost the run
        return False  # another store than last time: begin a new one
    return bool(
        found.info.lifecycle_stage == "active"
    )  # one that was deleted takes nothing any more


def _search(client: Any, experiment_id: str, own: Mapping[str, str] | None) -> str | None:
    """The run that has these tags, if any."""
    wanted = " and ".join(f"tags.`{key}` = '{value}'" for key, value in (own or {}).items())
    found = client.search_runs([experiment_id], wanted, max_results=1) if wanted else []
    return str(found[0].info.run_id) if found else None


def _create(
    client: Any, experiment_id: str, name: str, tags: Mapping[str, str], settings: Mapping[str, Any]
) -> str:
    from mlflow.entities import Param, RunTag

    created = client.create_run(experiment_id, run_name=name, tags=dict(tags))
    params = [Param(key, str(value)[:6000]) for key, value in flatten(settings).items()]
    for first in range(0, len(params), 100):
        client.log_batch(created.info.run_id, params=params[first : first + 100])
    client.log_batch(created.info.run_id, tags=[RunTag("mlflow.source.name", "ray_sql")])
    return str(created.info.run_id)


def _logged(client: Any, run_id: str) -> set[tuple[str, int]]:
    """Every metric that the run already has, with its steps."""
    keys = client.get_run(run_id).data.metrics
    return {(key, point.step) for key in keys for point in client.get_metric_history(run_id, key)}


def _send_metrics(client: Any, run_id: str, *points: Sequence[Any]) -> None:
    from mlflow.entities import Metric

    client.log_batch(run_id, metrics=[Metric(*point) for point in points])


def _send_dataset(
    client: Any, run_id: str, name: str, digest: str, source: str, split: str
) -> None:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    described = Dataset(
        name=name, digest=digest, source_type="local", source=json.dumps({"uri": source})
    )
    client.log_inputs(run_id, [DatasetInput(described, [InputTag("mlflow.data.context", split)])])


def _send_artifact(client: Any, run_id: str, path: str, folder: str) -> None:
    send = client.log_artifacts if Path(path).is_dir() else client.log_artifact
    send(run_id, path, folder or None)


def _send_table(client: Any, run_id: str, columns: Mapping[str, list[Any]], file: str) -> None:
    """MLflow adds the rows to those of a table that is there; here they take their place."""
    if file in {
        one.path for one in client.list_artifacts(run_id, str(Path(file).parent).strip("."))
    }:
        rows = list(zip(*columns.values(), strict=True))
        client.log_text(run_id, json.dumps({"columns": list(columns), "data": rows}), file)
    else:
        client.log_table(run_id, columns, file)


def _end_children(client: Any, run_id: str, status: str) -> None:
    left = f"attributes.status = 'RUNNING' and tags.`mlflow.parentRunId` = '{run_id}'"
    for run in client.search_runs([client.get_run(run_id).info.experiment_id], left):
        client.set_terminated(run.info.run_id, status)


def _send_version(
    client: Any,
    run_id: str,
    model: str,
    folder: str,
    tags: Mapping[str, str],
    alias: str,
    won: bool,
) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(model)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    known = client.search_model_versions(f"name='{model}'")
    source = f"{client.get_run(run_id).info.artifact_uri}/{folder}"
    own = [
        version for version in known if version.source == source
    ]  # of an attempt that was cut off, or measured otherwise
    version = (
        own[0]
        if own
        else client.create_model_version(model, source, run_id=run_id, tags=dict(tags))
    )
    for key, value in tags.items() if own else ():
        client.set_model_version_tag(model, version.version, key, value)
    holder = str(client.get_registered_model(model).aliases.get(alias))
    rival: Mapping[str, str] = next((one.tags for one in known if str(one.version) == holder), {})
    kept = rival.get("measured_on") == tags["measured_on"] and float(rival["score"]) > float(
        tags["score"]
    )
    if won and not kept:
        client.set_registered_model_alias(model, alias, version.version)
    elif not won and holder == str(version.version):
        client.delete_registered_model_alias(model, alias)


_SENDERS: dict[str, Callable[..., object]] = {
    "metrics": _send_metrics,
    "tag": lambda client, run_id, key, value: client.set_tag(run_id, key, value),
    "table": _send_table,
    "artifact": _send_artifact,
    "dataset": _send_dataset,
    "version": _send_version,
    "children": _end_children,
    "running": lambda client, run_id: client.update_run(run_id, status="RUNNING"),
    "end": lambda client, run_id, status: client.set_terminated(run_id, status),
}
