"""Say what SQL may do on a MariaDB or MySQL server, for the loop of `worker`.

These guards keep a query from doing harm, the strongest first:

- A READ ONLY transaction, always rolled back by closing the connection. The server refuses writes,
  DDL and locks of tables.
- One statement: the protocol's switch for several is off. Its first word is SELECT, WITH, VALUES,
  TABLE or a parenthesis. Comments that the server would execute (`/*!`) are refused.
- No text with words of what acts outside of a transaction. They are INTO OUTFILE and DUMPFILE, FOR
  UPDATE, NEXT VALUE, and calls such as `load_file`, `sleep` and `get_lock`.
- No view or function of the database's own that uses one of them, and no function whose text is
  hidden. A view's text is seen with the right SHOW VIEW.
- The server's limit on the seconds of a statement, and rows fetched as they come.
- A parent that kills this process. The next worker that connects ends what overstays on the server.

They leave some risks. The query may read all that its account may read, and call the database's own
functions. So give the URL an account of its own. It should have SELECT on the tables of the
questions, and no global right such as FILE or SUPER.

Needs PyMySQL (`pip install -e '.[mysql]'`).
"""

import os
import re
import time
import unicodedata
from collections.abc import Iterable, Iterator
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

import pymysql
from pymysql.constants import FIELD_TYPE
from pymysql.cursors import SSCursor

from ray_sql.database.named_functions import is_called, outside, used, words
from ray_sql.database.worker import Request

REFUSED = set(
    "load_file sleep benchmark get_lock release_lock release_all_locks is_free_lock is_used_lock "
    "master_pos_wait master_gtid_wait source_pos_wait wait_for_executed_gtid_set "
    "wait_until_sql_thread_after_gtids nextval setval sys_exec sys_eval "
    "sys_get sys_set lib_mysqludf_sys_info max_execution_time set_var".split()
)
"""Functions that act outside of a query, wait, or lift its limits."""
ACTING = set("outfile dumpfile kill global".split())
"""Words by which a function of the database's own acts outside."""
REFUSED_WORDS = (
    *("outfile", "dumpfile", "for update", "for share", "lock share"),
    *("next value for", "previous value for"),
)
"""Words that no query may have together, in any order: no quote and no comment hides them."""
EXECUTED_COMMENT = re.compile(r"/\*M?!", re.IGNORECASE)
READING = re.compile(
    r"(?:[\s(]|/\*.*?\*/|(?:--(?=\s|$)|#)[^\n]*)*+(?:select|with|values|table)\b",
    re.IGNORECASE | re.DOTALL,
)
"""The first word, behind comments and parentheses."""
EXPONENT = re.compile(r"\de\d+", re.IGNORECASE)
"""The end of a number; a word may follow it at once (`1e5for`)."""
UNREADABLE_URL = "percent-encode the password, or use MYSQL_PWD"
TEXTS = """
SELECT lower(routine_name), routine_definition IS NULL, routine_definition
FROM information_schema.routines WHERE routine_type <> 'PROCEDURE'
UNION ALL SELECT lower(table_name), false, view_definition FROM information_schema.views
WHERE table_schema NOT IN ('sys', 'information_schema', 'performance_schema', 'mysql')
"""
OVERSTAYED = """
SELECT id FROM information_schema.processlist
WHERE id <> connection_id() AND user = substring_index(user(), '@', 1)
  AND info LIKE '/* ray_sql, % s */%'
  AND time > 2 + substring_index(substring_index(info, ' s */', 1), ', ', -1)
"""
MOST_ROWS_AT_ONCE = 1024
OPTIONS = set("unix_socket charset ssl_ca ssl_cert ssl_key ssl_verify_cert".split())
"""What a URL may say behind `?`, in PyMySQL's words."""
FULL = {1040, 1203, 1226}
LATE = {1317, 1205, 1969, 3024, 1028}
LOST = {2006, 2013, 2014, 2055, 0}
OPENINGS = {
    1054: "no such column: ",
    1146: "no such table: ",
    1109: "no such table: ",
    1064: "syntax error: ",
    **dict.fromkeys((1792, 1044, 1142, 1143, 1227, 1290, 1370, 1419, 1827), "refused: "),
    **dict.fromkeys((1038, 1041, 1114, 1153, 1301, 1436), "too large: "),
}
"""The number of an error → the opening of `QueryResult.error`."""

OWN_REFUSED: dict[str, set[str]] = {}
"""URL → the names of its database's own functions and views that are refused."""


class Query:
    """One query on a server. A server has no `reverse`."""

    errors = (pymysql.MySQLError,)

    def __init__(self, request: Request, deadline: float) -> None:
        self._request = request
        self._deadline = deadline
        self._connection: Any = None
        self._cursor: Any = None

    def open(self) -> None:
        """Refuse a query by its words, or connect."""
        sql = self._request.sql
        if "\0" in sql:
            raise ValueError("refused: a NUL character")
        if EXECUTED_COMMENT.search(sql):
            raise ValueError("refused: a comment that the server would execute")
        if not READING.match(sql):
            raise ValueError("refused: not a query that only reads")
        found = words(EXPONENT.sub(" ", plain_letters(sql)))
        for together in REFUSED_WORDS:
            if found.issuperset(together.split()):
                raise ValueError(f"refused: {together.upper()}")
        seconds = self._request.seconds
        try:
            connection = pymysql.connect(
                **address(self._request.uri),
                connect_timeout=max(2, min(10, int(seconds))),
                read_timeout=seconds + 1,
                autocommit=True,
                conv=DECODERS,
                local_infile=False,
                program_name="ray_sql",
            )
        except (OSError, LookupError, AttributeError, RuntimeError) as error:
            # no file of a certificate, no such charset, no package for a kind of password
            raise pymysql.OperationalError(str(error)) from None
        try:
            prepare(connection, self._request.uri, seconds)
        except BaseException:
            connection.close()
            raise
        self._connection = connection
        own = used(OWN_REFUSED[self._request.uri], sql)
        if named := own | {name for name in REFUSED if is_called(name, plain_letters(sql))}:
            raise ValueError(f"refused: FUNCTION {min(named)}")

    def ask(self) -> tuple[tuple[str, ...], Iterable[tuple[Any, ...]]]:
        """Begin the query; rows come as they are read."""
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("too late")
        with self._connection.cursor() as cursor:
            cursor.execute(limit(self._connection, left))
            cursor.execute("START TRANSACTION READ ONLY")
        self._cursor = self._connection.cursor(SSCursor)
        self._cursor.execute(f"/* ray_sql, {self._request.seconds:g} s */ {self._request.sql}")
        if self._cursor.description is None:
            raise ValueError("refused: not a query")
        return tuple(column[0] for column in self._cursor.description), self._rows()

    def _rows(self) -> Iterator[tuple[Any, ...]]:
        while part := self._cursor.fetchmany(MOST_ROWS_AT_ONCE):
            yield from part

    def explain(self, error: Exception) -> tuple[str, str]:
        """Return status and message of an error, in the words that `QueryResult.error` promises."""
        number = error.args[0] if error.args and isinstance(error.args[0], int) else 0
        message = str(error.args[-1]) if error.args else type(error).__name__
        if self._connection is None:
            return "full" if number in FULL else "unreachable", message
        if number in LATE:
            return "timeout", ""
        if number in LOST:
            late = time.monotonic() >= self._deadline
            return ("timeout", "") if late else ("crash", f"crash: {message}")
        return "error", OPENINGS.get(number, "") + message

    def close(self) -> None:
        """Hang up, without reading what is left of a result. The server rolls back."""
        if self._cursor is not None:
            if self._cursor._result is not None:
                self._cursor._result.unbuffered_active = False
            self._cursor.connection = None
        if self._connection is not None:
            self._connection.close()


def plain_letters(sql: str) -> str:
    """Return a text without accents: the server finds a function by its name without them."""
    return "".join(
        letter for letter in unicodedata.normalize("NFKD", sql) if not unicodedata.combining(letter)
    )


def address(uri: str) -> dict[str, Any]:
    """Return PyMySQL's arguments for a URL.

    Raises `pymysql.OperationalError` for a URL that says what is not known here. No message quotes
    what may be a part of the password.
    """
    try:
        parts = urlsplit(uri)
        port = parts.port or 3306
    except ValueError:
        raise pymysql.OperationalError(UNREADABLE_URL) from None
    if "@" in parts.path + parts.query + parts.fragment:
        raise pymysql.OperationalError(UNREADABLE_URL)
    said = dict(parse_qsl(parts.query))
    unknown = set(said) - OPTIONS
    if unknown:
        names = ", ".join(sorted(OPTIONS))
        raise pymysql.OperationalError(f"{min(unknown)} is no option of the URL; those are {names}")
    return {
        "host": parts.hostname or "localhost",
        "port": port,
        "user": unquote(parts.username or "") or None,
        "password": unquote(parts.password or "") or os.environ.get("MYSQL_PWD", ""),
        "database": unquote(parts.path.removeprefix("/")) or None,
        "charset": "utf8mb4",
        **said,
    }


def prepare(connection: Any, uri: str, seconds: float) -> None:
    """End what overstays of earlier queries, and read what the database's own functions do."""
    with connection.cursor() as cursor:
        cursor.execute(f"SET time_zone = '+00:00', lock_wait_timeout = {max(1, int(seconds))}")
        if uri not in OWN_REFUSED:
            cursor.execute(OVERSTAYED)
            for (process,) in cursor.fetchall():
                try:
                    cursor.execute(f"KILL {process:d}")
                except pymysql.MySQLError:  # it has ended meanwhile
                    continue
            cursor.execute(TEXTS)
            functions = [(name, bool(hidden), text or "") for name, hidden, text in cursor]
            OWN_REFUSED[uri] = outside(functions, REFUSED | ACTING)


def limit(connection: Any, seconds: float) -> str:
    """Return the command that stops the server's work at the deadline, in the server's words."""
    if "mariadb" in connection.get_server_info().lower():
        return f"SET max_statement_time = {max(0.001, seconds):.3f}"
    return f"SET max_execution_time = {max(1, int(1000 * seconds))}"


def decimal(value: str) -> int | float:
    """Read an int where there are no decimals, else the nearest double."""
    return int(value) if value.lstrip("-").isdigit() else float(value)


DECODERS: dict[Any, Any] = {
    **dict.fromkeys(
        (
            FIELD_TYPE.TINY,
            FIELD_TYPE.SHORT,
            FIELD_TYPE.INT24,
            FIELD_TYPE.LONG,
            FIELD_TYPE.LONGLONG,
            FIELD_TYPE.YEAR,
        ),
        int,
    ),
    **dict.fromkeys((FIELD_TYPE.FLOAT, FIELD_TYPE.DOUBLE), float),
    **dict.fromkeys((FIELD_TYPE.DECIMAL, FIELD_TYPE.NEWDECIMAL), decimal),
}
"""By the type of a column; all others are text or bytes, as the server writes them."""
