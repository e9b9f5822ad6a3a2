"""The tables that FROM has in a query that is being written, and those that it still needs.

SELECT comes before FROM. So the columns that it names are kept, each with its qualifier, until
tables of FROM have them all. Tables with none of them are allowed too: a query may join through
them. After `MAX_UNNEEDED_TABLES` of those in a row, the next table must have a missing column. It
must also take the alias that the column was named by.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Self

from ray_sql.data.names import ROW_NAMES

MAX_UNNEEDED_TABLES = 3
"""Tables in a row that FROM may name without a column that SELECT needs."""


@dataclass
class QueryScope:
    """A query, or a parenthesis inside it, with its tables and the scope around it.

    All names are in lower case.
    """

    tables: Mapping[str, frozenset[str]]
    """The database: table → its columns."""
    outer: Self | None = None
    """The query around this one, whose tables are visible too."""
    clause: str = ""
    """The keyword that the current clause begins with."""
    selected: frozenset[tuple[str, str]] = frozenset()
    """The columns that SELECT named, each as (qualifier or "", column)."""
    sources: dict[str, str | None] = field(default_factory=dict)
    """Table or alias in FROM → its table, None where its columns are not known."""
    last_table: str | None = None
    """The table that the next alias stands for, None where its columns are not known."""
    last_is_needed: bool = False
    """The last table, or its alias, has a column that was missing."""
    unneeded_tables: int = 0
    """The number of tables since the last one that was needed."""
    number_missing: int = 0
    """The number of columns that were missing after the last table and its alias."""

    def copy(self) -> Self:
        """Return a scope with the same tables that goes on by itself."""
        outer = self.outer.copy() if self.outer else None
        return replace(self, outer=outer, sources=dict(self.sources))

    def with_outer(self) -> Iterator[Self]:
        """Yield this scope and those around it, from the inside out."""
        scope: Self | None = self
        while scope:
            yield scope
            scope = scope.outer

    # -- go on with the query

    def select(self, qualifier: str, column: str) -> None:
        """Keep a column, if the nearest clause around it is SELECT."""
        for scope in self.with_outer():
            if scope.clause == "select":
                scope.selected |= {(qualifier, column)}
            if scope.clause:
                return

    def begin_from(self) -> None:
        """Begin FROM, and count the columns that it has to have."""
        self.clause = "from"
        self.number_missing = len(self.missing())

    def add_table(self, name: str, table: str | None) -> None:
        """Add a table to FROM, by the name that stands there."""
        self.last_table = self.sources[name] = table
        self.unneeded_tables += 1
        self._see_if_needed()

    def add_alias(self, alias: str) -> None:
        """Give the last table of FROM an alias."""
        self.sources[alias] = self.last_table
        self._see_if_needed()

    def add_unknown(self, name: str) -> None:
        """Add a source to FROM whose columns are not known, such as a query."""
        self.last_table = self.sources[name] = None

    def _see_if_needed(self) -> None:
        missing = len(self.missing())
        self.last_is_needed = missing < self.number_missing
        self.unneeded_tables = 0 if self.last_is_needed else self.unneeded_tables
        self.number_missing = missing

    # -- what does FROM still need?

    def missing(self) -> set[tuple[str, str]]:
        """Return the columns that SELECT named and no table has, here or in a query around."""
        if not self._knows_sources():
            return set()
        sources: dict[str, str | None] = {}
        for scope in self.with_outer():
            sources = scope.sources | sources  # a name means the nearest table
        columns = {name: self.tables[table or ""] | ROW_NAMES for name, table in sources.items()}
        columns[""] = frozenset().union(*columns.values())
        return {
            (qualifier, column)
            for qualifier, column in self.selected
            if column not in columns.get(qualifier, ())
        }

    def next_tables(self, tables: Collection[str]) -> set[str]:
        """Return those of some tables that FROM may name next: the needed ones, if it must."""
        missing = self.missing() if self.unneeded_tables >= MAX_UNNEEDED_TABLES else set()
        needed = {
            table
            for table in tables
            for qualifier, column in missing
            if self._supplies(table, qualifier, column)
        }
        return needed or set(tables)

    def next_aliases(self) -> set[str]:
        """Return the aliases of which the last table must take one, or none if it need not."""
        if self.last_table is None or self.last_is_needed:
            return set()
        if self.unneeded_tables <= MAX_UNNEEDED_TABLES:
            return set()
        missing = {qualifier for qualifier, _ in self.missing()} - {"", *self.tables}
        return {alias for alias in missing if self.may_be_called(alias)}

    def may_be_called(self, alias: str) -> bool:
        """Tell whether the last table has all columns that SELECT named by an alias."""
        return self.last_table is None or self._has_columns_of(alias, self.last_table)

    def qualifiers(self) -> set[str]:
        """Return the aliases and tables by which SELECT named columns."""
        return {qualifier for qualifier, _ in self.selected if qualifier}

    def _supplies(self, table: str, qualifier: str, column: str) -> bool:
        """Tell whether a table may be the one that a missing column belongs to."""
        if qualifier in self.tables:
            return qualifier == table
        if qualifier:
            return self._has_columns_of(qualifier, table)
        return column in self.tables[table]

    def _has_columns_of(self, alias: str, table: str) -> bool:
        named = {column for qualifier, column in self.selected if qualifier == alias}
        return named <= self.tables[table] | ROW_NAMES

    # -- what may stand here?

    def columns(self) -> frozenset[str] | None:
        """Return the columns of all tables that are visible, None where not all are known."""
        if self.awaits_from() or not self._knows_sources():
            return None
        tables = {table for scope in self.with_outer() for table in scope.sources.values() if table}
        return frozenset().union(*(self.tables[table] for table in tables))

    def awaits_from(self) -> bool:
        """Tell whether this query, or one around it, has no FROM yet."""
        scopes = [*self.with_outer()]
        is_selecting = any(scope.clause == "select" for scope in scopes)
        return is_selecting or not any(scope.sources for scope in scopes)

    def _knows_sources(self) -> bool:
        """Tell whether every SELECT has its FROM, and every source there known columns."""
        return not any(
            scope.clause == "select" or None in scope.sources.values()
            for scope in self.with_outer()
        )
