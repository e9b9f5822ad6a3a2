"""Spreadsheets as people save them: Excel's files, Windows-1252, columns of many names."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from ray_sql import data
from ray_sql.data import read_file
from ray_sql.errors import DataError
from tests.test_field_data import make_shop, refusal

openpyxl = pytest.importorskip("openpyxl")
PAIRS = [["How many?", "SELECT COUNT(*) FROM customer"], ["Who?", "SELECT name FROM customer"]]


def save(file: Path, **sheets: list[list[Any]]) -> Path:
    book = openpyxl.Workbook()
    book.remove(book.active)
    for title, rows in sheets.items():
        sheet = book.create_sheet(title)
        for row in rows:
            sheet.append(row)
    book.save(file)
    return file


def test_the_first_table_of_a_workbook_is_read_below_its_title(tmp_path: Path) -> None:
    rows = [["Our questions"], [], ["Question", "SQL", "asked"], *[[*p, None] for p in PAIRS]]
    rows.append(["When?", "SELECT 1", datetime(2024, 5, 1)])
    file = save(tmp_path / "pairs.xlsx", Empty=[], Pairs=rows, Notes=[["a", "b"], ["c", "d"]])
    said: list[str] = []
    records = read_file(file, said.append)[""]
    assert [one.values["Question"] for one in records] == ["How many?", "Who?", "When?"]
    assert records[0].place == f"{file}[Pairs], row 4"
    assert records[2].values["asked"] == "2024-05-01"
    assert said == ["pairs.xlsx: sheet Pairs is read, not Notes"]


def test_the_sheet_and_the_row_above_the_queries_are_found(tmp_path: Path) -> None:
    notes = [["table", "meaning"], ["hive", "With kind regards from the hive"]]
    title = ["Questions", None, None, "autumn"]
    head = ["Nr", "Question", "SQL Query", "Who"]
    rows = [[n, *pair, None] for n, pair in enumerate(PAIRS, 1)]
    wide = ["Pair", "What is asked", None, None]  # above merged cells
    file = save(tmp_path / "q.xlsx", Notes=notes, Pairs=[title, [], wide, head, [], *rows])
    said: list[str] = []
    records = read_file(file, said.append)[""]
    assert [one.values["SQL Query"] for one in records] == [sql for _, sql in PAIRS]
    assert records[0].place == f"{file}[Pairs], row 6"
    assert said == ["q.xlsx: sheet Pairs is read, not Notes"]


@pytest.mark.parametrize("name", ["SQL Query", "sql-query", "Gold SQL", " SQL "])
def test_names_of_columns_may_have_blanks(make_config: Any, tmp_path: Path, name: str) -> None:
    make_shop(tmp_path / "shop.db")
    file = save(tmp_path / "q.xlsx", S=[["Natural language", name], *PAIRS * 5])
    assert data.load(make_config(dataset_id=str(file))).splits["train"][0].gold == PAIRS[0][1]


@pytest.mark.parametrize("name", ["User Question", "user question", "user-question"])
def test_a_mapped_column_is_found_by_any_writing(
    make_config: Any, tmp_path: Path, name: str
) -> None:
    make_shop(tmp_path / "shop.db")
    file = save(tmp_path / "q.xlsx", S=[["User Question", "sql"], *PAIRS * 5])
    config = make_config(dataset_id=str(file), **{"data.columns": {"question": name}})
    assert data.load(config).splits["train"][0].question == PAIRS[0][0]


def test_sheets_named_after_splits_are_splits(tmp_path: Path) -> None:
    head = ["question", "query"]
    file = save(tmp_path / "q.xlsx", Train=[head, PAIRS[0]], dev=[head, PAIRS[1]], x=[head])
    found = read_file(file)
    assert {split: len(rows) for split, rows in found.items()} == {"train": 1, "dev": 1}


def test_hidden_sheets_are_left_aside_and_named(tmp_path: Path) -> None:
    file = save(tmp_path / "q.xlsx", old=[["question", "query"], *PAIRS])
    book = openpyxl.load_workbook(file)
    book.create_sheet("new").append(["question", "query"])
    book["new"].append(PAIRS[0])
    book["old"].sheet_state = "hidden"
    book.active = 1
    book.save(file)
    said: list[str] = []
    assert len(read_file(file, said.append)[""]) == 1
    assert said == ["q.xlsx: hidden sheets are not read: old"]


@pytest.mark.parametrize("content", [b"", b"question,query\n", b"PK\x03\x04 cut off"])
def test_what_is_no_workbook_is_one_line(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "q.xlsx"
    file.write_bytes(content)
    with pytest.raises(DataError, match=r"q\.xlsx: cannot be read as an Excel file \(.*as CSV$"):
        read_file(file)


def test_a_workbook_trains_beside_its_database(make_config: Any, tmp_path: Path) -> None:
    make_shop(tmp_path / "shop.db")
    file = save(tmp_path / "q.xlsx", S=[["nl", "output"], *PAIRS * 5])
    corpus = data.load(make_config(dataset_id=str(file)))
    assert [one.gold for one in corpus.splits["train"][:2]] == [PAIRS[0][1], PAIRS[1][1]]
    assert "columns: question ← nl, query ← output" in corpus.notes


def test_windows_1252_is_read_and_said(make_config: Any, tmp_path: Path) -> None:
    make_shop(tmp_path / "shop.db")
    file = tmp_path / "q.csv"
    rows = ["Frage;SQL", *["Wie viele Größen – „groß“?;SELECT 1"] * 8]
    file.write_bytes("\r\n".join(rows).encode("cp1252"))
    corpus = data.load(make_config(dataset_id=str(file), **{"data.columns": {"question": "Frage"}}))
    assert corpus.splits["train"][0].question == "Wie viele Größen – „groß“?"
    assert any(
        note.startswith("q.csv: is not UTF-8 and is read as Windows") for note in corpus.notes
    )


def test_bytes_that_are_no_text_are_refused(make_config: Any, tmp_path: Path) -> None:
    make_shop(tmp_path / "shop.db")
    file = tmp_path / "q.csv"
    file.write_bytes(b"question,query\n\x81\x8d\x00,SELECT 1\n")
    assert "not UTF-8 text" in refusal(make_config(dataset_id=str(file)))
