"""Queries written for one database become those of another, where both give the same rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ray_sql.config import PrepareConfig, load
from ray_sql.curate import prepare
from ray_sql.errors import DataError
from tests.conftest import QUESTIONS, SHOP
from tests.test_field_data import make_shop

duckdb = pytest.importorskip("duckdb")

OTHERS = {
    "Cities, or none?": "SELECT IFNULL(city, 'none') FROM customer",
    "Of which type?": "SELECT typeof(price) FROM product",
    "Zeros?": "SELECT zeroblob(2)",
    "Named?": "SELECT nam FROM customer",
    "Sold?": "SELECT FROM WHERE",
    "Which of many?": f"SELECT name FROM customer WHERE id IN ({'-1,' * 6_000} 2)",
}
REASONS = {
    "Of which type?": "not translated: gives other rows, as SELECT",
    "Zeros?": "not translated: ",
    "Named?": "not translated: does not run where it is written for: no such column: nam",
    "Sold?": "not translated: does not run where it is written for: ",
    "Which of many?": "not translated: cannot be read",
}


def words(folder: Path, source: str) -> list[str]:
    pairs = [*QUESTIONS, *OTHERS.items()]
    lines = [json.dumps({"question": question, "query": sql}) for question, sql in pairs]
    (folder / "pairs.jsonl").write_text("\n".join(lines))
    with duckdb.connect(str(folder / "shop.duckdb")) as connection:
        connection.execute(SHOP)
    places = {"pairs": "pairs.jsonl", "url": "shop.duckdb", "translate_from": source}
    places |= {"output_dir": ".", "cache_dir": "cache"}
    return [word for name, place in places.items() for word in (f"--{name}", str(folder / place))]


def test_queries_are_kept_where_both_databases_agree(tmp_path: Path) -> None:
    make_shop(tmp_path / "old.db")
    record = prepare(load(PrepareConfig, words(tmp_path, "old.db")))
    folder = tmp_path / "dataset"
    audit = json.loads((folder / "audit.json").read_text())
    now = {row["before"]: row["now"] for row in audit["translated"]}
    assert "COALESCE(" in now[OTHERS["Cities, or none?"]]
    assert record["counts"]["translated"] == len(now)
    kept = [
        json.loads(line)
        for split in ("train", "dev")
        for line in (folder / f"{split}.jsonl").read_text().splitlines()
    ]
    assert now[OTHERS["Cities, or none?"]] in {row["query"] for row in kept}
    assert {question for question, _ in QUESTIONS} <= {row["question"] for row in kept}
    reasons = [json.loads(line) for line in (folder / "rejected.jsonl").read_text().splitlines()]
    places = {question: n for n, question in enumerate(OTHERS, len(QUESTIONS) + 1)}
    for question, reason in REASONS.items():
        (found,) = [r for r in reasons if r["place"].endswith(f"line {places[question]}")]
        assert found["reason"].startswith(reason), found
    assert len(reasons) == len(REASONS)


def test_a_database_to_translate_from_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.db: no such file"):
        prepare(load(PrepareConfig, words(tmp_path, "nowhere.db")))
    assert not (tmp_path / "dataset").exists()
