"""Words of SQLite's and PostgreSQL's queries, and their tokens while they are being written."""

from __future__ import annotations

import re
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
MORE_FUNCTIONS = {
    "sqlite": frozenset(
        """
        changes char glob hex ifnull instr julianday likelihood likely printf format quote
        random randomblob soundex strftime substr total typeof unicode unixepoch unlikely zeroblob
        date time datetime timediff json json_array json_array_length json_each json_extract
        json_object json_tree json_type json_valid json_group_array json_group_object iif
        group_concat string_agg nullif coalesce round trim ltrim rtrim replace upper lower length
        count sum avg min max abs sign sqrt power pow exp ln log ceil floor mod
        generate_series ntile lag lead rank dense_rank row_number percent_rank cume_dist
        first_value last_value nth_value
        """.split()
    ),
    "postgres": frozenset("to_char to_date to_timestamp date_part age now random".split()),
}
"""Functions of a database that sqlglot has no names for, or other ones."""
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
"""A token is one of these groups. Text that is not closed goes to the end."""


@cache
def known_functions(dialect: str) -> frozenset[str]:
    """Return the names of functions, in lower case, that sqlglot knows in a dialect."""
    names = {*exp.FUNCTION_BY_NAME, *Dialect.get_or_raise(dialect).parser_class.FUNCTIONS}
    return frozenset(name.lower() for name in names) | MORE_FUNCTIONS[dialect]


@cache
def keywords(dialect: str) -> frozenset[str]:
    """Return the keywords of a dialect, in lower case."""
    return KEYWORDS if dialect == "sqlite" else KEYWORDS | POSTGRES_KEYWORDS


def bare(word: str) -> str:
    """Return a name in lower case, without its quotes."""
    if word[:1] not in ('"', "`", "["):
        return word.lower()
    closed = len(word) > 1 and word[-1] == ("]" if word[0] == "[" else word[0])
    return (word[1:-1] if closed else word[1:]).lower()
