"""The child process for PostgreSQL: answers one query after another over a socket, as `worker` does for SQLite.

What keeps a query from doing harm, the strongest first:

- a READ ONLY transaction, always rolled back: the server refuses writes, DDL, `nextval`, `setval` and row locks;
- a cursor, declared through the extended protocol: the server's own grammar lets one SELECT, VALUES or WITH through and no
  COPY, SET, CALL, DO, SELECT INTO or second statement;
- no volatile function of the server or of its extensions but a few harmless ones: it is those that act outside of the
  transaction (`pg_terminate_backend`, `pg_read_file`, `lo_export`, `dblink`, advisory locks, `set_config`). Any word of the
  text that names one is refused, wherever it stands, so that no quoting and no comment hides it; functions that run SQL
  given as text are refused with them;
- `statement_timeout` and `lock_timeout` on the server, rows taken in small portions, and a parent that kills this process.

What they do not cover: the query may read whatever its role may read, and call the database's own functions; memory and temporary
files are the server's, bounded by its `work_mem` and `temp_file_limit`. So give the URL a role of its own, that may SELECT
from the tables of the questions, owns nothing and is in no other role.

Needs psycopg 3 (`pip install -e '.[postgres]'`).
"""

import re
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import psycopg
from psycopg import pq

from ray_sql.database.sqlite_worker import Reply, one_line, restrict, serve

HARMLESS = {
    "random",
    "random_normal",
    "clock_timestamp",
    "timeofday",
    "gen_random_uuid",
    "uuid_generate_v4",
}
"""Volatile because they answer anew each time, and nothing else."""
RUNS_TEXT = {
    "crosstab",
    "crosstab2",
    "crosstab3",
    "crosstab4",
    "crosstabn",
    "connectby",
    "xpath_table",
}
"""Of the server's own extensions: not declared volatile, though they run a query given as text."""
# Functions with an argument of type `internal` can be called by no query, and have names such as "system".
VOLATILE = """
SELECT DISTINCT lower(p.proname) FROM pg_catalog.pg_proc p
WHERE p.provolatile = 'v' AND p.prorettype <> 'trigger'::regtype AND NOT 'internal'::regtype = ANY (p.proargtypes::oid[])
  AND (p.pronamespace = 'pg_catalog'::regnamespace OR EXISTS (
    SELECT FROM pg_catalog.pg_depend d WHERE d.classid = 'pg_proc'::regclass AND d.objid = p.oid AND d.deptype = 'e'))
"""
# Output that depends on no server's defaults, and scans that begin at the beginning: equal questions get equal answers.
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
SET LOCAL idle_in_transaction_session_timeout = {idle}
"""
TIMEOUTS = "SET LOCAL statement_timeout = {left}; SET LOCAL lock_timeout = {left}"
MOST_ROWS_AT_ONCE = 4096
PREFIXES = {  # of SQLSTATE -> what `QueryResult.error` opens with
    "42703": "no such column: ",
    "42P01": "no such table: ",
    "25006": "refused: ",
    "42501": "refused: ",
    "53": "too large: ",
    "54": "too large: ",
}
SYNTAX = "42601"
COMMAND = re.compile(
    r"[\s;]*(insert|update|delete|merge|create|alter|drop|truncate|copy|set|reset|call|do|explain|show|vacuum|analyze|begin|start|"
    r"commit|rollback|abort|end|savepoint|release|lock|grant|revoke|notify|listen|unlisten|prepare|execute|deallocate|declare|fetch|"
    r"move|close|cluster|reindex|comment|security|load|discard|checkpoint|refresh|import|reassign)\b",
    re.IGNORECASE,
)
LATE = ("57014", "55P03")  # statement_timeout, lock_timeout
LOST = ("08", "57P", "25P03")  # the connection, or the server
BAD_REQUEST = "08P01"  # parameters without values: the query's own fault

ESCAPED = re.compile(r'u&"', re.IGNORECASE)  # a name in Unicode escapes

CONNECTIONS: dict[str, tuple[psycopg.Connection[Any], frozenset[str]]] = {}
"""The one to the last URL asked, with the functions that are refused there: a kept one a URL would use up the server's."""


def query(
    uri: str, sql: str, seconds: float, rows: int, size: int, memory: int, sql_length: int
) -> Reply:
    """Run one query under its limits; every mistake of the query becomes a reply, and a server out of reach is "unreachable"."""
    started = time.monotonic()

    def reply(status: str, error: str) -> Reply:
        return status, (), (), one_line(error), time.monotonic() - started

    restrict(seconds, memory)
    try:
        text = sql.encode()
        if b"\0" in text:
            return reply("error", "refused: a NUL character")
        if len(text) > sql_length:
            return reply("error", f"too large: a query of {len(text)} bytes")
        if ESCAPED.search(sql):
            return reply("error", "refused: a name in Unicode escapes")
        try:
            connection, refused = connect(uri, seconds)
        except psycopg.ProgrammingError as error:
            if error.sqlstate is None:  # libpq says what it cannot read, which may be a password
                unread = "not a URL that libpq reads: percent-encode the password, or leave it to PGPASSWORD or ~/.pgpass"
                return reply("unreachable", unread)
            return reply("unreachable", str(error))
        except psycopg.Error as error:
            return reply("unreachable", str(error))
        if named := refused & words(sql):
            return reply("error", f"refused: FUNCTION {min(named)}")
        began = time.monotonic()
        names, found = fetch(connection, text, started + seconds, seconds, rows, size)
        return (
            "ok",
            names,
            found,
            None,
            time.monotonic() - began,
        )  # of the query alone: efficiency is judged by it
    except psycopg.Error as error:
        return reply(*explain(error, sql, seconds))
    except TimeoutError:
        return reply("timeout", f"timeout: stopped after {seconds:g} s")
    except MemoryError:
        return reply("error", "too large: out of memory")
    except (
        OverflowError,
        ValueError,
    ) as error:  # a text that is no UTF-8, a number of more digits than Python reads
        return reply("error", str(error))
    finally:
        clean(uri)


def connect(uri: str, seconds: float) -> tuple[psycopg.Connection[Any], frozenset[str]]:
    """A connection to the server, kept for the next query, and the names of the functions that a query may not use there.

    Found within about a query's `seconds`: this process is killed soon after, and the server would count as a slow query.
    """
    if uri not in CONNECTIONS:
        for other in list(CONNECTIONS):
            CONNECTIONS.pop(other)[0].close()
        connection: psycopg.Connection[Any] = psycopg.connect(
            uri,
            autocommit=True,
            prepare_threshold=None,
            client_encoding="UTF8",
            application_name="ray_sql",
            connect_timeout=max(2, min(10, int(seconds))),
        )
        volatile = {name for (name,) in connection.execute(VOLATILE)}
        CONNECTIONS[uri] = connection, frozenset(volatile - HARMLESS | RUNS_TEXT)
    return CONNECTIONS[uri]


def clean(uri: str) -> None:
    """Roll back, and leave nothing of the session to the next query; a connection that cannot be cleaned is closed."""
    if uri not in CONNECTIONS:
        return
    connection, _ = CONNECTIONS[uri]
    try:
        connection.execute("ROLLBACK")
        connection.execute("DISCARD ALL")
    except psycopg.Error:
        connection.close()
        del CONNECTIONS[uri]


def words(sql: str) -> set[str]:
    """Every word of the text in lower case, inside comments and quotes, too."""
    return {word.lower() for word in re.findall(r"[^\W\d][\w$]*", sql)}


def fetch(
    connection: psycopg.Connection[Any],
    sql: bytes,
    deadline: float,
    seconds: float,
    most_rows: int,
    size: int,
) -> tuple[tuple[str, ...], tuple[tuple[Any, ...], ...]]:
    """Names and rows of a query; OverflowError beyond `most_rows` rows or `size` bytes, TimeoutError after the deadline."""
    run(connection, BEGIN.format(idle=milliseconds(seconds + 60)).encode())
    run(connection, timeouts(deadline))
    # Not `execute`: the simple protocol would take many statements.
    checked(
        connection,
        connection.pgconn.exec_params(b"DECLARE answer NO SCROLL CURSOR FOR " + sql, None),
    )
    names: tuple[str, ...] = ()
    rows: list[tuple[Any, ...]] = []
    used, portion = 0, 1
    while True:
        run(connection, timeouts(deadline))
        result = run(connection, b"FETCH FORWARD %d FROM answer" % portion)
        if not names:
            names = tuple(
                (result.fname(column) or b"").decode(errors="ignore")
                for column in range(result.nfields)
            )
            if sum(map(len, names)) > size:
                raise OverflowError(f"too large: more than {size} bytes of column names")
        loaders = [LOADERS.get(result.ftype(column), text) for column in range(result.nfields)]
        for row in range(result.ntuples):
            cells = [result.get_value(row, column) for column in range(result.nfields)]
            used += sum(8 if cell is None else max(8, len(cell)) for cell in cells)
            if len(rows) == most_rows:
                raise OverflowError(f"too large: more than {most_rows} rows")
            if used > size:
                raise OverflowError(f"too large: more than {size} bytes of rows")
            rows.append(
                tuple(
                    None if cell is None else load(cell)
                    for load, cell in zip(loaders, cells, strict=True)
                )
            )
        if result.ntuples < portion:
            return names, tuple(rows)
        portion = min(
            2 * portion, MOST_ROWS_AT_ONCE
        )  # the next holds about as much as all before: bounded by `size`


def timeouts(deadline: float) -> bytes:
    """What makes the server stop at the deadline; TimeoutError where it has passed."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("too late")
    return TIMEOUTS.format(left=milliseconds(left)).encode()


def milliseconds(seconds: float) -> int:
    """At least 1 (0 would be no limit), at most what the server takes."""
    return max(1, min(int(1000 * seconds), 2**31 - 1))


def run(connection: psycopg.Connection[Any], command: bytes) -> Any:
    """The last result of a command of our own, with every value as text."""
    return checked(connection, connection.pgconn.exec_(command))


def checked(connection: psycopg.Connection[Any], result: Any) -> Any:
    """The result, or its error raised."""
    if result.status in (pq.ExecStatus.COMMAND_OK, pq.ExecStatus.TUPLES_OK):
        return result
    raise psycopg.errors.error_from_result(result, encoding="utf-8")


def explain(error: psycopg.Error, sql: str, seconds: float) -> tuple[str, str]:
    """Status and one line on what went wrong, in the words that `QueryResult.error` promises."""
    state, message = error.sqlstate or "", error.diag.message_primary or str(error)
    if state in LATE:
        return "timeout", f"timeout: stopped after {seconds:g} s"
    if "out of memory" in message:
        return "error", f"too large: {message}"
    if not state or (state.startswith(LOST) and state != BAD_REQUEST):
        return "crash", f"crash: {message}"
    if "multiple commands" in message:
        return "error", "refused: more than one statement"
    if (
        "DECLARE CURSOR" in message
        or "INTO is not allowed" in message
        or (state == SYNTAX and COMMAND.match(sql))
    ):
        return "error", "refused: not a query that only reads"
    return "error", next(
        (prefix for code, prefix in PREFIXES.items() if state.startswith(code)), ""
    ) + message


def text(value: bytes) -> str:
    """Anything else, as the server writes it."""
    return value.decode(errors="ignore")


def boolean(value: bytes) -> int:
    """1 or 0, as in SQLite: `count(*) > 1` and `CASE … THEN 1` are the same answer."""
    return int(value == b"t")


def real(value: bytes) -> float | str:
    """A double; what is no number is text, since no NaN equals another and the same answer must."""
    return "NaN" if value == b"NaN" else float(value)


def numeric(value: bytes) -> int | float | str:
    """Exact where it has no decimals, else the nearest double: an average is the same whichever type computed it."""
    return int(value) if value.lstrip(b"-").isdigit() else real(value)


def bytestring(value: bytes) -> bytes:
    """`\\x` and hexadecimal digits."""
    return bytes.fromhex(value[2:].decode())


def padded(value: bytes) -> str:
    """`char(n)` without the blanks that fill it up, which do not count in its own comparisons."""
    return text(value).rstrip(" ")


LOADERS: dict[int, Callable[[bytes], Any]] = {
    **dict.fromkeys((20, 21, 23, 26), int),  # int8, int2, int4, oid
    **dict.fromkeys((700, 701), real),  # float4, float8
    16: boolean,
    17: bytestring,
    1042: padded,
    1700: numeric,
}
"""By the type's oid, which is the same in every server."""


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])), query)
