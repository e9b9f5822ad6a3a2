"""Read the schema of a SQLite file in a worker process: bounded, and without a trace.

A file in WAL mode is read as the executor reads it: no side file is made, and the folder need not
be writable.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from ray_sql.database.bounded import BoundedReader
from ray_sql.database.query import Rows
from ray_sql.database.schema import Column, ForeignKey, Schema, Table
from ray_sql.errors import DataError

OBJECTS = r"""
SELECT rowid, name, type = 'view', sql LIKE 'CREATE VIRTUAL %' FROM sqlite_master
WHERE type IN ('table', 'view') AND name NOT LIKE 'sqlite\_%' ESCAPE '\'
ORDER BY type = 'view', rowid
"""
# The private storage of full-text and spatial indexes. Finding it prepares every view, which may
# take long, so that it is asked for only where there is such an index.
SHADOWS = "SELECT name FROM pragma_table_list WHERE schema = 'main' AND type = 'shadow'"
COLUMNS = """
SELECT m.rowid, x.name, x.type, x."notnull", x.pk
FROM sqlite_master m, pragma_table_xinfo(m.name, 'main') x
WHERE m.rowid IN ({}) AND x.hidden <> 1 ORDER BY m.rowid, x.cid
"""
KEYS = """
SELECT m.rowid, f.id, f."table", f."from", f."to"
FROM sqlite_master m, pragma_foreign_key_list(m.name, 'main') f
WHERE m.rowid IN ({}) ORDER BY m.rowid, f.id, f.seq
"""
UNFINISHED = "refused: attempt to write a readonly database"
"""The executor says this of a journal whose change must first be undone."""
STANDARD_TYPES = {"ANY", "BLOB", "INT", "INTEGER", "REAL", "TEXT"}
"""SQLite forgets the case of these since 3.37, and so do we for a file read by an older one."""


class _Object(NamedTuple):
    """A table or view, by its row in SQLite's own list."""

    row: int
    name: str
    is_view: bool
    is_virtual: bool


def read(reader: BoundedReader, db_id: str) -> Schema:
    """Return the schema of a SQLite file, foreign keys unchecked.

    A virtual table or view that cannot be read is left out, and named.

    Raises:
        DataError: the file is no database, or nothing of it can be read.
    """
    objects = [_Object(*row) for row in _rows(reader, OBJECTS)]
    if any(one.is_virtual for one in objects):
        shadows = {name for (name,) in _rows(reader, SHADOWS)}
        objects = [one for one in objects if one.name not in shadows]
    columns, left_out = _columns(reader, objects)
    if objects and not columns:
        raise _unreadable(reader, f"nothing in it can be read: {left_out[0]}")
    shown = [one for one in objects if one.row in columns]
    keys = _foreign_keys(_rows(reader, KEYS.format(_row_list(shown))))
    tables = []
    for one in shown:
        rows = columns[one.row]
        primary = sorted((place, name) for name, _, _, place in rows if place)
        tables.append(
            Table(
                one.name,
                tuple(
                    Column(name, _declared(kind), not notnull) for name, kind, notnull, _ in rows
                ),
                tuple(name for _, name in primary),
                tuple(keys[one.row]),
                is_view=bool(one.is_view),
            )
        )
    return Schema(db_id, tuple(tables), left_out=tuple(left_out))


def _row_list(objects: Iterable[_Object]) -> str:
    return ", ".join(str(one.row) for one in objects)


def _rows(reader: BoundedReader, sql: str) -> Rows:
    result = reader.run(sql)
    if result.status != "ok":
        raise _unreadable(reader, result.error)
    return result.rows


def _unreadable(reader: BoundedReader, reason: str | None) -> DataError:
    way_out = "check it, for example with `sqlite3 FILE .schema`"
    if reason == UNFINISHED:
        reason, way_out = "a change to it was cut off", "open it once with sqlite3 to undo that"
    return DataError(f"{reader.database}: cannot read its schema: {reason}; {way_out}")


def _columns(
    reader: BoundedReader, objects: Sequence[_Object]
) -> tuple[dict[int, Rows], list[str]]:
    """Return (columns by row of their table, a line for each object that has none)."""
    found: dict[int, Rows] = defaultdict(tuple)
    left_out = []
    for group, result in reader.run_on(objects, lambda part: COLUMNS.format(_row_list(part))):
        for row, *column in result.rows:
            found[row] += (tuple(column),)
        for one in group:
            if result.status != "ok" and not (one.is_view or one.is_virtual):
                raise _unreadable(reader, f"{one.name}: {result.error}")
            if one.row not in found:
                left_out.append(f"{one.name} is not shown: {result.error or 'it has no columns'}")
    return found, left_out


def _foreign_keys(rows: Rows) -> dict[int, list[ForeignKey]]:
    """Return the keys by row of their table; without target columns where SQL names none."""
    pairs: dict[tuple[int, int, str], list[tuple[str, str | None]]] = defaultdict(list)
    for row, number, target, column, ref in rows:
        pairs[row, number, target].append((column, ref))
    keys: dict[int, list[ForeignKey]] = defaultdict(list)
    for (row, _, target), joined in pairs.items():
        columns = tuple(column for column, _ in joined)
        refs = tuple(ref for _, ref in joined if ref)
        keys[row].append(ForeignKey(columns, target, refs))
    return keys


def _declared(kind: str) -> str:
    """Return a type as it is declared, on one line: a type may be any text in quotes."""
    if kind.upper() in STANDARD_TYPES:
        return kind.upper()
    return "".join(char for char in " ".join(kind.split()) if char.isprintable())
