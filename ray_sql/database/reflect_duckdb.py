"""Read the schema of a DuckDB file in a worker process: bounded, and without a trace."""

import json
from collections import defaultdict
from typing import Any

from ray_sql.database.bounded import BoundedReader
from ray_sql.database.query import Rows
from ray_sql.database.schema import Column, ForeignKey, Schema, Table
from ray_sql.errors import DataError

# A table in creation order; those of the default schema first, then those of others, then views.
RELATIONS = """
SELECT schema_name, table_name, is_view, comment FROM (
  SELECT schema_name, table_name, false AS is_view, comment, table_oid AS oid
  FROM duckdb_tables() WHERE NOT internal AND NOT temporary AND database_name = current_database()
  UNION ALL SELECT schema_name, view_name, true, comment, view_oid
  FROM duckdb_views() WHERE NOT internal AND NOT temporary AND database_name = current_database())
ORDER BY is_view, schema_name <> 'main', schema_name, oid
"""
COLUMNS = """
SELECT schema_name, table_name, column_name, data_type, is_nullable, comment
FROM duckdb_columns() WHERE NOT internal AND database_name = current_database()
ORDER BY schema_name, table_name, column_index
"""
KEYS = """
SELECT schema_name, table_name, constraint_type, constraint_column_names, referenced_table,
  referenced_column_names
FROM duckdb_constraints() WHERE database_name = current_database()
  AND constraint_type IN ('PRIMARY KEY', 'FOREIGN KEY') ORDER BY constraint_index
"""
DEFAULT = "main"
"""The schema whose tables need no prefix."""

Name = tuple[str, str]
"""A schema's name and a table's."""


def read(reader: BoundedReader, db_id: str, comments: bool) -> Schema:
    """Return the schema of a DuckDB file, foreign keys unchecked.

    Where `comments` are read, they are the descriptions. Raises `DataError` where it cannot be
    read.
    """
    columns: dict[Name, list[Column]] = defaultdict(list)
    for space, table, name, kind, nullable, comment in _rows(reader, COLUMNS):
        said = (comment or "") if comments else ""
        columns[space, table].append(Column(name, kind, bool(nullable), description=said))
    primary: dict[Name, tuple[str, ...]] = {}
    foreign: dict[Name, list[ForeignKey]] = defaultdict(list)
    for space, table, kind, names, target, refs in _rows(reader, KEYS):
        if kind == "PRIMARY KEY":
            primary[space, table] = _names(names)
        else:  # a key leads to a table of its own schema
            key = ForeignKey(_names(names), _full_name(space, target), _names(refs))
            foreign[space, table].append(key)
    tables = [
        Table(
            _full_name(space, name),
            tuple(columns[space, name]),
            primary.get((space, name), ()),
            tuple(foreign[space, name]),
            namespace="" if space == DEFAULT else space,
            is_view=bool(is_view),
            description=(comment or "") if comments else "",
        )
        for space, name, is_view, comment in _rows(reader, RELATIONS)
    ]
    return Schema(db_id, tuple(tables), "duckdb")


def _full_name(space: str, table: str) -> str:
    return table if space == DEFAULT else f"{space}.{table}"


def _names(cell: Any) -> tuple[str, ...]:
    """Return a list of names, which the worker writes as JSON."""
    return tuple(json.loads(cell))


def _rows(reader: BoundedReader, sql: str) -> Rows:
    result = reader.run(sql)
    if result.status != "ok":
        raise DataError(
            f"{reader.database}: cannot read its schema: {result.error}; check it with duckdb"
        )
    return result.rows
