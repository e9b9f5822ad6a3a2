"""Look into a query's text: its tree, the keys it sorts by, what it reads besides tables."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from sqlglot import exp, parse
from sqlglot.errors import SqlglotError

from ray_sql.data.names import ROW_NAMES
from ray_sql.database import MOST_ANALYSED, MOST_NODES, sqlite_words
from ray_sql.database.query import may_change

_LITERAL = re.compile(r"'(?:[^']|'')*'")
_DAYS = re.compile(r"'(?:now|today|tomorrow|yesterday)'", re.IGNORECASE)
_READS_CLOCK = re.compile(
    r"\b(?:date|time|datetime|julianday|unixepoch|strftime|timediff|date_trunc|timestamp)\b\s*\(?"
    r"(?:\s*'[^']*'\s*,)?\s*'(?:now|today|tomorrow|yesterday)'"
    r"|'(?:now|today|tomorrow|yesterday)'\s*::",
    re.IGNORECASE,
)
_AGE_OF_TWO = re.compile(r"\bage\s*\([^()]*,[^()]*\)", re.IGNORECASE)
_ROW_WORD = re.compile(rf"\b(?:{'|'.join(sorted(ROW_NAMES))})\b", re.IGNORECASE)
KEY = "ray_sql_key"
"""Beginning of the names of columns that show what a query sorts by."""


@dataclass(frozen=True)
class Sorted:
    """A query that sorts, with its keys shown behind its own `width` columns.

    `limit` is that of the query, None where it has none, and `offset` the rows that it passes over.
    `sql` gives these too, and further rows beyond the limit. `decided` is the whole text twice, for
    a query inside another one: its own columns decide between equal rows, upwards and downwards.
    """

    sql: str
    width: int
    keys: tuple[int, ...]
    limit: int | None
    offset: int
    is_whole: bool
    """False for a query inside another one."""
    decided: tuple[str, ...] = ()


def tree(sql: str, dialect: str) -> exp.Query | None:
    """Return a query's tree; None where it cannot be parsed, or is no single query."""
    if len(sql) > MOST_ANALYSED:
        return None
    try:
        if dialect == "sqlite":
            found = sqlite_words.parse(sql, sqlite_words.tokenize(sql))
        else:
            found = parse(sql, read=dialect, max_nodes=MOST_NODES)
    except (SqlglotError, RecursionError):
        return None
    queries = [one for one in found if not isinstance(one, exp.Semicolon | None)]
    only = queries[0] if len(queries) == 1 else None
    return only if isinstance(only, exp.Query) else None


def reads_clock(sql: str) -> bool:
    """Tell whether a query draws at random or reads the clock; words in its texts do not count."""
    if not may_change(sql):
        return False
    if _READS_CLOCK.search(sql):
        return True
    return may_change(_AGE_OF_TWO.sub("", _LITERAL.sub("''", _DAYS.sub("''", sql))))


def names_rows(sql: str) -> bool:
    """Tell whether a query names rows by their place, as by `rowid`."""
    return bool(_ROW_WORD.search(_LITERAL.sub("''", sql)))


def is_sorted(query: exp.Query) -> bool:
    """Tell whether the result itself has an order."""
    return bool(query.args.get("order"))


def limits(query: exp.Query) -> int:
    """Count the places where a query takes a part of what it sorted."""
    return sum(1 for node in query.find_all(exp.Query) if node.args.get("limit"))


def sorts(query: exp.Query, dialect: str, most: int) -> Iterator[Sorted]:
    """Yield the query and those inside it that sort, each made to run alone and show its keys.

    One that needs the query around it does not run; whoever runs it finds out. `most` is the number
    of rows that each gives at most.
    """
    for place, node in enumerate(query.find_all(exp.Query)):
        if node.args.get("order"):
            found = _sort(node, query, dialect, most)
            if found is not None and found.limit and not found.is_whole:
                decided = (_decided(query, place, dialect, down) for down in (False, True))
                found = replace(found, decided=tuple(decided))
            if found is not None:
                yield found


def _decided(root: exp.Query, place: int, dialect: str, down: bool) -> str:
    """Return a query where the one at `place` inside sorts by its own columns, too."""
    copy = root.copy()
    node = list(copy.find_all(exp.Query))[place]
    for number in range(1, len(node.selects) + 1):
        column = exp.Literal.number(number)
        node.args["order"].append(
            "expressions", exp.Ordered(this=column, desc=down, nulls_first=not down)
        )
    return copy.sql(dialect)


def _sort(node: exp.Query, root: exp.Query, dialect: str, most: int) -> Sorted | None:
    copy = node.copy()
    limit, offset = _number(copy.args.get("limit")), _number(copy.args.get("offset"))
    if (copy.args.get("limit") and limit is None) or (copy.args.get("offset") and offset is None):
        return None
    keys = [ordered.this for ordered in copy.args["order"].expressions]
    width = len(copy.selects)
    if any(select.is_star for select in copy.selects):
        return None
    if isinstance(copy, exp.Select) and not copy.args.get("distinct"):
        shown = [found for key in keys if (found := _expression(key, copy)) is not None]
        if len(shown) < len(keys):
            return None
        for place, one in enumerate(shown):
            copy.args["expressions"].append(exp.alias_(one.copy(), f"{KEY}_{place}"))
        columns = tuple(range(width, width + len(keys)))
    else:
        places = [_place(key, copy) for key in keys]
        columns = tuple(place for place in places if place is not None)
        if len(columns) < len(keys):
            return None
    with_ = root.args.get("with_")
    if with_ and node is not root and not copy.args.get("with_"):
        copy.set("with_", with_.copy())
    copy.set("offset", None)
    before = offset or 0
    copy = copy.limit(max(most, before + (limit or 0) + 50), copy=False)
    return Sorted(copy.sql(dialect), width, columns, limit, before, node is root)


def _number(clause: exp.Expr | None) -> int | None:
    value = clause.expression if clause is not None else None
    text = value.this if isinstance(value, exp.Literal) and not value.is_string else ""
    return int(text) if str(text).isdigit() else None


def _expression(key: exp.Expr, select: exp.Select) -> exp.Expr | None:
    """Return what a key of ORDER BY stands for: an output column by place or alias, or itself."""
    place = _place(key, select)
    if place is not None:
        return select.selects[place].unalias()
    return None if isinstance(key, exp.Literal) else key


def _place(key: exp.Expr, query: exp.Query) -> int | None:
    """Return the output column that a key of ORDER BY names, None where it names none."""
    if isinstance(key, exp.Literal):
        place = int(key.this) - 1 if str(key.this).isdigit() else -1
        return place if 0 <= place < len(query.selects) else None
    names = [name.lower() for name in query.named_selects]
    is_plain = isinstance(key, exp.Column) and not key.table
    if is_plain and names.count(key.name.lower()) == 1:
        return names.index(key.name.lower())
    texts = [select.unalias().sql().lower() for select in query.selects]
    return texts.index(key.sql().lower()) if key.sql().lower() in texts else None


def selected_twice(query: exp.Query) -> str | None:
    """Return an expression that the query selects twice."""
    seen = set()
    for select in query.selects:
        text = select.unalias().sql().lower()
        if text in seen and not select.is_star:
            return select.unalias().sql()
        seen.add(text)
    return None
