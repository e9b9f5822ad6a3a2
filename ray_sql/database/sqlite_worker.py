"""The child process of the pool: answer queries over a socket until the parent hangs up.

The process starts by file path in isolated mode (`python -I -S sqlite_worker.py FD`). So it starts
in a few hundredths of a second and sees no environment, no site-packages and none of the parent's
imports. Only the standard library may be used here. Messages are marshalled tuples of plain values:
unmarshalling runs no code, whatever a broken child might send.
"""

import marshal
import math
import os
import resource
import select
import sqlite3
import sys
import threading
import time
from collections.abc import Callable, Set
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

Request = tuple[str, str, float, int, int, int, int, bool]
"""(uri, sql, *fields of `Limits`)."""
Reply = tuple[str, tuple[str, ...], tuple[tuple[Any, ...], ...], str | None, float]
"""The fields of `QueryResult` in their order."""

STEPS_BETWEEN_CLOCK_READS = 5_000
"""Steps of SQLite's virtual machine: about 0.1 ms of work for 0.3 µs of checking."""
SPARE_CPU_SECONDS = 5
LARGEST_LIMIT = 2**31 - 1
"""A C int."""
EXPRESSION_DEPTH = 1_000
"""SQLite's own default, set here because a build may have switched the check off."""
SMALL_STACK = 2**17
"""Bytes for the thread that waits for the parent's end; they count as this process's memory."""
LONGEST_ERROR = 1_000
"""Characters; SQLite quotes text that it cannot read, and that may be of any size."""

# Every other built-in function may be called. No function can be added to this process, so a list
# of refusals is complete. A list of permissions would fail gold queries on SQLite's next release.
REFUSED_FUNCTIONS = set("load_extension readfile writefile edit fts3_tokenizer sqlite_log".split())
# They describe the schema, and full-text tables call them on their own connection.
ALLOWED_PRAGMAS = set(
    "table_info table_xinfo table_list index_list index_info index_xinfo foreign_key_list "
    "function_list module_list collation_list data_version page_size".split()
)
RTREE_STORAGE = ("_node", "_rowid", "_parent")
"""Ends of the names of the tables in which a spatial index keeps itself."""
_ACTION_NAMES = """
    CREATE INDEX, CREATE TABLE, CREATE TEMP INDEX, CREATE TEMP TABLE, CREATE TEMP TRIGGER,
    CREATE TEMP VIEW, CREATE TRIGGER, CREATE VIEW, DELETE, DROP INDEX, DROP TABLE, DROP TEMP INDEX,
    DROP TEMP TABLE, DROP TEMP TRIGGER, DROP TEMP VIEW, DROP TRIGGER, DROP VIEW, INSERT, PRAGMA,
    READ, SELECT, TRANSACTION, UPDATE, ATTACH, DETACH, ALTER TABLE, REINDEX, ANALYZE,
    CREATE VTABLE, DROP VTABLE, FUNCTION, SAVEPOINT, RECURSIVE
"""
ACTIONS = {
    getattr(sqlite3, f"SQLITE_{name.strip().replace(' ', '_')}"): name.strip()
    for name in _ACTION_NAMES.split(",")
}

READING = {"SELECT", "READ", "RECURSIVE"}


class Guard:
    """SQLite's authorizer: let a query read, and remember the first action refused."""

    def __init__(self, allowed: Set[str] = READING) -> None:
        self.allowed = allowed
        self.refused: str | None = None

    def __call__(self, action: int, first: str | None, second: str | None, *_: str | None) -> int:
        """Return SQLITE_OK or SQLITE_DENY for one action of the statement being compiled."""
        name = ACTIONS.get(action, f"action {action}")
        detail = (second if name == "FUNCTION" else first) or ""
        if name in self.allowed:
            return sqlite3.SQLITE_OK
        if name == "FUNCTION" and detail.lower() not in REFUSED_FUNCTIONS:
            return sqlite3.SQLITE_OK
        if name == "PRAGMA" and detail.lower() in ALLOWED_PRAGMAS:
            return sqlite3.SQLITE_OK
        # Connecting a virtual table (json_each, full text) is reported as UPDATE. SQLite itself
        # refuses a real UPDATE of the schema table while writable_schema is off, and no PRAGMA can
        # switch that on here.
        if name == "UPDATE" and first in ("sqlite_master", "sqlite_schema"):
            return sqlite3.SQLITE_OK
        # A spatial index prepares its own changes when it is opened. The file is opened to read, so
        # that none can be made.
        if name in ("INSERT", "UPDATE", "DELETE") and detail.endswith(RTREE_STORAGE):
            return sqlite3.SQLITE_OK
        self.refused = self.refused or f"{name} {detail}".strip()
        return sqlite3.SQLITE_DENY


def connect(uri: str, size: int, sql_length: int) -> sqlite3.Connection:
    """Return a connection that cannot write, attach, or build a string beyond `size` bytes."""
    connection = sqlite3.connect(uri, uri=True, isolation_level=None, cached_statements=0)
    # As the official evaluators read text.
    connection.text_factory = lambda raw: raw.decode(errors="ignore")
    # Large sorts would otherwise spill to the temporary folder, which no limit here bounds.
    connection.execute("PRAGMA temp_store = MEMORY")
    connection.execute("PRAGMA query_only = ON")
    for limit, value in (
        (sqlite3.SQLITE_LIMIT_LENGTH, size),
        (sqlite3.SQLITE_LIMIT_SQL_LENGTH, sql_length),
        (sqlite3.SQLITE_LIMIT_EXPR_DEPTH, EXPRESSION_DEPTH),
        # mode=ro alone still lets ATTACH create a file.
        (sqlite3.SQLITE_LIMIT_ATTACHED, 0),
        (sqlite3.SQLITE_LIMIT_WORKER_THREADS, 0),
    ):
        connection.setlimit(limit, min(value, LARGEST_LIMIT))
    return connection


def fetch(cursor: sqlite3.Cursor, most_rows: int, size: int) -> tuple[tuple[Any, ...], ...]:
    """Return all rows; raise OverflowError beyond `most_rows` rows or `size` bytes."""
    rows: list[tuple[Any, ...]] = []
    used = 0
    for row in cursor:
        used += sum(len(cell) if isinstance(cell, (str, bytes)) else 8 for cell in row)
        if len(rows) == most_rows:
            raise OverflowError(f"too large: more than {most_rows} rows")
        if used > size:
            raise OverflowError(f"too large: more than {size} bytes of rows")
        rows.append(row)
    return tuple(rows)


def query(
    uri: str,
    sql: str,
    seconds: float,
    rows: int,
    size: int,
    memory: int,
    sql_length: int,
    reverse: bool = False,
) -> Reply:
    """Run one query under its limits; a mistake in the query becomes a reply.

    With `reverse`, rows without an order come in reverse.
    """
    started = time.monotonic()
    guard = Guard()

    def failed(error: str) -> Reply:
        elapsed = time.monotonic() - started
        if elapsed >= seconds and not error.startswith("refused"):
            return "timeout", (), (), f"timeout: stopped after {seconds:g} s", elapsed
        return "error", (), (), error, elapsed

    restrict(seconds, memory)
    try:
        connection = connect(uri, size, sql_length)
    except sqlite3.Error as error:
        return failed(explain(error, None))
    try:
        if reverse:
            connection.execute("PRAGMA reverse_unordered_selects = ON")
        connection.set_authorizer(guard)
        connection.set_progress_handler(
            lambda: time.monotonic() - started >= seconds, STEPS_BETWEEN_CLOCK_READS
        )
        began = time.monotonic()
        cursor = connection.execute(sql)
        if cursor.description is None:
            return failed("refused: not a query")
        names = tuple(column[0] for column in cursor.description)
        if sum(map(len, names)) > size:
            raise OverflowError(f"too large: more than {size} bytes of column names")
        result_rows = fetch(cursor, rows, size)
        if time.monotonic() - started >= seconds:  # One long call of a function reads no clock.
            raise TimeoutError("too late")
        # The seconds of the query alone, because efficiency is judged by them.
        return "ok", names, result_rows, None, time.monotonic() - began
    # sqlite3.Warning is no sqlite3.Error; the others are this module's, or Python's own limits.
    except (
        sqlite3.Error,
        sqlite3.Warning,
        ValueError,
        OverflowError,
        MemoryError,
        TimeoutError,
    ) as error:
        return failed(explain(error, guard.refused))
    finally:
        connection.close()


BUILDING = READING | {"CREATE TABLE", "CREATE VIEW", "CREATE INDEX", "INSERT"}
"""The actions of a script that builds a database."""


def build(
    _: str,
    script: str,
    seconds: float,
    rows: int,
    size: int,
    memory: int,
    sql_length: int,
    reverse: bool = False,
) -> Reply:
    """Run CREATE and INSERT statements in memory; the reply's one cell is the database's file."""
    started = time.monotonic()
    guard = Guard(BUILDING)
    restrict(seconds, memory)
    connection = sqlite3.connect(":memory:", isolation_level=None, cached_statements=0)
    try:
        connection.execute(f"PRAGMA max_page_count = {max(1, size // 4096)}")
        connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, min(size, LARGEST_LIMIT))
        connection.setlimit(sqlite3.SQLITE_LIMIT_ATTACHED, 0)
        connection.set_authorizer(guard)
        connection.set_progress_handler(
            lambda: time.monotonic() - started >= seconds, STEPS_BETWEEN_CLOCK_READS
        )
        connection.executescript(script)
        connection.set_authorizer(None)  # serialize itself asks for a PRAGMA
        cell = connection.serialize()
        return "ok", ("file",), ((cell,),), None, time.monotonic() - started
    except (sqlite3.Error, sqlite3.Warning, ValueError, MemoryError) as error:
        return "error", (), (), explain(error, guard.refused), time.monotonic() - started
    finally:
        connection.close()


def explain(error: Exception, refused: str | None) -> str:
    """Return one line about an error, in the words that `QueryResult.error` promises."""
    message = one_line(str(error))
    if refused:
        return one_line(f"refused: {refused}")
    if "one statement at a time" in message:
        return "refused: more than one statement"
    if "may not be modified" in message or "readonly database" in message:
        return f"refused: {message}"
    if isinstance(error, MemoryError):
        return "too large: out of memory"
    if "too big" in message or "too large" in message:
        return f"too large: {message.removeprefix('too large: ')}"
    return message


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


def serve(parent: Connection, query: Callable[..., Reply]) -> None:
    """Report that the process is ready, then answer requests until the parent hangs up.

    A parent that has ended is told nothing: its end is no error of this process.
    """
    threading.stack_size(SMALL_STACK)
    threading.Thread(target=end_with, args=(parent.fileno(),), daemon=True).start()
    with suppress(EOFError, ConnectionError):
        parent.send_bytes(b"ready")
        while True:
            request: Request = marshal.loads(parent.recv_bytes())
            parent.send_bytes(packed(query(*request)))


if __name__ == "__main__":
    os.nice(1)  # The parent must get its turn to kill.
    serve(Connection(int(sys.argv[-1])), build if "build" in sys.argv else query)
