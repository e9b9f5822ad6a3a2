"""Scores say how many questions they count, which they leave out, and how far to trust them."""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ray_sql.config import EvaluateConfig
from ray_sql.database import Executor, Limits, reflect
from ray_sql.database.query import may_change
from ray_sql.evaluate.run import run as evaluate
from ray_sql.metrics import (
    Counts,
    Pair,
    exact_set_match,
    hardness,
    judge,
    score_links,
    summarise_links,
)
from ray_sql.report import scores as report_scores
from tests.conftest import QUESTIONS, make_spider_folder

GOLD = [sql for _, sql in QUESTIONS]
MANY = (
    "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c WHERE x < {}) SELECT x FROM c"
)
SLOW = f"SELECT count(*) FROM ({MANY.format(20000)}) AS a, ({MANY.format(20000)}) AS b"


@pytest.fixture
def run_evaluate(spider_folder: Path, tmp_path: Path, capsys: Any) -> Callable[..., Any]:
    """`run_evaluate(records, **settings)`: (metrics of the file, what the terminal showed)."""

    def run(records: list[dict[str, Any]] | str, **settings: Any) -> Any:
        file = tmp_path / "answers.jsonl"
        text = records if isinstance(records, str) else "\n".join(map(json.dumps, records))
        file.write_text(text)
        sections = {"processes": 1, **settings.pop("evaluate", {})}
        config = EvaluateConfig(
            **{
                "predictions_file": str(file),
                "dataset_id": str(spider_folder),
                "output_name": "scores",
                "output_dir": str(tmp_path / "out"),
                "cache_dir": str(tmp_path / "cache"),
                "evaluate": sections,
            }
            | settings
        )
        metrics = evaluate(config)
        return metrics.get("file"), " ".join(capsys.readouterr().out.split())

    return run


def own(name: str, gold: str, predicted: str) -> dict[str, Any]:
    return {"id": name, "split": "own", "db_id": "mall", "gold": gold, "predicted": predicted}


@pytest.mark.kind("golds too large, long or slow")
@pytest.mark.parametrize(
    ("gold", "limits", "reason"),
    [
        (MANY.format(100_001), {}, "too large: more than 100000 rows"),
        (MANY.format(100), {"max_bytes": 400}, "too large: more than 400 bytes of rows"),
        (SLOW, {"timeout": 0.2}, "timeout: stopped after 0.2 s"),
        ("SELECT 1 -- " + "x" * 100, {"max_sql_length": 100}, "too large: query string is too"),
    ],
)
def test_a_gold_over_a_limit_is_named_and_said_beside_n(
    run_evaluate: Callable[..., Any], gold: str, limits: dict[str, Any], reason: str
) -> None:
    records = [own("big", gold, "SELECT 2"), own("small", "SELECT 1", "SELECT 1")]
    scores, shown = run_evaluate(records, evaluate=limits)
    assert (scores["own"]["n"], scores["own"]["gold_over_limits"]) == (1, 1)
    assert scores["own"]["gold_left_out"][0]["id"] == "big"
    assert "1 of 2 │" in shown and "1 of 2 questions are not counted" in shown
    assert f"big: {reason}" in shown and "--evaluate.max_rows" in shown


@pytest.mark.kind("golds too large, long or slow")
def test_a_higher_limit_lets_a_large_gold_count(run_evaluate: Callable[..., Any]) -> None:
    records = [own("big", MANY.format(100_001), "SELECT 2"), own("small", "SELECT 1", "SELECT 1")]
    scores, shown = run_evaluate(records, evaluate={"max_rows": 200_000})
    assert (scores["own"]["execution_accuracy"], scores["own"]["n"]) == (0.5, 2)
    assert "not counted" not in shown


@pytest.mark.kind("golds too large, long or slow")
def test_a_gold_that_fails_is_no_gold_over_a_limit(run_evaluate: Callable[..., Any]) -> None:
    records = [own("bad", "SELECT absent", "SELECT 1"), own("good", "SELECT 1", "SELECT 1")]
    scores, shown = run_evaluate(records)
    assert scores["own"]["gold_errors"] == 1 and "gold_over_limits" not in scores["own"]
    assert "bad: no such column: absent" in shown


@pytest.mark.kind("scores and their n")
def test_a_model_that_names_nothing_has_no_precision() -> None:
    gold = {"customer": ["name"]}
    nothing = summarise_links([score_links(gold, {}), score_links(gold, None)])
    assert nothing.column_micro.precision == nothing.table_macro.precision == 0.0
    assert Counts(0, 0, 0).scores.precision == 1.0  # nothing to name, and nothing named
    assert Counts(0, 2, 0).scores.precision == 0.0
    mixed = summarise_links([score_links(gold, {}), score_links(gold, gold)])
    assert (mixed.column_micro.precision, mixed.column_macro.precision) == (1.0, 0.5)


@pytest.mark.kind("scores and their n")
@pytest.mark.parametrize("answer", ['{"customer": ["id", "name"]}', "{}", "no links"])
def test_every_linking_score_has_an_interval(run_evaluate: Callable[..., Any], answer: str) -> None:
    records = [{"id": n, "predicted": answer} for n in range(8)]
    scores, shown = run_evaluate(records, task_type="schema")
    names = [f"{kind}_{key}{mean}" for kind in ("table", "column") for key in ("precision", "f1")
             for mean in ("", "_macro")]  # fmt: skip
    for name in [*names, "exact_match", "unparsable", "table_strict_recall"]:
        low, high = scores["dev"][f"{name}_interval"]
        assert 0 <= low <= scores["dev"][name] <= high <= 1 and low < high, name
    assert "column F1 │ 8 │" in shown


@pytest.mark.kind("scores and their n")
def test_golds_that_spiders_parser_does_not_read_are_counted_apart(
    run_evaluate: Callable[..., Any], tmp_path: Path
) -> None:
    readable = 'SELECT name FROM customer WHERE city = "Porto"'
    golds = [readable, 'SELECT "name" FROM customer', "SELECT strftime('%Y', day) FROM sale"]
    records = [own(str(n), gold, gold) for n, gold in enumerate(golds)]
    scores, shown = run_evaluate(records)
    part = scores["own"]
    assert (part["exact_set_match"], part["exact_set_match_n"]) == (1.0, 1)
    assert part["exact_set_gold_unread"] == 2
    note = "exact set match counts 1 of 3 questions: Spider's parser cannot read the gold"
    assert note in shown and "exact set match │ 1 │ 100.0 %" in shown
    page = " ".join((tmp_path / "out" / "scores" / "report.html").read_text().split())
    assert note.replace("'", "&#39;") in page and "(n = 1)" in page
    none, shown = run_evaluate(records[1:])
    assert "exact_set_match" not in none["own"] and "exact set match │" not in shown
    assert "exact set match counts 0 of 2 questions" in shown


@pytest.mark.kind("scores and their n")
def test_golds_without_a_grade_of_hardness_are_said(run_evaluate: Callable[..., Any]) -> None:
    gold = "VALUES (1)"
    _, shown = run_evaluate([own("0", gold, gold), own("1", "SELECT 1", "SELECT 1")])
    assert "hardness is unknown for 1 of 2 questions: Spider grades no such gold" in shown


@pytest.mark.kind("scores and their n")
@pytest.mark.parametrize("form", ["id", "order", "own gold"])
def test_the_limit_holds_for_a_predictions_file(
    run_evaluate: Callable[..., Any], form: str
) -> None:
    records: list[dict[str, Any]] = [{"predicted": sql} for sql in GOLD]
    if form == "id":
        records = [record | {"id": n} for n, record in enumerate(records)]
    if form == "own gold":
        records = [own(str(n), sql, sql) for n, sql in enumerate(GOLD)]
    scores, shown = run_evaluate(records, evaluate={"limit": 3})
    (part,) = scores.values()
    assert part["n"] == 3 and "3 of them are scored (--evaluate.limit 3)" in shown


@pytest.fixture(scope="module")
def executor() -> Iterator[Executor]:
    with Executor(1) as executor:
        yield executor


@pytest.fixture(scope="module")
def mall(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_spider_folder(tmp_path_factory.mktemp("mall"))
    return folder / "database" / "mall" / "mall.sqlite"


@pytest.mark.kind("scores and their n")
@pytest.mark.parametrize("semantics", ["spider", "bird"])
def test_comparing_two_results_ends_in_time(
    executor: Executor, tmp_path: Path, semantics: Any
) -> None:
    # wide rows whose columns all look alike: every order of them would have to be tried
    file = tmp_path / "wide.sqlite"
    width = 24
    connection = sqlite3.connect(file)
    names = [f"c{n}" for n in range(width)]
    connection.execute(f"CREATE TABLE t ({', '.join(names)})")
    rows = [[int(n in (row, (row + 1) % width)) for n in range(width)] for row in range(width)]
    other = [[int(n in (row, row ^ 1)) for n in range(width)] for row in range(width)]
    connection.execute(f"CREATE TABLE u ({', '.join(names)})")
    for table, values in (("t", rows), ("u", other)):
        connection.executemany(f"INSERT INTO {table} VALUES ({','.join('?' * width)})", values)
    connection.commit()
    pair = Pair(file, "SELECT * FROM t", "SELECT * FROM u")
    began = time.monotonic()
    verdict = judge(executor, pair, semantics=semantics, limits=Limits(seconds=0.5))
    assert time.monotonic() - began < 20
    assert verdict.verdict in ("error", "wrong")


@pytest.mark.kind("scores and their n")
@pytest.mark.parametrize(
    "sql",
    [
        "SELECT random()",
        "SELECT hex(randomblob(8))",
        "SELECT name FROM customer ORDER BY RANDOM ()",
        "SELECT strftime('%f', 'now'), random()",
    ],
)
def test_what_is_drawn_at_random_is_drawn_each_time(
    executor: Executor, mall: Path, sql: str
) -> None:
    drawn = {executor.run(mall, sql).rows for _ in range(12)}
    assert len(drawn) > 1


@pytest.mark.kind("scores and their n")
@pytest.mark.parametrize(
    ("sql", "changes"),
    [
        ("SELECT CURRENT_DATE", True),
        ("SELECT date('now', '-1 day')", True),
        ("SELECT datetime()", True),
        ("SELECT now()", True),
        ("SELECT strftime('%Y')", True),
        ("SELECT rand(), uuid()", True),
        ("SELECT sysdate(), unix_timestamp()", True),
        ("SELECT curdate()", True),
        ("SELECT curtime()", True),
        ("SELECT UTC_DATE", True),
        ("SELECT utc_time()", True),
        ("SELECT utc_timestamp(3)", True),
        ("SELECT today()", True),
        ("SELECT get_current_time()", True),
        ("SELECT get_current_timestamp()", True),
        ("SELECT current_localtimestamp()", True),
        ("SELECT today, uuid, rand FROM draw", False),
        ("SELECT age, now FROM person WHERE name = 'Random'", False),
        ("SELECT date(day), strftime('%Y', day) FROM sale", False),
    ],
)
def test_queries_that_read_the_clock_are_known(sql: str, changes: bool) -> None:
    assert may_change(sql) is changes


@pytest.mark.kind("scores and their n")
def test_is_distinct_from_runs_in_a_gold_query(executor: Executor, mall: Path) -> None:
    sql = "SELECT count(*) FROM customer WHERE city IS NOT DISTINCT FROM 'Lisbon'"
    assert judge(executor, Pair(mall, sql, sql), semantics="spider").verdict == "correct"
    other = Pair(mall, "SELECT count(DISTINCT city) FROM customer", sql)
    assert judge(executor, other, semantics="spider").verdict == "error"  # as officially


@pytest.mark.kind("scores and their n")
def test_nothing_counts_behind_an_empty_first_statement(executor: Executor, mall: Path) -> None:
    pair = Pair(mall, "SELECT 1", " ; SELECT 1")
    assert judge(executor, pair, semantics="spider").verdict == "error"
    assert judge(executor, pair, semantics="spider", keep_distinct=True).verdict == "correct"


@pytest.mark.kind("scores and their n")
@pytest.mark.parametrize(
    ("predicted", "matches"),
    [
        ("SELECT name FROM customer WHERE id > 5 ORDER BY name", True),
        ("SELECT name FROM customer WHERE id > 0x5 ORDER BY name", False),
        ("SELECT name FROM customer WHERE id > 5 ORDER BY name NULLS LAST", False),
        ("SELECT DISTINCT ON (name) name FROM customer WHERE id > 5 ORDER BY name", False),
    ],
)
def test_spellings_that_spiders_parser_rejects_match_nothing(
    mall: Path, predicted: str, matches: bool
) -> None:
    gold = "SELECT name FROM customer WHERE id > 5 ORDER BY name"
    assert exact_set_match(gold, predicted, reflect(str(mall), "mall")) is matches


@pytest.mark.kind("scores and their n")
@pytest.mark.parametrize(
    ("sql", "grade"),
    [
        ("SELECT a FROM t; -- done", "easy"),
        ("SELECT a FROM t;;", "easy"),
        ("SELECT a FROM t WHERE b < c OR b > d", "easy"),
        ("SELECT a FROM t WHERE b < 1 OR b > 2", "medium"),
        ("SELECT a FROM t; SELECT b FROM t", "unknown"),
    ],
)
def test_hardness_is_graded_as_spiders_parser_reads(sql: str, grade: str) -> None:
    assert hardness(sql) == grade


def test_notes_are_those_of_the_last_model() -> None:
    scores = {"n": 1, "gold_errors": 0, "errors": {"cut off": 1}}
    assert report_scores.notes({"tuned": {"dev": scores}}, "tuned") == [
        "dev: 1 of 1 answers are not right and were cut off at --evaluate.max_new_tokens; a higher "
        "one lets them end"
    ]
