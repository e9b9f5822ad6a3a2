"""A pool of killable processes that run queries, and the results they gave, each computed once."""

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
from types import TracebackType
from typing import Literal, NamedTuple, Self, TypeVar

from ray_sql.database.query import Limits, Place, QueryResult
from ray_sql.errors import DataError

Item = TypeVar("Item")
Answer = TypeVar("Answer")
Progress = Callable[[int, int], None]
"""Called with the number done and the number of all, from the thread that asked."""

GRACE_SECONDS = 1.0
"""What a worker may take beyond the limit before it is killed: it stops by itself at the limit if it can."""
START_SECONDS = 60.0
CACHE_BYTES = 256 * 2**20
DEFAULT_LIMITS = Limits()
WORKER = Path(__file__).with_name("sqlite_worker.py")
Kind = Literal["sqlite", "postgresql"]
SQLITE_HEADER = b"SQLite format 3\0"
WAL_VERSION = 2
PACKAGES = Path(__file__).parents[2]


class Executor:
    """Runs untrusted queries, `workers` at a time; use it as a context manager, from any number of threads.

    Results are kept by (database, sql, limits), so that a gold query runs once however many predictions it judges. A SQLite
    file that changed is another database; of a server no change can be seen, so an executor should live no longer than its
    content is meant to stay.
    """

    def __init__(self, workers: int | None = None, limits: Limits = DEFAULT_LIMITS) -> None:
        self.workers = workers or os.cpu_count() or 1
        self.limits = limits
        self._results = _Results()
        self._closed = False
        # A slot is None until it is needed, so that an executor that runs nothing starts nothing.
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
        self.close()

    def close(self) -> None:
        """Wait for running queries and end every worker."""
        if self._closed:
            return
        self._closed = True
        for _ in range(self.workers):
            if (worker := self._slots.get()) is not None:
                worker.kill()

    def run(
        self, database: Place, sql: str, limits: Limits | None = None, *, again: bool = False
    ) -> QueryResult:
        """Run one query, or return what it gave before; `again` runs it in any case, for its seconds.

        Raises DataError where `database` is missing, out of reach, or neither a SQLite file nor a PostgreSQL URL; whatever
        the query does wrong is a result.
        """
        if self._closed:
            raise RuntimeError("this Executor is closed")
        source = (
            _server(database)
            if isinstance(database, str) and "://" in database
            else _file(Path(database))
        )
        limits = limits or self.limits
        if again:
            return self._run_in_worker(source, sql, limits).result
        return self._results.get(
            (source, sql, limits), lambda: self._run_in_worker(source, sql, limits)
        )

    def run_many(
        self,
        queries: Sequence[tuple[Place, str]],
        *,
        limits: Limits | None = None,
        progress: Progress | None = None,
    ) -> list[QueryResult]:
        """Run (database, sql) pairs in parallel; results in the order of the pairs."""
        return self.map(lambda query: self.run(*query, limits), queries, progress)

    def map(
        self,
        function: Callable[[Item], Answer],
        items: Sequence[Item],
        progress: Progress | None = None,
    ) -> list[Answer]:
        """Apply a function that calls `run` to every item, one thread per worker; answers in input order."""
        with ThreadPoolExecutor(self.workers) as threads:
            futures = [threads.submit(function, item) for item in items]
            try:
                for done, future in enumerate(as_completed(futures), start=1):
                    future.result()
                    if progress is not None:
                        progress(done, len(futures))
            except BaseException:
                threads.shutdown(wait=False, cancel_futures=True)
                raise
        return [future.result() for future in futures]

    def _run_in_worker(self, source: "_Source", sql: str, limits: Limits) -> "_Sized":
        worker = self._slots.get()
        try:
            if worker is not None and worker.kind != source.kind:
                worker.kill()
                worker = None
            if worker is None or not worker.alive():
                worker = _Worker(source.kind)
            return worker.ask(source.uri, sql, limits)
        finally:
            self._slots.put(worker if worker is not None and worker.alive() else None)


class _Sized(NamedTuple):
    """A result and roughly how many bytes it holds."""

    result: QueryResult
    size: int


class _Worker:
    """One child process and the socket to it."""

    def __init__(self, kind: Kind) -> None:
        self.kind = kind
        self._socket, theirs = Pipe()
        command, environment = _start(kind)
        with theirs:
            self._process = subprocess.Popen(
                [*command, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
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
        """Whether the process can take a query."""
        return self._process.poll() is None

    def ask(self, uri: str, sql: str, limits: Limits) -> _Sized:
        """Run one query there; a process that hangs or dies is ended and what it did is the result."""
        try:
            self._socket.send_bytes(marshal.dumps((uri, sql, *astuple(limits))))
            if not self._socket.poll(limits.seconds + GRACE_SECONDS):
                self.kill()
                error = f"timeout: killed after {limits.seconds:g} s"
                return _Sized(
                    QueryResult("timeout", (), (), error, limits.seconds + GRACE_SECONDS), 0
                )
            reply = self._socket.recv_bytes()
        except (EOFError, ConnectionError):
            self.kill()
            error = (
                f"crash: the process that ran the query ended with code {self._process.returncode}"
            )
            return _Sized(QueryResult("crash", (), (), error, 0.0), 0)
        status, *rest = marshal.loads(reply)
        if status == "unreachable":
            raise DataError(
                f"cannot connect to PostgreSQL: {rest[2]}; check the URL, and PGPASSWORD or ~/.pgpass"
            )
        return _Sized(QueryResult(status, *rest), len(reply))

    def kill(self) -> None:
        """End the process and free its socket."""
        self._process.kill()
        self._process.wait()
        self._socket.close()


def _start(kind: Kind) -> tuple[list[str], dict[str, str]]:
    """Command and environment of a worker.

    For SQLite by path and isolated: no fork of this process (which may hold torch and threads), no import of anything but the
    standard library, and no token from the environment within reach of the query. For PostgreSQL, where queries run elsewhere,
    with the packages of this process and what libpq takes from the environment (PGPASSWORD, ~/.pgpass).
    """
    names = ["PATH", "LD_LIBRARY_PATH"]
    if kind == "sqlite":
        command = [sys.executable, "-I", "-S", str(WORKER)]
    else:
        command = [sys.executable, "-P", "-m", "ray_sql.database.postgres_worker"]
        names += ["HOME", *(name for name in os.environ if name.startswith("PG"))]
    environment = {name: os.environ[name] for name in names if name in os.environ}
    if kind == "postgresql":
        environment["PYTHONPATH"] = os.pathsep.join(
            path for path in [str(PACKAGES), *sys.path] if path
        )
    return command, environment


class _Results:
    """Results by key, each computed once even if many threads ask at the same time; the oldest go first."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._futures: OrderedDict[Hashable, Future[_Sized]] = OrderedDict()
        self._size = 0

    def get(self, key: Hashable, compute: Callable[[], _Sized]) -> QueryResult:
        """The result kept under `key`, or that of `compute()`."""
        with self._lock:
            future = self._futures.get(key)
            mine = future is None
            if future is None:
                future = self._futures[key] = Future()
            else:
                self._futures.move_to_end(key)
        if mine:
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
            if sized.result.status in ("timeout", "crash"):
                del self._futures[
                    key
                ]  # may be the machine's fault and not the query's: the next asker tries again
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
    """Where a database is and which state of it: equal values read equal rows.

    The state is size and time of change, not a hash of the content: hashing reads a file of gigabytes to run a query
    that touches a page, and on a file system with nanosecond times a change that leaves both alone takes intent.
    """

    kind: Kind
    uri: str
    state: tuple[int, ...]


def _server(url: str) -> _Source:
    """A PostgreSQL URL as libpq reads it; DataError where it is another server's, or psycopg is not installed."""
    dialect, _, rest = url.partition("://")
    if not is_postgresql(url):
        raise DataError(
            f"{dialect}: queries can be executed on SQLite files and on PostgreSQL (postgresql://…), on nothing else"
        )
    if find_spec("psycopg") is None:
        raise DataError(
            "PostgreSQL needs psycopg, which is not installed: pip install -e '.[postgres]'"
        )
    return _Source("postgresql", f"postgresql://{rest}", ())


def is_postgresql(url: str) -> bool:
    """Whether a URL names a PostgreSQL database: by libpq's scheme, or by SQLAlchemy's with any driver."""
    return url.partition("://")[0].partition("+")[0] in ("postgresql", "postgres")


def _file(database: Path) -> _Source:
    """Find an SQLite file and how to open it without ever creating or changing one; DataError if it is none."""
    path = database.resolve()
    try:
        with path.open("rb") as file:
            header = file.read(len(SQLITE_HEADER) + 4)
            found = os.fstat(file.fileno())
    except OSError as error:
        raise DataError(
            f"{database}: cannot open this database ({error.strerror}); check the path"
        ) from error
    if not header.startswith(SQLITE_HEADER):
        raise DataError(
            f"{database}: not an SQLite database ({found.st_size} bytes); check the path"
        )
    uri, state = f"{path.as_uri()}?mode=ro", (found.st_ino, found.st_size, found.st_mtime_ns)
    if WAL_VERSION not in header[18:20]:
        return _Source("sqlite", uri, state)
    log, index = (path.with_name(path.name + end) for end in ("-wal", "-shm"))
    if not log.exists() or not (written := log.stat()).st_size:
        # Nobody writes: say so, or a reader would create the two side files, which a worker may not.
        return _Source("sqlite", f"{uri}&immutable=1", state)
    if not index.exists():
        raise DataError(
            f"{database}: holds changes that a crash left in {log.name}; open it once with sqlite3 to merge"
        )
    # Read-only, or the first reader after a crash would empty the index and could not fill it again.
    return _Source(
        "sqlite", f"{uri}&readonly_shm=1", (*state, written.st_size, written.st_mtime_ns)
    )
