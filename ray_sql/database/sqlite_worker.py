"""The child process of the pool: answers one query after another over a socket until its parent hangs up.

Started by file path in isolated mode (`python -I -S worker.py FD`), so that it costs a few hundredths of a second and
sees no environment, no site-packages and nothing of the parent's imports: only the standard library may be used here.
Messages are marshalled tuples of plain values; unmarshalling runs no code, whatever a broken child might send.
"""

import marshal
import math
import os
import resource
import sqlite3
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

Request = tuple[str, str, float, int, int, int, int]
"""uri, sql, then the fields of `Limits` in their order."""
Reply = tuple[str, tuple[str, ...], tuple[tuple[Any, ...], ...], str | None, float]
"""The fields of `QueryResult` in their order."""

STEPS_BETWEEN_CLOCK_READS = (
    5_000  # of SQLite's virtual machine: about 0.1 ms of work for 0.3 µs of checking
)
SPARE_CPU_SECONDS = 5
LARGEST_LIMIT = 2**31 - 1  # a C int
EXPRESSION_DEPTH = (
    1_000  # SQLite's own default, stated because a build may have switched the check off
)
LONGEST_ERROR = (
    1_000  # characters; SQLite quotes what it cannot read, and that may be a string of any size
)

# Everything SQLite has built in may be called but these: no function can be added to this process, so a list of what to
# refuse is complete, where a list of what to allow would fail gold queries on the next release of SQLite.
REFUSED_FUNCTIONS = {
    "load_extension",
    "readfile",
    "writefile",
    "edit",
    "fts3_tokenizer",
    "sqlite_log",
}
# What describes the schema, and what the full-text tables ask of their own connection.
ALLOWED_PRAGMAS = {
    *(
        "table_info",
        "table_xinfo",
        "table_list",
        "index_list",
        "index_info",
        "index_xinfo",
        "foreign_key_list",
    ),
    *("function_list", "module_list", "collation_list", "data_version", "page_size"),
}
ACTIONS = {
    getattr(sqlite3, f"SQLITE_{name.replace(' ', '_')}"): name
    for name in (
        *(
            "CREATE INDEX",
            "CREATE TABLE",
            "CREATE TEMP INDEX",
            "CREATE TEMP TABLE",
            "CREATE TEMP TRIGGER",
        ),
        *(
            "CREATE TEMP VIEW",
            "CREATE TRIGGER",
            "CREATE VIEW",
            "DELETE",
            "DROP INDEX",
            "DROP TABLE",
            "DROP TEMP INDEX",
        ),
        *(
            "DROP TEMP TABLE",
            "DROP TEMP TRIGGER",
            "DROP TEMP VIEW",
            "DROP TRIGGER",
            "DROP VIEW",
            "INSERT",
            "PRAGMA",
        ),
        *(
            "READ",
            "SELECT",
            "TRANSACTION",
            "UPDATE",
            "ATTACH",
            "DETACH",
            "ALTER TABLE",
            "REINDEX",
            "ANALYZE",
        ),
        *("CREATE VTABLE", "DROP VTABLE", "FUNCTION", "SAVEPOINT", "RECURSIVE"),
    )
}


class Guard:
    """SQLite's authorizer: lets a query read, and remembers the first thing it refused."""

    def __init__(self) -> None:
        self.refused: str | None = None

    def __call__(self, action: int, first: str | None, second: str | None, *_: str | None) -> int:
        """SQLITE_OK or SQLITE_DENY for one action of the statement being compiled."""
        name = ACTIONS.get(action, f"action {action}")
        detail = (second if name == "FUNCTION" else first) or ""
        if name in ("SELECT", "READ", "RECURSIVE"):
            return sqlite3.SQLITE_OK
        if name == "FUNCTION" and detail.lower() not in REFUSED_FUNCTIONS:
            return sqlite3.SQLITE_OK
        if name == "PRAGMA" and detail.lower() in ALLOWED_PRAGMAS:
            return sqlite3.SQLITE_OK
        # Connecting a virtual table (json_each, full text) is reported as this; a real UPDATE of the schema table is
        # refused by SQLite itself while writable_schema is off, and no PRAGMA can switch it on here.
        if name == "UPDATE" and first in ("sqlite_master", "sqlite_schema"):
            return sqlite3.SQLITE_OK
        self.refused = self.refused or f"{name} {detail}".strip()
        return sqlite3.SQLITE_DENY


def connect(uri: str, size: int, sql_length: int) -> sqlite3.Connection:
    """A connection that cannot write, attach, or build a string beyond `size` bytes."""
    connection = sqlite3.connect(uri, uri=True, isolation_level=None, cached_statements=0)
    connection.text_factory = lambda raw: raw.decode(
        errors="ignore"
    )  # as the official evaluators read text
    # Large sorts would otherwise spill to the temporary folder, which no limit here watches.
    connection.execute("PRAGMA temp_store = MEMORY")
    connection.execute("PRAGMA query_only = ON")
    for limit, value in (
        (sqlite3.SQLITE_LIMIT_LENGTH, size),
        (sqlite3.SQLITE_LIMIT_SQL_LENGTH, sql_length),
        (sqlite3.SQLITE_LIMIT_EXPR_DEPTH, EXPRESSION_DEPTH),
        (sqlite3.SQLITE_LIMIT_ATTACHED, 0),  # mode=ro alone still lets ATTACH create a file
        (sqlite3.SQLITE_LIMIT_WORKER_THREADS, 0),
    ):
        connection.setlimit(limit, min(value, LARGEST_LIMIT))
    return connection


def fetch(cursor: sqlite3.Cursor, most_rows: int, size: int) -> tuple[tuple[Any, ...], ...]:
    """All rows of the cursor; OverflowError beyond `most_rows` rows or `size` bytes."""
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
    uri: str, sql: str, seconds: float, rows: int, size: int, memory: int, sql_length: int
) -> Reply:
    """Run one query under its limits; every mistake of the query becomes a reply."""
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
        found = fetch(cursor, rows, size)
        if time.monotonic() - started >= seconds:  # one long call of a function reads no clock
            raise TimeoutError("too late")
        return (
            "ok",
            names,
            found,
            None,
            time.monotonic() - began,
        )  # of the query alone: efficiency is judged by it
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


def explain(error: Exception, refused: str | None) -> str:
    """One line on what went wrong, in the words that `QueryResult.error` promises."""
    message = one_line(str(error))
    if refused:
        return one_line(f"refused: {refused}")
    if "one statement at a time" in message:
        return "refused: more than one statement"
    if "may not be modified" in message:
        return f"refused: {message}"
    if isinstance(error, MemoryError):
        return "too large: out of memory"
    if "too big" in message or "too large" in message:
        return message if message.startswith("too large") else f"too large: {message}"
    return message


def one_line(text: str) -> str:
    """The text without line breaks, cut where it is very long."""
    cut = text if len(text) <= LONGEST_ERROR else f"{text[:LONGEST_ERROR]}…"
    return " ".join(cut.split())


def restrict(seconds: float, memory: int) -> None:
    """Limit this process for the next query: no files, bounded memory, and an end even if the parent is gone."""
    lower(resource.RLIMIT_FSIZE, 0)
    lower(resource.RLIMIT_CORE, 0)
    # Only a live parent can kill a child that hangs; without one the kernel does it by processor time.
    lower(resource.RLIMIT_CPU, math.ceil(time.process_time() + seconds) + SPARE_CPU_SECONDS)
    if sys.platform == "linux":
        lower(resource.RLIMIT_AS, memory)


def lower(kind: int, value: int) -> None:
    """Set a soft limit, which the next query may set anew, within the hard limit this process was born with."""
    hard = resource.getrlimit(kind)[1]
    resource.setrlimit(kind, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))


def packed(reply: Reply) -> bytes:
    """The reply as one message; a result that fits in memory once may not fit twice."""
    try:
        return marshal.dumps(reply)
    except (MemoryError, ValueError):
        return marshal.dumps(("error", (), (), "too large: out of memory", reply[-1]))


def serve(parent: Connection, query: Callable[..., Reply]) -> None:
    """Say hello, then answer requests with `query` until the parent hangs up."""
    parent.send_bytes(b"ready")
    while True:
        try:
            request: Request = marshal.loads(parent.recv_bytes())
        except EOFError:
            return
        parent.send_bytes(packed(query(*request)))


if __name__ == "__main__":
    os.nice(1)  # the parent must get its turn to kill
    serve(Connection(int(sys.argv[1])), query)
