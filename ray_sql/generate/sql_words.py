"""Words of SQLite's and PostgreSQL's queries, and a lexer of queries that are being written."""

from __future__ import annotations

import re
import sqlite3
from contextlib import closing
from functools import cache

from sqlglot import Dialect, exp

KEYWORDS = frozenset(
    """
    select distinct all from where group by having order limit offset as on using join left right
    full outer inner cross natural union intersect except and or not in is null like glob regexp
    match between exists case when then else end asc desc collate cast with recursive values over
    partition rows range groups unbounded preceding following current row filter window escape
    isnull notnull nulls first last true false current_date current_time current_timestamp nocase
    binary rtrim ties no others exclude materialized indexed
    """.split()
)
"""Words of SQLite's queries."""
POSTGRES_KEYWORDS = frozenset(
    """
    interval ilike similar to any some array lateral at time zone for fetch next only ordinality
    within both leading trailing symmetric
    """.split()
)
"""Further words of PostgreSQL's queries."""
POSTGRES_FUNCTIONS = frozenset(
    """
    to_char to_date to_timestamp date_part age now random string_agg json_agg jsonb_agg array_agg
    json_build_object jsonb_build_object position make_date cardinality regexp_match regexp_matches
    regexp_replace regexp_split_to_table every unnest generate_series split_part
    """.split()
)
"""Functions of PostgreSQL that sqlglot has no names for, or other ones."""
ENDS_EXPRESSION = frozenset(
    "end null true false current_date current_time current_timestamp".split()
)
"""Keywords that end an expression: values, and the END of a CASE."""
OPERATORS = frozenset(
    """
    and or not in is like glob regexp match between collate isnull notnull ilike similar at over
    filter
    """.split()
)
"""Keywords by which an expression goes on."""
CASE_GOES_ON = frozenset(["when", "then", "else", "end"])
"""Keywords by which CASE goes on."""
LIKE_OPERATORS = frozenset(["like", "ilike", "similar", "glob"])
"""Operators after whose pattern ESCAPE may stand."""
ENDS_PATTERN = frozenset(["and", "or", "escape", "join", "on"])
"""Keywords after which the last operand is no pattern."""
BEFORE_SELECT = frozenset(["", "(", ")", "all", "distinct", "union", "intersect", "except"])
"""Tokens after which a query begins."""
CLAUSES = frozenset(
    "with select where group having order limit offset fetch on using values window".split()
)
"""Keywords that begin a clause without tables."""
FROM_CLAUSES = ("from", "on", "using")
"""Clauses in which a query names its tables, and how they are joined."""
INSTEAD_OF_TABLE = frozenset(["select", "with", "lateral", "only", "values"])
"""Keywords that may stand where a table does."""
AFTER_TABLE = frozenset(
    "as join left right full outer inner cross natural on using indexed not with".split()
)
"""Keywords by which FROM goes on after a table."""
SIGNS_AFTER_TABLE = ",().;"
"""Signs by which FROM goes on after a table, or ends."""
CLOSES_FROM = frozenset(
    "where group having order limit offset union intersect except window fetch".split()
)
"""Keywords after which a query names no further tables."""
FUNCTIONS_WITH_FROM = frozenset(["extract", "trim", "substring", "overlay", "position"])
"""Functions with a FROM between their arguments."""
SIGNS = {"sqlite": "!%&()*+,-./:;<=>?@|~$", "postgres": "!#%&()*+,-./:;<=>?@[]^{|}~$"}
"""Signs outside of literals, in the dialects whose queries are read."""
LEXER = re.compile(
    r"""
      (?P<space> \s+ | --[^\n]*(?:\n|\Z) | /\*.*?(?:\*/|\Z) )
    | (?P<text> '(?:[^']|'')*(?:'|\Z) )
    | (?P<quoted> "(?:[^"]|"")*(?:"|\Z) | `[^`]*(?:`|\Z) | \[[^\]]*(?:\]|\Z) )
    | (?P<number> \d+(?:\.\d*)?(?:[eE][+-]?\d*)? )
    | (?P<word> [^\W\d][\w$]* )
    | (?P<sign> :: | . )
    """,
    re.VERBOSE | re.DOTALL,
)
"""A token is one of these groups. Text that is not closed goes to the end of the query."""


@cache
def known_functions(dialect: str) -> frozenset[str]:
    """Return the names of a dialect's functions, in lower case: SQLite's own, else sqlglot's."""
    if dialect == "sqlite":
        return _names_of_sqlite("pragma_function_list") | known_table_functions(dialect)
    names = {*exp.FUNCTION_BY_NAME, *Dialect.get_or_raise(dialect).parser_class.FUNCTIONS}
    return frozenset(name.lower() for name in names) | POSTGRES_FUNCTIONS


@cache
def known_table_functions(dialect: str) -> frozenset[str]:
    """Return the names of a dialect's functions that may stand behind FROM, in lower case."""
    if dialect == "sqlite":
        return _names_of_sqlite("pragma_module_list")
    return known_functions(dialect)


def _names_of_sqlite(place: str) -> frozenset[str]:
    with closing(sqlite3.connect(":memory:")) as connection:
        rows = connection.execute(f"SELECT name FROM {place}")
        return frozenset(str(name).lower() for (name,) in rows)


@cache
def keywords(dialect: str) -> frozenset[str]:
    """Return the keywords of a dialect, in lower case."""
    return KEYWORDS if dialect == "sqlite" else KEYWORDS | POSTGRES_KEYWORDS


def bare(word: str) -> str:
    """Return a name in lower case, without its quotes."""
    if word[:1] not in ('"', "`", "["):
        return word.lower()
    return (word[1:-1] if is_closed(word) else word[1:]).lower()


def is_closed(quoted: str) -> bool:
    """Tell whether a quoted name has its second quote."""
    quote = "]" if quoted[0] == "[" else quoted[0]
    return len(quoted) > 1 and quoted[-1] == quote
