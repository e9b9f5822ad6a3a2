"""Golds of published layouts score 100 %; grades and exact set match are the official code's."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import QUESTIONS
from tests.test_field_layouts import LAYOUTS, mini_dev, spider_without_databases
from tests.test_field_scores import score

GOLDS = [sql for _, sql in QUESTIONS]

GRADES = ["easy", "easy", "easy", "easy", "easy", "easy", "easy", "medium"]
"""By Spider's rules: a WHERE alone is easy, a join and a WHERE are medium."""

PREDICTED = [
    ("SELECT COUNT(id) FROM customer", False),
    ("SELECT name FROM customer WHERE city = 'Porto'", True),  # values do not count
    ("SELECT DISTINCT title FROM product", True),  # nor does DISTINCT
    ("SELECT MAX(price), MIN(price) FROM product", False),
    ("SELECT MIN(T1.price) FROM product AS T1", True),  # an alias is its table
    ("SELECT city FROM customer WHERE city != 'Lisbon'", False),
    ("SELECT COUNT(*) FROM product WHERE price >= 50", False),
    # what a join is made on does not count
    (GOLDS[7].replace("T1.id = T2.customer_id", "T1.id = T2.product_id"), True),
]
"""Predictions for the eight questions, with the verdict of Spider's exact set match."""


@pytest.mark.kind("golds of published layouts")
@pytest.mark.parametrize("lay_out", LAYOUTS, ids=lambda function: function.__name__)
def test_golds_of_a_published_layout_score_in_full(
    tmp_path: Path, lay_out: Callable[[Path], None]
) -> None:
    place, split = tmp_path / "published", LAYOUTS[lay_out]
    lay_out(place)
    scores, rows = score(place, tmp_path, GOLDS, split=split)
    assert (scores["exact_set_match"], scores["exact_set_match_n"]) == (1.0, 8)
    executed = 0 if lay_out is spider_without_databases else 8
    assert (scores["correct"], scores["n"]) == (executed, executed)
    grades = ["simple"] * 8 if lay_out is mini_dev else GRADES
    assert [row["hardness"] for row in rows] == grades


@pytest.mark.kind("golds of published layouts")
@pytest.mark.parametrize("lay_out", LAYOUTS, ids=lambda function: function.__name__)
def test_exact_set_match_on_a_published_layout_is_the_official_one(
    tmp_path: Path, lay_out: Callable[[Path], None]
) -> None:
    place, split = tmp_path / "published", LAYOUTS[lay_out]
    lay_out(place)
    _, rows = score(place, tmp_path, [sql for sql, _ in PREDICTED], split=split)
    assert [row["exact_set_match"] for row in rows] == [matches for _, matches in PREDICTED]
