"""Read the schema of a live database by SQLAlchemy: SQLite, PostgreSQL, MySQL or another dialect.

SQLAlchemy is imported inside the functions, because most jobs never open a database.
"""

import re
import sqlite3
import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray_sql.database.schema import Column, ForeignKey, Schema, Table
from ray_sql.errors import DataError

if TYPE_CHECKING:
    from sqlalchemy import URL, ColumnClause, Connection, Dialect, Engine
    from sqlalchemy.types import TypeEngine

EXAMPLE_ROWS = 10_000
"""Rows read for example values: a table's first ones, so that a large table costs no more."""

EXAMPLE_LENGTH = 40
"""Longest example value in characters: longer ones cost tokens, and no question quotes them."""


def reflect(database: str | Path, db_id: str, example_values: int = 0) -> Schema:
    """Read tables (no views), columns, types, whole primary keys and foreign keys.

    SQLite's tables come in creation order; other databases keep no such order, so theirs are sorted
    by name. Foreign keys come in the order of their columns. A foreign key to a table or column
    that does not exist is left out: real databases have them.

    Args:
        database: a path to a SQLite file, opened read-only, or an SQLAlchemy URL.
        db_id: the name that the schema gets.
        example_values: the number of most frequent short values per column; 0 reads no rows.

    Raises:
        DataError: no such file, not a database, no driver for it, no connection.
    """
    from sqlalchemy.exc import SAWarning, SQLAlchemyError

    url = database_url(database)
    name = url.database
    if url.get_backend_name() != "sqlite":
        name = url.render_as_string(hide_password=True)
    try:
        with warnings.catch_warnings(), open_engine(url).connect() as connection:
            # SQLite takes any word as a type. SQLAlchemy warns of each that it does not know.
            warnings.simplefilter("ignore", SAWarning)
            schema = _with_resolved_keys(Schema(db_id, _tables(connection)))
            return _with_examples(schema, connection, example_values) if example_values else schema
    except ModuleNotFoundError as error:
        way_out = "install this database's driver"
        if error.name == "psycopg":
            way_out = "pip install -e '.[postgres]'"
        raise DataError(f"{name}: Python has no module {error.name!r}; {way_out}") from error
    except ImportError as error:  # A driver lacks its own library.
        raise DataError(
            f"{name}: {' '.join(str(error).split())}; install this database's driver whole"
        ) from error
    except (SQLAlchemyError, sqlite3.Error) as error:
        reason = str(error).partition("\n")[0]
        raise DataError(
            f"{name}: cannot read its schema: {reason}; check the database and your rights to it"
        ) from error


def database_url(database: str | Path) -> "URL":
    from sqlalchemy import URL, make_url
    from sqlalchemy.exc import ArgumentError

    if "://" not in str(database):
        return URL.create("sqlite", database=str(database))
    try:
        url = make_url(str(database))
    except ArgumentError as error:  # The text may hold a password, so it is not repeated.
        raise DataError(
            "database: not a URL that SQLAlchemy reads; write dialect://user:password@host/name"
        ) from error
    # A URL as libpq has it names no driver; queries are executed by psycopg 3.
    if url.drivername in ("postgresql", "postgres"):
        return url.set(drivername="postgresql+psycopg")
    return url


def open_engine(url: "URL") -> "Engine":
    """Return an engine that keeps no connection open, and opens a SQLite file read-only."""
    from sqlalchemy import create_engine
    from sqlalchemy.pool import NullPool

    if url.get_backend_name() != "sqlite":
        return create_engine(url, poolclass=NullPool)
    path = Path(url.database or ":memory:")
    if not path.is_file():
        raise DataError(
            f"{path}: no such SQLite file; give a path to a database file or an SQLAlchemy URL"
        )

    def connect() -> sqlite3.Connection:
        connection = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)
        # Real databases hold bytes that are no UTF-8; a schema must not fail on them.
        connection.text_factory = lambda raw: raw.decode(errors="ignore")
        return connection

    return create_engine("sqlite://", creator=connect, poolclass=NullPool)


def _tables(connection: "Connection") -> tuple[Table, ...]:
    """Return the tables as the database declares them, foreign keys unchecked."""
    from sqlalchemy import inspect

    inspector = inspect(connection)
    names = _table_names(connection)
    # The plural calls: one round trip for all tables where the server can do it.
    columns = inspector.get_multi_columns(filter_names=names)
    primary = inspector.get_multi_pk_constraint(filter_names=names)
    foreign = inspector.get_multi_foreign_keys(filter_names=names)
    tables = []
    for name in names:
        table_columns = [
            Column(c["name"], type_text(c["type"], connection.dialect), bool(c["nullable"]))
            for c in columns[None, name]
        ]
        keys = [
            ForeignKey(
                tuple(key["constrained_columns"]),
                key["referred_table"],
                tuple(key["referred_columns"]),
            )
            for key in foreign[None, name]
            if key["referred_schema"] is None  # A table of another schema is not shown.
        ]
        primary_key = tuple(primary[None, name]["constrained_columns"])
        tables.append(Table(name, tuple(table_columns), primary_key, tuple(keys)))
    return tuple(tables)


def _table_names(connection: "Connection") -> list[str]:
    from sqlalchemy import inspect, text

    if connection.dialect.name != "sqlite":
        return sorted(inspect(connection).get_table_names())
    # Shadow tables are the private storage of full-text and spatial indexes.
    query = """
        SELECT name FROM sqlite_master
        WHERE type = 'table' AND name NOT LIKE 'sqlite~_%' ESCAPE '~'
          AND name NOT IN (
            SELECT name FROM pragma_table_list WHERE schema = 'main' AND type = 'shadow')
        ORDER BY rowid
    """
    return list(connection.execute(text(query)).scalars())


def type_text(kind: "TypeEngine[Any]", dialect: "Dialect") -> str:
    """Return the type in its database's words, without character set and collation.

    It is empty for a column without a type.
    """
    from sqlalchemy.types import NullType

    if isinstance(kind, NullType):
        return ""
    return re.sub(r' (CHARACTER SET|COLLATE) ("[^"]*"|\S+)', "", kind.compile(dialect=dialect))


def _with_resolved_keys(schema: Schema) -> Schema:
    """Keep the foreign keys that lead somewhere, once each, in the order of their columns."""
    tables = []
    for table in schema.tables:
        resolved = {_resolved_key(key, table, schema) for key in table.foreign_keys}
        keys = sorted((key for key in resolved if key), key=partial(_key_order, table))
        tables.append(replace(table, foreign_keys=tuple(keys)))
    return replace(schema, tables=tuple(tables))


def _key_order(table: Table, key: ForeignKey) -> tuple[list[int], str, tuple[str, ...]]:
    positions = [table.column_names.index(name) for name in key.columns]
    return positions, key.ref_table, key.ref_columns


def _resolved_key(key: ForeignKey, table: Table, schema: Schema) -> ForeignKey | None:
    """Return the key with names as the tables spell them; None where one does not exist."""
    target = schema.table(key.ref_table)
    if target is None:
        return None
    columns, refs = _spelled(table, key.columns), _spelled(target, key.ref_columns)
    sizes = {len(columns), len(refs), len(key.columns), len(key.ref_columns)}
    return ForeignKey(columns, target.name, refs) if len(sizes) == 1 else None


def _spelled(table: Table, names: Iterable[str]) -> tuple[str, ...]:
    """Return names as the table spells them, without those that do not exist."""
    columns = [table.column(name) for name in names]
    return tuple(column.name for column in columns if column)


def _with_examples(schema: Schema, connection: "Connection", count: int) -> Schema:
    tables = [_table_with_examples(table, connection, count) for table in schema.tables]
    return replace(schema, tables=tuple(tables))


def _table_with_examples(table: Table, connection: "Connection", count: int) -> Table:
    import sqlalchemy as sa

    clauses: list[ColumnClause[Any]] = [sa.column(name) for name in table.column_names]
    query = sa.select(*clauses).select_from(sa.table(table.name)).limit(EXAMPLE_ROWS)
    counts: list[Counter[str]] = [Counter() for _ in table.columns]
    for row in connection.execution_options(stream_results=True).execute(query):
        for counter, value in zip(counts, row, strict=True):
            if _is_example(value):
                counter[str(value)] += 1
    columns = tuple(
        replace(column, examples=_most_frequent(counter, count))
        for column, counter in zip(table.columns, counts, strict=True)
    )
    return replace(table, columns=columns)


def _is_example(value: object) -> bool:
    if value is None or isinstance(value, (bytes, memoryview)):
        return False
    text = str(value)
    return 0 < len(text) <= EXAMPLE_LENGTH and text.isprintable()


def _most_frequent(counter: Counter[str], count: int) -> tuple[str, ...]:
    """Sort by falling frequency, then by value: `Counter.most_common` leaves ties in row order."""
    return tuple(sorted(counter, key=lambda value: (-counter[value], value))[:count])
