"""Find a call that a PostgreSQL server could not stop.

A server stops a query between rows and inside most functions, but not in all. `translate`, the
search for a text in a text, or the overlap of two lists goes through one value for each part of the
other. `statement_timeout` and `pg_terminate_backend` wait for its end. The data of tables keeps
that short. So this finds calls on values that the query itself makes, of any size.
"""

import math
import re

import sqlglot
from sqlglot import exp

from ray_sql.database.query import MOST_NODES

SMALL = 1_000
"""A length up to which a value is made and read in no time."""
LARGE = 50_000
"""A length from which two values take long on one another."""
MAKERS = set("repeat lpad rpad array_fill polygon".split())
GATHERERS = set(
    "string_agg array_agg json_agg jsonb_agg xmlagg json_object_agg jsonb_object_agg range_agg "
    "array".split()
)
"""They make one value of many rows: of more than tables have, if the query makes rows too."""
ROWS = set(
    "generate_series generate_subscripts unnest recursive cross string_to_table regexp_matches "
    "regexp_split_to_table json_array_elements json_array_elements_text json_object_keys "
    "json_each json_each_text jsonb_array_elements jsonb_array_elements_text jsonb_object_keys "
    "jsonb_each jsonb_each_text jsonb_path_query ts_parse".split()
)
JOINERS = set(
    "concat concat_ws format overlay array_cat array_append array_prepend quote_literal "
    "quote_ident quote_nullable".split()
)
REPLACERS = set("replace regexp_replace array_replace array_to_string".split())
GROWS = re.compile(rf"\|\||\b(?:{'|'.join(JOINERS | REPLACERS)})\b", re.IGNORECASE)
"""They make a value longer than each part: large, if many work on one another."""
ALONE = set(
    "normalize is_normalized exp ln log log10 power pow sqrt parse_ident xml xml_is_well_formed "
    "xml_is_well_formed_content xml_is_well_formed_document tsquery to_tsquery".split()
)
"""They take long on a single large value."""
LINEAR = GATHERERS | set(
    "concat concat_ws coalesce greatest least row format json_build_object json_build_array "
    "jsonb_build_object jsonb_build_array case if nullif cast and or not".split()
)
"""They read each value once."""
CROSSING = (
    exp.JSONBContainsAllTopKeys,
    exp.JSONBContainsAnyTopKeys,
    exp.ArrayOverlaps,
    exp.ArrayContainsAll,
    exp.ArrayContainedBy,
    exp.Like,
    exp.ILike,
)
"""Operators that compare the parts of one side with those of the other."""
LINEAR_OPERATORS = (exp.Connector, exp.DPipe, exp.Predicate)
ARITHMETIC = (exp.Add, exp.Sub, exp.Mul, exp.Div, exp.Mod)
"""Operators that are for numbers mostly: a column of one is no large value."""
WIDE = re.compile(
    r"\d{1000}|\b(?:char|character|bpchar|bit|varying|numeric|decimal)\s*\(\s*\d{4}", re.IGNORECASE
)
"""A number of many digits, or a type of great length."""
PADDED = re.compile(r"%[^%a-zA-Z]*(?:\d{4}|\*)")
"""A part of a pattern for `format` that is filled up to a great length, or to any."""
TYPES = set("char nchar character bpchar bit varying numeric decimal dec xml tsquery".split())
MANY = 9
"""So many calls that make a value longer may stand in a query that cannot be read."""
UNREADABLE = "of a query that makes large values and cannot be read"


def endless_call(sql: str, words: set[str]) -> str | None:
    """Return the name of a call that may never end; None if there is none.

    `words` are those of the query in lower case. Most queries make nothing large, and are not
    parsed.
    """
    makes = words & (MAKERS | GATHERERS | {"recursive"}) or WIDE.search(sql)
    grows = len(GROWS.findall(sql))
    if not makes and not grows and not words & TYPES:
        return None
    try:
        trees = sqlglot.parse(sql, read="postgres", max_nodes=MOST_NODES)
        names = [_Query(tree, words).endless() for tree in trees if tree is not None]
    except (sqlglot.errors.SqlglotError, RecursionError):
        return UNREADABLE if makes or grows > MANY else None
    return next((name for name in names if name), None)


class _Query:
    """One parsed statement, with the calls in it that make a large value."""

    def __init__(self, tree: exp.Expr, words: set[str]) -> None:
        self._tree = tree
        joins_all = not all(map(_pairs_columns, tree.find_all(exp.Join)))
        self._makes_rows = bool(words & ROWS) or joins_all
        texts = [len(text.name) for text in tree.find_all(exp.Literal) if text.is_string]
        grown = math.prod(map(_growth, tree.walk()))
        self._grows = grown * max([*texts, 1]) > LARGE
        self._makers = {id(node) for node in tree.walk() if self._makes(node)}
        # A column of a subquery may be such a value.
        inner = any(
            node.find_ancestor(exp.Subquery, exp.CTE)
            for node in tree.walk()
            if id(node) in self._makers
        )
        self._columns_are_large = inner or "recursive" in words

    def endless(self) -> str | None:
        """Return the name of the first call on too many large values."""
        for node in self._tree.walk():
            name = _name(node)
            if name is None or name in LINEAR or name in MAKERS:
                continue
            counts = not isinstance(node, ARITHMETIC) and self._columns_are_large
            large = sum(self._is_large(part, counts) for part in node.iter_expressions())
            if large > 1 or (large and name in ALONE):
                return name
        return None

    def _makes(self, node: exp.Expr) -> bool:
        if isinstance(node, exp.Literal):
            return not node.is_string and len(node.name) > SMALL
        if isinstance(node, exp.DataTypeParam):
            return node.name.isdigit() and int(node.name[:9]) > SMALL
        if isinstance(node, exp.Array):  # of listed values, or of a query's rows
            return self._makes_rows and isinstance(next(node.iter_expressions(), None), exp.Query)
        name = _name(node)
        if name in GATHERERS:
            return self._makes_rows
        given = list(node.iter_expressions())
        if name == "format" and not (_is_text(given[:1]) and not PADDED.search(given[0].name)):
            return True
        if isinstance(node, exp.DPipe) or name in JOINERS | REPLACERS:
            return self._grows
        if name not in MAKERS:
            return False
        count = given[1] if len(given) > 1 else None
        short = isinstance(count, exp.Literal) and count.name.isdigit() and len(count.name) <= 3
        return not short or given[0].find(exp.Func) is not None

    def _is_large(self, node: exp.Expr, columns: bool) -> bool:
        """Tell whether a value holds one that the query makes; `columns` count as such too."""
        return any(
            id(part) in self._makers or (columns and isinstance(part, exp.Column))
            for part in node.walk()
        )


def _pairs_columns(join: exp.Join) -> bool:
    """Tell whether a join is by columns that are equal, so that few rows of each meet."""
    on = join.args.get("on")
    equal = on.find_all(exp.EQ) if on else ()
    columns = any(pair.left.find(exp.Column) and pair.right.find(exp.Column) for pair in equal)
    return columns or bool(join.args.get("using"))


def _growth(node: exp.Expr) -> int:
    """Return how many times as long as the longest of its parts a value may be."""
    name, parts = _name(node), list(node.iter_expressions())
    if isinstance(node, exp.DPipe):
        return sum(not isinstance(part, exp.Literal) for part in parts) or 1
    if name in JOINERS:
        return max(2, len(parts), *(part.name.count("%") for part in parts))
    if name not in REPLACERS:
        return 1
    if not _is_text(parts[1:3]):
        return SMALL
    *old, new = (len(part.name) for part in parts[1:3])
    return 1 if name == "replace" and old and new <= old[0] else 1 + new


def _is_text(parts: list[exp.Expr]) -> bool:
    """Tell whether there are parts, and all are written out."""
    return bool(parts) and all(isinstance(part, exp.Literal) for part in parts)


def _name(node: exp.Expr) -> str | None:
    """Return the name of a call or of an operator that may take long; None for all else."""
    if isinstance(node, CROSSING):
        return node.key
    if isinstance(node, exp.Binary):
        return None if isinstance(node, LINEAR_OPERATORS) else node.key
    if isinstance(node, exp.Cast) and node.to.sql().lower() in ALONE:
        return node.to.sql().lower()
    if isinstance(node, exp.Anonymous):
        return node.name.lower()
    if isinstance(node, exp.Func):
        return node.sql(dialect="postgres").partition("(")[0].strip().lower()
    return None
