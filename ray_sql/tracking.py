"""MLflow as the record of a run: one MLflow run per training run, whatever restarts, always ended.

Only the driver talks to MLflow. A configured store must answer at the start. Afterwards nothing
here raises: records that cannot be sent are kept in a spool file, and one warning is printed. The
spool is replayed when the run ends, or when it continues after a restart. A run that belongs to
another one, such as a sweep's trial, may even begin while the store is away. Points carry their
step, and a step that was logged before is not logged again. Where tracking is off, no function
does anything, so callers need not ask. This module is a sink: it knows none of the stages.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple
from urllib.parse import unquote, urlsplit

from ray_sql.config import flatten, mask_password, mask_secrets
from ray_sql.config.sections import TrackingSection
from ray_sql.errors import DamagedFile, StoreError
from ray_sql.files import parse_json, read_text

log = logging.getLogger(__name__)

Status = Literal["FINISHED", "FAILED", "KILLED"]
_Kind = Literal[
    "metrics", "tag", "table", "artifact", "dataset", "version", "children", "running", "end"
]
METRICS_PER_CALL = 1000
"""Metrics that MLflow takes in one call."""
PARAMS_PER_CALL = 100
"""Params that MLflow takes in one call."""
PORTS = {"http": 80, "https": 443, "postgresql": 5432, "mysql": 3306, "mssql": 1433}
"""The usual ports of what may hold MLflow's record."""
DATABASES = {"sqlite", "postgresql", "mysql", "mssql"}
RETRY_SECONDS = 60.0
"""Seconds for which records go straight to the spool after a failure: each try costs seconds."""


class Record(NamedTuple):
    """A line of the file of records that wait."""

    run_id: str
    kind: _Kind
    values: list[Any]


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
    ) -> None:
        self.uri, self.run_id = uri, ""
        self._spool, self._begin, self._waiting = spool, begin, waiting
        self._client: Any = None
        self._logged: set[tuple[str, int]] = set()
        self._stored: set[tuple[str, int]] = set()
        self._warned = False
        self._retry_at = 0.0
        self._lock = threading.RLock()

    def open(self) -> None:
        """Find or create the run. Raises `StoreError` if the store does not answer."""
        if self._client is None and self._begin is not None:
            self._client, self.run_id = self._begin(self)
            if self.run_id:
                self._stored = _logged_points(self._client, self.run_id)
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

    def describe(self, text: str, score: str | None) -> None:
        """Give the run a description in Markdown, and its experiment the score of the first chart.

        MLflow's list of runs takes no columns from the server.
        """
        self.tag({"mlflow.note.content": text})
        if score:
            self._send("score", [score])

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
        """Register the artifact `folder` as a version of `model`, one version a folder.

        A version that `won` gets `alias`. It leaves the alias to a version that was measured on
        the same (tag `measured_on`) with a higher score (tag `score`). A version that did not win
        loses the alias.
        """
        self._send("version", [model, folder, dict(tags), alias, won])

    def end(self, status: Status) -> None:
        """Replay the spool, then set the final status."""
        self.replay()
        self._send("end", [status])

    def end_children(self, status: Status) -> None:
        """Set the final status of every child run that was left running."""
        self._send("children", [status])

    def replay(self) -> int:
        """Send the spool's records, oldest first. Returns the number of records that still wait."""
        with self._lock:
            if self._begin is None or not self._spool.exists():
                return 0
            self._retry_at = 0.0
            lines = _spooled(self._spool)
            while lines and self._replay_line(lines[0]):
                lines.pop(0)
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
        """Return True if a record is settled: sent, or refused for good."""
        if self._begin is None:
            return True
        if time.monotonic() < self._retry_at:
            return False
        try:
            self.open()
            action()
        except Exception as error:  # any backend's: an outage of the record must not end the run
            place = mask_password(self.uri)
            if _is_final(error):
                log.warning("MLflow at %s refused a record: %s", place, _reason(error))
                return True
            if not self._warned:
                log.warning(
                    "MLflow at %s stopped answering (%s); points are kept in %s",
                    place,
                    _reason(error),
                    self._spool,
                )
            self._warned = True
            self._retry_at = time.monotonic() + RETRY_SECONDS
            return False
        return True


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
        with _refusing(run.uri):
            client = _client(run.uri)
            experiment_id = _experiment_id(client, settings.experiment, run.uri)
            earlier = _find_run(client, experiment_id, run_id, own)
            return client, earlier or _create(client, experiment_id, name, tags, params)

    # with clients of its own: mlflow.set_tracking_uri would also set MLFLOW_TRACKING_URI, for
    # whatever this process does next
    run = Run(store_uri(settings.uri), spool, begin, " ".join((own or {}).values()))
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
        return _client(run.uri), run_id

    run = Run(store_uri(settings.uri), spool, begin)
    run.run_id = run_id
    return run


def close(settings: TrackingSection, run_id: str | None, own: Mapping[str, str]) -> None:
    """Mark a run that was cut off, and its children, as killed: nobody will continue them."""
    if not settings.enabled:
        return
    uri = require_store(settings)
    with _refusing(uri):
        client = _client(uri)
        experiment = client.get_experiment_by_name(settings.experiment)
        experiment_id = experiment.experiment_id if experiment else None
        earlier = _find_run(client, experiment_id, run_id, own)
        if earlier:
            if client.get_run(earlier).info.status == "RUNNING":
                client.set_terminated(earlier, "KILLED")
            _end_children(client, earlier, "KILLED")


def read_tag(settings: TrackingSection, run_id: str, key: str) -> str | None:
    """Return a tag of a run; None where the store has no such run or tag."""
    uri = require_store(settings)
    with _refusing(uri):
        client = _client(uri)
        if not run_exists(client, run_id):
            return None
        tag: str | None = client.get_run(run_id).data.tags.get(key)
    return tag


def named(values: Mapping[str, float]) -> dict[str, float]:
    """Return a point's values by MLflow's names: `loss` becomes `train/loss`, a group is kept."""
    return {name if "/" in name else f"train/{name}": value for name, value in values.items()}


def replay(settings: TrackingSection, spool: Path) -> int:
    """Send the records that an earlier run left in its spool. Returns the number that still wait.

    Raises `StoreError` if the store does not answer, or if the records are for another one.
    """
    if not settings.enabled or not spool.exists():
        return 0
    run = reopen(settings, "", spool)
    run.open()
    waiting = run_ids_waiting(spool)
    with _refusing(run.uri):
        is_the_store = any(run_exists(run._client, run_id) for run_id in waiting)
    if waiting and not is_the_store:  # it would refuse all records, and they would be gone
        raise StoreError(
            f"--tracking.uri {mask_password(run.uri)}: has no run {waiting.pop()}, whose "
            f"records wait in {spool}; give the place where it was recorded, or remove the file "
            "if it was deleted there"
        )
    return run.replay()


def run_ids_waiting(spool: Path) -> set[str]:
    """Return the ids of the runs whose records wait in a spool."""
    runs = set()
    for line in _spooled(spool):
        with suppress(DamagedFile):  # the process was killed while it wrote this line
            runs.add(parse_json(Record, line, str(spool), "")[0])
    return {run_id for run_id in runs if " " not in run_id}


def _spooled(spool: Path) -> list[str]:
    """Return the lines of a file of records that wait."""
    return read_text(spool, "remove it: its records are lost").splitlines()


def require_store(settings: TrackingSection) -> str:
    """Return the absolute URI of the tracking store. Raises `StoreError` if it does not answer.

    Where tracking is off, no store is asked.
    """
    uri = store_uri(settings.uri)
    if not settings.enabled:
        return uri
    shown = mask_password(uri)
    try:
        parts = urlsplit(uri)
    except ValueError as error:
        raise StoreError(f"--tracking.uri {shown}: is no address ({error}); correct it") from None
    dialect = parts.scheme.partition("+")[0]
    if dialect in ("http", "https") or (dialect in PORTS and parts.hostname):
        try:
            address = (parts.hostname or "", parts.port or PORTS[dialect])
            socket.create_connection(address, timeout=5).close()
        except (OSError, ValueError) as error:  # the second for a port or name that is none
            raise StoreError(
                f"--tracking.uri {shown}: no MLflow server answers there ({error}); start it, "
                "correct the address (MLFLOW_TRACKING_URI), or use --no-tracking.enabled"
            ) from None
    if parts.scheme in ("http", "https"):
        # a server that dies later must cost seconds, not MLflow's default of many minutes per call
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        # at a run's end MLflow would print where to look, with the password of the address
        os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    elif parts.scheme == "sqlite":
        folder, name = _sqlite_folder(uri), uri.rpartition("/")[2].partition("?")[0]
        if len(name.encode()) > 255:  # MLflow would try for minutes to open it
            raise StoreError(f"--tracking.uri {shown}: its name is too long; give a shorter one")
        if not os.access(folder, os.W_OK):
            raise StoreError(
                f"--tracking.uri {shown}: the folder {folder} is missing or cannot be written"
            )
    with _refusing(uri):
        if dialect in DATABASES:
            _open_database(uri)
        _client(uri).search_experiments(max_results=1)
    return uri


def _open_database(uri: str) -> None:
    """Connect to a database once: one that refuses is tried by MLflow for two minutes."""
    from sqlalchemy import create_engine

    engine = create_engine(uri)
    engine.connect().close()
    engine.dispose()


def store_uri(uri: str | None) -> str:
    """Return the absolute URI of a store, by default of `mlflow.db` in the working directory.

    MLflow reads a relative SQLite path from the working directory, which Ray changes. It decodes
    the path, so a path that is written as its folder is called is encoded here.
    """
    path = "mlflow.db" if uri is None else uri.removeprefix("sqlite:///")
    if path == uri:
        return uri
    folder, _, name = path.rpartition("/")
    if not (Path.cwd() / folder).is_dir():  # no folder is called so: it is encoded already
        folder = unquote(folder)
    file, mark, query = name.partition("?")
    place = Path.cwd() / folder / unquote(file)
    # no more than must be: MLflow prints it, and makes a folder of the encoded name
    encoded = re.sub(r"%(?=[0-9A-Fa-f]{2})", "%25", str(place)).replace("?", "%3F")
    return f"sqlite:///{encoded}{mark}{query}"


def _sqlite_folder(uri: str) -> Path:
    """Return the folder of a SQLite store, from what `store_uri` returns."""
    return Path(unquote(uri.removeprefix("sqlite:///").partition("?")[0])).parent


def _reason(error: Exception) -> str:
    """Return an error's words in one line, without the password that MLflow repeats."""
    return mask_secrets(" ".join(str(error).split()))[:300]


def _is_final(error: Exception) -> bool:
    """Tell whether another try must fail too: a malformed record, a deleted run, a lost file."""
    from mlflow.exceptions import MlflowException

    if isinstance(error, MlflowException):
        return error.get_http_status_code() in (400, 404)
    return isinstance(error, FileNotFoundError)


def _client(uri: str) -> Any:
    from mlflow.tracking import MlflowClient

    logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    client = MlflowClient(uri)
    if uri.startswith("sqlite:///") and unquote(uri) != uri:
        with suppress(OSError):  # there is none, or it holds something and was not MLflow's
            os.removedirs(Path(uri.removeprefix("sqlite:///")).parent)
    return client


@contextmanager
def _refusing(uri: str) -> Iterator[None]:
    """Raise errors of MLflow and its database drivers as a `StoreError`."""
    from alembic.util.exc import CommandError
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    known = (MlflowException, SQLAlchemyError, CommandError, ImportError, OSError, ValueError)
    try:
        yield
    except known as error:
        raise StoreError(
            f"--tracking.uri {mask_password(uri)}: MLflow cannot use it: {_reason(error)}"
        ) from None


def _experiment_id(client: Any, name: str, uri: str) -> str:
    """Find or create an experiment."""
    experiment = client.get_experiment_by_name(name)
    if experiment is not None:
        return str(experiment.experiment_id)
    if not uri.startswith("sqlite:"):
        return str(client.create_experiment(name))
    # without this, artifacts would go to `mlruns` in whatever folder the process happens to be in
    root = _sqlite_folder(uri) / "mlartifacts" / name
    return str(client.create_experiment(name, artifact_location=root.as_uri()))


def _find_run(
    client: Any, experiment_id: str | None, run_id: str | None, own: Mapping[str, str] | None
) -> str | None:
    """Return an earlier attempt's run, by its id or by tags that no other run has."""
    if run_id and run_exists(client, run_id):
        return run_id
    if not own or experiment_id is None:
        return None
    query = " and ".join(f"tags.`{key}` = '{value}'" for key, value in own.items())
    runs = client.search_runs([experiment_id], query, max_results=1)
    return str(runs[0].info.run_id) if runs else None


def run_exists(client: Any, run_id: str) -> bool:
    from mlflow.exceptions import MlflowException

    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code not in {"RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"}:
            raise  # a server that fails for a moment has not lost the run
        return False  # another store than last time: begin a new one
    return bool(run.info.lifecycle_stage == "active")  # a deleted run takes no records


def _create(
    client: Any, experiment_id: str, name: str, tags: Mapping[str, str], settings: Mapping[str, Any]
) -> str:
    from mlflow.entities import Param, RunTag

    run_id = str(client.create_run(experiment_id, run_name=name, tags=dict(tags)).info.run_id)
    params = [Param(key, str(value)[:6000]) for key, value in flatten(settings).items()]
    for first in range(0, len(params), PARAMS_PER_CALL):
        client.log_batch(run_id, params=params[first : first + PARAMS_PER_CALL])
    client.log_batch(run_id, tags=[RunTag("mlflow.source.name", "ray_sql")])
    return run_id


def _logged_points(client: Any, run_id: str) -> set[tuple[str, int]]:
    """Return (name, step) of every metric that the run already has."""
    keys = client.get_run(run_id).data.metrics
    return {(key, point.step) for key in keys for point in client.get_metric_history(run_id, key)}


def _send_metrics(client: Any, run_id: str, *points: Sequence[Any]) -> None:
    from mlflow.entities import Metric

    client.log_batch(run_id, metrics=[Metric(*point) for point in points])


def _send_dataset(
    client: Any, run_id: str, name: str, digest: str, source: str, split: str
) -> None:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    place = json.dumps({"uri": source})
    dataset = Dataset(name=name, digest=digest, source_type="local", source=place)
    client.log_inputs(run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", split)])])


def _send_artifact(client: Any, run_id: str, path: str, folder: str) -> None:
    send = client.log_artifacts if Path(path).is_dir() else client.log_artifact
    send(run_id, path, folder or None)


def _send_score(client: Any, run_id: str, score: str) -> None:
    experiment = client.get_run(run_id).info.experiment_id
    client.set_experiment_tag(experiment, "mlflow.experiment.primaryMetric.name", score)


def _send_table(client: Any, run_id: str, columns: Mapping[str, list[Any]], file: str) -> None:
    """Write a table. MLflow's own call would add the rows to those of an earlier table."""
    folder = str(Path(file).parent).strip(".")
    if file in {artifact.path for artifact in client.list_artifacts(run_id, folder)}:
        rows = list(zip(*columns.values(), strict=True))
        client.log_text(run_id, json.dumps({"columns": list(columns), "data": rows}), file)
    else:
        client.log_table(run_id, columns, file)


def _end_children(client: Any, run_id: str, status: str) -> None:
    running = f"attributes.status = 'RUNNING' and tags.`mlflow.parentRunId` = '{run_id}'"
    for run in client.search_runs([client.get_run(run_id).info.experiment_id], running):
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
    versions = client.search_model_versions(f"name='{model}'")
    source = "/".join((client.get_run(run_id).info.artifact_uri, folder))
    # of an attempt that was cut off, or was measured otherwise
    version = next((version for version in versions if version.source == source), None)
    if version is None:
        version = client.create_model_version(model, source, run_id=run_id, tags=dict(tags))
    else:
        for key, value in tags.items():
            client.set_model_version_tag(model, version.version, key, value)
    holder = str(client.get_registered_model(model).aliases.get(alias))
    if not won:
        if holder == str(version.version):
            client.delete_registered_model_alias(model, alias)
        return
    rival: Mapping[str, str] = next(
        (other.tags for other in versions if str(other.version) == holder), {}
    )
    comparable = rival.get("measured_on") == tags["measured_on"]
    if not comparable or float(rival["score"]) <= float(tags["score"]):
        client.set_registered_model_alias(model, alias, version.version)


_SENDERS: dict[str, Callable[..., object]] = {
    "metrics": _send_metrics,
    "tag": lambda client, run_id, key, value: client.set_tag(run_id, key, value),
    "score": _send_score,
    "table": _send_table,
    "artifact": _send_artifact,
    "dataset": _send_dataset,
    "version": _send_version,
    "children": _end_children,
    "running": lambda client, run_id: client.update_run(run_id, status="RUNNING"),
    "end": lambda client, run_id, status: client.set_terminated(run_id, status),
}
