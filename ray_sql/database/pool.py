"""Run queries in a pool of killable processes, and compute each result once."""

import logging
import marshal
import os
import queue
import subprocess
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import astuple, replace
from multiprocessing import Pipe
from types import TracebackType
from typing import NamedTuple, Self, TypeVar

from ray_sql.database.places import SCRIPT, Kind, Source, source
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


class Executor:
    """Run untrusted queries, `workers` at a time, from any number of threads; a context manager.

    Results are cached by (database, sql, limits), so a gold query runs once for all predictions.
    A query that draws at random or reads the clock is run each time.
    A file that changed counts as another database. A change on a server cannot be seen, so use an
    executor no longer than the server's content stays the same.
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
            DataError: `database` is missing, unreachable, or of a kind that runs no queries. A
                mistake in the query is a result instead.
        """
        self._check_open()
        place, limits = source(database), limits or self.limits
        if again or may_change(sql):
            return self._run_in_worker(place, sql, limits).result
        return self._results.get(
            (place, sql, limits), lambda: self._run_in_worker(place, sql, limits)
        )

    def build(self, script: str) -> QueryResult:
        """Run CREATE and INSERT statements in an empty database, under the limits of a query.

        The one cell of the result is the content of the SQLite file. No file is written.
        """
        limits = replace(self.limits, sql_length=self.limits.bytes)
        return self._run_in_worker(Source(SCRIPT, "", ()), script, limits).result

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
        """Apply a function that calls `run` to every item, in threads; return answers in order.

        An error, such as a database that is missing, leaves the queries of other callers alone.
        """
        with ThreadPoolExecutor(self.workers) as threads:
            futures = [threads.submit(function, item) for item in items]
            try:
                for done, future in enumerate(as_completed(futures), start=1):
                    future.result()
                    if progress is not None:
                        progress(done, len(futures))
            except BaseException as error:
                threads.shutdown(wait=False, cancel_futures=True)
                if not isinstance(error, Exception):  # a signal: nothing may follow
                    self._stopped = True
                    self.kill()
                raise
        return [future.result() for future in futures]

    def _check_open(self) -> None:
        if self._closed or self._stopped:
            raise RuntimeError("this Executor is closed")

    def _run_in_worker(self, place: Source, sql: str, limits: Limits) -> "_Sized":
        worker = self._slots.get()
        try:
            if worker is not None and not (worker.kind == place.kind and worker.alive()):
                self._drop(worker)
                worker = None
            if worker is None:
                worker = _Worker(place.kind)
                self._started.add(worker)
                self._check_open()  # it may have been stopped since
            answer = worker.ask(place.uri, sql, limits)
        except ServerFull as error:
            if not self._overstayed:
                raise
            busy = f"timeout: {self._overstayed} queries before overstayed, and {error}"
            return _Sized(QueryResult("timeout", (), (), busy, 0.0), 0)
        else:
            if place.kind.schemes and not worker.alive():
                self._overstayed += 1
                logger.warning(
                    "%s did not stop a query after %g s; one of its processes may stay busy (%s)",
                    *(place.kind.name, limits.seconds, place.kind.busy),
                )
            return answer
        finally:
            if worker is not None and not worker.alive():
                self._drop(worker)
                worker = None
            self._slots.put(worker)

    def _drop(self, worker: "_Worker") -> None:
        """End a worker for good."""
        self._started.discard(worker)
        worker.kill()


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
        command = kind.command()
        with child_socket:
            self._process = subprocess.Popen(
                [*command, str(child_socket.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=(child_socket.fileno(),),
                env=kind.environment(),
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
                f"{self.kind.name} has no connection left: {error}; lower --evaluate.processes, "
                "or raise the limit of the role or server"
            )
        if status == "unreachable":
            raise DataError(f"cannot connect to {self.kind.name}: {error}; {self.kind.way_out}")
        return _Sized(QueryResult(status, columns, rows, error, seconds), len(reply))

    def end(self) -> None:
        """End the process; whoever waits for its answer learns of it."""
        self._process.kill()

    def kill(self) -> None:
        """End the process and free its socket."""
        self._process.kill()
        self._process.wait()
        self._socket.close()


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
