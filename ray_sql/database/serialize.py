"""Write a schema as the text of a prompt, in three forms.

The exact text is part of the prompt contract: an adapter reads only the text it was trained on. Any
change to the output of `render`, or to what a schema reads of a database, must raise
`SERIALIZER_VERSION`.
"""

import re
from collections.abc import Iterable
from functools import cache
from typing import Literal

from ray_sql.database.schema import Column, Schema, Table

SERIALIZER_VERSION = 2

Serializer = Literal["ddl", "compact", "m_schema"]

MYSQL = ("mysql", "mariadb")
"""The dialects that quote a name with backticks."""

UNSHOWN = "-- {count} tables left out"
"""The last line of a schema of which tables were left out."""

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

# The words that only PostgreSQL keeps for functions and types.
_POSTGRES_WORDS = """
authorization binary collation concurrently cross current_schema freeze full ilike inner left like
natural notnull outer overlaps right similar tablesample verbose
"""
# The words that DuckDB keeps besides.
_DUCKDB_WORDS = """
anti asof at by describe generated glob lambda map pivot pivot_longer pivot_wider positional qualify
semi show summarize try_cast unpack unpivot
"""
_POSTGRES_RESERVED = _RESERVED | frozenset(_POSTGRES_WORDS.split())
_DUCKDB_RESERVED = _POSTGRES_RESERVED | frozenset(_DUCKDB_WORDS.split())
# PostgreSQL reads an unquoted name in lower case.
_POSTGRES_PLAIN_NAME = re.compile(r"[a-z_][a-z0-9_]*")

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

    `ddl`: one CREATE statement per table or view, a line per column and key. `compact`: one line
    per table, types shortened. `m_schema`: the M-Schema of XiYan-SQL (arXiv 2411.08599), the only
    form with example values. Names are quoted where the database's SQL must quote them. A
    description follows its table or column: behind `--`, in brackets, or as M-Schema has it.
    A schema without tables is empty text in `ddl` and `compact`. A last line says how many tables
    were left out for want of room.
    """
    names = Names(schema)
    text = _tables(schema, names, serializer)
    return f"{text}\n{UNSHOWN.format(count=schema.unshown)}" if schema.unshown else text


def _tables(schema: Schema, names: "Names", serializer: Serializer) -> str:
    if serializer == "ddl":
        return "\n\n".join(_ddl_table(table, names) for table in schema.tables)
    if serializer == "compact":
        return "\n".join(_compact_table(table, names) for table in schema.tables)
    return _m_schema(schema, names)


@cache
def _mysql_reserved() -> frozenset[str]:
    """Return the words that MySQL or MariaDB reserves."""
    from sqlalchemy.dialects.mysql import reserved_words

    return frozenset(reserved_words.RESERVED_WORDS_MYSQL | reserved_words.RESERVED_WORDS_MARIADB)


class Names:
    """A schema's names as the SQL of its database must write them."""

    def __init__(self, schema: Schema) -> None:
        self.dialect = schema.dialect
        self._plain, self._reserved, self._quote = _PLAIN_NAME, _RESERVED, '"'
        if self.dialect == "postgresql":
            self._plain, self._reserved = _POSTGRES_PLAIN_NAME, _POSTGRES_RESERVED
        elif self.dialect == "duckdb":
            self._reserved = _DUCKDB_RESERVED
        elif self.dialect in MYSQL:
            self._reserved, self._quote = _mysql_reserved(), "`"
        self._tables = {table.name: self._qualified(table) for table in schema.tables}

    def one(self, name: str) -> str:
        """Return the name of a column."""
        if self._plain.fullmatch(name) and name.lower() not in self._reserved:
            return name
        return self.quoted(name)

    def quoted(self, name: str) -> str:
        """Return the name in quotes, whatever it is."""
        return f"{self._quote}{name.replace(self._quote, 2 * self._quote)}{self._quote}"

    def many(self, names: Iterable[str]) -> str:
        """Return the names of columns, with commas between them."""
        return ", ".join(map(self.one, names))

    def table(self, name: str) -> str:
        """Return the name of a table, with that of its namespace."""
        return self._tables.get(name) or self.one(name)

    def _qualified(self, table: Table) -> str:
        if not table.namespace:
            return self.one(table.name)
        own = table.name.removeprefix(f"{table.namespace}.")
        return f"{self.one(table.namespace)}.{self.one(own)}"


def _ddl_table(table: Table, names: Names) -> str:
    lines = [
        (f"{names.one(column.name)} {column.type}".rstrip(), column.description)
        for column in table.columns
    ]
    if table.primary_key:
        lines.append((f"PRIMARY KEY ({names.many(table.primary_key)})", ""))
    for key in table.foreign_keys:
        target = f"{names.table(key.ref_table)} ({names.many(key.ref_columns)})"
        lines.append((f"FOREIGN KEY ({names.many(key.columns)}) REFERENCES {target}", ""))
    kind = "VIEW" if table.is_view else "TABLE"
    head = f"CREATE {kind} {names.table(table.name)} (" + _comment(table.description)
    rest = [f"{line},{_comment(said)}" for line, said in lines[:-1]]
    rest += [line + _comment(said) for line, said in lines[-1:]] or [""]
    return "\n  ".join([head, *rest]) + "\n);"


def _comment(description: str) -> str:
    return f" -- {description}" if description else ""


def _compact_table(table: Table, names: Names) -> str:
    parts = [_compact_column(column, table, names) for column in table.columns]
    for key in table.foreign_keys:
        if len(key.columns) > 1:
            target = f"{names.table(key.ref_table)}({names.many(key.ref_columns)})"
            parts.append(f"({names.many(key.columns)}) -> {target}")
    return f"{names.table(table.name)}{_bracket(table.description)}({', '.join(parts)})"


def _bracket(description: str) -> str:
    return f" [{description}] " if description else ""


def _compact_column(column: Column, table: Table, names: Names) -> str:
    words = [names.one(column.name), short_type(column.type)]
    if column.name in table.primary_key:
        words.append("pk")
    targets = [key for key in table.foreign_keys if key.columns == (column.name,)]
    words += [f"-> {names.table(key.ref_table)}.{names.many(key.ref_columns)}" for key in targets]
    words.append(_bracket(column.description).strip())
    return " ".join(word for word in words if word)


def short_type(declared: str) -> str:
    """Return the shortest spelling of a type, without length: `VARCHAR(20)` is `text`."""
    word = re.split(r"[\s(]", declared.strip().lower(), maxsplit=1)[0]
    return _SHORT_TYPES.get(word, word)


def _m_schema(schema: Schema, names: Names) -> str:
    lines = [f"【DB_ID】 {schema.db_id}", "【Schema】"]
    for table in schema.tables:
        columns = ",\n".join(_m_schema_column(column, table, names) for column in table.columns)
        name = ", ".join(filter(None, [names.table(table.name), table.description]))
        lines += [f"# Table: {name}", f"[\n{columns}\n]"]
    keys = [(table.name, key) for table in schema.tables for key in table.foreign_keys]
    if keys:
        lines.append("【Foreign keys】")
    for name, key in keys:
        source, target = names.table(name), names.table(key.ref_table)
        pairs = zip(map(names.one, key.columns), map(names.one, key.ref_columns), strict=True)
        lines += [f"{source}.{column}={target}.{ref}" for column, ref in pairs]
    return "\n".join(lines)


def _m_schema_column(column: Column, table: Table, names: Names) -> str:
    # M-Schema drops lengths: TEXT, not VARCHAR(20), decides how a value is written.
    base_type = column.type.split("(")[0].strip().upper()
    parts = [f"{names.one(column.name)}:{base_type}", *filter(None, [column.description])]
    if column.name in table.primary_key:
        parts.append("Primary Key")
    if column.examples:
        parts.append(f"Examples: [{', '.join(column.examples)}]")
    return f"({', '.join(parts)})"
