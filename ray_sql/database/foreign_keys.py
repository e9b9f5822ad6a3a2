"""Compare and join the foreign keys of a dataset's tables.json with those of its database."""

from collections.abc import Iterable
from dataclasses import replace

from ray_sql.database.schema import ForeignKey, Schema, Table

Pair = tuple[str, str, str, str]
"""A table and its column, and the table and the column that it refers to, all in lower case."""


def differ(schema: Schema, listed: Schema) -> bool:
    """Tell whether two sources of one schema join other columns of the tables that both have."""
    both = schema.lower_names().keys() & listed.lower_names().keys()
    ours, theirs = (
        {pair for pair in _pairs(source) if {pair[0], pair[2]} <= both}
        for source in (schema, listed)
    )
    return ours != theirs


def joined(schema: Schema, listed: Schema) -> Schema:
    """Return a schema with the keys of `listed` besides its own, in the order of their columns."""
    known = set(_pairs(schema))
    tables = []
    for table in schema.tables:
        source = listed.table(table.name)
        keys = list(table.foreign_keys)
        for key in source.foreign_keys if source else ():
            spelled = _spelled(key, table, schema)
            if spelled and not known.issuperset(_key_pairs(table, spelled)):
                keys.append(spelled)
        places = {name: place for place, name in enumerate(table.column_names)}
        keys.sort(key=lambda key: ([places[name] for name in key.columns], key.ref_table))
        tables.append(replace(table, foreign_keys=tuple(keys)))
    return replace(schema, tables=tuple(tables))


def _spelled(key: ForeignKey, table: Table, schema: Schema) -> ForeignKey | None:
    """Return a key with names as a schema spells them, None where it lacks one of them."""
    target = schema.table(key.ref_table)
    if target is None:
        return None
    columns = [column for name in key.columns if (column := table.column(name))]
    refs = [column for name in key.ref_columns if (column := target.column(name))]
    if len(columns) < len(key.columns) or len(refs) < len(key.ref_columns):
        return None
    return ForeignKey(
        tuple(column.name for column in columns), target.name, tuple(ref.name for ref in refs)
    )


def _pairs(schema: Schema) -> Iterable[Pair]:
    for table in schema.tables:
        for key in table.foreign_keys:
            yield from _key_pairs(table, key)


def _key_pairs(table: Table, key: ForeignKey) -> Iterable[Pair]:
    for column, ref in zip(key.columns, key.ref_columns, strict=True):
        yield table.name.lower(), column.lower(), key.ref_table.lower(), ref.lower()
