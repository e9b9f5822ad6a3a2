"""Read a query that is being written, token by token: which token may come next?

Each word must have a meaning where it stands. It is a keyword, a function before a parenthesis, a
table, a column, or an alias or CTE of the query. The last word may be the beginning of one.
Literals, numbers, operators, comments and the grammar are free.

After FROM and JOIN only tables stand. After a qualifier stand the columns of its table, or any
column where the qualifier is not known yet: SELECT comes before FROM. Once FROM is written, columns
are those of its tables. FROM goes on, by JOIN, until its tables have all columns that SELECT named.
An alias is one whose columns its table has. `query_scope` knows the tables, columns and aliases.
"""

from __future__ import annotations

import copy
import re
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from itertools import chain

from ray_sql.data.names import ROW_NAMES
from ray_sql.generate.query_scope import QueryScope
from ray_sql.generate.sql_words import (
    AFTER_TABLE,
    BEFORE_SELECT,
    CASE_GOES_ON,
    CLAUSES,
    CLOSES_FROM,
    ENDS_EXPRESSION,
    ENDS_PATTERN,
    FROM_CLAUSES,
    FUNCTIONS_WITH_FROM,
    INSTEAD_OF_TABLE,
    LIKE_OPERATORS,
    OPERATORS,
    SIGNS,
    SIGNS_AFTER_TABLE,
    bare,
    is_closed,
    keywords,
    known_functions,
    known_table_functions,
)

_ALIAS = re.compile(r"[a-z]{1,2}\d{0,2}")
"""A name that may stand for a table of FROM before FROM is written."""


@dataclass
class _Level(QueryScope):
    """A query, or a parenthesis inside it, and its place in the grammar."""

    opened_by: str = ""
    """The word before the parenthesis."""
    open_cases: int = 0
    """The number of CASEs without their END."""
    has_pattern: bool = False
    """The pattern of a LIKE may be the last operand."""


class BegunQuery:
    """A query up to its last token. Tells what may come next, and goes on by it."""

    def __init__(self, tables: Mapping[str, Collection[str]], dialect: str) -> None:
        self._tables = {table: frozenset(columns) for table, columns in tables.items()}
        self._dialect = dialect
        self._all_columns = frozenset().union(*self._tables.values())
        self._tables_inside: dict[str, set[str]] = defaultdict(set)
        """The tables of each of a server's schemas: those of `sales.orders`."""
        for table in self._tables:
            namespace, _, name = table.rpartition(".")
            self._tables_inside[namespace].add(name)
        self._namespaces = self._tables_inside.keys() - {""}
        self._level = _Level(self._tables)
        """The innermost parenthesis that is open."""
        self._made: set[str] = set()
        """Names that the query itself makes: aliases, CTEs and their columns."""
        self._ctes: set[str] = set()
        """Those of these names that stand for tables."""
        self._last_token = ""
        """In lower case."""
        self._qualifier = ""
        """The name before the last token, if that is a dot."""
        self._expression_ended = False
        """The last token ends an expression."""

    def copy(self) -> BegunQuery:
        """Return a query of the same beginning that goes on by itself."""
        query = copy.copy(self)
        query._level = self._level.copy()
        query._made, query._ctes = set(self._made), set(self._ctes)
        return query

    # -- may a token come next?

    def fits(self, token: re.Match[str], following: str, unfinished: bool) -> bool:
        """Tell whether a token may come next; an unfinished one may be the beginning of a name."""
        text = token.group()
        match token.lastgroup:
            case "word":
                return self._word_fits(text.lower(), following, unfinished)
            case "quoted":
                return self._quoted_fits(text)
            case "sign":
                begins_comment = unfinished and text in "-/"
                return begins_comment or self._sign_fits(text)
            case _:
                return not self._is_after_table() and not self._expects_alias()

    def may_end(self) -> bool:
        """Tell whether the query may end here."""
        return self._level.clause not in FROM_CLAUSES or not self._level.missing()

    def _sign_fits(self, sign: str) -> bool:
        if sign in (")", ";") and self._level.clause in FROM_CLAUSES:
            return not self._level.missing()
        if self._is_after_table():
            return sign in SIGNS_AFTER_TABLE
        return sign == "::" or sign in SIGNS[self._dialect]

    def _word_fits(self, word: str, following: str, unfinished: bool) -> bool:
        if self._is_date_part():
            return True
        if self._last_token in BEFORE_SELECT and _matches(word, {"select"}, unfinished):
            return True
        if word == "select":
            return False
        if self._is_after_table():
            return self._fits_after_table(word, unfinished)
        if self._level.clause in FROM_CLAUSES and self._expression_ended:
            return _matches(word, self._keywords_after_table() | self._operators(), unfinished)
        if self._expects_new_name():
            return self._level.clause != "from" or self._alias_fits(word, unfinished)
        if _matches(word, self._names(), unfinished):
            return True
        may_be_call = following in ("(", "")
        if self._expects_table():
            return may_be_call and _matches(word, self._table_functions(), unfinished)
        if self._last_token == ".":
            return False
        if may_be_call and _matches(word, known_functions(self._dialect), unfinished):
            return True
        if _matches(word, self._keywords() - {"select"}, unfinished):
            return True
        if self._expression_ended and self._level.clause == "select":
            return True  # an alias without AS
        may_be_qualifier = following == "." or unfinished
        return bool(may_be_qualifier and _ALIAS.fullmatch(word) and self._level.awaits_from())

    def _quoted_fits(self, text: str) -> bool:
        name, unfinished = bare(text), not is_closed(text)
        if self._expects_new_name():
            return self._level.clause != "from" or self._quoted_alias_fits(name, unfinished)
        must_be_name = self._last_token == "." or self._expects_table()
        if text[0] == '"' and self._dialect == "sqlite" and not must_be_name:
            return True  # SQLite reads what is no name as text
        return _matches(name, self._names(), unfinished)

    # -- may FROM go on by it?

    def _fits_after_table(self, word: str, unfinished: bool) -> bool:
        """Tell whether a word may go on with FROM, or be the alias of its last table."""
        if self._next_aliases():
            return _matches(word, {"as"}, unfinished) or self._alias_fits(word, unfinished)
        if _matches(word, self._keywords_after_table(), unfinished):
            return True
        if word in self._keywords() or not self._alias_fits(word, unfinished):
            return False
        looks_like_alias = word in self._level.qualifiers() or bool(_ALIAS.fullmatch(word))
        return looks_like_alias or not self._level.missing()

    def _quoted_alias_fits(self, alias: str, unfinished: bool) -> bool:
        if self._next_aliases():
            return self._alias_fits(alias, unfinished)
        if self._last_token == "as" or not self._level.missing():
            return True
        qualifiers = self._level.qualifiers()
        looks_like_alias = _ALIAS.fullmatch(alias) or _matches(alias, qualifiers, unfinished)
        return bool(looks_like_alias) and self._alias_fits(alias, unfinished)

    def _alias_fits(self, alias: str, unfinished: bool) -> bool:
        """Tell whether the last table may have an alias."""
        aliases = self._next_aliases()
        if aliases:
            return _matches(alias, aliases, unfinished)
        return self._level.may_be_called(alias)

    def _next_aliases(self) -> set[str]:
        """Return the aliases of which one must come next, if the last table has none yet."""
        table = self._level.last_table
        if table is None or bare(self._last_token) not in (table.rpartition(".")[2], "as"):
            return set()
        return self._level.next_aliases()

    def _keywords_after_table(self) -> frozenset[str]:
        """Return the keywords after a table, or after how it is joined."""
        return AFTER_TABLE if self._level.missing() else AFTER_TABLE | CLOSES_FROM

    def _operators(self) -> frozenset[str]:
        """Return the keywords by which a condition of FROM goes on."""
        words = OPERATORS | CASE_GOES_ON if self._level.open_cases else OPERATORS
        return words | {"escape"} if self._level.has_pattern else words

    # -- which kind of token is expected?

    def _is_date_part(self) -> bool:
        """Tell whether a part of a date stands here, as in `extract(year FROM day)`."""
        return self._level.opened_by == "extract" and self._last_token == "("

    def _is_after_table(self) -> bool:
        """Tell whether a table of FROM, or its alias, is the last token."""
        return self._level.clause == "from" and self._expression_ended

    def _expects_table(self) -> bool:
        """Tell whether a table must stand here."""
        return self._level.clause == "from" and self._last_token in ("from", "join", ",")

    def _expects_alias(self) -> bool:
        """Tell whether the alias of a table must stand here."""
        return self._level.clause == "from" and self._last_token == "as"

    def _expects_new_name(self) -> bool:
        """Tell whether a new name, or a type, stands here."""
        if self._last_token in ("as", "::") or self._level.clause == "columns":
            return True
        if self._level.clause == "with":
            return self._last_token in ("with", "recursive", ",")
        return self._is_after_table()

    # -- which words are there?

    def _names(self) -> Collection[str]:
        """Return the names of tables and columns that may stand here."""
        if self._last_token == ".":
            return self._names_after(self._qualifier)
        if self._expects_table():
            return self._level.next_tables(self._tables) | self._ctes | self._namespaces
        columns = self._level.columns()
        names = self._all_columns if columns is None else columns
        names |= self._made | ROW_NAMES | self._namespaces
        names |= {name for level in self._level.with_outer() for name in level.sources}
        if self._level.awaits_from():
            names |= self._tables.keys() | {*chain.from_iterable(self._tables_inside.values())}
        return names

    def _names_after(self, qualifier: str) -> Collection[str]:
        """Return the columns of an alias or a table; every column where it is not known.

        After a server's schema stand its tables.
        """
        anything = self._all_columns | self._made | ROW_NAMES
        if self._namespaces:
            anything |= self._tables.keys()
        for level in self._level.with_outer():
            if qualifier in level.sources:
                table = level.sources[qualifier]
                return anything if table is None else self._tables[table] | ROW_NAMES
        if qualifier in self._namespaces:
            tables = {f"{qualifier}.{name}" for name in self._tables_inside[qualifier]}
            return {table.rpartition(".")[2] for table in self._level.next_tables(tables)}
        if qualifier in self._tables and qualifier not in self._made:
            return self._tables[qualifier] | ROW_NAMES
        return anything

    def _table_functions(self) -> Collection[str]:
        return known_table_functions(self._dialect) | INSTEAD_OF_TABLE

    def _keywords(self) -> frozenset[str]:
        return keywords(self._dialect)

    # -- go on by a token

    def read(self, token: re.Match[str], following: str) -> None:
        """Go on by a token."""
        text = token.group().lower()
        match token.lastgroup:
            case "sign":
                self._read_sign(text)
            case "word" | "quoted":
                self._read_word(text, following)
            case _:
                if self._expects_table():  # SQLite reads a text there as a name
                    self._level.add_unknown(text)
                self._expression_ended = True
        self._last_token = text

    def _read_sign(self, sign: str) -> None:
        match sign:
            case ".":
                self._qualifier, self._expression_ended = bare(self._last_token), False
            case "(":
                self._open()
                self._expression_ended = False
            case ")":
                self._close()
                self._expression_ended = True
            case "," if self._level.clause in FROM_CLAUSES:
                self._level.clause, self._expression_ended = "from", False
            case "*":
                is_all_columns = self._last_token in ("select", "distinct", "all", ",", ".")
                self._expression_ended = is_all_columns  # else it multiplies
            case _:
                self._expression_ended = False

    def _open(self) -> None:
        """Enter a parenthesis. Behind the name of a CTE it has the names of its columns."""
        has_columns = self._level.clause == "with" and self._last_token != "as"
        clause = "columns" if has_columns else ""
        self._level = _Level(self._tables, self._level, clause, opened_by=self._last_token)

    def _close(self) -> None:
        """Leave a parenthesis. In FROM it is a source whose columns are not known."""
        closed = self._level
        if closed.outer is None:
            return
        self._level = closed.outer
        if self._level.clause == "from" and closed.opened_by != "using":
            self._level.add_unknown("(")

    def _read_word(self, word: str, following: str) -> None:
        name = bare(word)
        if self._last_token == ".":
            self._read_qualified(name)
        elif self._expects_new_name() and not self._is_keyword_after_table(word):
            self._make(name)
        elif self._expects_table() and following not in ("(", ".") and word not in INSTEAD_OF_TABLE:
            self._add_table(name, name)
        elif word in self._keywords():
            self._read_keyword(word)
        elif self._expression_ended and self._level.clause == "select":
            self._make(name)
        else:
            if following not in ("(", ".") and not self._is_date_part():
                self._select("", word)
            self._expression_ended = True

    def _read_qualified(self, name: str) -> None:
        if self._qualifier not in self._namespaces:
            self._select(self._qualifier, name)
        if self._level.clause == "from":  # `FROM sales.orders`
            self._add_table(name, f"{self._qualifier}.{name}")
        self._expression_ended = True

    def _select(self, qualifier: str, column: str) -> None:
        """Keep a column of the database that SELECT names, for the FROM that comes after it."""
        if column in self._all_columns and column not in self._made:
            self._level.select(qualifier, column)

    def _add_table(self, name: str, table: str) -> None:
        """Add a table to FROM, or a CTE, by the name that stands there."""
        is_known = table in self._tables and name not in self._made
        self._level.add_table(name, table if is_known else None)
        self._expression_ended = True

    def _make(self, name: str) -> None:
        """Take a new name: an alias of the last table or of a column, a CTE, or a column of it."""
        if self._last_token != "::":
            self._made.add(name)
        if self._level.clause == "with":
            self._ctes.add(name)
        if self._level.clause == "from":
            self._level.add_alias(name)
        self._expression_ended = True

    def _is_keyword_after_table(self, word: str) -> bool:
        """Tell whether a word goes on with the query, where an alias could stand too."""
        return self._last_token not in ("as", "::") and word in self._keywords()

    def _read_keyword(self, word: str) -> None:
        level = self._level
        self._expression_ended = word in ENDS_EXPRESSION
        level.open_cases += (word == "case") - (word == "end")
        level.has_pattern = word in LIKE_OPERATORS or (
            level.has_pattern and word not in ENDS_PATTERN
        )
        if word in ("union", "intersect", "except"):
            self._made |= {column for _, column in level.selected}  # ORDER BY may name them
            self._level = _Level(self._tables, level.outer, opened_by=level.opened_by)
        elif self._begins_no_clause(word):
            pass
        elif word == "from":
            level.begin_from()
        elif word == "join":
            level.clause = "from"
        elif word in CLAUSES:
            level.clause = word

    def _begins_no_clause(self, word: str) -> bool:
        """Tell whether FROM, ON or USING stands here without its clause."""
        if word == "from":
            is_argument = self._level.opened_by in FUNCTIONS_WITH_FROM
            is_in_function = is_argument and self._level.clause != "select"
            return self._last_token == "distinct" or is_in_function  # IS DISTINCT FROM
        return word in ("on", "using") and self._level.clause not in FROM_CLAUSES  # DISTINCT ON


def _matches(word: str, names: Collection[str], unfinished: bool) -> bool:
    """Tell whether a word is one of the names, or the beginning of one if it is unfinished."""
    return word in names or (unfinished and any(name.startswith(word) for name in names))
