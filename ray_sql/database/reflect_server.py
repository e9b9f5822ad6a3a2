"""Read the schema of a database on a server by SQLAlchemy: PostgreSQL, MySQL or another dialect.

SQLAlchemy is imported inside the functions, because most jobs never open a server.
"""

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from ray_sql.database.schema import Column, ForeignKey, Table

if TYPE_CHECKING:
    from sqlalchemy import Connection, Dialect
    from sqlalchemy.types import TypeEngine

# All that a query can name: tables of the default schema as ever, and besides what the role may
# read. Extensions keep tables and views of their own, which no question is about.
RELATIONS = """
SELECT n.nspname, c.relname, c.relkind IN ('v', 'm'), n.nspname = current_schema()
FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
WHERE c.relkind IN ('r', 'p', 'f', 'v', 'm') AND c.relpersistence <> 't'
  AND n.nspname <> 'information_schema' AND n.nspname !~ '^pg_'
  AND (n.nspname = current_schema() AND c.relkind IN ('r', 'p')
    OR has_schema_privilege(n.oid, 'USAGE') AND has_any_column_privilege(c.oid, 'SELECT')
      AND NOT EXISTS (SELECT FROM pg_catalog.pg_depend d WHERE d.deptype = 'e' AND (
        d.classid = 'pg_class'::regclass AND d.objid = c.oid
        OR d.classid = 'pg_namespace'::regclass AND d.objid = n.oid)))
"""
KEYS = """
SELECT n.nspname, c.relname, rn.nspname, r.relname,
  ARRAY(SELECT a.attname::text FROM unnest(k.conkey) WITH ORDINALITY AS u (number, place)
    JOIN pg_catalog.pg_attribute a ON a.attrelid = k.conrelid AND a.attnum = u.number
    ORDER BY u.place),
  ARRAY(SELECT a.attname::text FROM unnest(k.confkey) WITH ORDINALITY AS u (number, place)
    JOIN pg_catalog.pg_attribute a ON a.attrelid = k.confrelid AND a.attnum = u.number
    ORDER BY u.place)
FROM pg_catalog.pg_constraint k
JOIN pg_catalog.pg_class c ON c.oid = k.conrelid
JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
JOIN pg_catalog.pg_class r ON r.oid = k.confrelid
JOIN pg_catalog.pg_namespace rn ON rn.oid = r.relnamespace
WHERE k.contype = 'f'
"""
TYPES = """
SELECT n.nspname, c.relname, a.attname, format_type(a.atttypid, a.atttypmod)
FROM pg_catalog.pg_attribute a JOIN pg_catalog.pg_class c ON c.oid = a.attrelid
JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
WHERE a.attnum > 0 AND NOT a.attisdropped AND c.relkind IN ('r', 'p', 'f', 'v', 'm')
"""
CATALOG_SECONDS = 60


class _Relation(NamedTuple):
    """A table or view; `namespace` is None for the default schema, as SQLAlchemy has it."""

    namespace: str | None
    name: str
    is_view: bool

    @property
    def full_name(self) -> str:
        """Return the name as SQL must write it, but for quotes."""
        return _full_name(self.namespace, self.name)


def tables(connection: "Connection", comments: bool = False) -> tuple[Table, ...]:
    """Return the tables and views as the database declares them, foreign keys unchecked.

    They are sorted by name: first the tables of the default schema, then those of others, then
    views. Where `comments` are read, they are the descriptions.
    """
    declared = _declared(connection)
    return _with_comments(connection, declared) if comments else declared


def _declared(connection: "Connection") -> tuple[Table, ...]:
    if connection.dialect.name != "postgresql":
        relations = _listed(connection)
        return _described(connection, relations, _listed_keys(connection, relations), {})
    connection.exec_driver_sql(f"SET LOCAL statement_timeout = '{CATALOG_SECONDS}s'")
    relations, default = [], None
    for namespace, name, is_view, is_default in connection.exec_driver_sql(RELATIONS):
        relations.append(_Relation(None if is_default else namespace, name, is_view))
        default = namespace if is_default else default
    keys: dict[str, list[ForeignKey]] = defaultdict(list)
    for namespace, name, ref_namespace, ref, columns, refs in connection.exec_driver_sql(KEYS):
        target = _full_name(ref_namespace, ref, default)
        key = ForeignKey(tuple(columns), target, tuple(refs))
        keys[_full_name(namespace, name, default)].append(key)
    types = {
        (_full_name(namespace, name, default), column): kind
        for namespace, name, column, kind in connection.exec_driver_sql(TYPES)
    }
    return _described(connection, relations, keys, types)


def _full_name(namespace: str | None, name: str, default: str | None = None) -> str:
    return name if namespace in (None, default) else f"{namespace}.{name}"


def _listed(connection: "Connection") -> list[_Relation]:
    from sqlalchemy import inspect

    inspector = inspect(connection)
    views = [_Relation(None, name, is_view=True) for name in inspector.get_view_names()]
    return [_Relation(None, name, is_view=False) for name in inspector.get_table_names()] + views


def _listed_keys(
    connection: "Connection", relations: list[_Relation]
) -> Mapping[str, list[ForeignKey]]:
    from sqlalchemy import inspect

    names = [relation.name for relation in relations]
    found = inspect(connection).get_multi_foreign_keys(filter_names=names)
    return {
        str(name): [
            ForeignKey(
                tuple(key["constrained_columns"]),
                key["referred_table"],
                tuple(key["referred_columns"]),
            )
            for key in keys
            if key["referred_schema"] is None  # another schema of this server is not shown
        ]
        for (_, name), keys in found.items()
    }


def _described(
    connection: "Connection",
    relations: list[_Relation],
    keys: Mapping[str, list[ForeignKey]],
    types: Mapping[tuple[str, str], str],
) -> tuple[Table, ...]:
    """Return the relations with columns, primary keys and `keys`; `types` has unknown ones."""
    from sqlalchemy import inspect
    from sqlalchemy.engine.reflection import ObjectKind

    inspector = inspect(connection)
    columns: dict[Any, Any] = {}
    primary: dict[Any, Any] = {}
    for namespace in {relation.namespace for relation in relations}:
        names = [relation.name for relation in relations if relation.namespace == namespace]
        # The plural calls: one round trip for all tables where the server can do it.
        columns |= inspector.get_multi_columns(namespace, names, kind=ObjectKind.ANY)
        primary |= inspector.get_multi_pk_constraint(namespace, names)
    described = []
    for relation in sorted(relations, key=_order):
        place, name = relation[:2], relation.full_name
        table_columns = [
            Column(
                column["name"],
                type_text(column["type"], connection.dialect)
                or types.get((name, column["name"]), ""),
                bool(column["nullable"]),
            )
            for column in columns[place]
        ]
        primary_key = tuple(primary[place]["constrained_columns"]) if place in primary else ()
        described.append(
            Table(
                name,
                tuple(table_columns),
                primary_key,
                tuple(keys.get(name, ())),
                relation.namespace or "",
                relation.is_view,
            )
        )
    return tuple(described)


def _with_comments(connection: "Connection", declared: tuple[Table, ...]) -> tuple[Table, ...]:
    """Return tables with their comments, and their columns', in the dialects that have any."""
    from sqlalchemy import inspect
    from sqlalchemy.engine.reflection import ObjectKind

    inspector = inspect(connection)
    said: dict[tuple[str, str], str] = {}
    for namespace in {table.namespace or None for table in declared}:
        columns = inspector.get_multi_columns(namespace, kind=ObjectKind.ANY)
        for (_, name), found in columns.items():
            full = _full_name(namespace, name)
            said |= {(full, one["name"]): one.get("comment") or "" for one in found}
        if connection.dialect.supports_comments:
            own = inspector.get_multi_table_comment(namespace, kind=ObjectKind.ANY)
            for (_, name), comment in own.items():
                said[_full_name(namespace, name), ""] = comment["text"] or ""
    return tuple(
        replace(
            table,
            description=said.get((table.name, ""), ""),
            columns=tuple(
                replace(column, description=said.get((table.name, column.name), ""))
                for column in table.columns
            ),
        )
        for table in declared
    )


def _order(relation: _Relation) -> tuple[bool, str, str]:
    return relation.is_view, relation.namespace or "", relation.name


def type_text(kind: "TypeEngine[Any]", dialect: "Dialect") -> str:
    """Return the type in its database's words, without character set and collation.

    It is empty for a type that SQLAlchemy does not know.
    """
    from sqlalchemy.types import NullType

    if isinstance(getattr(kind, "item_type", kind), NullType):
        return ""
    return re.sub(r' (CHARACTER SET|COLLATE) ("[^"]*"|\S+)', "", kind.compile(dialect=dialect))
