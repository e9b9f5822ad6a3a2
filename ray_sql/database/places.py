"""Name the kinds of databases that run queries, and tell how a place of each is opened."""

import os
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from stat import S_ISREG
from typing import NamedTuple

from ray_sql.database.query import Place
from ray_sql.errors import DataError

SQLITE_HEADER = b"SQLite format 3\0"
DUCKDB_MARK = b"DUCK"
DUCKDB_MARK_AT = 8
WAL_VERSION = 2
LOOP = Path(__file__).with_name("worker.py")
PACKAGES = Path(__file__).parents[2]


@dataclass(frozen=True)
class Kind:
    """A kind of database, with the worker that asks it: a module and its class.

    A worker without a `package` runs queries itself, isolated. It does not fork this process, which
    may hold torch and threads. It imports the standard library only, and no token of the
    environment is within reach of a query. One with a `package` gets the packages of this process.
    """

    name: str
    dialect: str
    """Its SQL, as SQLAlchemy names it."""
    worker: tuple[str, str]
    schemes: tuple[str, ...] = ()
    """The beginnings of a server's URLs, the first as its driver reads it."""
    package: str = ""
    extra: str = ""
    """The extra of this project that installs the package."""
    variables: tuple[str, ...] = ()
    """The beginnings of the variables that its driver reads."""
    way_out: str = ""
    """The way out where it cannot be opened."""
    busy: str = ""
    """Where a query that the server did not stop is seen."""

    def command(self) -> list[str]:
        """Return the command of a worker, without the number of its socket."""
        isolated = ["-P"] if self.package else ["-I", "-S"]
        return [sys.executable, *isolated, str(LOOP), *self.worker]

    def environment(self) -> dict[str, str]:
        """Return the environment of a worker."""
        names = ["PATH", "LD_LIBRARY_PATH"]
        if self.variables:
            names += ["HOME", *(name for name in os.environ if name.startswith(self.variables))]
        environment = {name: os.environ[name] for name in names if name in os.environ}
        # A heap for each thread would take 64 MiB of the memory that the limit leaves.
        environment["MALLOC_ARENA_MAX"] = "1"
        if self.package:
            paths = [path for path in [str(PACKAGES), *sys.path] if path]
            environment["PYTHONPATH"] = os.pathsep.join(paths)
        return environment


SQLITE = Kind("SQLite", "sqlite", ("sqlite_worker", "Query"))
SCRIPT = Kind("SQLite", "sqlite", ("sqlite_worker", "Script"))
DUCKDB = Kind(
    "DuckDB",
    "duckdb",
    ("duckdb_worker", "Query"),
    package="duckdb",
    extra="duckdb",
    way_out="close the program that has it open, or check it with duckdb",
)
POSTGRESQL = Kind(
    "PostgreSQL",
    "postgresql",
    ("postgres_worker", "Query"),
    schemes=("postgresql", "postgres"),
    package="psycopg",
    extra="postgres",
    variables=("PG",),
    way_out="check the URL, and PGPASSWORD or ~/.pgpass",
    busy="`ray_sql` in pg_stat_activity",
)
MYSQL = Kind(
    "MySQL",
    "mysql",
    ("mysql_worker", "Query"),
    schemes=("mysql", "mariadb"),
    package="pymysql",
    extra="mysql",
    variables=("MYSQL_PWD",),
    way_out="check the URL, and its password or MYSQL_PWD",
    busy="`ray_sql` in SHOW PROCESSLIST",
)
SERVERS = (POSTGRESQL, MYSQL)
"""The kinds that a URL leads to."""


class Source(NamedTuple):
    """A database and its state: equal values read equal rows.

    The state is size and time of change, not a hash of the content. Hashing would read a file of
    gigabytes for a query that touches one page. On a file system with nanosecond times, only
    intent makes a change that alters neither.
    """

    kind: Kind
    uri: str
    state: tuple[int, ...]


def source(database: Place) -> Source:
    """Return how to open a database without ever creating or changing one.

    Raises:
        DataError: a file that is missing, no database, or in need of a repair after a crash. Or
            the URL of another server, or a package is not installed.
    """
    if not (isinstance(database, str) and "://" in database):
        return _file(Path(database))
    scheme, _, rest = database.partition("://")
    kind = kind_of(database)
    if kind is None:
        raise DataError(f"{scheme}: queries can be executed on {EXECUTABLE}, on nothing else")
    return Source(installed(kind), f"{kind.schemes[0]}://{rest}", ())


def kind_of(url: str) -> Kind | None:
    """Return the kind of server that a URL leads to; None where no queries run."""
    dialect = url.partition("://")[0].partition("+")[0]
    return next((kind for kind in SERVERS if dialect in kind.schemes), None)


def dialect_of(place: Place | None) -> str | None:
    """Return the dialect of a place, as SQLAlchemy names it; None where there is no database."""
    if not place:
        return None
    url = str(place)
    if "://" in url:
        kind = kind_of(url)
        return None if kind is None else kind.dialect
    return _file(Path(url)).kind.dialect if Path(url).is_file() else None


def installed(kind: Kind) -> Kind:
    """Return the kind; raise `DataError` where its package is not installed."""
    if kind.package and find_spec(kind.package) is None:
        raise DataError(
            f"{kind.name} needs {kind.package}, which is not installed: pip install -e "
            f"'.[{kind.extra}]'"
        )
    return kind


EXECUTABLE = "SQLite and DuckDB files, on PostgreSQL (postgresql://…) and MySQL (mysql://…)"
"""Where queries run, in words."""


def sqlite_uri(database: Path) -> str | None:
    """Return the URI by which SQLite reads a file without creating or changing one.

    It is None for a file of another kind. Raises `DataError` where it is no database.
    """
    found = _file(database)
    return found.uri if found.kind == SQLITE else None


def _file(database: Path) -> Source:
    """Find out how to open a file without ever creating or changing one."""
    path = database.resolve()
    try:
        # Not waiting: nobody may ever write to a pipe, which a check before would not exclude.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            stat = os.fstat(file.fileno())
            if not S_ISREG(stat.st_mode):
                raise DataError(f"{database}: is no file (a folder, a pipe or a device); remove it")
            header = file.read(len(SQLITE_HEADER) + 4)
    except OSError as error:
        raise DataError(
            f"{database}: cannot open this database ({error.strerror}); check the path"
        ) from error
    state = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
    if header.startswith(SQLITE_HEADER):
        return _sqlite(database, path, WAL_VERSION in header[18:20], state)
    if header.startswith(DUCKDB_MARK, DUCKDB_MARK_AT):
        return _duckdb(database, path, state)
    raise DataError(
        f"{database}: not an SQLite database, nor DuckDB's ({stat.st_size} bytes); check the path"
    )


def _duckdb(database: Path, path: Path, state: tuple[int, ...]) -> Source:
    log = path.with_name(f"{path.name}.wal")
    if log.exists():
        raise DataError(
            f"{database}: changes are still in {log.name}; close the program that writes it, or "
            "open it once with duckdb to merge"
        )
    return Source(installed(DUCKDB), str(path), state)


def _sqlite(database: Path, path: Path, has_log: bool, state: tuple[int, ...]) -> Source:
    for end in ("-journal", "-wal", "-shm"):
        side = path.with_name(path.name + end)
        if side.exists() and not side.is_file():
            raise DataError(f"{side}: is no file, but SQLite would open it; remove it")
    uri = f"{path.as_uri()}?mode=ro"
    if not has_log:
        return Source(SQLITE, uri, state)
    log, index = (path.with_name(path.name + end) for end in ("-wal", "-shm"))
    log_stat = log.stat() if log.exists() else None
    if log_stat is None or not (log_stat.st_size or index.exists()):
        # Nobody has it open: say so, or a reader would create the two side files, as no worker may.
        return Source(SQLITE, f"{uri}&immutable=1", state)
    if not index.exists():
        raise DataError(
            f"{database}: holds changes that a crash left in {log.name}; open it once with sqlite3 "
            "to merge"
        )
    # Read-only: else the first reader after a crash empties the index and cannot fill it again.
    state = (*state, log_stat.st_size, log_stat.st_mtime_ns)
    return Source(SQLITE, f"{uri}&readonly_shm=1", state)
