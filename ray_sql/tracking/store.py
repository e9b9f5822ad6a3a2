"""The store of MLflow's records: its address, whether it answers, and clients of it."""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from ray_sql.config import mask_password, mask_secrets
from ray_sql.config.sections import TrackingSection
from ray_sql.errors import StoreError

PORTS = {"http": 80, "https": 443, "postgresql": 5432, "mysql": 3306, "mssql": 1433}
"""The usual ports of what may hold MLflow's record."""
NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}
"""Errors of a file system that makes no hard links."""
DATABASES = {"sqlite", "postgresql", "mysql", "mssql"}
FINAL = (FileNotFoundError, NotImplementedError, TypeError, AttributeError, ImportError)
"""Errors that are no outage: a lost file, or a store that lacks what a record needs."""

PASSING = {401, 408, 425, 429}
"""HTTP statuses of refusals that pass: a sign-in that expired, and a server that is busy."""


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
        folder, name = _sqlite_file(uri).parent, uri.rpartition("/")[2].partition("?")[0]
        if len(name.encode()) > 255:  # MLflow would try for minutes to open it
            raise StoreError(f"--tracking.uri {shown}: its name is too long; give a shorter one")
        if not os.access(folder, os.W_OK):
            raise StoreError(
                f"--tracking.uri {shown}: the folder {folder} is missing or cannot be written"
            )
    with refusing(uri):
        if parts.scheme == "sqlite":
            _create_sqlite(_sqlite_file(uri))
        if dialect in DATABASES:
            _open_database(uri)
        client_of(uri).search_experiments(max_results=1)
    return uri


def _open_database(uri: str) -> None:
    """Connect to a database once: one that refuses is tried by MLflow for two minutes."""
    from sqlalchemy import create_engine

    engine = create_engine(uri)
    engine.connect().close()
    engine.dispose()


def _create_sqlite(file: Path) -> None:
    """Make a new store under another name first: a run killed meanwhile leaves no half one.

    MLflow refuses a store whose tables are not all there. Where the folder knows no hard links,
    MLflow makes the store in its place.
    """
    if file.exists():
        return
    with tempfile.TemporaryDirectory() as place:
        made, beside = Path(place) / "new.db", file.with_name(f".{file.name}.{os.getpid()}")
        client_of(f"sqlite:///{made}").search_experiments(max_results=1)
        try:
            shutil.copyfile(made, beside)
            with suppress(FileExistsError):  # another run was first
                os.link(beside, file)
        except OSError as error:
            if error.errno not in NO_LINKS:
                raise
        finally:
            beside.unlink(missing_ok=True)


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


def _sqlite_file(uri: str) -> Path:
    """Return the file of a SQLite store, from what `store_uri` returns."""
    return Path(unquote(uri.removeprefix("sqlite:///").partition("?")[0]))


def reason(error: Exception) -> str:
    """Return an error's words in one line, else its name, without the password MLflow repeats."""
    return mask_secrets(" ".join(str(error).split()))[:300] or type(error).__name__


def is_final(error: Exception) -> bool:
    """Tell whether another try must fail too.

    So it is for a malformed record, a deleted run, a lost file, and what a store cannot hold.
    """
    from mlflow.exceptions import MlflowException

    if isinstance(error, MlflowException):
        return error.get_http_status_code() in (400, 404, 501)
    return isinstance(error, FINAL)


def is_refusal(error: Exception) -> bool:
    """Tell whether a store answers and takes this record from nobody, or not from this user.

    So it is for a missing permission and for a file that is too large. Another record may pass.
    """
    if isinstance(error, PermissionError):
        return True
    status = _status(error)
    return status is not None and 400 <= status < 500 and status not in PASSING


def _status(error: Exception) -> int | None:
    """Return the HTTP status of an error; None where it has none."""
    from mlflow.exceptions import MlflowException

    # MLflow has no code of its own for 413, among others, and says it in words
    said = re.search(r"failed with error code (\d{3})\b", str(error))
    if isinstance(error, MlflowException):
        return int(said[1]) if said else error.get_http_status_code()
    return getattr(getattr(error, "response", None), "status_code", None)


def client_of(uri: str) -> Any:
    """Return a client of a store."""
    from mlflow.tracking import MlflowClient

    logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    client = MlflowClient(uri)
    if uri.startswith("sqlite:///") and unquote(uri) != uri:
        with suppress(OSError):  # there is none, or it holds something and was not MLflow's
            os.removedirs(Path(uri.removeprefix("sqlite:///")).parent)
    return client


@contextmanager
def refusing(uri: str) -> Iterator[None]:
    """Raise errors of MLflow and its database drivers as a `StoreError`."""
    from alembic.util.exc import CommandError
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    known = (MlflowException, SQLAlchemyError, CommandError, ImportError, OSError, ValueError)
    try:
        yield
    except known as error:
        raise StoreError(
            f"--tracking.uri {mask_password(uri)}: MLflow cannot use it: {reason(error)}"
        ) from None


def experiment_id_of(client: Any, name: str, uri: str) -> str:
    """Find or create an experiment."""
    experiment = client.get_experiment_by_name(name)
    if experiment is not None:
        return str(experiment.experiment_id)
    if not uri.startswith("sqlite:"):
        return str(client.create_experiment(name))
    # without this, artifacts would go to `mlruns` in whatever folder the process happens to be in
    root = _sqlite_file(uri).parent / "mlartifacts" / name
    return str(client.create_experiment(name, artifact_location=root.as_uri()))


def find_run(
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
    """Tell whether a store has a run that was not deleted: a deleted one takes no records."""
    run = _find(client, run_id)
    return run is not None and bool(run.info.lifecycle_stage == "active")


def has_held(client: Any, run_id: str) -> bool:
    """Tell whether a store has a run, deleted or not."""
    return _find(client, run_id) is not None


def _find(client: Any, run_id: str) -> Any:
    """Return a run, deleted or not; None where the store has none, as another one than last time.

    A server that fails for a moment has not lost the run, and its error is raised.
    """
    from mlflow.exceptions import MlflowException

    try:
        return client.get_run(run_id)
    except MlflowException as error:
        if error.error_code not in {"RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"}:
            raise
        return None
