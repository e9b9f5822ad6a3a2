"""Exact set match: compare gold and prediction clause by clause, whatever they return.

This is Spider's other judgement, older than execution and blind where execution is not. Values are
not compared, and two queries that mean the same count only if they are built alike. Report it
beside execution accuracy; never optimise it.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import lru_cache

from ray_sql.database import Schema
from ray_sql.metrics.spider_grammar import read_query
from ray_sql.metrics.spider_query import Conditions, SpiderQuery, Term, Unit


def exact_set_match(gold: str, predicted: str, schema: Schema) -> bool:
    """Tell whether both queries have the same clauses as sets.

    The clauses are columns, tables, conditions, keys and set operations. Values and DISTINCT do not
    count, nor does the order of columns, tables and conditions. Columns joined by foreign keys
    are one. The order of GROUP BY and ORDER BY counts. A query that Spider's parser would reject,
    or that names something outside the schema, matches nothing, not even itself.

    Source: exact set match of Spider (Yu et al. 2018), `evaluation.py` of
    taoyds/test-suite-sql-eval. benchmarks/agreement.py measures the agreement with its verdicts.
    These mistakes are kept, because published scores depend on them:

    - good SQL outside its parser's grammar (`spider_grammar`) is wrong, and some bad SQL is read;
    - joins count only by their tables and the OR, NOT, IN and LIKE in their conditions, so `ON` may
      be anything;
    - AND and OR count only by which of them a WHERE has, not by the conditions they connect;
    - an alias defined twice means the same table everywhere, and `a = b OR …` loses the rest
      after the OR;
    - inside a nested query everything but values counts, in the order written: DISTINCT too, and
      foreign keys unmerged.

    Two are not kept. Officially the values inside a subquery in FROM are compared. And text that is
    no SQL is passed over after the last clause (a second WHERE, a comment).
    """
    return bool(exact_set_verdict(gold, predicted, schema))


def exact_set_verdict(gold: str, predicted: str, schema: Schema) -> bool | None:
    """Return `exact_set_match`, or None (no match) where one query cannot be read."""
    gold_query, predicted_query = read_query(gold, schema), read_query(predicted, schema)
    if gold_query is None or predicted_query is None:
        return None
    representatives = _representatives(schema)
    try:
        return _same(
            _merged(gold_query, representatives), _merged(predicted_query, representatives)
        )
    # A model that does not stop writes hundreds of set operations in a row.
    except RecursionError:
        return None


def is_readable(sql: str, schema: Schema) -> bool:
    """Tell whether Spider's parser reads a query; one that it does not matches nothing."""
    return read_query(sql, schema) is not None


@lru_cache(maxsize=256)
def _representatives(schema: Schema) -> Mapping[str, str]:
    """Return column of a foreign key → the first column, in schema order, of those it joins."""
    names = [
        f"{table.name}.{name}".lower() for table in schema.tables for name in table.column_names
    ]
    position = {name: index for index, name in enumerate(names)}
    groups: list[set[str]] = []
    for column, target in _joined_columns(schema):
        # A pair that joins two groups stays in the first: officially they are not united.
        for group in groups:
            if column in group or target in group:
                group |= {column, target}
                break
        else:
            groups.append({column, target})
    return {name: min(group, key=position.__getitem__) for group in groups for name in group}


def _joined_columns(schema: Schema) -> Iterator[tuple[str, str]]:
    """Yield (column, referenced column) of every foreign key, as lower-case "table.column"."""
    for table in schema.tables:
        for key in table.foreign_keys:
            for column, target in zip(key.columns, key.ref_columns, strict=True):
                yield f"{table.name}.{column}".lower(), f"{key.ref_table}.{target}".lower()


def _merged(query: SpiderQuery, representatives: Mapping[str, str]) -> SpiderQuery:
    """Drop DISTINCT, and write one column for all that foreign keys join in the query's tables.

    Nested queries stay as they are; those of a set operation are judged by the first one's tables.
    """
    columns = {
        name: first
        for name, first in representatives.items()
        if name.partition(".")[0] in query.tables
    }

    def unit(old: Unit) -> Unit:
        return Unit(old.aggregate, columns.get(old.column, old.column), False)

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
    """Return the OR, NOT, IN and LIKE of a query's conditions, those of its joins included."""
    clauses = (query.on, query.where, query.having)
    words = set()
    for clause in clauses:
        words |= {"or"} & set(clause.connectors)
        for item in clause.items:
            words |= {item.comparison} & {"in", "like"}
            if item.negated:
                words.add("not")
    return words


def _same_combined(gold: SpiderQuery, predicted: SpiderQuery) -> bool:
    if gold.combined is None or predicted.combined is None:
        return gold.combined is predicted.combined
    (gold_word, gold_query), (word, query) = gold.combined, predicted.combined
    return gold_word == word and _same(gold_query, query)
