"""Check each score against its definition, computed the slow way, and against known values."""

import itertools
import random
import sqlite3
import time
from collections import Counter
from collections.abc import Iterator
from math import comb, isclose, sqrt
from pathlib import Path
from statistics import NormalDist

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_sql.database import Executor, Limits, Rows
from ray_sql.errors import DataError
from ray_sql.metrics import (
    PRF,
    Interval,
    Pair,
    Semantics,
    Verdict,
    bird_match,
    classify_error,
    clustered_interval,
    execution_match,
    hardness,
    how_little_is_known,
    is_ordered,
    judge,
    judge_many,
    mcnemar,
    prepare_spider,
    resolvable_difference,
    score_links,
    spider_match,
    strict_match,
    summarise_links,
    wilson_interval,
)
from tests.waiting import HANGS

# Few values, so that random tables often nearly match.
TABLES = st.integers(1, 4).flatmap(
    lambda width: st.lists(
        st.tuples(*[st.sampled_from([0, 1, "0", "a", None])] * width), max_size=5
    ).map(tuple)
)


def in_some_column_order(gold: Rows, predicted: Rows, ordered: bool) -> bool:
    """Spider's judgement by its definition: try every order of the predicted columns."""
    if not gold and not predicted:
        return True
    if len(gold) != len(predicted) or len(gold[0]) != len(predicted[0]):
        return False
    orders = itertools.permutations(range(len(gold[0])))
    tables = ([tuple(row[place] for place in order) for row in predicted] for order in orders)
    return any(
        list(gold) == table if ordered else Counter(gold) == Counter(table) for table in tables
    )


@settings(max_examples=400, deadline=None)
@given(TABLES, TABLES, st.booleans())
def test_spider_match_equals_trying_every_column_order(
    gold: Rows, predicted: Rows, ordered: bool
) -> None:
    assert spider_match(gold, predicted, ordered=ordered) == in_some_column_order(
        gold, predicted, ordered
    )


@settings(max_examples=400, deadline=None)
@given(TABLES, st.randoms(use_true_random=False), st.booleans())
def test_spider_match_sees_through_shuffled_columns_and_one_changed_cell(
    gold: Rows, chance: random.Random, ordered: bool
) -> None:
    order = list(range(len(gold[0]) if gold else 0))
    chance.shuffle(order)
    rows = [tuple(row[place] for place in order) for row in gold]
    if not ordered:
        chance.shuffle(rows)
    assert spider_match(gold, tuple(rows), ordered=ordered)
    if rows:
        assert not spider_match(gold, (("changed", *rows[0][1:]), *rows[1:]), ordered=ordered)


@pytest.mark.parametrize("width", [12, 40])
def test_many_alike_columns_take_no_time(width: int) -> None:
    equal: Rows = ((1,) * width,) * 3
    unit: Rows = tuple(tuple(int(row == column) for column in range(width)) for row in range(width))
    ring: Rows = tuple(
        tuple(int((column - row) % width in (0, 1)) for column in range(width))
        for row in range(width)
    )
    half = width // 2
    rings: Rows = tuple(
        tuple(
            int(row // half == column // half and (column - row) % half in (0, 1))
            for column in range(width)
        )
        for row in range(width)
    )
    started = time.perf_counter()
    assert spider_match(equal, equal, ordered=False)
    assert spider_match(unit, unit[::-1], ordered=False)
    assert spider_match(ring, tuple(row[::-1] for row in ring[::-1]), ordered=False)
    assert not spider_match(
        ring, rings, ordered=False
    )  # every column, row and pair of values is as frequent in both
    assert not spider_match(
        tuple(row * 4 for row in ring), tuple(row * 4 for row in rings), ordered=False
    )
    assert time.perf_counter() - started < HANGS, "trying every order of columns would take years"


def test_many_rows_take_linear_time() -> None:
    rows: Rows = tuple((number, number % 7, f"name {number}", None) for number in range(50_000))
    turned: Rows = tuple((d, c, b, a) for a, b, c, d in reversed(rows))
    started = time.perf_counter()
    assert spider_match(rows, turned, ordered=False)
    assert not spider_match(rows, turned, ordered=True)
    assert time.perf_counter() - started < HANGS, "comparing every pair of rows would take hours"


def test_the_three_semantics_differ_where_they_should() -> None:
    gold: Rows = ((1, "a"), (2, "b"))
    cases: dict[str, tuple[Rows, bool, bool, bool]] = {  # predicted: spider, bird, strict
        "same": (gold, True, True, True),
        "rows turned": (gold[::-1], True, True, False),
        "columns turned": ((("a", 1), ("b", 2)), True, False, False),
        "row twice": ((*gold, gold[0]), False, True, False),
        "other value": (((1, "a"), (2, "c")), False, False, False),
    }
    for name, (predicted, *expected) in cases.items():
        names: tuple[Semantics, ...] = ("spider", "bird", "strict")
        matches = [execution_match(gold, predicted, semantics=semantics) for semantics in names]
        assert matches == expected, name
    assert not execution_match(gold, gold[::-1], semantics="spider", ordered=True)
    assert execution_match(gold, gold[::-1], semantics="bird", ordered=True)


def test_values_compare_as_the_official_code_compares_them() -> None:
    assert spider_match(((1,),), ((1.0,),), ordered=False)
    assert not spider_match(((1,),), (("1",),), ordered=False)
    assert not spider_match(((0.3,),), ((0.1 + 0.2,),), ordered=False)
    assert not spider_match(((None,),), (("",),), ordered=False)
    # Equal to Python, but 1 sorts after 1.5 as text and 1.0 before it.
    assert not spider_match(((1, 1.5),), ((1.0, 1.5),), ordered=False)
    assert bird_match(((1, 1.5),), ((1.0, 1.5),)) and strict_match(((1, 1.5),), ((1.0, 1.5),))


def test_empty_results_are_equal_whatever_their_columns() -> None:
    assert spider_match((), (), ordered=True)
    assert not spider_match(((1,),), (), ordered=False)
    assert not bird_match(((1,),), ())


@pytest.mark.parametrize(
    ("sql", "prepared", "kept"),
    [
        ("SELECT DISTINCT a FROM t", "SELECT  a FROM t", "SELECT DISTINCT a FROM t"),
        ("SELECT count(distinct a)", "SELECT count( a)", "SELECT count(distinct a)"),
        (
            "SELECT 'distinct' -- distinct",
            "SELECT 'distinct' -- distinct",
            "SELECT 'distinct' -- distinct",
        ),
        ("a > = 1 AND b < = '! ='", "a >= 1 AND b <= '!='", "a >= 1 AND b <= '!='"),
        ("year ( curdate() ) - 1", "2020- 1", "2020- 1"),
        ("SELECT 1;; -- done", "SELECT 1;", "SELECT 1;; -- done"),
        ("SELECT 1; DROP TABLE t", "SELECT 1; DROP TABLE t", "SELECT 1; DROP TABLE t"),
        ("", "", ""),
        ("  \n", "  \n", "  \n"),
    ],
)
def test_prepare_spider(sql: str, prepared: str, kept: str) -> None:
    assert prepare_spider(sql).strip() == prepared.strip()
    assert prepare_spider(sql, keep_distinct=True) == kept


def test_on_a_server_a_distinct_that_the_grammar_needs_stays() -> None:
    sql = (
        "SELECT DISTINCT ON (a) DISTINCT b FROM t "
        "WHERE b IS NOT DISTINCT FROM c AND c IS DISTINCT FROM d"
    )
    prepared = prepare_spider(sql, keep_needed=True)
    assert prepared.split() == sql.replace(" DISTINCT b", " b").split()
    assert "DISTINCT" not in prepare_spider(sql)


def test_order_counts_where_the_gold_text_has_the_words() -> None:
    assert is_ordered("SELECT 'Order By'")
    assert not is_ordered("SELECT a FROM t ORDER  BY a")


@pytest.mark.parametrize(
    ("sql", "grade"),
    [
        ("SELECT a FROM t", "easy"),
        ("SELECT a FROM t WHERE b = 1", "easy"),
        ("SELECT a, b FROM t WHERE c = 1 AND d = 2", "medium"),
        ("SELECT t.a FROM t JOIN u ON t.id = u.id WHERE u.b = 1", "medium"),
        ("SELECT a, count(*) FROM t GROUP BY a ORDER BY count(*)", "extra"),
        ("SELECT a FROM t WHERE b LIKE 'x' ORDER BY c", "hard"),
        ("SELECT a FROM t WHERE b NOT IN (SELECT b FROM u)", "hard"),
        ("SELECT a FROM t UNION SELECT a FROM u ORDER BY a", "hard"),
        ("SELECT a FROM t WHERE b = 1 OR c = 2 GROUP BY a ORDER BY a LIMIT 1", "extra"),
        ("SELECT a FROM t WHERE b > = 1", "easy"),
        ("SELECT a FROM t WHERE", "unknown"),
        ("DROP TABLE t", "unknown"),
        ("", "unknown"),
        ("SELECT 'open", "unknown"),
    ],
)
def test_hardness_follows_spiders_counts(sql: str, grade: str) -> None:
    assert hardness(sql) == grade


def test_hardness_survives_deep_nesting() -> None:
    assert hardness("SELECT " + "(" * 3000 + "1" + ")" * 3000) in ("easy", "unknown")
    assert hardness("SELECT a FROM t WHERE " + " OR ".join(["a = 1"] * 3000)) in (
        "extra",
        "unknown",
    )


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("databases") / "shop" / "shop.sqlite"
    path.parent.mkdir()
    with sqlite3.connect(path) as connection:
        connection.executescript(
            "CREATE TABLE item (name TEXT, price INT);"
            "INSERT INTO item VALUES ('pen', 2), ('ink', 5), ('pen', 3);"
        )
    connection.close()
    return path


@pytest.fixture(scope="module")
def executor() -> Iterator[Executor]:
    with Executor(2, Limits(seconds=1.0)) as executor:
        yield executor


JUDGED = [
    ("SELECT name FROM item", "SELECT name FROM item ORDER BY price DESC", "correct", "none"),
    ("SELECT name FROM item", "SELECT DISTINCT name FROM item", "correct", "none"),
    ("SELECT name FROM item", "SELECT price FROM item", "wrong", "wrong rows"),
    ("SELECT name FROM item ORDER BY price", "SELECT name FROM item", "wrong", "wrong rows"),
    ("SELECT name FROM item", "SELECT name FROM item WHERE price > 9", "wrong", "empty"),
    ("SELECT name FROM item", "SELECT colour FROM item", "error", "no such column"),
    ("SELECT name FROM item", "SELECT name FROM goods", "error", "no such table"),
    ("SELECT name FROM item", "SELECT name FORM item", "error", "syntax"),
    ("SELECT name FROM item", "The pen.", "error", "syntax"),
    ("SELECT name FROM item", "SELECT upper(name, 1) FROM item", "error", "other"),
    ("SELECT name FROM item", "DELETE FROM item", "error", "refused"),
    ("SELECT name FROM item", "SELECT name FROM item; DROP TABLE item", "error", "refused"),
    ("SELECT name FROM item WHERE price > 9", "", "error", "refused"),
    ("SELECT name FROM item", "SELECT zeroblob(900000000)", "error", "too large"),
    (
        "SELECT name FROM item",
        "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT max(i) FROM n",
        "timeout",
        "timeout",
    ),
    ("SELECT name FROM goods", "SELECT name FROM item", "gold_error", "gold error"),
    ("SELECT name FROM goods", "SELECT name FROM goods", "gold_error", "gold error"),
]


def test_verdicts_and_their_kinds(executor: Executor, shop: Path) -> None:
    pairs = [Pair(shop, gold, predicted) for gold, predicted, *_ in JUDGED]
    verdicts = judge_many(executor, pairs, semantics="spider")
    kinds = [(verdict.verdict, classify_error(verdict)) for verdict in verdicts]
    assert kinds == [(verdict, kind) for *_, verdict, kind in JUDGED]
    assert all((verdict.error is None) == (verdict.verdict == "correct") for verdict in verdicts)
    assert verdicts[2] == judge(
        executor, pairs[2], semantics="spider"
    )  # the same results, so the same seconds
    crashed = Verdict("error", "crash: the process that ran the query ended with code -9", 0.0)
    assert classify_error(crashed) == "crash"


def test_distinct_is_kept_on_demand_and_by_the_other_semantics(
    executor: Executor, shop: Path
) -> None:
    pair = Pair(shop, "SELECT name FROM item", "SELECT DISTINCT name FROM item")
    assert judge(executor, pair, semantics="spider").verdict == "correct"
    assert judge(executor, pair, semantics="spider", keep_distinct=True).verdict == "wrong"
    assert (
        judge(executor, pair, semantics="bird").verdict == "correct"
    )  # a set has no duplicates anyway
    assert judge(executor, pair, semantics="strict").verdict == "wrong"


def test_a_test_suite_must_agree_on_every_database(executor: Executor, tmp_path: Path) -> None:
    for name, price in (
        ("shop/shop", 5),
        ("shop/neighbour", 0),
        ("mixed/shop", 5),
        ("mixed/neighbour", 0),
    ):
        path = tmp_path / f"{name}.sqlite"
        path.parent.mkdir(exist_ok=True)
        with sqlite3.connect(path) as connection:
            connection.executescript(
                f"CREATE TABLE item (price INT); INSERT INTO item VALUES ({price})"
            )
        connection.close()
    gold, lucky = "SELECT count(*) FROM item WHERE price > 3", "SELECT count(*) FROM item"
    suite, single = tmp_path / "shop" / "shop.sqlite", tmp_path / "mixed" / "shop.sqlite"
    assert judge(executor, Pair(suite, gold, lucky), semantics="spider").verdict == "wrong"
    assert judge(executor, Pair(suite, gold, gold), semantics="spider").verdict == "correct"
    # A folder of unrelated databases is no test suite.
    assert judge(executor, Pair(single, gold, lucky), semantics="spider").verdict == "correct"


def test_a_missing_database_is_the_users_to_fix(executor: Executor, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere"):
        judge_many(
            executor, [Pair(tmp_path / "nowhere.sqlite", "SELECT 1", "SELECT 1")], semantics="bird"
        )


def test_a_score_of_few_questions_says_how_little_is_known() -> None:
    assert how_little_is_known(12) == "a score of 12 questions is known to ±25 points"
    assert how_little_is_known(1).startswith("a score of 1 question is known to ±")
    assert how_little_is_known(99).endswith(" ±10 points")
    assert how_little_is_known(100) == how_little_is_known(0) == ""


def test_wilson_interval_at_known_points() -> None:
    # Newcombe 1998, table I: 81 of 263, and 0 of 20.
    middle = wilson_interval(81, 263)
    assert (round(middle.low, 4), round(middle.high, 4)) == (0.2553, 0.3662)
    none = wilson_interval(0, 20)
    assert none.low == 0.0 and round(none.high, 4) == 0.1611
    every = wilson_interval(20, 20)
    assert isclose(every.low, 1 - none.high, abs_tol=1e-12) and every.high == 1.0
    assert wilson_interval(0, 0) == Interval(0.0, 1.0)
    for successes, total, confidence in ((5, 4, 0.95), (-1, 4, 0.95), (1, 4, 95.0)):
        with pytest.raises(ValueError):
            wilson_interval(successes, total, confidence)


@given(st.integers(1, 2000).flatmap(lambda total: st.tuples(st.integers(0, total), st.just(total))))
def test_wilson_interval_holds_the_rate_and_narrows_with_less_confidence(
    trial: tuple[int, int],
) -> None:
    successes, total = trial
    wide, narrow = wilson_interval(*trial, confidence=0.99), wilson_interval(*trial, confidence=0.5)
    assert 0 <= wide.low <= narrow.low <= successes / total <= narrow.high <= wide.high <= 1


def test_wilson_interval_is_its_formula() -> None:
    z = NormalDist().inv_cdf(0.975)
    for successes, total in ((1, 1), (1, 3), (7, 20), (81, 263), (1033, 1034)):
        rate, scale = successes / total, 1 + z * z / total
        middle = (rate + z * z / (2 * total)) / scale
        reach = z / scale * sqrt(rate * (1 - rate) / total + z * z / (4 * total * total))
        interval = wilson_interval(successes, total)
        high = 1.0 if successes == total else middle + reach
        assert isclose(interval.low, middle - reach, abs_tol=1e-12)
        assert isclose(interval.high, high, abs_tol=1e-12)


def test_mcnemar_is_twice_the_smaller_tail() -> None:
    for only_a, only_b in ((0, 1), (1, 0), (4, 4), (3, 12), (40, 61)):
        total = only_a + only_b
        tail = sum(comb(total, count) for count in range(min(only_a, only_b) + 1))
        p = min(1.0, 2 * tail / 2**total)
        assert isclose(mcnemar(only_a, only_b), p, abs_tol=1e-12)


def test_mcnemar_is_the_exact_binomial() -> None:
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(3, 3) == 1.0
    assert isclose(mcnemar(0, 5), 2 / 32)
    assert isclose(mcnemar(2, 8), 2 * (1 + 10 + 45) / 1024)
    assert mcnemar(2, 8) == mcnemar(8, 2)
    assert 0 < mcnemar(2000, 2400) < 1e-8


def test_an_interval_clustered_by_database_is_seeded_and_as_wide_as_databases_differ() -> None:
    alike, apart = [(5, 10), (6, 10), (5, 10), (6, 10)], [(0, 10), (10, 10), (1, 10), (11, 12)]
    narrow, wide = clustered_interval(alike), clustered_interval(apart)
    assert narrow and wide and narrow == clustered_interval(alike)
    assert 0.5 <= narrow.low <= 0.55 <= narrow.high <= 0.6
    plain = wilson_interval(22, 42)
    assert 0 <= wide.low < plain.low and plain.high < wide.high <= 1
    less = clustered_interval(apart, confidence=0.5)
    assert less and wide.low < less.low < less.high < wide.high
    for nothing in ([], [(5, 10)], [(5, 10), (1, 2)], [(0, 10), (0, 10)], [(5, 10), (0, 0)]):
        assert clustered_interval(nothing) is None
    with pytest.raises(ValueError):
        clustered_interval(apart, confidence=95)


def test_an_interval_clustered_by_database_holds_the_rate_as_often_as_it_says() -> None:
    generator, held = random.Random(1), 0
    for trial in range(200):
        rates = [generator.betavariate(2, 2) for _ in range(40)]
        groups = [(sum(generator.random() < rate for _ in range(25)), 25) for rate in rates]
        interval = clustered_interval(groups, draws=500, seed=trial)
        assert interval
        held += interval.low <= 0.5 <= interval.high
    assert 0.88 <= held / 200 <= 0.99


@pytest.mark.parametrize(("questions", "discordant"), [(1034, 186), (184, 40), (200, 20)])
def test_a_resolvable_difference_is_found_four_times_in_five(
    questions: int, discordant: int
) -> None:
    difference, share = resolvable_difference(questions, discordant), discordant / questions
    generator, detected = random.Random(2), 0
    for _ in range(400):
        draws = [generator.random() for _ in range(questions)]
        only_a = sum(draw < (share - difference) / 2 for draw in draws)
        only_b = sum((share - difference) / 2 <= draw < share for draw in draws)
        detected += mcnemar(only_a, only_b) <= 0.05
    assert 0.68 <= detected / 400 <= 0.87  # exact, so a little below 0.8


def test_a_resolvable_difference_at_known_points() -> None:
    # as Connor's formula gives n: (1.96 sqrt(0.2) + 0.8416 sqrt(0.2 - 0.01))^2 / 0.01 = 154.7
    assert isclose(resolvable_difference(155, 31), 0.1, rel_tol=0.01)
    assert (
        resolvable_difference(1034, 100)
        < resolvable_difference(1034, 200)
        < resolvable_difference(100, 20)
    )
    assert resolvable_difference(1000, 0) == resolvable_difference(1000, 2) > 0.007, (
        "few disagreements promise nothing"
    )
    assert resolvable_difference(1, 1) == 1.0
    for questions, discordant in ((0, 0), (5, 6), (5, -1)):
        with pytest.raises(ValueError):
            resolvable_difference(questions, discordant)


def test_linking_scores_count_names_lower_cased() -> None:
    gold = {"Item": ["Name", "price"], "shop": ["id"]}
    schema = {"item": ["name", "price"], "shop": ["id", "city"], "staff": []}
    perfect = score_links(gold, {"ITEM": ["NAME", "Price"], "Shop": ["ID"]}, schema)
    assert perfect.exact and perfect.strict_recall and perfect.hallucinated == 0
    generous = score_links(gold, {**gold, "staff": [], "goods": ["x"]}, schema)
    assert generous.strict_recall and not generous.exact and generous.hallucinated == 2
    assert generous.tables.scores == PRF(0.5, 1.0, 2 * 2 / 6)
    stingy = score_links(gold, {"item": ["name"]}, schema)
    assert not stingy.strict_recall and stingy.columns.scores == PRF(1.0, 1 / 3, 0.5)
    column_elsewhere = score_links({"a": ["id"]}, {"a": [], "b": ["id"]})
    assert column_elsewhere.columns.shared == 0 and column_elsewhere.table_strict_recall
    unread = score_links(gold, None, schema)
    assert not unread.parsed and not unread.strict_recall and unread.tables.scores.f1 == 0


def test_an_unparsable_answer_is_not_exact_even_where_gold_is_empty() -> None:
    assert score_links({}, {}).exact
    assert not score_links({}, None).exact


def test_micro_counts_names_and_macro_counts_questions() -> None:
    large = score_links({"a": ["1", "2", "3"]}, {"a": ["1", "2", "3"]})
    small = score_links({"a": ["1"]}, {"a": ["2"]}, {"a": ["1"]})
    summary = summarise_links([large, small, score_links({"b": []}, None)])
    assert summary.questions == 3 and summary.unparsable == 1
    assert summary.hallucinated == summary.questions_hallucinating == 1
    assert summary.column_micro == PRF(3 / 4, 3 / 4, 3 / 4)
    assert isclose(summary.column_macro.f1, (1 + 0 + 1) / 3)
    assert isclose(summary.table_micro.recall, 2 / 3)
    assert isclose(summary.strict_recall, 1 / 3) and isclose(summary.table_strict_recall, 2 / 3)
    with pytest.raises(ValueError):
        summarise_links([])
