"""Read the schema of a live database: a file of SQLite or DuckDB, PostgreSQL, MySQL or another.

SQLAlchemy is imported inside the functions, because most jobs never open a database.
"""

import os
import sqlite3
import warnings
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ray_sql.database import reflect_duckdb, reflect_server, reflect_sqlite
from ray_sql.database.bounded import BoundedReader
from ray_sql.database.examples import (
    CELLS,
    EXAMPLE_ROWS,
    count_examples,
    most_frequent,
    table_with,
    with_examples,
)
from ray_sql.database.places import DUCKDB, MYSQL, SERVERS, source
from ray_sql.database.pool import Executor
from ray_sql.database.query import Place
from ray_sql.database.schema import ForeignKey, Schema, Table
from ray_sql.errors import DataError

if TYPE_CHECKING:
    from sqlalchemy import URL, ColumnClause, Connection

CONNECT_SECONDS = "10"


def reflect(
    database: str | Path,
    db_id: str,
    example_values: int = 0,
    executor: Executor | None = None,
    *,
    comments: bool = False,
) -> Schema:
    """Read tables and views, columns, types, whole primary keys and foreign keys.

    A file's tables come in creation order; servers keep no such order, so theirs are sorted by
    name. Views follow them. Foreign keys come in the order of their columns. A foreign key to a
    table or column that does not exist is left out: real databases have them. `left_out` of the
    schema names what could not be read.

    Args:
        database: a path to a file of SQLite or DuckDB, opened read-only, or an SQLAlchemy URL.
        db_id: the name that the schema gets.
        example_values: the number of most frequent short values per column; 0 reads no rows.
        executor: processes to read by; one of its own if not given.
        comments: read the database's comments, as descriptions.

    Raises:
        DataError: no such file, not a database, no driver for it, no connection.
    """
    with ExitStack() as stack:
        if executor is None:
            executor = stack.enter_context(Executor(1))
        url = database_url(database)
        place: Place = str(database)
        if url.get_backend_name() in ("sqlite", "duckdb"):
            place = Path(url.database or ":memory:")
            reader = BoundedReader(executor, place)
            if source(place).kind == DUCKDB:
                schema = reflect_duckdb.read(reader, db_id, comments)
            else:
                schema = reflect_sqlite.read(reader, db_id)
        else:
            schema = _server_schema(url, db_id, example_values, comments)
        schema = _with_resolved_keys(schema)
        if example_values and schema.dialect in CELLS:
            return with_examples(schema, BoundedReader(executor, place), example_values)
        return schema


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
    if url.username and "@" in (url.database or ""):  # most likely a part of the password
        raise DataError(
            "database: an @ stands in the name of the URL's database; percent-encode the password, "
            "and the name"
        )
    # A URL as libpq has it names no driver; queries are executed by psycopg 3.
    if url.drivername in ("postgresql", "postgres"):
        url = url.set(drivername="postgresql+psycopg")
    if url.drivername in MYSQL.schemes:
        url = url.set(drivername=f"{url.drivername}+pymysql")
    if url.drivername.endswith("+pymysql"):
        url = url.set(password=url.password or os.environ.get("MYSQL_PWD"))
    drivers = ("postgresql+psycopg", "mysql+pymysql", "mariadb+pymysql")
    if url.drivername in drivers and "connect_timeout" not in url.query:
        url = url.update_query_dict({"connect_timeout": CONNECT_SECONDS})
    return url


def _server_schema(url: "URL", db_id: str, example_values: int, comments: bool) -> Schema:
    from sqlalchemy import create_engine
    from sqlalchemy.exc import SAWarning, SQLAlchemyError
    from sqlalchemy.pool import NullPool

    name = url.render_as_string(hide_password=True)
    try:
        with (
            warnings.catch_warnings(),
            create_engine(url, poolclass=NullPool).connect() as connection,
        ):
            # SQLAlchemy warns of each type that it does not know.
            warnings.simplefilter("ignore", SAWarning)
            tables = reflect_server.tables(connection, comments)
            schema = Schema(db_id, tables, connection.dialect.name)
            if not example_values or schema.dialect in CELLS:
                return schema
            shown = [_with_examples(table, connection, example_values) for table in schema.tables]
            return replace(schema, tables=tuple(shown))
    except ModuleNotFoundError as error:
        extras = {kind.package: kind.extra for kind in SERVERS}
        way_out = "install this database's driver"
        if error.name in extras:
            way_out = f"pip install -e '.[{extras[error.name]}]'"
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
    """Return the key with names as the tables spell them; None where one does not exist.

    A key that names no columns of its target leads to the target's primary key.
    """
    target = schema.table(key.ref_table)
    if target is None:
        return None
    ref_columns = key.ref_columns or target.primary_key
    columns, refs = _spelled(table, key.columns), _spelled(target, ref_columns)
    sizes = {len(columns), len(refs), len(key.columns), len(ref_columns)}
    return ForeignKey(columns, target.name, refs) if len(sizes) == 1 else None


def _spelled(table: Table, names: Iterable[str]) -> tuple[str, ...]:
    """Return names as the table spells them, without those that do not exist."""
    columns = [table.column(name) for name in names]
    return tuple(column.name for column in columns if column)


def _with_examples(table: Table, connection: "Connection", count: int) -> Table:
    """Read the examples of a database on which no executor runs."""
    import sqlalchemy as sa

    clauses: list[ColumnClause[object]] = [sa.column(name) for name in table.column_names]
    query = sa.select(*clauses).select_from(sa.table(table.name)).limit(EXAMPLE_ROWS)
    rows = connection.execution_options(stream_results=True).execute(query)
    counters = count_examples([tuple(row) for row in rows], len(clauses))
    examples = [most_frequent(counter, count) for counter in counters]
    return table_with(table, dict(zip(table.column_names, examples, strict=True)))
