"""Say what SQL may do on a PostgreSQL server, for the loop of `worker`.

These guards keep a query from doing harm, the strongest first:

- A READ ONLY transaction, always rolled back. The server refuses writes, DDL, `nextval`, `setval`
  and row locks.
- A cursor, declared through the extended protocol. The server's own grammar admits one SELECT,
  VALUES or WITH, and no COPY, SET, CALL, DO, SELECT INTO or second statement.
- No volatile function of the server or of its extensions, but for a few harmless ones
  (`postgres_functions`). Volatile functions act outside of the transaction (`pg_terminate_backend`,
  `pg_read_file`, `lo_export`, `dblink`, advisory locks, `set_config`). A query is refused if any
  word of its text names one, wherever it stands, so no quoting and no comment hides it. Functions
  that run SQL given as text are refused too.
- No function of the database's own that acts outside too. It may be in a language that the server
  does not trust, have its owner's rights (`SECURITY DEFINER`), or name a refused function. And no
  view, operator, cast, domain or policy of rows that calls one.
- No call that the server could not stop (`postgres_costs`), and no XPath.
- `statement_timeout` and `lock_timeout` on the server, and rows fetched in small portions. The
  next worker that connects tells a process of the server to end that overstays nevertheless.
- A parent that kills this process.

They leave some risks. The query may read all that its role may read, and call the database's own
functions. Memory and temporary files are the server's, bounded by its `work_mem` and
`temp_file_limit`. So give the URL a role of its own. It should be allowed to SELECT from the
tables of the questions, own nothing and be in no other role.

Needs psycopg 3 (`pip install -e '.[postgres]'`).
"""

import re
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import psycopg
from psycopg import pq

from ray_sql.database.named_functions import words
from ray_sql.database.postgres_costs import endless_call
from ray_sql.database.postgres_functions import called, refused_functions
from ray_sql.database.worker import Request

# A backend that is in a function without an end takes note of this when it leaves it.
OVERSTAYED = """
SELECT pg_catalog.pg_terminate_backend(pid) FROM pg_catalog.pg_stat_activity
WHERE usename = current_user AND state = 'active' AND pid <> pg_catalog.pg_backend_pid()
  AND application_name ~ '^ray_sql, [0-9.e+]+ s$'
  AND clock_timestamp() - xact_start > make_interval(
    secs => 2 + substring(application_name from '[0-9.e+]+')::float8)
"""
# No output depends on a server's defaults, and scans begin at the beginning: equal questions get
# equal answers.
BEGIN = """
BEGIN READ ONLY;
SET LOCAL TIME ZONE 'UTC';
SET LOCAL datestyle = 'ISO, YMD';
SET LOCAL intervalstyle = 'postgres';
SET LOCAL bytea_output = 'hex';
SET LOCAL extra_float_digits = 1;
SET LOCAL standard_conforming_strings = on;
SET LOCAL synchronize_seqscans = off;
SET LOCAL cursor_tuple_fraction = 1;
SET LOCAL idle_in_transaction_session_timeout = {idle};
SET LOCAL application_name = 'ray_sql, {seconds:g} s'
"""
WATCH = "SET client_connection_check_interval = '1s'"
"""Let the server end a query whose client is gone, from PostgreSQL 14 on."""
TIMEOUTS = "SET LOCAL statement_timeout = {left}; SET LOCAL lock_timeout = {left}"
MOST_ROWS_AT_ONCE = 4096
# The start of an SQLSTATE -> the opening of `QueryResult.error`.
PREFIXES = {
    "42703": "no such column: ",
    "42P01": "no such table: ",
    "25006": "refused: ",
    "42501": "refused: ",
    "53": "too large: ",
    "54": "too large: ",
}
SYNTAX = "42601"
COMMAND = re.compile(
    r"[\s;]*(insert|update|delete|merge|create|alter|drop|truncate|copy|set|reset|call|do|explain|"
    r"show|vacuum|analyze|begin|start|commit|rollback|abort|end|savepoint|release|lock|grant|revoke|"
    r"notify|listen|unlisten|prepare|execute|deallocate|declare|fetch|move|close|cluster|reindex|"
    r"comment|security|load|discard|checkpoint|refresh|import|reassign)\b",
    re.IGNORECASE,
)
LATE = ("57014", "55P03")
"""statement_timeout, lock_timeout."""
LOST = ("08", "57P", "25P03")
"""The connection, or the server."""
BAD_REQUEST = "08P01"
"""Parameters without values: a mistake in the query."""

ESCAPED = re.compile(r'u&"', re.IGNORECASE)
"""A name in Unicode escapes."""

FULL = re.compile("too many (connections|clients)|remaining connection slots")
FULL_SECONDS = 3.0
"""Seconds for which a server without a free connection is tried again."""

UNREADABLE_URL = (
    "not a URL that libpq reads: percent-encode the password, or leave it to PGPASSWORD or "
    "~/.pgpass"
)

CONNECTIONS: dict[str, tuple[psycopg.Connection[Any], frozenset[str]]] = {}
"""The connection to the last URL, with the functions refused there.

One open connection for each URL would use up the server's.
"""


class Query:
    """One query on a PostgreSQL server. A server has no `reverse`."""

    errors = (psycopg.Error,)

    def __init__(self, request: Request, deadline: float) -> None:
        self._request = request
        self._deadline = deadline
        self._connection: psycopg.Connection[Any] | None = None

    def open(self) -> None:
        """Connect, and refuse a query by its words."""
        sql = self._request.sql
        if "\0" in sql:
            raise ValueError("refused: a NUL character")
        if ESCAPED.search(sql):
            raise ValueError("refused: a name in Unicode escapes")
        connection, refused = connect(self._request.uri, self._request.seconds)
        if named := called(refused, sql):
            raise ValueError(f"refused: FUNCTION {min(named)}")
        if call := endless_call(sql, words(sql)):
            raise ValueError(f"refused: FUNCTION {call} on large values of the query's own")
        self._connection = connection

    def ask(self) -> tuple[tuple[str, ...], Iterable[tuple[Any, ...]]]:
        """Declare a cursor and fetch its first row; the others come as they are read."""
        assert self._connection is not None
        seconds = self._request.seconds
        begin = BEGIN.format(idle=milliseconds(seconds + 60), seconds=seconds)
        run(self._connection, begin.encode())
        run(self._connection, timeouts(self._deadline))
        # Not `execute`: the simple protocol would take many statements.
        declare = b"DECLARE answer NO SCROLL CURSOR FOR " + self._request.sql.encode()
        checked(self._connection.pgconn.exec_params(declare, None))
        first = fetched(self._connection, self._deadline, 1)
        columns = range(first.nfields)
        names = tuple((first.fname(i) or b"").decode(errors="ignore") for i in columns)
        return names, self._rows(first)

    def _rows(self, first: Any) -> Iterator[tuple[Any, ...]]:
        """Yield all rows; a portion is about as large as all before it, so `bytes` bounds it."""
        assert self._connection is not None
        yield from plain_rows(first)
        portion, count = 2, first.ntuples
        while count:
            result = fetched(self._connection, self._deadline, portion)
            yield from plain_rows(result)
            count = result.ntuples if result.ntuples == portion else 0
            portion = min(2 * portion, MOST_ROWS_AT_ONCE)

    def explain(self, error: Exception) -> tuple[str, str]:
        """Return status and message of an error, in the words that `QueryResult.error` promises."""
        assert isinstance(error, psycopg.Error)
        if self._connection is not None:
            return explain(error, self._request.sql)
        # libpq quotes a URL that it cannot read, and the quoted part may be a password.
        if isinstance(error, psycopg.ProgrammingError) and error.sqlstate is None:
            return "unreachable", UNREADABLE_URL
        return "full" if FULL.search(str(error)) else "unreachable", str(error)

    def close(self) -> None:
        """Leave the session as the next query expects it."""
        clean(self._request.uri)


def connect(uri: str, seconds: float) -> tuple[psycopg.Connection[Any], frozenset[str]]:
    """Return a connection, reused by the next query, and the functions that are refused there.

    Connecting takes at most about a query's `seconds`. The parent kills this process soon after,
    and the server would count as a slow query.
    """
    if uri not in CONNECTIONS:
        for other in list(CONNECTIONS):
            CONNECTIONS.pop(other)[0].close()
        connection = reach(uri, seconds)
        connection.execute(OVERSTAYED)
        CONNECTIONS[uri] = connection, frozenset(refused_functions(connection))
    connection, refused = CONNECTIONS[uri]
    if connection.info.server_version >= 140000:
        connection.execute(WATCH)
    return connection, refused


def reach(uri: str, seconds: float) -> psycopg.Connection[Any]:
    """Return a new connection; a server without a free one may have one soon."""
    deadline = time.monotonic() + min(seconds, FULL_SECONDS)
    while True:
        try:
            return psycopg.connect(
                uri,
                autocommit=True,
                prepare_threshold=None,
                client_encoding="UTF8",
                application_name="ray_sql",
                connect_timeout=max(2, min(10, int(seconds))),
            )
        except psycopg.OperationalError as error:
            if time.monotonic() > deadline or not FULL.search(str(error)):
                raise
        time.sleep(0.1)


def clean(uri: str) -> None:
    """Roll back and reset the session for the next query; close it where that fails."""
    if uri not in CONNECTIONS:
        return
    connection, _ = CONNECTIONS[uri]
    try:
        connection.execute("ROLLBACK")
        connection.execute("DISCARD ALL")
    except psycopg.Error:
        connection.close()
        del CONNECTIONS[uri]


def fetched(connection: psycopg.Connection[Any], deadline: float, portion: int) -> Any:
    """Return the next rows of the cursor; raise TimeoutError after the deadline."""
    run(connection, timeouts(deadline))
    return run(connection, b"FETCH FORWARD %d FROM answer" % portion)


def plain_rows(result: Any) -> Iterator[tuple[Any, ...]]:
    """Yield the rows of a result, each cell as None, int, float, str or bytes."""
    columns = range(result.nfields)
    loaders = [LOADERS.get(result.ftype(column), text) for column in columns]
    for row in range(result.ntuples):
        cells = zip(loaders, [result.get_value(row, column) for column in columns], strict=True)
        yield tuple(None if cell is None else load(cell) for load, cell in cells)


def timeouts(deadline: float) -> bytes:
    """Return the command that stops the server at the deadline; raise TimeoutError after it."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("too late")
    return TIMEOUTS.format(left=milliseconds(left)).encode()


def milliseconds(seconds: float) -> int:
    """Return at least 1, because 0 would be no limit, and at most the server's largest value."""
    return max(1, min(int(1000 * seconds), 2**31 - 1))


def run(connection: psycopg.Connection[Any], command: bytes) -> Any:
    """Run a command of our own; return its last result, with every value as text."""
    return checked(connection.pgconn.exec_(command))


def checked(result: Any) -> Any:
    """Return the result, or raise its error."""
    if result.status in (pq.ExecStatus.COMMAND_OK, pq.ExecStatus.TUPLES_OK):
        return result
    raise psycopg.errors.error_from_result(result, encoding="utf-8")


def explain(error: psycopg.Error, sql: str) -> tuple[str, str]:
    """Return status and message of an error of a query."""
    state, message = error.sqlstate or "", error.diag.message_primary or str(error)
    if state in LATE:
        return "timeout", ""
    if "out of memory" in message:
        return "error", f"too large: {message}"
    if not state or (state.startswith(LOST) and state != BAD_REQUEST):
        return "crash", f"crash: {message}"
    if "multiple commands" in message:
        return "error", "refused: more than one statement"
    is_command = state == SYNTAX and COMMAND.match(sql)
    if is_command or "DECLARE CURSOR" in message or "INTO is not allowed" in message:
        return "error", "refused: not a query that only reads"
    for code, prefix in PREFIXES.items():
        if state.startswith(code):
            return "error", prefix + message
    return "error", message


def text(value: bytes) -> str:
    """Read any other type, as the server writes it."""
    return value.decode(errors="ignore")


def boolean(value: bytes) -> int:
    """Read 1 or 0, as in SQLite: `count(*) > 1` and `CASE … THEN 1` are the same answer."""
    return int(value == b"t")


def real(value: bytes) -> float | str:
    """Read a double; NaN becomes text, because no NaN equals another and equal answers must."""
    return "NaN" if value == b"NaN" else float(value)


def numeric(value: bytes) -> int | float | str:
    """Read an int where there are no decimals, else the nearest double.

    So an average is the same whichever type computed it.
    """
    return int(value) if value.lstrip(b"-").isdigit() else real(value)


def bytestring(value: bytes) -> bytes:
    """Read `\\x` and hexadecimal digits."""
    return bytes.fromhex(value[2:].decode())


def padded(value: bytes) -> str:
    """Read `char(n)` without its padding, which does not count in its own comparisons."""
    return text(value).rstrip(" ")


LOADERS: dict[int, Callable[[bytes], Any]] = {
    **dict.fromkeys((20, 21, 23, 26), int),  # int8, int2, int4, oid
    **dict.fromkeys((700, 701), real),  # float4, float8
    16: boolean,
    17: bytestring,
    1042: padded,
    1700: numeric,
}
"""By the type's oid, which is the same on every server."""
