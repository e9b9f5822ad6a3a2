"""Run queries in a pool of killable processes, and compute each result once."""

import logging
import marshal
import os
import queue
import subprocess
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import astuple
from importlib.util import find_spec
from multiprocessing import Pipe
from pathlib import Path
from stat import S_ISREG
from types import TracebackType
from typing import Literal, NamedTuple, Self, TypeVar

from ray_sql.database.query import Limits, Place, QueryResult, may_change
from ray_sql.errors import DataError

Item = TypeVar("Item")
Answer = TypeVar("Answer")
Progress = Callable[[int, int], None]
"""Called with (done, total), in the calling thread."""

logger = logging.getLogger(__name__)
GRACE_SECONDS = 1.0
"""Time beyond the limit before a worker is killed; it stops by itself at the limit if it can."""
START_SECONDS = 60.0
CACHE_BYTES = 256 * 2**20
DEFAULT_LIMITS = Limits()
WORKER = Path(__file__).with_name("sqlite_worker.py")
Kind = Literal["sqlite", "postgresql", "script"]
SQLITE_HEADER = b"SQLite format 3\0"
WAL_VERSION = 2
PACKAGES = Path(__file__).parents[2]


class Executor:
    """Run untrusted queries, `workers` at a time, from any number of threads; a context manager.

    Results are cached by (database, sql, limits), so a gold query runs once for all predictions.
    A query that draws at random or reads the clock is run each time.
    A SQLite file that changed counts as another database. A change on a server cannot be seen, so
    use an executor no longer than the server's content stays the same.
    """

    def __init__(self, workers: int | None = None, limits: Limits = DEFAULT_LIMITS) -> None:
        self.workers = workers or os.cpu_count() or 1
        self.limits = limits
        self._results = _Results()
        self._closed = False
        self._stopped = False
        self._overstayed = 0
        self._started: set[_Worker] = set()
        """Workers that were started and not ended, idle or not."""
        # A slot is None until it is needed, so an idle executor starts no process.
        self._slots: queue.LifoQueue[_Worker | None] = queue.LifoQueue()
        for _ in range(self.workers):
            self._slots.put(None)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:
            self.kill()
        self.close()

    def kill(self) -> None:
        """End running queries at once; each counts as a crash."""
        for worker in list(self._started):
            worker.end()

    def close(self) -> None:
        """Wait for running queries and end every worker."""
        if self._closed:
            return
        self._closed = True
        for _ in range(self.workers):
            worker = self._slots.get()
            if worker is not None:
                worker.kill()

    def run(
        self, database: Place, sql: str, limits: Limits | None = None, *, again: bool = False
    ) -> QueryResult:
        """Run one query, or return its cached result; `again` runs it anew, to time it.

        Raises:
            DataError: `database` is missing, unreachable, or neither a SQLite file nor a
                PostgreSQL URL. A mistake in the query is a result instead.
        """
        self._check_open()
        is_url = isinstance(database, str) and "://" in database
        source = _server(str(database)) if is_url else _file(Path(database))
        limits = limits or self.limits
        if again or may_change(sql):
            return self._run_in_worker(source, sql, limits).result
        return self._results.get(
            (source, sql, limits), lambda: self._run_in_worker(source, sql, limits)
        )

    def build(self, script: str) -> QueryResult:
        """Run CREATE and INSERT statements in an empty database, under the limits of a query.

        The one cell of the result is the content of the SQLite file. No file is written.
        """
        return self._run_in_worker(_Source("script", "", ()), script, self.limits).result

    def run_many(
        self,
        queries: Sequence[tuple[Place, str]],
        *,
        limits: Limits | None = None,
        progress: Progress | None = None,
    ) -> list[QueryResult]:
        """Run (database, sql) pairs in parallel; return results in the order of the pairs."""
        return self.map(lambda query: self.run(*query, limits), queries, progress)

    def forget(self) -> None:
        """Drop all cached results: a server's content may have changed."""
        self._results = _Results()

    def map(
        self,
        function: Callable[[Item], Answer],
        items: Sequence[Item],
        progress: Progress | None = None,
    ) -> list[Answer]:
        """Apply a function that calls `run` to every item, in threads; return answers in order."""
        with ThreadPoolExecutor(self.workers) as threads:
            futures = [threads.submit(function, item) for item in items]
            try:
                for done, future in enumerate(as_completed(futures), start=1):
                    future.result()
                    if progress is not None:
                        progress(done, len(futures))
            except BaseException as error:
                threads.shutdown(wait=False, cancel_futures=True)
                self._stopped |= not isinstance(error, Exception)  # a signal: nothing may follow
                self.kill()
                raise
        return [future.result() for future in futures]

    def _check_open(self) -> None:
        if self._closed or self._stopped:
            raise RuntimeError("this Executor is closed")

    def _run_in_worker(self, source: "_Source", sql: str, limits: Limits) -> "_Sized":
        worker = self._slots.get()
        try:
            if worker is not None and worker.kind != source.kind:
                self._started.discard(worker)
                worker.kill()
                worker = None
            if worker is None or not worker.alive():
                worker = _Worker(source.kind)
                self._started.add(worker)
                self._check_open()  # it may have been stopped since
            answer = worker.ask(source.uri, sql, limits)
        except ServerFull as error:
            if not self._overstayed:
                raise
            busy = f"timeout: {self._overstayed} queries before overstayed, and {error}"
            return _Sized(QueryResult("timeout", (), (), busy, 0.0), 0)
        else:
            if source.kind == "postgresql" and not worker.alive():
                self._overstayed += 1
                logger.warning(
                    "PostgreSQL did not stop a query after %g s; one of its processes named "
                    "`ray_sql` in pg_stat_activity may stay busy",
                    limits.seconds,
                )
            return answer
        finally:
            if worker is not None and not worker.alive():
                self._started.discard(worker)
                worker = None
            self._slots.put(worker)


class ServerFull(DataError):
    """A server that has no connection left, for now."""


class _Sized(NamedTuple):
    """A result and its approximate size in bytes."""

    result: QueryResult
    size: int


class _Worker:
    """One child process and the socket to it."""

    def __init__(self, kind: Kind) -> None:
        self.kind = kind
        self._socket, child_socket = Pipe()
        command, environment = _command(kind)
        with child_socket:
            self._process = subprocess.Popen(
                [*command, str(child_socket.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=(child_socket.fileno(),),
                env=environment,
            )
        try:
            if not self._socket.poll(START_SECONDS):
                raise TimeoutError(f"no sign of life within {START_SECONDS:g} s")
            self._socket.recv_bytes()
        except (EOFError, OSError) as error:
            self.kill()
            raise RuntimeError(f"an SQL worker did not start: {' '.join(command)}") from error

    def alive(self) -> bool:
        """Tell whether the process can take a query."""
        return self._process.poll() is None

    def ask(self, uri: str, sql: str, limits: Limits) -> _Sized:
        """Run one query in the process; a process that hangs or dies is a result too."""
        try:
            self._socket.send_bytes(marshal.dumps((uri, sql, *astuple(limits))))
            if not self._socket.poll(limits.seconds + GRACE_SECONDS):
                self.kill()
                error = f"timeout: killed after {limits.seconds:g} s"
                seconds = limits.seconds + GRACE_SECONDS
                return _Sized(QueryResult("timeout", (), (), error, seconds), 0)
            reply = self._socket.recv_bytes()
        except (EOFError, ConnectionError):
            self.kill()
            code = self._process.returncode
            error = f"crash: the process that ran the query ended with code {code}"
            return _Sized(QueryResult("crash", (), (), error, 0.0), 0)
        except BaseException:  # a signal: the next query would get this one's answer
            self.kill()
            raise
        status, columns, rows, error, seconds = marshal.loads(reply)
        if status == "full":
            raise ServerFull(
                f"PostgreSQL has no connection left: {error}; lower --evaluate.processes, or raise "
                "the limit of the role or server"
            )
        if status == "unreachable":
            raise DataError(
                f"cannot connect to PostgreSQL: {error}; check the URL, and PGPASSWORD or ~/.pgpass"
            )
        return _Sized(QueryResult(status, columns, rows, error, seconds), len(reply))

    def end(self) -> None:
        """End the process; whoever waits for its answer learns of it."""
        self._process.kill()

    def kill(self) -> None:
        """End the process and free its socket."""
        self._process.kill()
        self._process.wait()
        self._socket.close()


def _command(kind: Kind) -> tuple[list[str], dict[str, str]]:
    """Return command and environment of a worker.

    A worker for SQLite starts by path and isolated. It does not fork this process, which may hold
    torch and threads. It imports the standard library only, and no token of the environment is
    within reach of the query. A worker for PostgreSQL runs no query itself, so it gets the packages
    of this process and the variables that libpq reads (PGPASSWORD, ~/.pgpass).
    """
    names = ["PATH", "LD_LIBRARY_PATH"]
    if kind == "postgresql":
        names += ["HOME", *(name for name in os.environ if name.startswith("PG"))]
    environment = {name: os.environ[name] for name in names if name in os.environ}
    # A heap for each thread would take 64 MiB of the memory that the limit leaves.
    environment["MALLOC_ARENA_MAX"] = "1"
    if kind != "postgresql":
        action = ["build"] if kind == "script" else []
        return [sys.executable, "-I", "-S", str(WORKER), *action], environment
    command = [sys.executable, "-P", "-m", "ray_sql.database.postgres_worker"]
    paths = [path for path in [str(PACKAGES), *sys.path] if path]
    return command, environment | {"PYTHONPATH": os.pathsep.join(paths)}


class _Results:
    """Results by key, each computed once for any number of threads; the oldest go first."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._futures: OrderedDict[Hashable, Future[_Sized]] = OrderedDict()
        self._size = 0

    def get(self, key: Hashable, compute: Callable[[], _Sized]) -> QueryResult:
        """Return the result cached under `key`, or that of `compute()`."""
        with self._lock:
            future = self._futures.get(key)
            is_first = future is None
            if future is None:
                future = self._futures[key] = Future()
            else:
                self._futures.move_to_end(key)
        if is_first:
            self._fill(key, future, compute)
        return future.result().result

    def _fill(self, key: Hashable, future: "Future[_Sized]", compute: Callable[[], _Sized]) -> None:
        try:
            sized = compute()
        except BaseException as error:
            with self._lock:
                del self._futures[key]
            future.set_exception(error)
            raise
        future.set_result(sized)
        with self._lock:
            # These may be the machine's fault and not the query's: the next caller tries again.
            if sized.result.status in ("timeout", "crash"):
                del self._futures[key]
                return
            self._size += sized.size
            if self._size > CACHE_BYTES:
                self._shrink()

    def _shrink(self) -> None:
        for key, future in list(self._futures.items()):
            if self._size <= CACHE_BYTES:
                return
            if future.done():
                self._size -= self._futures.pop(key).result().size


class _Source(NamedTuple):
    """A database and its state: equal values read equal rows.

    The state is size and time of change, not a hash of the content. Hashing would read a file of
    gigabytes for a query that touches one page. On a file system with nanosecond times, only
    intent makes a change that alters neither.
    """

    kind: Kind
    uri: str
    state: tuple[int, ...]


def _server(url: str) -> _Source:
    """Return a PostgreSQL URL as libpq reads it.

    Raises:
        DataError: another server's URL, or psycopg is not installed.
    """
    dialect, _, rest = url.partition("://")
    if dialect.partition("+")[0] not in ("postgresql", "postgres"):
        raise DataError(
            f"{dialect}: queries can be executed on SQLite files and on PostgreSQL "
            "(postgresql://…), on nothing else"
        )
    if find_spec("psycopg") is None:
        raise DataError(
            "PostgreSQL needs psycopg, which is not installed: pip install -e '.[postgres]'"
        )
    return _Source("postgresql", f"postgresql://{rest}", ())


def sqlite_uri(database: Path) -> str:
    """Return the URI by which SQLite reads a file without creating or changing one.

    Raises `DataError` where it is no database that can be read.
    """
    return _file(database).uri


def _file(database: Path) -> _Source:
    """Find out how to open a SQLite file without ever creating or changing one.

    Raises:
        DataError: the file is missing, is no SQLite database, or needs a repair after a crash.
    """
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
    if not header.startswith(SQLITE_HEADER):
        raise DataError(
            f"{database}: not an SQLite database ({stat.st_size} bytes); check the path"
        )
    for end in ("-journal", "-wal", "-shm"):
        side = path.with_name(path.name + end)
        if side.exists() and not side.is_file():
            raise DataError(f"{side}: is no file, but SQLite would open it; remove it")
    uri = f"{path.as_uri()}?mode=ro"
    state: tuple[int, ...] = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
    if WAL_VERSION not in header[18:20]:
        return _Source("sqlite", uri, state)
    log, index = (path.with_name(path.name + end) for end in ("-wal", "-shm"))
    log_stat = log.stat() if log.exists() else None
    if log_stat is None or not (log_stat.st_size or index.exists()):
        # Nobody has it open: say so, or a reader would create the two side files, as no worker may.
        return _Source("sqlite", f"{uri}&immutable=1", state)
    if not index.exists():
        raise DataError(
            f"{database}: holds changes that a crash left in {log.name}; open it once with sqlite3 "
            "to merge"
        )
    # Read-only: else the first reader after a crash empties the index and cannot fill it again.
    state = (*state, log_stat.st_size, log_stat.st_mtime_ns)
    return _Source("sqlite", f"{uri}&readonly_shm=1", state)
