"""Read a query that is being written, token by token: what may stand where it has come to?

Each word must have a meaning where it stands. It is a keyword, a function before a parenthesis, a
table, a column, or an alias or CTE of the query. The last word may be the beginning of one.
Literals, numbers, operators, comments and the grammar are free.

Behind FROM and JOIN only tables stand. Behind a qualifier stand the columns of its table, or any
column where the qualifier is not known yet: SELECT comes before FROM. Once FROM is written, columns
are those of the tables that it names. FROM goes on, by JOIN, until its tables have all columns that
SELECT named. An alias is one whose columns its table has. After `MOST_IN_VAIN` tables without any
of these columns, the next one must have some, and take the alias that they were named by.
"""

from __future__ import annotations

import copy
import re
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain

from ray_sql.data.names import ROW_NAMES
from ray_sql.generate.sql_words import (
    BEHIND_TABLE,
    CASE_GOES_ON,
    CLOSES_FROM,
    OPERATORS,
    SIGNS,
    bare,
    keywords,
    known_functions,
    known_table_functions,
)

ENDS = frozenset("end null true false current_date current_time current_timestamp".split())
"""Keywords that end an expression."""
CLAUSES = frozenset(
    "with select where group having order limit offset fetch on using values window".split()
)
"""Keywords that begin a clause without sources."""
BEFORE_SOURCE = frozenset({"select", "with", "lateral", "only", "values"})
"""Keywords that may stand where a table does."""
FROM_INSIDE = frozenset("extract trim substring overlay position".split())
"""Functions with a FROM between their arguments."""
MOST_IN_VAIN = 3
"""Tables in a row that FROM may name without a column that SELECT needs."""
SIGNS_BEHIND_TABLE = ",().;"
"""Signs by which FROM goes on behind a table, or ends."""
LIKE = frozenset(["like", "ilike", "similar", "glob"])
"""Operators behind whose pattern ESCAPE may stand."""
AFTER_LIKE = frozenset(["and", "or", "escape", "join", "on"])
"""Keywords that leave a pattern behind."""
BEFORE_SELECT = frozenset(["", "(", ")", "all", "distinct", "union", "intersect", "except"])
"""Tokens behind which a query begins."""
FROM = ("from", "on", "using")
"""Clauses in which a query names its tables, and how they are joined."""
_ALIAS = re.compile(r"[a-z]{1,2}\d{0,2}")
"""An alias that may be used before FROM makes it."""


@dataclass
class _Level:
    """A query, or a parenthesis inside it."""

    clause: str = ""
    """The keyword that the current clause begins with."""
    opened_by: str = ""
    """The word before the parenthesis."""
    sources: dict[str, str | None] = field(default_factory=dict)
    """Alias or name → table, None where its columns are not known; lower case."""
    last_table: str | None = None
    """The table that the next alias stands for."""
    in_vain: int = 0
    """The number of tables since the last one that had a column which SELECT named."""
    lacking: int = 0
    """The number of columns that SELECT named and no table of FROM has yet."""
    is_needed: bool = False
    """The last table has, by its own name, a column that was missing."""
    cases: int = 0
    """The number of CASEs that are open."""
    likes: bool = False
    """A pattern of LIKE may be the last operand."""
    selected: frozenset[tuple[str, str]] = frozenset()
    """The columns that SELECT named, each behind its qualifier or ""; lower case."""


class BegunQuery:
    """The meaning of the place behind the tokens that were read."""

    def __init__(self, tables: Mapping[str, Collection[str]], dialect: str) -> None:
        self._tables = {table: frozenset(columns) for table, columns in tables.items()}
        self._dialect = dialect
        self._all_columns = frozenset().union(*self._tables.values())
        self._inside: dict[str, set[str]] = defaultdict(set)
        """The tables of each of a server's schemas: those of `sales.orders`."""
        for table in self._tables:
            namespace, _, name = table.rpartition(".")
            self._inside[namespace].add(name)
        self._namespaces = self._inside.keys() - {""}
        self._levels = [_Level()]
        self._made: set[str] = set()
        """Names that the query itself makes: aliases, CTEs and their columns."""
        self._ctes: set[str] = set()
        """Those of these names that stand for tables."""
        self._before = ""
        """The last token, in lower case."""
        self._qualifier = ""
        """The name before the last token, if that is a dot."""
        self._ended = False
        """The last token ends an expression."""

    def copy(self) -> BegunQuery:
        """Return a query of the same beginning that goes on by itself."""
        query = copy.copy(self)
        query._levels = [replace(level, sources=dict(level.sources)) for level in self._levels]
        query._made, query._ctes = set(self._made), set(self._ctes)
        return query

    # -- may a token stand here?

    def fits(self, token: re.Match[str], following: str, unfinished: bool) -> bool:
        """Tell whether a token may stand here; an unfinished one may be the beginning of a name."""
        if token.lastgroup == "quoted":
            return self._quoted_fits(token.group())
        if token.lastgroup == "sign":
            begins_comment = unfinished and token.group() in "-/"
            return begins_comment or self._sign_fits(token.group())
        if token.lastgroup != "word":
            return not self._is_behind_table() and not self._expects_alias()
        word = token.group().lower()
        if self._is_field():
            return True
        if self._before in BEFORE_SELECT and _fits(word, {"select"}, unfinished):
            return True
        if word == "select":
            return False
        if self._is_behind_table():
            return self._fits_behind_table(word, unfinished)
        if self._level.clause in FROM and self._ended:
            return _fits(word, self._behind_table() | self._operators(), unfinished)
        if self._any_word_fits():
            return self._level.clause != "from" or self._alias_fits(word, unfinished)
        if _fits(word, self._names(), unfinished):
            return True
        is_function = following in ("(", "") and _fits(word, self._functions(), unfinished)
        if self._expects_source():
            return following in ("(", "") and _fits(word, self._table_functions(), unfinished)
        if self._before == ".":
            return False
        if is_function or _fits(word, self._keywords() - {"select"}, unfinished):
            return True
        if self._ended and self._level.clause == "select":
            return True  # an alias without AS
        may_be_qualifier = following == "." or unfinished
        return bool(may_be_qualifier and _ALIAS.fullmatch(word) and self._awaits_from())

    def _is_field(self) -> bool:
        """Tell whether a part of a date stands here, as in `extract(year FROM day)`."""
        return self._level.opened_by == "extract" and self._before == "("

    def may_end(self) -> bool:
        """Tell whether the query may end here."""
        return self._level.clause not in FROM or not self._missing()

    def _is_behind_table(self) -> bool:
        """Tell whether a table of FROM, or its alias, is the last token."""
        return self._level.clause == "from" and self._ended

    def _expects_alias(self) -> bool:
        """Tell whether the alias of a table must stand here."""
        return self._level.clause == "from" and self._before == "as"

    def _sign_fits(self, sign: str) -> bool:
        if sign in (")", ";") and self._level.clause in FROM:
            return not self._missing()
        if self._is_behind_table():
            return sign in SIGNS_BEHIND_TABLE
        return sign == "::" or sign in SIGNS[self._dialect]

    def _fits_behind_table(self, word: str, unfinished: bool) -> bool:
        """Tell whether a word may go on with FROM, or be the alias of its last table."""
        if self._wanted_aliases():
            return _fits(word, {"as"}, unfinished) or self._alias_fits(word, unfinished)
        if _fits(word, self._behind_table(), unfinished):
            return True
        if word in self._keywords() or not self._alias_fits(word, unfinished):
            return False
        is_new = word in self._qualifiers() or bool(_ALIAS.fullmatch(word))
        return is_new or not self._missing()

    def _operators(self) -> frozenset[str]:
        """Return the keywords by which a condition of FROM goes on."""
        words = OPERATORS | CASE_GOES_ON if self._level.cases else OPERATORS
        return words | {"escape"} if self._level.likes else words

    def _qualifiers(self) -> set[str]:
        """Return the aliases and tables behind which SELECT named columns."""
        return {qualifier for qualifier, _ in self._level.selected if qualifier}

    def _behind_table(self) -> frozenset[str]:
        """Return the keywords behind a table, or behind how it is joined."""
        return BEHIND_TABLE if self._missing() else BEHIND_TABLE | CLOSES_FROM

    def _alias_fits(self, alias: str, unfinished: bool) -> bool:
        """Tell whether the last table has all columns that SELECT named behind an alias."""
        wanted = self._wanted_aliases()
        if wanted:
            return _fits(alias, wanted, unfinished)
        table = self._level.last_table
        return table is None or self._has(table, alias)

    def _wanted_aliases(self) -> set[str]:
        """Return the aliases of which the last table must take one, if it must."""
        level, table = self._level, self._level.last_table
        if table is None or level.in_vain <= MOST_IN_VAIN or level.is_needed:
            return set()
        if bare(self._before) not in (table.rpartition(".")[2], "as"):
            return set()  # it has its alias
        missing = {qualifier for qualifier, _ in self._missing()} - {"", *self._tables}
        return {alias for alias in missing if self._has(table, alias)}

    def _has(self, table: str, qualifier: str) -> bool:
        """Tell whether a table has all columns that SELECT named behind a qualifier."""
        named = {column for alias, column in self._level.selected if alias == qualifier}
        return named <= self._tables[table] | ROW_NAMES

    def _missing(self) -> set[tuple[str, str]]:
        """Return the columns that SELECT named and that no table of FROM has, with qualifiers.

        A query inside another may name columns of the outer one.
        """
        sources: dict[str, str | None] = {}
        for level in self._levels:
            if level.clause == "select" or None in level.sources.values():
                return set()
            sources |= level.sources
        columns = {name: self._tables[table or ""] | ROW_NAMES for name, table in sources.items()}
        columns[""] = frozenset().union(*columns.values())
        return {
            (qualifier, column)
            for qualifier, column in self._level.selected
            if column not in columns.get(qualifier, ())
        }

    def _sources(self) -> Collection[str]:
        """Return the names of tables that may stand in FROM."""
        return self._needed_or_all(self._tables.keys()) | self._ctes | self._namespaces

    def _needed_or_all(self, tables: Collection[str]) -> set[str]:
        """Return the tables of which one must come next in FROM, or all if any may."""
        missing = self._missing() if self._level.in_vain >= MOST_IN_VAIN else set()
        return {table for table in tables if self._helps(table, missing)} or set(tables)

    def _helps(self, table: str, missing: Collection[tuple[str, str]]) -> bool:
        """Tell whether a table has columns that are missing in FROM."""
        for qualifier, column in missing:
            if qualifier in self._tables:
                helps = qualifier == table
            elif qualifier:
                helps = self._has(table, qualifier)
            else:
                helps = column in self._tables[table]
            if helps:
                return True
        return False

    def _quoted_fits(self, text: str) -> bool:
        must_be_name = self._before == "." or self._expects_source()
        closed = len(text) > 1 and text[-1] == ("]" if text[0] == "[" else text[0])
        if self._any_word_fits():
            return self._quoted_alias_fits(bare(text), unfinished=not closed)
        if text[0] == '"' and self._dialect == "sqlite" and not must_be_name:
            return True  # SQLite reads what is no name as text
        return _fits(bare(text), self._names(), unfinished=not closed)

    def _quoted_alias_fits(self, alias: str, unfinished: bool) -> bool:
        if self._level.clause != "from":
            return True
        if self._wanted_aliases():
            return self._alias_fits(alias, unfinished)
        if self._before == "as" or not self._missing():
            return True
        is_new = _ALIAS.fullmatch(alias) or _fits(alias, self._qualifiers(), unfinished)
        return bool(is_new) and self._alias_fits(alias, unfinished)

    def _any_word_fits(self) -> bool:
        """Tell whether a new name, or a type, stands here."""
        level = self._level
        if self._before in ("as", "::") or level.clause == "columns":
            return True
        if level.clause == "with":
            return self._before in ("with", "recursive", ",")
        return level.clause == "from" and self._ended

    def _names(self) -> Collection[str]:
        """Return the names of tables and columns that may stand here."""
        if self._before == ".":
            return self._columns_behind(self._qualifier)
        if self._expects_source():
            return self._sources()
        names = self._columns_in_scope() | self._made | ROW_NAMES | self._namespaces
        names |= {name for level in self._levels for name in level.sources}
        if self._awaits_from():
            names |= self._tables.keys() | {*chain.from_iterable(self._inside.values())}
        return names

    def _columns_behind(self, qualifier: str) -> Collection[str]:
        """Return the columns of an alias or a table; every column where it is not known.

        Behind a server's schema are its tables.
        """
        anything = self._all_columns | self._made | ROW_NAMES
        if self._namespaces:
            anything |= self._tables.keys()
        for level in reversed(self._levels):
            if qualifier in level.sources:
                table = level.sources[qualifier]
                return anything if table is None else self._tables[table] | ROW_NAMES
        if qualifier in self._namespaces:
            tables = {f"{qualifier}.{name}" for name in self._inside[qualifier]}
            return {table.rpartition(".")[2] for table in self._needed_or_all(tables)}
        if qualifier in self._tables and qualifier not in self._made:
            return self._tables[qualifier] | ROW_NAMES
        return anything

    def _columns_in_scope(self) -> frozenset[str]:
        """Return the columns of the sources that are visible; every column before FROM."""
        if not self._knows_sources():
            return self._all_columns
        columns: frozenset[str] = frozenset()
        for level in self._levels:
            tables = level.sources.values()
            if level.clause == "select" or None in tables:
                return self._all_columns
            columns |= frozenset().union(*(self._tables[table] for table in tables if table))
        return columns

    def _expects_source(self) -> bool:
        """Tell whether a table must stand here."""
        return self._level.clause == "from" and self._before in ("from", "join", ",")

    def _knows_sources(self) -> bool:
        """Tell whether the query that is being written has its FROM already."""
        for level in reversed(self._levels):
            if level.clause == "select":
                return False
            if level.sources:
                return True
        return False

    def _awaits_from(self) -> bool:
        """Tell whether this query, or one around it, has no FROM yet."""
        return not self._knows_sources() or any(level.clause == "select" for level in self._levels)

    def _table_functions(self) -> Collection[str]:
        return known_table_functions(self._dialect) | BEFORE_SOURCE

    def _functions(self) -> Collection[str]:
        return known_functions(self._dialect)

    def _keywords(self) -> frozenset[str]:
        return keywords(self._dialect)

    # -- go on behind it

    @property
    def _level(self) -> _Level:
        return self._levels[-1]

    def read(self, token: re.Match[str], following: str) -> None:
        """Go on behind a token."""
        text = token.group().lower()
        match token.lastgroup:
            case "sign":
                self._read_sign(text)
            case "word" | "quoted":
                self._read_word(text, following)
            case _:
                if self._expects_source():  # SQLite reads a text there as a name
                    self._level.sources[text] = self._level.last_table = None
                self._ended = True
        self._before = text

    def _read_sign(self, sign: str) -> None:
        match sign:
            case ".":
                self._qualifier, self._ended = bare(self._before), False
            case "(":
                new_columns = self._level.clause == "with" and self._before != "as"
                self._levels.append(_Level("columns" if new_columns else "", self._before))
                self._ended = False
            case ")":
                self._close()
                self._ended = True
            case "," if self._level.clause in FROM:
                self._level.clause, self._ended = "from", False
            case "*":
                self._ended = self._before in ("select", "distinct", "all", ",", ".")
            case _:
                self._ended = False

    def _close(self) -> None:
        """Leave a parenthesis. Behind FROM it is a source whose columns are not known."""
        if len(self._levels) == 1:
            return
        closed = self._levels.pop()
        if self._level.clause == "from" and closed.opened_by != "using":
            self._level.sources["("] = None
            self._level.last_table = None

    def _read_word(self, word: str, following: str) -> None:
        name = bare(word)
        if self._before == ".":
            if self._qualifier not in self._namespaces:
                self._select(self._qualifier, name)
            if self._level.clause == "from":  # `FROM sales.orders`
                self._add_source(name, f"{self._qualifier}.{name}")
            self._ended = True
        elif self._any_word_fits() and not self._is_keyword_after_source(word):
            self._make(name)
        elif self._expects_source() and following not in ("(", ".") and word not in BEFORE_SOURCE:
            self._add_source(name, name)
            self._ended = True
        elif word in self._keywords():
            self._read_keyword(word)
        elif self._ended and self._level.clause == "select":
            self._make(name)
        else:
            if following not in ("(", ".") and not self._is_field():
                self._select("", word)
            self._ended = True

    def _select(self, qualifier: str, column: str) -> None:
        """Keep a column that SELECT names, for the FROM that comes behind it."""
        if column not in self._all_columns or column in self._made:
            return
        for level in reversed(self._levels):
            if level.clause == "select":
                level.selected |= {(qualifier, column)}
            if level.clause:
                return

    def _is_keyword_after_source(self, word: str) -> bool:
        """Tell whether a word goes on with the query, where an alias could stand too."""
        return self._before not in ("as", "::") and word in self._keywords()

    def _read_keyword(self, word: str) -> None:
        level = self._level
        self._ended = word in ENDS
        level.cases += (word == "case") - (word == "end")
        level.likes = word in LIKE or (level.likes and word not in AFTER_LIKE)
        if word in ("union", "intersect", "except"):
            self._made |= {column for _, column in level.selected}  # ORDER BY may name them
            self._levels[-1] = _Level(opened_by=level.opened_by)
        elif word == "from" and self._before == "distinct":
            pass  # IS DISTINCT FROM
        elif word == "from" and level.opened_by in FROM_INSIDE and level.clause != "select":
            pass
        elif word in ("on", "using") and level.clause not in FROM:
            pass  # DISTINCT ON
        elif word == "from":
            level.clause = "from"
            level.lacking = len(self._missing())
        elif word == "join":
            level.clause = "from"
        elif word in CLAUSES:
            level.clause = word

    def _add_source(self, name: str, table: str) -> None:
        known = table in self._tables and name not in self._made
        self._level.last_table = table if known else None
        self._level.sources[name] = self._level.last_table
        self._level.in_vain += 1
        self._count_missing()

    def _count_missing(self) -> None:
        """See whether the last table, or its alias, has columns that were missing."""
        level, lacking = self._level, len(self._missing())
        level.is_needed = lacking < level.lacking
        level.in_vain = 0 if level.is_needed else level.in_vain
        level.lacking = lacking

    def _make(self, name: str) -> None:
        """Take a new name: an alias of the last source or of a column, a CTE, or a column of it."""
        if self._before != "::":
            self._made.add(name)
        if self._level.clause == "with":
            self._ctes.add(name)
        if self._level.clause == "from":
            self._level.sources[name] = self._level.last_table
            self._count_missing()
        self._ended = True


def _fits(word: str, names: Collection[str], unfinished: bool) -> bool:
    """Tell whether a word is one of the names, or the beginning of one if it is unfinished."""
    return word in names or (unfinished and any(name.startswith(word) for name in names))
