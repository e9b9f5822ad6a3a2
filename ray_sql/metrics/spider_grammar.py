"""Read a query as Spider's own parser does, or reject it as that parser would.

Spider's grammar is a small part of SQL. It has one list of joined tables, and five aggregates over
one column or an operation on two. Conditions have no parentheses, a nested query may be a value,
and set operations follow one another. Names must be the schema's. sqlglot reads the query; this
module decides which parts Spider can express. It keeps the habits of Spider's parser that verdicts
depend on:

- Spelling counts, because it works on words separated by blanks. It rejects `<>`, `==`, `NOT a IN`
  and quoted or bracketed names. It rejects an alias without AS, and an operator that touches a word
  or a quote (`a='x'`).
- Aliases belong to the whole text: the last definition of T1 holds everywhere.
- A column on the right of a comparison swallows the text up to the next AND or clause. That may be
  an OR and its condition (`a = b OR c = d AND …`), or the LEFT of the next join.
- `ORDER BY a DESC, b` has one direction, the last one written. LIMIT counts, its number does not.
- Text after the end of the query (a second statement, OFFSET) is not read.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache

import sqlglot
from sqlglot import exp

from ray_sql.database import MOST_ANALYSED, Schema, sqlite_words
from ray_sql.metrics.spider_query import Condition, Conditions, SpiderQuery, Term, Unit
from ray_sql.metrics.spider_words import UnreadableError, aliases, check_spelling, first_statement

_AGGREGATES: dict[type[exp.Expr], str] = {
    exp.Max: "max",
    exp.Min: "min",
    exp.Count: "count",
    exp.Sum: "sum",
    exp.Avg: "avg",
}
_OPERATIONS: dict[type[exp.Expr], str] = {exp.Sub: "-", exp.Add: "+", exp.Mul: "*", exp.Div: "/"}
_COMPARISONS: dict[type[exp.Expr], str] = {
    exp.EQ: "=",
    exp.NEQ: "!=",
    exp.GT: ">",
    exp.LT: "<",
    exp.GTE: ">=",
    exp.LTE: "<=",
    exp.In: "in",
    exp.Like: "like",
    exp.Between: "between",
    exp.Is: "is",
}
_SETS: dict[type[exp.Expr], str] = {
    exp.Union: "union",
    exp.Intersect: "intersect",
    exp.Except: "except",
}
_NEGATABLE = (exp.In, exp.Like, exp.Between)
_CLAUSES = {
    "expressions",
    "distinct",
    "from_",
    "joins",
    "where",
    "group",
    "having",
    "order",
    "limit",
    "offset",
}


def read_query(sql: str, schema: Schema) -> SpiderQuery | None:
    """Return the query as Spider's parser sees it, in lower case; None where it rejects it."""
    if len(sql) > MOST_ANALYSED:
        return None
    sql = re.sub(r"([<>!])\s+=", r"\1=", sql)
    try:
        tokens = first_statement(sqlite_words.tokenize(sql))
        check_spelling(sql, tokens)
        statements = sqlite_words.parse(sql, tokens)
        if len(statements) != 1 or statements[0] is None:
            return None
        return _Reader(_columns(schema), aliases(tokens)).query(statements[0], outermost=True)
    except (UnreadableError, sqlglot.errors.SqlglotError, RecursionError):
        return None


_columns = lru_cache(maxsize=256)(Schema.lower_names)


class _Reader:
    """Turn sqlglot's tree into Spider's; raise `UnreadableError` where Spider cannot express it."""

    def __init__(self, columns: dict[str, frozenset[str]], aliases: dict[str, str]) -> None:
        if not columns.keys().isdisjoint(aliases):
            raise UnreadableError("an alias that is a table's name")
        self.columns = columns
        self.aliases = aliases

    def query(self, node: exp.Expr, *, outermost: bool = False) -> SpiderQuery:
        """Read a query and its set operations from the right; ORDER BY is in the last SELECT."""
        (operation, last), *earlier = reversed(_combined(node))
        modifiers = {
            name: value for name, value in node.args.items() if name in ("order", "limit", "offset")
        }
        query = self._select(last, modifiers, cut_off=outermost)
        for earlier_operation, part in earlier:
            query = replace(self._select(part, {}, cut_off=False), combined=(operation, query))
            operation = earlier_operation
        return query

    def _select(
        self, node: exp.Expr, modifiers: dict[str, exp.Expr | None], *, cut_off: bool
    ) -> SpiderQuery:
        if isinstance(node, exp.Subquery):
            others = [value for name, value in node.args.items() if name != "this"]
            node = node if any(others) else node.this
        if not isinstance(node, exp.Select):
            raise UnreadableError(node.key)
        clauses = {name: value for name, value in {**node.args, **modifiers}.items() if value}
        unknown, needed = clauses.keys() - _CLAUSES, {"expressions", "from_"}
        if unknown or not needed <= clauses.keys() or ("offset" in clauses and not cut_off):
            raise UnreadableError(", ".join(clauses))
        tables, default, on = self._tables(clauses["from_"].this, clauses.get("joins", []))
        keys = clauses["order"].expressions if "order" in clauses else []
        where = Conditions()
        if "where" in clauses:
            where = self._conditions(clauses["where"].this, default)
        return SpiderQuery(
            distinct="distinct" in clauses,
            select=tuple(self._selected(item, default) for item in clauses["expressions"]),
            tables=tables,
            on=on,
            where=where,
            group=self._group(clauses, default),
            having=self._having(clauses, default),
            direction=_direction(keys),
            order=tuple(self._term(key.this, default) for key in keys),
            limited="limit" in clauses,
        )

    def _group(self, clauses: dict[str, exp.Expr], default: Sequence[str]) -> tuple[Unit, ...]:
        keys = clauses["group"].expressions if "group" in clauses else []
        return tuple(self._unit(key, default) for key in keys)

    def _having(self, clauses: dict[str, exp.Expr], default: Sequence[str]) -> Conditions:
        if "having" not in clauses:
            return Conditions()
        if "group" not in clauses:
            raise UnreadableError("having")
        return self._conditions(clauses["having"].this, default)

    def _tables(
        self, first: exp.Expr, joins: Iterable[exp.Join]
    ) -> tuple[tuple[str | SpiderQuery, ...], list[str], Conditions]:
        """Return the tables in order, the names that may own a bare column, and all conditions."""
        default: list[str] = []
        tables = [self._table(first, default)]
        items: list[Condition] = []
        connectors: list[str] = []
        swallows = False
        for join in joins:
            kind = join.args.get("kind")
            named = kind or join.side or join.method
            if join.args.get("using") or kind == "CROSS" or (named and not swallows):
                raise UnreadableError("join")
            tables.append(self._table(join.this, default))
            condition = join.args.get("on")
            swallows = False
            # sqlglot adds ON TRUE where there is none.
            if condition is not None and not isinstance(condition, exp.Boolean):
                read = self._conditions(condition, default)
                connectors += [*(["and"] if items else []), *read.connectors]
                items += read.items
                swallows = ends_in_column(condition)
        return tuple(tables), default, Conditions(tuple(items), tuple(connectors))

    def _table(self, node: exp.Expr, default: list[str]) -> str | SpiderQuery:
        if isinstance(node, exp.Subquery) and not node.alias:
            return self.query(node.this)
        is_name = isinstance(node, exp.Table) and isinstance(node.this, exp.Identifier)
        if not is_name or node.args.get("db"):
            raise UnreadableError(node.key)
        name, alias = node.name.lower(), node.alias.lower()
        if node.this.quoted or name not in self.columns or (alias and alias not in self.aliases):
            raise UnreadableError(name)
        default.append(name)
        return name

    def _selected(self, node: exp.Expr, default: Sequence[str]) -> tuple[str, Term]:
        if type(node) in _OPERATIONS and type(node.this) in _AGGREGATES:
            raise UnreadableError("an aggregate before an operator, without parentheses")
        if type(node) not in _AGGREGATES:
            return "", self._term(node, default)
        inner, distinct = _argument(node)
        term = self._term(inner, default)
        return _AGGREGATES[type(node)], term._replace(left=term.left._replace(distinct=distinct))

    def _term(self, node: exp.Expr, default: Sequence[str]) -> Term:
        node = node.unnest()
        if type(node) in _OPERATIONS:
            left, right = (self._unit(side, default) for side in (node.this, node.expression))
            return Term(_OPERATIONS[type(node)], left, right)
        return Term("", self._unit(node, default), None)

    def _unit(self, node: exp.Expr, default: Sequence[str]) -> Unit:
        node = node.unnest()
        if type(node) not in _AGGREGATES:
            return Unit("", self._column(node, default), False)
        inner, distinct = _argument(node)
        return Unit(_AGGREGATES[type(node)], self._column(inner, default), distinct)

    def _column(self, node: exp.Expr, default: Sequence[str]) -> str:
        if isinstance(node, exp.Star) and not any(node.args.values()):
            return "*"
        if not isinstance(node, exp.Column) or not isinstance(node.this, exp.Identifier):
            raise UnreadableError(node.key)
        if node.this.quoted:
            raise UnreadableError(node.key)
        name, owner = node.name.lower(), node.table.lower()
        for table in [self.aliases.get(owner, owner)] if owner else default:
            if name in self.columns.get(table, ()):
                return f"{table}.{name}"
        raise UnreadableError(name)

    def _conditions(self, node: exp.Expr, default: Sequence[str]) -> Conditions:
        items: list[Condition] = []
        connectors: list[str] = []
        swallows = False
        for connector, condition in _flattened(node):
            if swallows and connector == "or":
                continue
            items.append(self._condition(condition, default))
            connectors += [connector] if connector else []
            swallows = ends_in_column(condition)
        return Conditions(tuple(items), tuple(connectors))

    def _condition(self, node: exp.Expr, default: Sequence[str]) -> Condition:
        negated = isinstance(node, exp.Not) and isinstance(node.this, _NEGATABLE)
        body = node.this if negated else node
        if type(body) not in _COMPARISONS:
            raise UnreadableError(body.key)
        values = tuple(self._value(value, default) for value in _values(body))
        negated = negated or bool(body.args.get("negate"))
        return Condition(negated, _COMPARISONS[type(body)], self._term(body.this, default), values)

    def _value(self, node: exp.Expr, default: Sequence[str]) -> SpiderQuery | None:
        if isinstance(node, exp.Subquery):
            return self.query(node.this)
        if isinstance(node, exp.Query):
            return self.query(node)
        if not _is_constant(node.unnest()):
            while type(node) in _OPERATIONS:  # Only the first column is read.
                node = node.this
            self._column(node, default)
        return None


def _direction(keys: Sequence[exp.Expr]) -> str:
    """Return the last direction written in an ORDER BY, "asc" by default; empty without keys."""
    if not keys:
        return ""
    written = [key.args["desc"] for key in keys if key.args.get("desc") is not None]
    return "desc" if written and written[-1] else "asc"


def _combined(node: exp.Expr) -> list[tuple[str, exp.Expr]]:
    """Return the parts of a chain of set operations in order, each with the word before it."""
    if type(node) not in _SETS:
        return [("", node)]
    if not node.args.get("distinct"):  # UNION ALL
        raise UnreadableError("all")
    (_, first), *others = _combined(node.args["expression"])
    return [*_combined(node.this), (_SETS[type(node)], first), *others]


def _flattened(node: exp.Expr) -> Iterator[tuple[str, exp.Expr]]:
    """Yield the conditions of a tree without parentheses in order, with the word before each."""
    pending: list[tuple[str, exp.Expr]] = [("", node)]
    # Not recursive: a generated chain of conditions can be deeper than Python's stack.
    while pending:
        connector, node = pending.pop()
        if isinstance(node, exp.Connector):
            pending += [(node.key, node.right), (connector, node.left)]
        else:
            yield connector, node


def _argument(node: exp.Expr) -> tuple[exp.Expr, bool]:
    """Return the argument of an aggregate, and whether DISTINCT stands before it."""
    inner = node.this
    if inner is None or node.expressions:
        raise UnreadableError("an aggregate of no value or of several")
    if not isinstance(inner, exp.Distinct):
        return inner, False
    if len(inner.expressions) != 1 or inner.args.get("on"):
        raise UnreadableError("distinct")
    return inner.expressions[0], True


def _values(node: exp.Expr) -> list[exp.Expr]:
    """Return the right-hand side of a comparison."""
    if isinstance(node, exp.Between):
        return [node.args["low"], node.args["high"]]
    if not isinstance(node, exp.In):
        return [node.expression]
    query, listed = node.args.get("query"), node.expressions
    if query is not None:
        return [query]
    if len(listed) != 1 or not (_is_constant(listed[0]) or isinstance(listed[0], exp.Query)):
        raise UnreadableError("in")
    return [listed[0]]


def _is_constant(node: exp.Expr) -> bool:
    """Tell whether a node is a text or a number; a word in double quotes is a text."""
    if isinstance(node, exp.Neg):
        return isinstance(node.this, exp.Literal) and not node.this.is_string
    if isinstance(node, exp.Column):
        return isinstance(node.this, exp.Identifier) and node.this.quoted and not node.table
    return isinstance(node, exp.Literal)


def ends_in_column(node: exp.Expr) -> bool:
    """Tell whether a condition ends in a column, after which Spider's parser loses its place."""
    *_, (_, last) = _flattened(node)
    last = last.this if isinstance(last, exp.Not) else last
    value = last.args.get("high") or last.args.get("expression")
    if value is None or isinstance(value, (exp.Query, exp.Paren)):
        return False
    return not _is_constant(value)
