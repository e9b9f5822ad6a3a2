"""The plain values of execution: the limits of a query, and its result."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Place = Path | str
"""A database: the path of a SQLite or DuckDB file, or a URL (`postgresql://user@host/name`)."""
ResultRow = tuple[Any, ...]
"""One result row; a cell is None, int, float, str or bytes.

From PostgreSQL and DuckDB, a decimal is int where it has no decimals and else float, and a boolean
is 1 or 0. Dates, times and all other types are text in ISO form and UTC, as the server writes them.
"""
Rows = tuple[ResultRow, ...]
MOST_SQL = 100_000
"""Bytes of a query's text: a longer one is not executed."""
MOST_ANALYSED = 20_000
"""Characters of a query's text: a longer one gets no hardness, no links and no exact set match."""
MOST_NODES = 5_000
"""Parts of a query that a parser may try: it tries some queries of a line in 2^100 ways."""
OVER_LIMITS = ("timeout", "crash", "too large")
"""Beginnings of errors that limits or the machine may have caused: the query may be right."""
Status = Literal["ok", "error", "timeout", "crash"]


@dataclass(frozen=True)
class Limits:
    """The resources that one query may use before it is stopped."""

    seconds: float = 30.0
    """Wall time from the first step to the last row."""
    rows: int = 100_000
    """Rows of the result."""
    bytes: int = 256 * 2**20
    """Bytes of the whole result (a number counts 8), and of any string or blob on the way to it."""
    memory: int = 2 * 2**30
    """Bytes of address space of the child process (Linux only).

    The child runs the query, or for PostgreSQL takes the result.
    """
    sql_length: int = MOST_SQL
    """Bytes of the query's own text."""
    reverse: bool = False
    """Hand out rows without an order in reverse (SQLite only): does a result depend on it?"""


@dataclass(frozen=True)
class QueryResult:
    """The result of one query; `rows` and `columns` are empty unless `status` is "ok".

    `error` is one line. It opens with `refused:` (not one read-only query), `too large:` (a limit
    other than time), `timeout:` or `crash:`. Any other is the database's own message.
    """

    status: Status
    columns: tuple[str, ...]
    rows: Rows
    error: str | None
    seconds: float


_CHANGING = re.compile(
    r"""\b(?:random|randomblob|gen_random_uuid|uuid_generate_v\d\w*|random_normal|changes
        |total_changes|last_insert_rowid|now|timeofday|nextval|age
        |rand|uuid|sysdate|curdate|curtime|unix_timestamp|today
        |get_current_time|get_current_timestamp)\s*\(
      |\b(?:current_date|current_time|localtime|localtimestamp|tablesample
        |utc_date|utc_time|utc_timestamp|current_localtimestamp
        |(?:current|clock|statement|transaction)_timestamp)\b
      |\b(?:date|time|datetime|julianday|unixepoch)\s*\(\s*\)|\bstrftime\s*\([^,()]*\)
      |['"](?:now|today|tomorrow|yesterday)['"]""",
    re.IGNORECASE | re.VERBOSE,
)


def may_change(sql: str) -> bool:
    """Tell whether a query may give other rows each time: it draws at random or reads the clock.

    Words count wherever they stand, in a literal too. A query that is taken for one of these is
    only run again.
    """
    return bool(_CHANGING.search(sql))
