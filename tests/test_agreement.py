"""Our verdicts and hardness grades equal the official evaluators' on every settled row."""

import json
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from benchmarks.agreement import (
    JUDGEMENTS,
    OFFICIAL_MISTAKES,
    compare_exact_set,
    compare_execution,
    compare_hardness,
    compare_links,
    judge_dev,
    judge_reference,
    read,
)
from ray_sql.database import read_tables_json
from ray_sql.metrics.spider_grammar import read_query
from ray_sql.metrics.spider_query import Condition, Conditions, SpiderQuery, Term, Unit

pytestmark = pytest.mark.skipif(
    "RAY_SQL_SHARED" not in os.environ, reason="needs the reference data: RAY_SQL_SHARED"
)

# Officially right, and refused here: empty text, several statements, and anything but a query.
NO_QUERY = ("err_blank_or_stub", "multi_", "stmt_")


@pytest.fixture(scope="module")
def data() -> Path:
    return Path(os.environ["RAY_SQL_SHARED"]) / "data"


@pytest.fixture(scope="module")
def rows(data: Path) -> list[dict[str, Any]]:
    return read(data / "agreement" / "execution.jsonl")


@pytest.fixture(scope="module")
def ours(data: Path, rows: list[dict[str, Any]]) -> Callable[[str], dict[str, Any]]:
    """`ours(column)`: the rows that an evaluation under its semantics wrote, computed once."""
    return cache(lambda column: judge_reference(rows, data / "spider", column))


@pytest.fixture(scope="module")
def queries(data: Path) -> list[dict[str, Any]]:
    return list(json.loads((data / "spider" / "dev.json").read_text(encoding="utf-8")))


@pytest.mark.parametrize("column", JUDGEMENTS)
def test_verdicts_equal_the_official_ones(rows: Any, ours: Any, column: str) -> None:
    comparison = compare_execution(rows, ours(column), column)
    assert comparison.compared > 7000
    assert comparison.differing == ()
    kinds = {row["id"]: row.get("kind", "prediction") for row in rows}
    assert [row for row in comparison.refused if not kinds[row].startswith(NO_QUERY)] == []


def test_hardness_equals_the_official_grade(data: Path, queries: Any) -> None:
    own = judge_dev(queries, data / "spider", "sql")
    comparison = compare_hardness(read(data / "agreement" / "hardness.jsonl"), own)
    assert comparison.compared == len(queries) == 1034
    assert comparison.differing == ()


def test_links_equal_those_of_spiders_parser(data: Path, queries: Any) -> None:
    own = judge_dev(queries, data / "spider", "schema")
    comparison = compare_links(read(data / "agreement" / "links.jsonl"), own)
    assert comparison.compared == 1034 and comparison.differing == ()


def test_exact_set_match_equals_the_official_one_but_for_listed_mistakes(
    rows: Any, ours: Any
) -> None:
    comparison = compare_exact_set(rows, ours("spider_exec"))
    assert comparison.compared == 7070
    assert comparison.agree / comparison.compared >= 0.995
    assert sorted(comparison.differing) == sorted(OFFICIAL_MISTAKES)


def test_queries_are_read_as_in_spiders_own_trees(data: Path) -> None:
    schemas = read_tables_json(data / "spider" / "tables.json")
    entries = json.loads((data / "spider" / "tables.json").read_text(encoding="utf-8"))
    names = {entry["db_id"]: Names(entry) for entry in entries}
    queries = json.loads((data / "spider" / "dev.json").read_text(encoding="utf-8"))
    assert len(queries) == 1034
    for query in queries:
        expected = names[query["db_id"]].query(query["sql"])
        assert read_query(query["query"], schemas[query["db_id"]]) == expected, query["query"]


class Names:
    """Read Spider's tree of a query, and put names for its numbers of columns and words."""

    AGGREGATES = ("", "max", "min", "count", "sum", "avg")
    OPERATIONS = ("", "-", "+", "*", "/")
    COMPARISONS = ("not", "between", "=", ">", "<", ">=", "<=", "!=", "in", "like", "is", "exists")

    def __init__(self, entry: dict[str, Any]) -> None:
        self.tables = [name.lower() for name in entry["table_names_original"]]
        self.columns = [
            "*" if table < 0 else f"{self.tables[table]}.{name}".lower()
            for table, name in entry["column_names_original"]
        ]

    def query(self, tree: dict[str, Any]) -> SpiderQuery:
        distinct, selected = tree["select"]
        direction, keys = tree["orderBy"] or ("", [])
        combined = [
            (word, self.query(tree[word]))
            for word in ("intersect", "union", "except")
            if tree[word]
        ]
        return SpiderQuery(
            distinct=distinct,
            select=tuple(
                (self.AGGREGATES[aggregate], self.term(term)) for aggregate, term in selected
            ),
            tables=tuple(
                self.query(table) if kind == "sql" else self.tables[table]
                for kind, table in tree["from"]["table_units"]
            ),
            on=self.conditions(tree["from"]["conds"]),
            where=self.conditions(tree["where"]),
            group=tuple(self.unit(key) for key in tree["groupBy"]),
            having=self.conditions(tree["having"]),
            direction=direction,
            order=tuple(self.term(key) for key in keys),
            limited=tree["limit"] is not None,
            combined=combined[0] if combined else None,
        )

    def unit(self, tree: list[Any]) -> Unit:
        aggregate, column, distinct = tree
        return Unit(self.AGGREGATES[aggregate], self.columns[column], distinct)

    def term(self, tree: list[Any]) -> Term:
        operation, left, right = tree
        return Term(
            self.OPERATIONS[operation], self.unit(left), None if right is None else self.unit(right)
        )

    def conditions(self, tree: list[Any]) -> Conditions:
        return Conditions(tuple(self.condition(item) for item in tree[::2]), tuple(tree[1::2]))

    def condition(self, tree: list[Any]) -> Condition:
        negated, comparison, term, *values = tree
        word = self.COMPARISONS[comparison]
        nested = [self.query(value) if isinstance(value, dict) else None for value in values]
        return Condition(
            negated, word, self.term(term), tuple(nested if word == "between" else nested[:1])
        )
