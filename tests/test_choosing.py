"""Choosing among candidates: by results and probability, never by gold."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from math import log
from pathlib import Path
from typing import Any

import pytest

from ray_sql.config.sections import AnswersSection
from ray_sql.database import Column, QueryResult, Schema, Table
from ray_sql.evaluate import candidates, choosing, scoring
from ray_sql.evaluate.choosing import Proposal, choose_links, choose_sql
from ray_sql.generate import Answer, Candidate, Question
from ray_sql.report.scores import notes
from ray_sql.tasks import TASKS

COUNTS = {"n": 1, "gold_errors": 0}
ITEM = Schema("shop", (Table("item", (Column("name", "TEXT"), Column("price", "REAL"))),))


def ran(*rows: tuple[Any, ...]) -> QueryResult:
    return QueryResult("ok", ("a",), rows, None, 0.0)


FAILED = QueryResult("error", (), (), "no such column: x", 0.0)


def chosen(
    proposals: Sequence[tuple[str, float]], results: Sequence[QueryResult | None]
) -> dict[str, str | None]:
    given = [Proposal(sql, log(probability)) for sql, probability in proposals]
    return dict(choose_sql("greedy", given, results, "spider").chosen)


def test_the_result_that_most_candidates_give_is_chosen_by_its_likeliest_text() -> None:
    proposals = [("a1", 0.1), ("b", 0.5), ("a2", 0.2), ("c", 0.05)]
    ways = chosen(proposals, [ran((1,)), ran((2,)), ran((1,)), FAILED])
    assert ways == {"greedy": "greedy", "first_executable": "b", "vote": "a2", "weighted_vote": "b"}


def test_draws_of_the_same_answer_count_each_but_weigh_once() -> None:
    proposals = [("a", 0.2), ("a", 0.2), ("a", 0.2), ("b", 0.3), ("c", 0.3)]
    results = [ran((1,)), ran((1,)), ran((1,)), ran((2,)), ran((2,))]
    ways = chosen(proposals, results)
    assert (ways["vote"], ways["weighted_vote"]) == ("a", "b")


def test_empty_results_weigh_half_and_errors_nothing() -> None:
    empty = [("e1", 0.2), ("e2", 0.2), ("a", 0.1)]
    assert chosen(empty, [ran(), ran(), ran((1,))])["vote"] == "e1"  # 1 against 1: the likelier
    assert chosen([*empty, ("b", 0.01)], [ran(), ran(), ran((1,)), ran((1,))])["vote"] == "a"
    assert chosen([("x", 0.9), ("y", 0.9), ("a", 0.1)], [FAILED, FAILED, ran()])["vote"] == "a"


def test_where_nothing_runs_the_greedy_answer_stays() -> None:
    assert set(chosen([("x", 0.5), ("y", 0.5)], [FAILED, None]).values()) == {"greedy"}


def test_rows_in_another_order_are_the_same_result_unless_one_query_orders_them() -> None:
    rows, turned = ran((1,), (2,)), ran((2,), (1,))
    plain = [Proposal("SELECT a FROM t"), Proposal("SELECT a FROM u")]
    assert choose_sql(None, plain, [rows, turned], "spider").result_keys == [0, 0]
    ordered = [Proposal("SELECT a FROM t ORDER BY a"), Proposal("SELECT a FROM u")]
    assert choose_sql(None, ordered, [rows, turned], "spider").result_keys == [0, 1]
    assert choose_sql(None, plain, [rows, turned], "strict").result_keys == [0, 1]


def test_links_are_voted_by_table_and_column() -> None:
    texts = [
        '{"item": ["name"]}',
        '{"item": ["price", "name"], "sale": []}',
        '{"item": ["price"], "sale": ["day"]}',
        None,
    ]
    choices = choose_links("greedy", [Proposal(text, log(0.1)) for text in texts])
    assert choices.chosen["vote"] == '{"item": ["name", "price"], "sale": []}'
    assert choices.result_keys == [0, 1, 2, None]
    alone = [Proposal(texts[0], log(0.9)), Proposal(texts[1], log(0.1))]
    assert choose_links("greedy", alone).chosen["weighted_vote"] == '{"item": ["name"]}'


@pytest.mark.parametrize(("correct", "k", "chance"), [(0, 4, 0), (8, 1, 1), (4, 1, 0.5), (1, 8, 1)])
def test_pass_at_k_is_unbiased(correct: int, k: int, chance: float) -> None:
    assert choosing.pass_at_k(correct, 8, k) == pytest.approx(chance)
    assert choosing.sizes(6) == [1, 2, 4, 6]


@pytest.fixture
def shop(tmp_path: Path) -> str:
    file = tmp_path / "shop.sqlite"
    with sqlite3.connect(file) as connection:
        connection.executescript(
            "CREATE TABLE item (name TEXT, price REAL);"
            "INSERT INTO item VALUES ('pen', 2), ('ink', 5), ('pad', 5);"
        )
    return str(file)


def judged(shop: str, gold: str, **settings: Any) -> list[dict[str, Any]]:
    """Judge a question whose greedy answer is wrong, and six of whose eight samples are right."""

    def fenced(sql: str) -> str:
        return f"```sql\n{sql}\n```"

    right = (
        "SELECT count(*) FROM item WHERE price > 4",
        "SELECT count(name) FROM item WHERE price=5",
    )
    samples = [*right * 3, "SELECT cost FROM item", "SELECT count(*) FROM item"]
    sampled = [Candidate(fenced(sql), 9, -1.0 - place) for place, sql in enumerate(samples)]
    greedy = fenced("SELECT count(*) FROM item")
    answer = Answer(greedy, 5, 9, 0.1, -0.5, Candidate(greedy, 9, -0.5), sampled)
    question = Question("1", "dev", "shop", "?", gold, None, shop, [1])
    section = AnswersSection(samples=8, **settings)
    return scoring.score([question], [answer], TASKS["sql"], section, {"shop": ITEM})


def test_every_way_is_scored_beside_the_one_that_is_chosen(shop: str) -> None:
    (row,) = judged(shop, "SELECT 2", choose="vote")
    assert (row["chosen_by"], row["verdict"]) == ("vote", "correct")
    assert row["predicted"] == "SELECT count(*) FROM item WHERE price > 4"
    assert {way: one["right"] for way, one in row["ways"].items()} == {
        "greedy": False,
        "first_executable": False,  # the greedy answer is the likeliest, and runs
        "vote": True,
        "weighted_vote": False,
        "constrained": False,
    }
    verdicts = [one["verdict"] for one in row["candidates"]]
    assert verdicts == ["correct"] * 6 + ["error", "wrong"]
    assert [one["result_key"] for one in row["candidates"]] == [1] * 6 + [None, 0]
    scores = candidates.scores([row], TASKS["sql"])
    assert scores["execution_accuracy_vote"] == 1.0
    assert scores["execution_accuracy_greedy"] == 0.0
    assert scores["vote_vs_greedy"]["only_vote"] == 1
    assert scores["pass@1"] == pytest.approx(6 / 8) and scores["pass@4"] == 1.0
    assert (scores["new_tokens_greedy"], scores["new_tokens_all"]) == (9, 90)  # ten answers
    assert "0.10 s and 90 new tokens" in notes({"tuned": {"dev": COUNTS | scores}}, "tuned")[-1]


def test_gold_is_never_read_in_choosing(shop: str) -> None:
    """Scramble gold: the same answers are chosen."""
    for way in ("vote", "weighted_vote", "first_executable"):
        answers = {
            judged(shop, gold, choose=way)[0]["predicted"]
            for gold in (
                "SELECT 2",
                "SELECT 3",
                "SELECT count(*) FROM item",
                "SELECT name FROM item",
            )
        }
        assert len(answers) == 1
    assert "gold" not in candidates.Options.__dataclass_fields__


def test_repaired_answers_stand_beside_those_as_written(shop: str) -> None:
    (row,) = judged(shop, "SELECT 2", ground="repair", choose="vote")
    assert "repaired" in row["ways"]
    assert row["candidates"][6]["sql"] == "SELECT cost FROM item"  # nothing is near


def test_one_greedy_answer_leaves_the_rows_as_they_were(shop: str) -> None:
    question = Question("1", "dev", "shop", "?", "SELECT 2", None, shop, [1])
    answer = Answer("```sql\nSELECT 2\n```", 5, 9, 0.1)
    (row,) = scoring.score([question], [answer], TASKS["sql"], AnswersSection())
    assert row["verdict"] == "correct"
    assert not {"ways", "candidates", "chosen_by"} & row.keys()
