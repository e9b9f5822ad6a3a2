"""Write a schema as the text of a prompt, in three forms.

The exact text is part of the prompt contract: an adapter reads only the text it was trained on. Any
change to the output of `render` must raise `SERIALIZER_VERSION`.
"""

import re
from collections.abc import Iterable
from typing import Literal

from ray_sql.database.schema import Column, ForeignKey, Schema, Table

SERIALIZER_VERSION = 1

Serializer = Literal["ddl", "compact", "m_schema"]

# First the words that SQLite (3.40, tried one by one) rejects as a bare table or column name, then
# those that PostgreSQL reserves besides.
_RESERVED_WORDS = """
add all alter and as autoincrement between case cast check collate commit constraint create
current_date current_time current_timestamp default deferrable delete distinct drop else escape
except exists foreign from group having if in index insert intersect into is isnull join limit not
nothing notnull null on or order primary raise references returning select set table then to
transaction union unique update using values when where

analyse analyze any array asc asymmetric both column current_catalog current_role current_user desc
do end false fetch for grant initially lateral leading localtime localtimestamp offset only placing
session_user some symmetric trailing true user variadic window with
"""
_RESERVED = frozenset(_RESERVED_WORDS.split())
_PLAIN_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")

# First words of SQL types that mean the same to a reader of a query.
_SHORT_TYPES = {
    **dict.fromkeys(("integer", "tinyint", "smallint", "mediumint", "bigint"), "int"),
    **dict.fromkeys(("char", "varchar", "nchar", "nvarchar", "character", "clob"), "text"),
    **dict.fromkeys(("float", "double"), "real"),
    **dict.fromkeys(("numeric", "decimal", "number"), "num"),
    "boolean": "bool",
}


def render(schema: Schema, serializer: Serializer) -> str:
    """Return the schema as text, without a final newline.

    `ddl`: one CREATE TABLE per table, a line per column and key. `compact`: one line per table,
    types shortened. `m_schema`: the M-Schema of XiYan-SQL (arXiv 2411.08599), the only form with
    example values.
    A schema without tables is empty text in `ddl` and `compact`.
    """
    if serializer == "ddl":
        return "\n\n".join(_ddl_table(table) for table in schema.tables)
    if serializer == "compact":
        return "\n".join(_compact_table(table) for table in schema.tables)
    return _m_schema(schema)


def _quoted(name: str) -> str:
    if _PLAIN_NAME.fullmatch(name) and name.lower() not in _RESERVED:
        return name
    return '"' + name.replace('"', '""') + '"'


def _names(names: Iterable[str]) -> str:
    return ", ".join(_quoted(name) for name in names)


def _ddl_table(table: Table) -> str:
    lines = [f"{_quoted(column.name)} {column.type}".rstrip() for column in table.columns]
    if table.primary_key:
        lines.append(f"PRIMARY KEY ({_names(table.primary_key)})")
    for key in table.foreign_keys:
        target = f"{_quoted(key.ref_table)} ({_names(key.ref_columns)})"
        lines.append(f"FOREIGN KEY ({_names(key.columns)}) REFERENCES {target}")
    return f"CREATE TABLE {_quoted(table.name)} (\n  " + ",\n  ".join(lines) + "\n);"


def _compact_table(table: Table) -> str:
    parts = [_compact_column(column, table) for column in table.columns]
    for key in table.foreign_keys:
        if len(key.columns) > 1:
            target = f"{_quoted(key.ref_table)}({_names(key.ref_columns)})"
            parts.append(f"({_names(key.columns)}) -> {target}")
    return f"{_quoted(table.name)}({', '.join(parts)})"


def _compact_column(column: Column, table: Table) -> str:
    words = [_quoted(column.name), _short_type(column.type)]
    if column.name in table.primary_key:
        words.append("pk")
    words += [f"-> {_target(key)}" for key in table.foreign_keys if key.columns == (column.name,)]
    return " ".join(word for word in words if word)


def _target(key: ForeignKey) -> str:
    return f"{_quoted(key.ref_table)}.{_quoted(key.ref_columns[0])}"


def _short_type(declared: str) -> str:
    """Return the shortest spelling of a type, without length: `VARCHAR(20)` is `text`."""
    word = re.split(r"[\s(]", declared.strip().lower(), maxsplit=1)[0]
    return _SHORT_TYPES.get(word, word)


def _m_schema(schema: Schema) -> str:
    lines = [f"【DB_ID】 {schema.db_id}", "【Schema】"]
    for table in schema.tables:
        columns = ",\n".join(_m_schema_column(column, table) for column in table.columns)
        lines += [f"# Table: {table.name}", f"[\n{columns}\n]"]
    keys = [(table.name, key) for table in schema.tables for key in table.foreign_keys]
    if keys:
        lines.append("【Foreign keys】")
    for name, key in keys:
        pairs = zip(key.columns, key.ref_columns, strict=True)
        lines += [f"{name}.{column}={key.ref_table}.{target}" for column, target in pairs]
    return "\n".join(lines)


def _m_schema_column(column: Column, table: Table) -> str:
    # M-Schema drops lengths: TEXT, not VARCHAR(20), decides how a value is written.
    base_type = column.type.split("(")[0].strip().upper()
    parts = [f"{column.name}:{base_type}"]
    if column.name in table.primary_key:
        parts.append("Primary Key")
    if column.examples:
        parts.append(f"Examples: [{', '.join(column.examples)}]")
    return f"({', '.join(parts)})"
