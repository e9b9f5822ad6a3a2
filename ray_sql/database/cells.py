"""Read the distinct cells of a database's columns in bounded time.

Queries run through an executor, as those of a model do. Of too many cells a sample is read. It is
the same at each time.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from ray_sql.database.bounded import BoundedReader
from ray_sql.database.examples import BYTES
from ray_sql.database.query import QueryResult
from ray_sql.database.schema import Column, Schema, Table
from ray_sql.database.serialize import Names, short_type

Cell = str | int | float

CELL_LENGTH = 80
"""Longest cell in characters that is read: longer ones are no values that a question names."""
COLUMN_CELLS = 50_000
"""Most cells that are read of a column."""
DATABASE_CELLS = 1_000_000
"""Most cells that are read of a database, in equal parts by its columns."""
FIRST_ROWS = 20_000
"""Rows that are read of a table whose distinct cells take too long to find."""
NUMBERS = ("int", "real", "num")
"""Types of numbers, as `short_type` spells them."""


@dataclass(frozen=True)
class ColumnCells:
    """The distinct cells of one column, without NULLs, bytes and long texts."""

    table: str
    column: str
    cells: tuple[Cell, ...]

    @property
    def name(self) -> str:
        """Return `table.column`."""
        return f"{self.table}.{self.column}"


@dataclass(frozen=True)
class Cells:
    """The cells of a database, and the columns of which only a part or nothing could be read."""

    columns: tuple[ColumnCells, ...]
    sampled: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()


def read_cells(schema: Schema, reader: BoundedReader, without: Collection[str] = ()) -> Cells:
    """Return the distinct cells of all columns but those that `without` names.

    Numbers that are keys are not read: no question means them by a number alone. Views are read
    where there are no tables.
    """
    wanted = list(_wanted(schema, without))
    most = max(1, min(COLUMN_CELLS, DATABASE_CELLS // max(1, len(wanted))))
    names, columns = Names(schema), list[ColumnCells]()
    sampled, unread = list[str](), list[str]()
    for table, column in wanted:
        result, whole = _read(table, column, names, reader, most)
        found = ColumnCells(table.name, column.name, tuple(row[0] for row in result.rows[:most]))
        columns.append(found)
        if result.status != "ok":
            unread.append(found.name)
        elif not whole or len(result.rows) > most:
            sampled.append(found.name)
    return Cells(tuple(columns), tuple(sampled), tuple(unread))


def is_named(table: str, column: str, names: Collection[str]) -> bool:
    """Tell whether a list of columns has this one: as `table.column`, `table`, or `*.column`."""
    known = {name.lower() for name in names}
    table, column = table.lower(), column.lower()
    return not known.isdisjoint({table, f"{table}.{column}", f"*.{column}"})


def _wanted(schema: Schema, without: Collection[str]) -> Iterator[tuple[Table, Column]]:
    tables = [table for table in schema.tables if not table.is_view] or schema.tables
    for table in tables:
        keys = {name for key in table.foreign_keys for name in key.columns} | {*table.primary_key}
        for column in table.columns:
            is_key = column.name in keys and short_type(column.type) in NUMBERS
            is_bytes = column.type.upper() in BYTES
            if not (is_key or is_bytes or is_named(table.name, column.name, without)):
                yield table, column


def _read(
    table: Table, column: Column, names: Names, reader: BoundedReader, most: int
) -> tuple[QueryResult, bool]:
    """Return the distinct cells of a column, and whether all of its rows were looked at."""
    name, source = names.quoted(column.name), names.table(table.name)
    whole = reader.run(_query(name, source, column, names.dialect, most))
    if whole.status == "ok":
        return whole, True
    part = f"(SELECT {name} FROM {source} LIMIT {FIRST_ROWS}) AS part"
    return reader.run(_query(name, part, column, names.dialect, most)), False


def _query(name: str, source: str, column: Column, dialect: str, most: int) -> str:
    """Return the query of a column's cells, one more than are wanted.

    SQLite finds them in the order of its rows. Servers have no such order, and draw by a hash.
    """
    if dialect == "sqlite":
        kinds = f"typeof({name}) IN ('text', 'integer', 'real')"
        short = f"length({name}) BETWEEN 1 AND {CELL_LENGTH}"
        return f"SELECT DISTINCT {name} FROM {source} WHERE {kinds} AND {short} LIMIT {most + 1}"
    cell = name
    if short_type(column.type) not in NUMBERS:
        cell = f"CAST({name} AS {TEXT_TYPES.get(dialect, 'TEXT')})"
    text = f"CAST(cell AS {TEXT_TYPES.get(dialect, 'TEXT')})"
    return (
        f"SELECT cell FROM (SELECT DISTINCT {cell} AS cell FROM {source}) AS cells "
        f"WHERE length({text}) BETWEEN 1 AND {CELL_LENGTH} ORDER BY md5({text}) LIMIT {most + 1}"
    )


TEXT_TYPES = {"mysql": "CHAR", "mariadb": "CHAR"}
"""The type that a cell is cast to, where TEXT is not allowed."""


def printable(cells: Sequence[Cell]) -> Iterator[Cell]:
    """Yield the cells that fit on a line of a prompt."""
    return (cell for cell in cells if not isinstance(cell, str) or cell.isprintable())
