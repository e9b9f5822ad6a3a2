"""A database schema as frozen values, and its restriction to schema links.

Names keep the spelling of their source and are looked up in any case, as in SQL.
"""

from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, TypeVar

Links = dict[str, list[str]]
"""Schema links: table → the columns of it that a query needs (none for `count(*)`)."""

Form = Literal["full", "tables", "reduced"]
"""The part of a schema that a prompt shows; see `restrict`."""

_UNSAID = {"namespace": "", "is_view": False, "dialect": "sqlite", "description": "", "unshown": 0}
"""Values of the fields that came after 0.2.0, left out of hashes: those of old schemas stay."""


@dataclass(frozen=True)
class Column:
    """A column.

    `type` is the source's own word, maybe empty. `examples` are its most frequent values first.
    `description` says on one line what it holds, where prompts show that.
    """

    name: str
    type: str
    nullable: bool = True
    examples: tuple[str, ...] = ()
    description: str = ""


@dataclass(frozen=True)
class ForeignKey:
    """`columns` of the table that owns the key refer to `ref_columns` of `ref_table`, pairwise."""

    columns: tuple[str, ...]
    ref_table: str
    ref_columns: tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """A table, or a view; `primary_key` holds column names, several where it is composite.

    `namespace` is the server's schema that the table lies in, where SQL must name it. The table
    `orders` of the schema `sales` has the name `sales.orders`, here as in keys and links.
    """

    name: str
    columns: tuple[Column, ...]
    primary_key: tuple[str, ...] = ()
    foreign_keys: tuple[ForeignKey, ...] = ()
    namespace: str = ""
    is_view: bool = False
    description: str = ""

    @property
    def column_names(self) -> tuple[str, ...]:
        return tuple(column.name for column in self.columns)

    @property
    def is_described(self) -> bool:
        """Tell whether there are words on the table, or on one of its columns."""
        return bool(self.description or any(column.description for column in self.columns))

    def column(self, name: str) -> Column | None:
        """Return the column of this name, spelled so or else in any case, or None."""
        return _find(self.columns, name)


Named = TypeVar("Named", Column, Table)


@dataclass(frozen=True)
class Schema:
    """The tables of one database in creation order, then its views; foreign keys point into it.

    `dialect` is the database's SQL, as SQLAlchemy names it. `left_out` says, a line each, what of
    the database the schema lacks and why.
    """

    db_id: str
    tables: tuple[Table, ...]
    dialect: str = "sqlite"
    left_out: tuple[str, ...] = field(default=(), compare=False)
    unshown: int = 0
    """Tables that were left out for want of room, which a prompt says."""

    @property
    def table_names(self) -> tuple[str, ...]:
        return tuple(table.name for table in self.tables)

    def table(self, name: str) -> Table | None:
        """Return the table of this name, spelled so or else in any case, or None."""
        return _find(self.tables, name)

    def lower_names(self) -> dict[str, frozenset[str]]:
        """Return table → its columns, all in lower case."""
        return {table.name.lower(): frozenset(_lower(table.column_names)) for table in self.tables}

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON, of which hashes and cache keys are made."""
        return asdict(self, dict_factory=_hashed)


def restrict(schema: Schema, links: Links, form: Form) -> Schema:
    """Return the part of a schema that `links` name, in the schema's order.

    `full` is the schema unchanged, and `tables` the linked tables whole. `reduced` has only their
    linked columns, with primary keys and both ends of the foreign keys that join two kept tables.

    Unknown names are ignored. A foreign key to a dropped table is dropped. Links without a known
    table leave no table at all. A table that would have no column keeps its first one, because SQL
    has no tables without columns.
    """
    if form == "full":
        return schema
    wanted = {table.lower(): _lower(columns) for table, columns in links.items()}
    tables = [_keep_keys(table, wanted) for table in schema.tables if table.name.lower() in wanted]
    if form == "reduced":
        joined = _join_columns(tables)
        for index, table in enumerate(tables):
            name = table.name.lower()
            tables[index] = _keep_columns(table, wanted[name] | joined[name])
    return replace(schema, tables=tuple(tables))


def _hashed(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the fields that a hash is made of."""
    return {
        name: value
        for name, value in pairs
        if name != "left_out" and (name, value) not in _UNSAID.items()
    }


def _find(items: Iterable[Named], name: str) -> Named | None:
    """Return the item of this name: spelled so, or else the first in any case."""
    alike = [item for item in items if item.name.lower() == name.lower()]
    return next((item for item in alike if item.name == name), alike[0] if alike else None)


def _lower(names: Iterable[str]) -> set[str]:
    return {name.lower() for name in names}


def _keep_keys(table: Table, tables: Collection[str]) -> Table:
    """Return the table with only the foreign keys that lead to `tables` (lower-case names)."""
    keys = [key for key in table.foreign_keys if key.ref_table.lower() in tables]
    return replace(table, foreign_keys=tuple(keys))


def _join_columns(tables: list[Table]) -> dict[str, set[str]]:
    """Return table → its columns at either end of a foreign key; all names in lower case."""
    joined: dict[str, set[str]] = {table.name.lower(): set() for table in tables}
    for table in tables:
        for key in table.foreign_keys:
            joined[table.name.lower()] |= _lower(key.columns)
            joined[key.ref_table.lower()] |= _lower(key.ref_columns)
    return joined


def _keep_columns(table: Table, names: set[str]) -> Table:
    """Return the table with its primary key and the columns of `names` (lower case)."""
    wanted = names | _lower(table.primary_key)
    columns = tuple(column for column in table.columns if column.name.lower() in wanted)
    return replace(table, columns=columns or table.columns[:1])
