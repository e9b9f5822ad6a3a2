"""Say what SQL may do in a DuckDB file, for the loop of `worker`.

These guards keep a query from doing harm:

- The file is opened read-only, and DuckDB's access to anything outside of it is switched off. No
  file is read or written besides (`read_csv`, `glob`, COPY, ATTACH, EXPORT), and its own is not
  read as bytes. No extension is installed or loaded, and nothing is fetched from a network. The
  settings are locked.
- DuckDB's own parser says what a text is. Only one SELECT is executed.
- Memory is limited by DuckDB and by the kernel, nothing spills to a disk, and one thread computes.
- A query is interrupted on time, and a parent kills this process if that does not help.

The query may read all of its database. Needs duckdb (`pip install -e '.[duckdb]'`).
"""

import json
import math
import threading
import time
from collections.abc import Iterable, Iterator
from datetime import date, datetime
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import duckdb

if TYPE_CHECKING:
    from ray_sql.database.worker import Request

SETTINGS = {
    "enable_external_access": "false",
    "autoinstall_known_extensions": "false",
    "autoload_known_extensions": "false",
    "allow_community_extensions": "false",
    "allow_unsigned_extensions": "false",
    "python_enable_replacements": "false",
    "temp_directory": "",
    "threads": "1",
}
LOCKED = """
SET TimeZone = 'UTC'; SET disabled_filesystems = 'LocalFileSystem'; SET lock_configuration = true
"""
"""DuckDB allows the database's own file to `read_blob`, unless all files are disabled once open."""
SMALLEST_MEMORY = 2**26
MOST_ROWS_AT_ONCE = 1024
OPENINGS = {
    "Catalog Error: Table with name": "no such table: ",
    "Binder Error: Referenced column": "no such column: ",
    "Binder Error: Table ": "no such column: ",  # … "c" does not have a column named …
    "Binder Error: Referenced table": "no such table: ",
    "Permission Error": "refused: ",
    "Invalid Input Error: Cannot change configuration option": "refused: ",
    "Invalid Input Error: Cannot execute statement of type": "refused: ",  # it would write
    "Invalid Input Error: Displaying unredacted secrets": "refused: ",
    "Out of Memory Error": "too large: ",
    "Parser Error": "syntax error: ",
}
"""The start of DuckDB's message → the opening of `QueryResult.error`."""


class Query:
    """One query on a DuckDB file. DuckDB has no `reverse`."""

    errors = (duckdb.Error, RuntimeError)  # it may raise the second where it is interrupted

    def __init__(self, request: "Request", deadline: float) -> None:
        self._request = request
        self._deadline = deadline
        self._connection: duckdb.DuckDBPyConnection | None = None
        self._alarm: threading.Timer | None = None

    def open(self) -> None:
        """Open the file, and lock the settings."""
        memory = max(self._request.memory // 2, SMALLEST_MEMORY)
        settings = {**SETTINGS, "memory_limit": f"{memory // 2**20}MiB"}
        connection = duckdb.connect(self._request.uri, read_only=True, config=settings)
        connection.execute(LOCKED)
        self._connection = connection

    def ask(self) -> tuple[tuple[str, ...], Iterable[tuple[Any, ...]]]:
        """Parse the text, and run it if it is one SELECT."""
        assert self._connection is not None
        left = max(0, self._deadline - time.monotonic())
        self._alarm = threading.Timer(left, self._connection.interrupt)
        self._alarm.daemon = True
        self._alarm.start()
        statements = self._connection.extract_statements(self._request.sql)
        if len(statements) != 1:
            raise ValueError(f"refused: {'more than one statement' if statements else 'no query'}")
        kind = _kind(statements[0])
        if kind != "SELECT":
            raise ValueError(f"refused: {kind}")
        self._connection.execute(statements[0])
        names = tuple(str(column[0]) for column in self._connection.description or ())
        return names, self._rows()

    def _rows(self) -> Iterator[tuple[Any, ...]]:
        assert self._connection is not None
        while part := self._connection.fetchmany(MOST_ROWS_AT_ONCE):
            for row in part:
                yield tuple(map(plain, row))

    def explain(self, error: Exception) -> tuple[str, str]:
        """Return status and message of an error, in the words that `QueryResult.error` promises."""
        message = str(error).partition("\n")[0] or type(error).__name__
        if self._connection is None:
            return "unreachable", message
        if "INTERRUPT" in message.upper():
            return "timeout", ""
        for start, opening in OPENINGS.items():
            if message.startswith(start):
                return "error", f"{opening}{message}"
        return "error", message

    def close(self) -> None:
        """Close the file, if it was opened."""
        if self._alarm is not None:
            self._alarm.cancel()
        if self._connection is not None:
            self._connection.close()


def _kind(statement: duckdb.Statement) -> str:
    """Return the kind of a statement, also of one for which DuckDB's module has no name."""
    try:
        return str(statement.type.name)
    except ValueError:
        return "not a query"


def plain(value: Any) -> Any:
    """Return a cell as None, int, float, str or bytes: the values of `ResultRow`."""
    if value is None or isinstance(value, str | bytes):
        return value
    if isinstance(value, int):
        return int(value)  # a boolean as 1 or 0
    if isinstance(value, float):
        return "NaN" if math.isnan(value) else value  # no NaN equals another
    if isinstance(value, Decimal):
        return int(value) if value == value.to_integral_value() else float(value)
    if isinstance(value, datetime):
        return value.isoformat(" ")
    if isinstance(value, date):
        return value.isoformat()
    if isinstance(value, list | tuple | dict):
        return json.dumps(value, default=str, ensure_ascii=False)
    return str(value)
