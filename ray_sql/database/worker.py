"""Answer queries over a socket until the parent hangs up: the loop of a process of the pool.

It is the same for every kind of database. The modules `…_worker` beside it say what is special
about one. That is how a query is opened, asked, explained and closed.

The process starts by file path (`python -I -S worker.py sqlite_worker Query FD`). For SQLite it is
isolated. It starts in a few hundredths of a second and sees no environment, no site-packages and
none of the parent's imports. So only the standard library may be used here. Messages are marshalled
tuples of plain values: unmarshalling runs no code, whatever a broken child might send.
"""

import marshal
import math
import os
import resource
import select
import sys
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from importlib import import_module
from multiprocessing.connection import Connection
from typing import Any, NamedTuple, Protocol

Row = tuple[Any, ...]
Reply = tuple[str, tuple[str, ...], tuple[Row, ...], str | None, float]
"""The fields of `QueryResult` in their order."""

SPARE_CPU_SECONDS = 5
SMALL_STACK = 2**17
"""Bytes for the thread that waits for the parent's end; they count as this process's memory."""
LONGEST_ERROR = 1_000
"""Characters; SQLite quotes text that it cannot read, and that may be of any size."""
MISTAKES = (ValueError, OverflowError, MemoryError, TimeoutError)
"""Errors of the loop, and limits of Python: text that is no UTF-8, very long numbers."""


class Request(NamedTuple):
    """A query, where it is asked, and the fields of `Limits`."""

    uri: str
    sql: str
    seconds: float
    rows: int
    bytes: int
    memory: int
    sql_length: int
    reverse: bool


class Query(Protocol):
    """One query on one kind of database."""

    errors: tuple[type[Exception], ...]
    """The errors of the database, which `explain` is given."""

    def __init__(self, request: Request, deadline: float) -> None:
        """Keep the request; `deadline` is a time of `time.monotonic`."""

    def open(self) -> None:
        """Connect, with all guards in place."""

    def ask(self) -> tuple[tuple[str, ...], Iterable[Row]]:
        """Begin the query; return the names of its columns, and its rows as they come."""

    def explain(self, error: Exception) -> tuple[str, str]:
        """Return status and message of an error, in the words that `QueryResult.error` promises."""

    def close(self) -> None:
        """Leave nothing of the query behind."""


def answer(kind: type[Query], request: Request) -> Reply:
    """Run one query under its limits; a mistake in the query becomes a reply.

    The status is "unreachable" for a database out of reach, and "full" for a server without a free
    connection.
    """
    started = time.monotonic()
    query = kind(request, started + request.seconds)
    restrict(request.seconds, request.memory)
    mistakes: tuple[type[Exception], ...] = (*kind.errors, *MISTAKES)
    try:
        length = len(request.sql.encode())
        if length > request.sql_length:
            raise OverflowError(f"too large: query string is too long: {length} bytes")
        query.open()
        began = time.monotonic()
        names, found = query.ask()
        if sum(map(len, names)) > request.bytes:
            raise OverflowError(f"too large: more than {request.bytes} bytes of column names")
        rows = collect(found, request.rows, request.bytes)
        if time.monotonic() >= started + request.seconds:  # one long call reads no clock
            raise TimeoutError("too late")
        # The seconds of the query alone, because efficiency is judged by them.
        return "ok", names, rows, None, time.monotonic() - began
    except mistakes as error:
        status, message = said(query, error)
        seconds = time.monotonic() - started
        is_late = seconds >= request.seconds and not message.startswith("refused")
        if status == "timeout" or (status == "error" and is_late):
            message = f"timeout: stopped after {request.seconds:g} s"
            return "timeout", (), (), message, seconds
        return status, (), (), one_line(message), seconds
    finally:
        query.close()


def collect(found: Iterable[Row], most_rows: int, size: int) -> tuple[Row, ...]:
    """Return all rows; raise OverflowError beyond `most_rows` rows or `size` bytes."""
    rows: list[Row] = []
    used = 0
    for row in found:
        used += sum(len(cell) if isinstance(cell, (str, bytes)) else 8 for cell in row)
        if len(rows) == most_rows:
            raise OverflowError(f"too large: more than {most_rows} rows")
        if used > size:
            raise OverflowError(f"too large: more than {size} bytes of rows")
        rows.append(row)
    return tuple(rows)


def said(query: Query, error: Exception) -> tuple[str, str]:
    """Return status and message of an error."""
    if isinstance(error, query.errors):
        return query.explain(error)
    if isinstance(error, TimeoutError):
        return "timeout", ""
    return "error", "too large: out of memory" if isinstance(error, MemoryError) else str(error)


def one_line(text: str) -> str:
    """Return the text without line breaks, cut where it is very long."""
    cut = text if len(text) <= LONGEST_ERROR else f"{text[:LONGEST_ERROR]}…"
    return " ".join(cut.split())


def restrict(seconds: float, memory: int) -> None:
    """Limit this process for the next query: no files, bounded memory, bounded processor time."""
    lower(resource.RLIMIT_FSIZE, 0)
    lower(resource.RLIMIT_CORE, 0)
    # A live parent kills a child that hangs. Without one the kernel does, by processor time.
    lower(resource.RLIMIT_CPU, math.ceil(time.process_time() + seconds) + SPARE_CPU_SECONDS)
    if sys.platform == "linux":
        lower(resource.RLIMIT_AS, memory)


def lower(kind: int, value: int) -> None:
    """Set a soft limit, within the hard one; the next query may set it anew."""
    hard = resource.getrlimit(kind)[1]
    if hard != resource.RLIM_INFINITY:
        value = min(value, hard)
    resource.setrlimit(kind, (value, hard))


def packed(reply: Reply) -> bytes:
    """Return the reply as one message; a result that fits in memory once may not fit twice."""
    try:
        return marshal.dumps(reply)
    except (MemoryError, ValueError):
        return marshal.dumps(("error", (), (), "too large: out of memory", reply[-1]))


def end_with(parent: int) -> None:
    """End this process when the other end of a socket closes, whatever a query is doing."""
    hangup = select.poll()
    hangup.register(parent, 0)  # a hang-up is reported unasked
    hangup.poll()
    os._exit(1)


def serve(parent: Connection, kind: type[Query]) -> None:
    """Report that the process is ready, then answer requests until the parent hangs up.

    A parent that has ended is told nothing: its end is no error of this process.
    """
    threading.stack_size(SMALL_STACK)
    threading.Thread(target=end_with, args=(parent.fileno(),), daemon=True).start()
    with suppress(EOFError, ConnectionError):
        parent.send_bytes(b"ready")
        while True:
            request = Request(*marshal.loads(parent.recv_bytes()))
            parent.send_bytes(packed(answer(kind, request)))


if __name__ == "__main__":
    os.nice(1)  # The parent must get its turn to kill.
    sys.path.append(os.path.dirname(__file__))  # behind the library, of which it hides nothing
    module, name, socket = sys.argv[1:]
    serve(Connection(int(socket)), getattr(import_module(module), name))
