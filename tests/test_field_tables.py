"""Tables as spreadsheets and scripts write them: marks, quotes, and names of columns."""

from __future__ import annotations

import csv
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from ray_sql import data
from ray_sql.data import tables
from ray_sql.errors import DataError
from tests.conftest import QUESTIONS, SHOP

kind = pytest.mark.kind("file formats")


@pytest.fixture
def load(make_config: Any, tmp_path: Path) -> Any:
    """`load(name, text)`: the corpus of a table, beside the only database there is."""
    connection = sqlite3.connect(tmp_path / "shop.sqlite")
    connection.executescript(SHOP)
    connection.close()

    def read(name: str, text: str) -> Any:
        (tmp_path / name).write_bytes(text.encode())
        return data.load(make_config(dataset_id=str(tmp_path / name)))

    return read


def questions(corpus: Any) -> set[str]:
    return {one.question for rows in corpus.splits.values() for one in rows}


def table(mark: str, *above: str, more: str = "", end: str = "\n") -> str:
    lines = [f"question{mark}query{more and mark + more}"]
    lines += [f"{q}{mark}{sql}{mark if more else ''}" for q, sql in QUESTIONS]
    return end.join([*above, *lines, ""])


@kind
@pytest.mark.parametrize(
    "text",
    [
        table(";", more="notes, if any", end="\r\n"),
        table(";", "sep=;", end="\r\n"),
        table("\t", '"sep=\t"'),
        table("\t", "\ufeffsep=\t"),
        table(";", more='"one, two, three"'),
    ],
)
def test_the_mark_between_values_is_found(load: Any, text: str) -> None:
    assert questions(load("q.csv", text)) == {q for q, _ in QUESTIONS}


@kind
def test_a_column_that_is_there_twice_is_refused(load: Any) -> None:
    # the second one was taken: an answer, a translation, an older question
    for header in ("question,query,question", "question, query,query"):
        text = f"{header}\n" + "".join(f"{q},{sql},Frage?\n" for q, sql in QUESTIONS)
        with pytest.raises(DataError, match=r"q\.csv: column '\w+' is there twice; rename"):
            load("q.csv", text)
    unnamed = table(",").replace("\n", ",,\n")
    assert questions(load("q.csv", unnamed)) == {q for q, _ in QUESTIONS}


@kind
def test_quotes_of_a_file_of_tabs_are_its_own(load: Any) -> None:
    odd = ['"Lamp" or "Desk"?', '"How many', 'Is 5" enough?', '""', "'a'"]
    rows = [*QUESTIONS, *((question, "SELECT 1") for question in odd)]
    text = "question\tquery\n" + "".join(f"{q}\t{sql}\n" for q, sql in rows)
    corpus = load("q.tsv", text)
    assert questions(corpus) == {q for q, _ in rows} and not corpus.left_out
    # the rule of CSV, where it is kept
    text = "question\tquery\n" + '"Say ""hi""\tin two\nlines"\tSELECT 1\n' + text.partition("\n")[2]
    kept = [row for row in text.split("\n") if not row.startswith(('"Lamp', '"How', '""\t'))]
    assert 'Say "hi"\tin two\nlines' in questions(load("q.tsv", "\n".join(kept)))


@kind
def test_quotes_that_are_no_csv_are_named_and_never_taken_off(load: Any) -> None:
    rows = table(",").splitlines()
    rows[3] = '"Lamp" or desk?,SELECT 1'
    corpus = load("q.csv", "\n".join(rows))
    (bad,) = corpus.left_out
    assert bad.place.endswith("line 4") and "write a quote in it twice" in bad.reason
    assert questions(corpus) == {q for q, _ in QUESTIONS} - {QUESTIONS[2][0]}
    rows[3] = '"How many,SELECT 1'
    with pytest.raises(DataError, match=r"q\.csv, line 4: a quote that opens there does not end"):
        load("q.csv", "\n".join(rows))


@kind
def test_a_table_that_was_cut_off_loses_its_last_row_only(load: Any) -> None:
    text = table(",") + 'Who?,"SELECT name FROM customer'
    corpus = load("q.csv", text)
    (bad,) = corpus.left_out
    assert bad.place.endswith("line 10") and "unexpected end of data" in bad.reason
    assert questions(corpus) == {q for q, _ in QUESTIONS}


def test_a_small_table_leaves_the_limit_of_other_readers(tmp_path: Path) -> None:
    before = csv.field_size_limit()
    assert len(tables.read(tmp_path / "a.csv", "question,query\nWho?,SELECT 1\n")) == 1
    assert csv.field_size_limit() == before, "importlib reads files of packages by it"
