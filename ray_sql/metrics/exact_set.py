"""Exact set match: do gold and prediction consist of the same parts, clause by clause, whatever they return?

Spider's other judgement, older than execution and blind where it is not: values are not compared, and two queries that
mean the same count only if they are built alike. Report it beside execution accuracy; never optimise it.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache

from ray_sql.database import Schema
from ray_sql.metrics.spider_grammar import read_query
from ray_sql.metrics.spider_query import Conditions, SpiderQuery, Term, Unit


def exact_set_match(gold: str, predicted: str, schema: Schema) -> bool:
    """Whether both queries have the same clauses as sets: columns, tables, conditions, keys, set operations.

    Values and DISTINCT do not count, nor does the order of columns, tables and conditions; columns joined by foreign
    keys are one. The order of GROUP BY and ORDER BY counts. A query that Spider's parser would reject, or that names
    what the schema lacks, matches nothing, not even itself.

    Source: exact set match of Spider (Yu et al. 2018), `evaluation.py` of taoyds/test-suite-sql-eval; how far the
    verdicts agree is in benchmarks/agreement.py. Kept because published scores depend on it, though it is wrong:

    - good SQL that its parser cannot read is wrong (`spider_grammar` has its limits), and some bad SQL is read;
    - joins count only by their tables and the OR, NOT, IN and LIKE in their conditions, so `ON` may be anything;
    - AND and OR count only by which of them a WHERE has, not by what they connect;
    - an alias defined twice means the same table everywhere, and `a = b OR …` loses what follows the OR;
    - inside a nested query everything but values counts, in the order written: DISTINCT too, foreign keys unmerged.

    Not kept: officially the values inside a subquery in FROM are compared, and text that is no SQL is passed over where
    it follows the last clause (a second WHERE, a comment).
    """
    return bool(exact_set_verdict(gold, predicted, schema))


def exact_set_verdict(gold: str, predicted: str, schema: Schema) -> bool | None:
    """`exact_set_match`, with None where one of the two is no query that it can read, which counts as no match."""
    expected, found = read_query(gold, schema), read_query(predicted, schema)
    if expected is None or found is None:
        return None
    representatives = _representatives(schema)
    try:
        return _same(_merged(expected, representatives), _merged(found, representatives))
    except (
        RecursionError
    ):  # hundreds of set operations in a row, as a model writes that does not stop
        return None


@lru_cache(maxsize=256)
def _representatives(schema: Schema) -> Mapping[str, str]:
    """For each column in a foreign key the first column, in the schema's order, of those it is joined with."""
    names = [
        f"{table.name}.{column}".lower() for table in schema.tables for column in table.column_names
    ]
    place = {name: index for index, name in enumerate(names)}
    groups: list[set[str]] = []
    for table in schema.tables:
        for key in table.foreign_keys:
            for column, target in zip(key.columns, key.ref_columns, strict=True):
                pair = {f"{table.name}.{column}".lower(), f"{key.ref_table}.{target}".lower()}
                # A pair that joins two groups stays in the first: officially they are not united.
                group = next((group for group in groups if group & pair), None)
                if group is None:
                    groups.append(group := set())
                group |= pair
    return {name: min(group, key=place.__getitem__) for group in groups for name in group}


def _merged(query: SpiderQuery, representatives: Mapping[str, str]) -> SpiderQuery:
    """The query without DISTINCT and with one column for all that foreign keys join, where its tables have them.

    Nested queries stay as they are; those added by a set operation are judged by the tables of the first.
    """
    here = {
        name: kept
        for name, kept in representatives.items()
        if name.partition(".")[0] in query.tables
    }

    def unit(old: Unit) -> Unit:
        return Unit(old.aggregate, here.get(old.column, old.column), False)

    def term(old: Term) -> Term:
        return Term(old.operation, unit(old.left), None if old.right is None else unit(old.right))

    def conditions(old: Conditions) -> Conditions:
        return Conditions(
            tuple(item._replace(term=term(item.term)) for item in old.items), old.connectors
        )

    def merged(old: SpiderQuery) -> SpiderQuery:
        return replace(
            old,
            distinct=False,
            select=tuple((aggregate, term(item)) for aggregate, item in old.select),
            where=conditions(old.where),
            group=tuple(unit(key) for key in old.group),
            having=conditions(old.having),
            order=tuple(term(key) for key in old.order),
            combined=None if old.combined is None else (old.combined[0], merged(old.combined[1])),
        )

    return merged(query)


def _same(gold: SpiderQuery, predicted: SpiderQuery) -> bool:
    return (
        Counter(gold.select) == Counter(predicted.select)
        and Counter(gold.tables) == Counter(predicted.tables)
        and Counter(gold.where.items) == Counter(predicted.where.items)
        and set(gold.where.connectors) == set(predicted.where.connectors)
        and [key.column for key in gold.group] == [key.column for key in predicted.group]
        and gold.having == predicted.having
        and (gold.direction, gold.order, gold.limited)
        == (predicted.direction, predicted.order, predicted.limited)
        and _keywords(gold) == _keywords(predicted)
        and _same_combined(gold, predicted)
    )


def _keywords(query: SpiderQuery) -> set[str]:
    """The telling words in any of a query's conditions, those of its joins included."""
    clauses = (query.on, query.where, query.having)
    words = {word for clause in clauses for word in clause.connectors if word == "or"}
    for item in (item for clause in clauses for item in clause.items):
        words |= {"not"} if item.negated else set()
        words |= {item.comparison} & {"in", "like"}
    return words


def _same_combined(gold: SpiderQuery, predicted: SpiderQuery) -> bool:
    if gold.combined is None or predicted.combined is None:
        return gold.combined is predicted.combined
    return gold.combined[0] == predicted.combined[0] and _same(
        gold.combined[1], predicted.combined[1]
    )
