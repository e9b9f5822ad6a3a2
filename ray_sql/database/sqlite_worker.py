"""Say what SQL may do in a SQLite file, for the loop of `worker`.

Only the standard library may be used here: the process sees no other package.
"""

import sqlite3
import time
from collections.abc import Iterable, Set
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray_sql.database.worker import Request

STEPS_BETWEEN_CLOCK_READS = 5_000
"""Steps of SQLite's virtual machine: about 0.1 ms of work for 0.3 µs of checking."""
LARGEST_LIMIT = 2**31 - 1
"""A C int."""
EXPRESSION_DEPTH = 1_000
"""SQLite's own default, set here because a build may have switched the check off."""

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
BUILDING = READING | {"CREATE TABLE", "CREATE VIEW", "CREATE INDEX", "INSERT"}
"""The actions of a script that builds a database."""


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


def watch(connection: sqlite3.Connection, guard: Guard, deadline: float) -> None:
    """Let a guard see each statement, and stop it at the deadline."""
    connection.set_authorizer(guard)
    connection.set_progress_handler(lambda: time.monotonic() >= deadline, STEPS_BETWEEN_CLOCK_READS)


class Query:
    """One query on a SQLite file."""

    errors = (sqlite3.Error, sqlite3.Warning)  # the second is none of the first

    def __init__(self, request: "Request", deadline: float) -> None:
        self._request = request
        self._deadline = deadline
        self._guard = Guard()
        self._connection: sqlite3.Connection | None = None

    def open(self) -> None:
        """Open the file; with `reverse`, rows without an order come in reverse."""
        asked = self._request
        self._connection = connect(asked.uri, asked.bytes, asked.sql_length)
        if asked.reverse:
            self._connection.execute("PRAGMA reverse_unordered_selects = ON")
        watch(self._connection, self._guard, self._deadline)

    def ask(self) -> tuple[tuple[str, ...], Iterable[tuple[Any, ...]]]:
        """Run the query to its first row."""
        assert self._connection is not None
        cursor = self._connection.execute(self._request.sql)
        if cursor.description is None:
            raise ValueError("refused: not a query")
        return tuple(column[0] for column in cursor.description), cursor

    def explain(self, error: Exception) -> tuple[str, str]:
        """Return one line about an error, in the words that `QueryResult.error` promises."""
        message = str(error)
        if self._guard.refused:
            message = f"refused: {self._guard.refused}"
        elif "one statement at a time" in message:
            message = "refused: more than one statement"
        elif "may not be modified" in message or "readonly database" in message:
            message = f"refused: {message}"
        elif "too big" in message or "too large" in message:
            message = f"too large: {message}"
        return "error", message

    def close(self) -> None:
        """Close the file, if it was opened."""
        if self._connection is not None:
            self._connection.close()


class Script(Query):
    """CREATE and INSERT statements run in memory; the answer's one cell is the database's file."""

    def open(self) -> None:
        """Begin an empty database."""
        size = self._request.bytes
        self._guard = Guard(BUILDING)
        self._connection = sqlite3.connect(":memory:", isolation_level=None, cached_statements=0)
        self._connection.execute(f"PRAGMA max_page_count = {max(1, size // 4096)}")
        self._connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, min(size, LARGEST_LIMIT))
        self._connection.setlimit(sqlite3.SQLITE_LIMIT_ATTACHED, 0)
        watch(self._connection, self._guard, self._deadline)

    def ask(self) -> tuple[tuple[str, ...], Iterable[tuple[Any, ...]]]:
        """Run the script."""
        assert self._connection is not None
        self._connection.executescript(self._request.sql)
        self._connection.set_authorizer(None)  # serialize itself asks for a PRAGMA
        return ("file",), [(self._connection.serialize(),)]
