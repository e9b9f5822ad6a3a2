"""How hard a query is by Spider's grading, read from the SQL itself, with no tables.json and no other parser.

Spider grades its own parse of a query, which looks only at the outermost SELECT (of a UNION: the first one) and has
habits of its own, kept here because the grades of published tables depend on them: a NOT before a condition counts as
an aggregate, and so does each AND or OR of a HAVING.
"""

from typing import Literal

import sqlglot
from sqlglot import exp

from ray_sql.metrics.match import prepare_spider

Hardness = Literal["easy", "medium", "hard", "extra", "unknown"]

AGGREGATES = (exp.Max, exp.Min, exp.Count, exp.Sum, exp.Avg)
NEGATABLE = (exp.In, exp.Like, exp.Between, exp.Exists)


def hardness(sql: str) -> Hardness:
    """Spider's grade of a query, or "unknown" where it is no SELECT that sqlglot can parse.

    Source: the official evaluator's `eval_hardness`; equal on all of Spider's dev set (see benchmarks/agreement.py).
    """
    try:
        tree: exp.Expr | None = sqlglot.parse_one(
            prepare_spider(sql, keep_distinct=True), read="sqlite"
        )
    except (sqlglot.errors.SqlglotError, RecursionError):
        return "unknown"
    set_operation = False
    while isinstance(tree, (exp.SetOperation, exp.Subquery)):
        set_operation |= isinstance(tree, exp.SetOperation)
        tree = tree.this
    if not isinstance(tree, exp.Select):
        return "unknown"
    joined = [
        node
        for join in tree.args.get("joins") or ()
        for node in _condition_nodes(join.args.get("on"))
    ]
    where, having = (_condition_nodes(_body(tree, clause)) for clause in ("where", "having"))
    everywhere = joined + where + having
    nested = set_operation + sum(_compares_with_query(node) for node in everywhere)
    return _grade(_clauses(tree, everywhere), nested, _plurals(tree, where, having))


def _grade(clauses: int, nested: int, plurals: int) -> Hardness:
    if nested == 0 and clauses <= 1 and plurals == 0:
        return "easy"
    if nested == 0 and ((clauses <= 1 and plurals <= 2) or (clauses <= 2 and plurals <= 1)):
        return "medium"
    if nested == 0 and ((clauses <= 2 and plurals > 2) or (clauses == 3 and plurals <= 2)):
        return "hard"
    if nested == 1 and clauses <= 1 and plurals == 0:
        return "hard"
    return "extra"


def _clauses(select: exp.Select, conditions: list[exp.Expr]) -> int:
    """Clauses beyond SELECT and FROM, plus joins, ORs and LIKEs."""
    present = sum(
        select.args.get(clause) is not None for clause in ("where", "group", "order", "limit")
    )
    joins = len(select.args.get("joins") or ())
    return (
        present
        + joins
        + sum(isinstance(_affirmed(node), (exp.Or, exp.Like)) for node in conditions)
    )


def _plurals(select: exp.Select, where: list[exp.Expr], having: list[exp.Expr]) -> int:
    """How many of these there are more than one of: aggregates, columns, conditions, columns grouped by."""
    columns, groups = select.expressions, _listed(select, "group")
    connectors = sum(isinstance(node, exp.Connector) for node in having)
    aggregates = (
        sum(isinstance(column.unalias(), AGGREGATES) for column in [*columns, *groups])
        + sum(
            isinstance(side, AGGREGATES)
            for key in _listed(select, "order")
            for side in _operands(key.this)
        )
        + sum(_negated(node) for node in where + having)
        + connectors
    )
    conditions = sum(not isinstance(node, exp.Connector) for node in where)
    return sum(count > 1 for count in (aggregates, len(columns), conditions, len(groups)))


def _body(select: exp.Select, clause: str) -> exp.Expr | None:
    found: exp.Expr | None = select.args.get(clause)
    return None if found is None else found.this


def _listed(select: exp.Select, clause: str) -> list[exp.Expr]:
    found: exp.Expr | None = select.args.get(clause)
    return [] if found is None else found.expressions


def _condition_nodes(tree: exp.Expr | None) -> list[exp.Expr]:
    """Each AND and OR of a condition and each thing they connect, parentheses left out."""
    found: list[exp.Expr] = []
    left = [] if tree is None else [tree]
    while left:  # not recursive: a generated chain of conditions can be deeper than Python's stack
        node = left.pop().unnest()
        found.append(node)
        if isinstance(node, exp.Connector):
            left += [node.left, node.right]
    return found


def _affirmed(node: exp.Expr) -> exp.Expr:
    return node.this if isinstance(node, exp.Not) else node


def _negated(node: exp.Expr) -> bool:
    return (isinstance(node, exp.Not) and isinstance(node.this, NEGATABLE)) or bool(
        node.args.get("negate")
    )


def _compares_with_query(node: exp.Expr) -> bool:
    """Whether a condition, not a connector, has a whole query on its right-hand side."""
    condition = _affirmed(node)
    if isinstance(condition, exp.Connector):
        return False
    sides = [
        value
        for name, value in condition.args.items()
        if name != "this" or isinstance(condition, exp.Exists)
    ]
    return any(isinstance(_query_of(side), exp.Query) for side in sides)


def _query_of(side: object) -> object:
    return side.this if isinstance(side, (exp.All, exp.Any)) else side


def _operands(key: exp.Expr) -> list[exp.Expr]:
    return [key.left, key.right] if isinstance(key, exp.Binary) else [key]
