"""Copies of a SQLite database with the same rows in another order, under other indexes.

The meaning of a query depends on neither. So a result that differs on a copy is one that the query
leaves open. Keys are left away, for SQLite keeps the rows of a table by its key.
"""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from ray_sql.database.places import sqlite_uri

MOST_BYTES = 512 * 2**20
"""Bytes of a database that is copied; a larger one is only read in reverse."""
ORDERS = {
    "reversed": "ORDER BY rowid DESC",
    "shuffled": "ORDER BY (rowid % 65521 * 40503 + 7) % 65521, rowid DESC",
    "indexed": "ORDER BY (rowid % 65521 * 25717 + 3) % 65521, rowid DESC",
    "empty": "LIMIT 0",
}
"""A copy → the rows that it gets, and their order."""
INDEXED = ("indexed",)
"""Copies with an index on each column; the others have none."""
MOST_INDEXED = 40
"""Columns of a table that get an index."""


@dataclass(frozen=True)
class Copies:
    """The copies of a database: one without rows, and those with their rows in another order.

    `left_out` says what is in none of them, or why there are none.
    """

    empty: Path | None = None
    reordered: tuple[Path, ...] = ()
    left_out: tuple[str, ...] = ()


def copies(database: Path, folder: Path) -> Copies:
    """Write the copies of a database into a folder.

    Raises `DataError` where it is no database that can be read.
    """
    uri = sqlite_uri(database)
    if uri is None:
        return Copies(left_out=("only the rows of SQLite files are put in another order",))
    size = database.stat().st_size
    if size > MOST_BYTES:
        return Copies(left_out=(f"has {size:,} bytes, and is too large to be copied",))
    left_out: dict[str, None] = {}
    made = {name: folder / f"{name}.sqlite" for name in ORDERS}
    for name, file in made.items():
        try:
            left_out |= dict.fromkeys(_copy(uri, file, name))
        except sqlite3.Error as error:
            return Copies(left_out=(f"cannot be copied ({error})",))
    empty = made.pop("empty")
    return Copies(empty, tuple(made.values()), tuple(left_out))


def _copy(uri: str, target: Path, name: str) -> Iterator[str]:
    """Write one copy; yield the tables and views that are not in it."""
    with closing(sqlite3.connect(target, isolation_level=None, uri=True)) as connection:
        connection.execute("PRAGMA journal_mode = OFF")
        connection.execute("PRAGMA synchronous = OFF")
        connection.execute("ATTACH ? AS source", (uri,))
        objects = connection.execute(
            "SELECT name, type, sql FROM source.sqlite_master "
            "WHERE type IN ('table', 'view') AND name NOT LIKE 'sqlite~_%' ESCAPE '~' "
            "ORDER BY type, rowid"
        ).fetchall()
        connection.execute("BEGIN")
        for table, kind, sql in objects:
            try:
                if kind == "view":
                    connection.execute(sql)
                elif re.match(r"(?i)\s*create\s+virtual\b", sql):
                    yield f"table {table} is virtual"
                else:
                    _copy_table(connection, table, sql, name)
            except sqlite3.Error as error:
                yield f"{kind} {table}: {error}"
        connection.execute("COMMIT")


def _copy_table(connection: sqlite3.Connection, table: str, sql: str, name: str) -> None:
    columns = [
        (column, declared)
        for _, column, declared, _, _, _, hidden in connection.execute(
            f"PRAGMA source.table_xinfo({_quoted(table)})"
        )
        if hidden != 1
    ]
    definitions = [
        f"{_quoted(column)} {declared} {_collation(column, sql)}" for column, declared in columns
    ]
    connection.execute(f"CREATE TABLE main.{_quoted(table)} ({', '.join(definitions)})")
    listed = ", ".join(_quoted(column) for column, _ in columns)
    fill = f"INSERT INTO main.{_quoted(table)} SELECT {listed} FROM source.{_quoted(table)} "
    try:
        connection.execute(fill + ORDERS[name])
    except sqlite3.OperationalError:  # a table WITHOUT ROWID
        places = ", ".join(f"{place} DESC" for place in range(1, len(columns) + 1))
        connection.execute(fill + ("LIMIT 0" if name == "empty" else f"ORDER BY {places}"))
    if name in INDEXED:
        for place, (column, _) in enumerate(columns[:MOST_INDEXED]):
            index = _quoted(f"ray_sql_{table}_{place}")
            connection.execute(f"CREATE INDEX {index} ON {_quoted(table)} ({_quoted(column)})")


def _collation(column: str, sql: str) -> str:
    """Return the column's COLLATE clause, by which its values compare."""
    found = re.search(
        rf"(?is)[\"\[`(,\s]{re.escape(column)}[\"\]`]?\s[^,]*?\bcollate\s+[\"']?(\w+)", sql
    )
    return f"COLLATE {found[1]}" if found else ""


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'
