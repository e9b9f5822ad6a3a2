"""Files, databases and rows as people have them: read, or named with the true reason."""

from __future__ import annotations

import gzip
import json
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ray_sql import data
from ray_sql.config import Config, load
from ray_sql.data import Corpus
from ray_sql.data.columns import without_fence
from ray_sql.display import Display
from ray_sql.errors import ConfigError, DataError
from ray_sql.finetune import finetune
from tests.conftest import QUESTIONS, SHOP

ROWS = [{"db_id": "shop", "question": q, "query": sql} for q, sql in QUESTIONS]


def make_shop(file: Path) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    connection = sqlite3.connect(file)
    connection.executescript(SHOP)
    connection.close()
    return file


def jsonl(records: list[Any]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def read(corpus: Corpus) -> set[tuple[str, str]]:
    """Return question and gold of all examples."""
    return {(one.question, one.gold) for split in corpus.splits.values() for one in split}


def refusal(config: Config) -> str:
    with pytest.raises(DataError) as caught:
        data.load(config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


class Lines(Display):
    """A display that keeps its lines."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def line(self, text: str) -> None:
        self.lines.append(text)


def plan_of(config: Config) -> str:
    """Return what a dry run shows."""
    display = Lines()
    finetune.preview(config, display)
    return "\n".join(display.lines)


# Bad rows


@pytest.fixture
def one_bad(make_config: Any, tmp_path: Path) -> Callable[..., Config]:
    """Make settings of a file of eight rows, the sixth of which is changed."""
    make_shop(tmp_path / "databases" / "shop" / "shop.sqlite")

    def make(change: dict[str, Any], **settings: Any) -> Config:
        rows = [dict(row) for row in ROWS]
        rows[5] |= change
        file = tmp_path / "q.jsonl"
        file.write_text(jsonl(rows))
        return make_config(dataset_id=str(file), **settings)

    return make


@pytest.mark.kind("bad rows")
@pytest.mark.parametrize(
    "change,reason",
    [
        ({"question": float("nan")}, "question is empty"),
        ({"question": "nan"}, "question is empty"),
        ({"question": None}, "question is empty"),
        ({"question": ["a", "b"]}, "question is no text but list"),
        ({"question": 5}, "question is no text but int 5"),
        ({"query": None}, "query is empty"),
        ({"query": "  "}, "query is empty"),
        ({"query": {"sel": 1}}, "query is no text but dict"),
        ({"query": "```sql\n```"}, "query is empty"),
        ({"db_id": "elsewhere"}, "unknown db_id 'elsewhere'"),
    ],
)
def test_one_bad_row_is_named_and_left_out(
    one_bad: Callable[..., Config], change: dict[str, Any], reason: str
) -> None:
    corpus = data.load(one_bad(change))
    assert read(corpus) == {pair for pair in QUESTIONS if pair != QUESTIONS[5]}
    (row,) = corpus.left_out
    assert row.place.endswith("q.jsonl, line 6") and reason in row.reason
    ids = {one.id for split in corpus.splits.values() for one in split}
    assert ids == {"0", "1", "2", "3", "4", "6", "7"}, "the others keep their places"


@pytest.mark.kind("bad rows")
@pytest.mark.parametrize(
    "gold", ["SELECT colour FROM product", "SELECT 1; SELECT 2", "UPDATE sale SET amount = 0"]
)
def test_gold_that_does_not_run_is_not_trained_on(
    one_bad: Callable[..., Config], gold: str
) -> None:
    nothing_aside = {"data.validation_fraction": 0, "evaluate.select_examples": 0}
    config = one_bad({"query": gold}, **nothing_aside)
    every = {**nothing_aside, "data.test_fraction": 0.125}
    config = config.changed(every)
    plan = plan_of(config)
    assert "q.jsonl, line 6" in plan and "gold does not run" in plan
    assert "kept out of training and of the scores" in plan
    assert "rows      6 rows" in plan
    kept = plan_of(config.changed({"data.bad_rows": "keep"}))
    assert "rows      7 rows" in kept


@pytest.mark.kind("bad rows")
def test_rows_left_out_are_listed_in_the_runs_folder(
    one_bad: Callable[..., Config], tmp_path: Path
) -> None:
    from ray_sql.finetune.prepare import prepare, write_inputs

    write_inputs(prepare(one_bad({"question": None})))
    (line,) = (tmp_path / "out" / "run" / "left_out.jsonl").read_text().splitlines()
    row = json.loads(line)
    assert row["place"].endswith("q.jsonl, line 6") and row["reason"] == "question is empty"


@pytest.mark.kind("bad rows")
def test_bad_rows_may_be_refused_or_kept(one_bad: Callable[..., Config]) -> None:
    message = refusal(one_bad({"query": None}, **{"data.bad_rows": "error"}))
    assert "1 bad rows: " in message and "q.jsonl, line 6 query is empty" in message
    corpus = data.load(one_bad({"question": 5}, **{"data.bad_rows": "keep"}))
    assert ("5", QUESTIONS[5][1]) in read(corpus) and not corpus.left_out


@pytest.mark.kind("bad rows")
def test_a_file_of_bad_rows_alone_is_refused_with_the_first_reasons(
    make_config: Any, tmp_path: Path
) -> None:
    make_shop(tmp_path / "databases" / "shop" / "shop.sqlite")
    file = tmp_path / "q.jsonl"
    file.write_text(jsonl([row | {"query": None} for row in ROWS]))
    message = refusal(make_config(dataset_id=str(file)))
    assert f"{file}: no row can be used: {file}, line 1 query is empty; {file}, line 2" in message


@pytest.mark.kind("bad rows")
@pytest.mark.parametrize(
    "text",
    [
        "```sql\nSELECT 1\n```",
        "```\nSELECT 1\n```",
        "```SELECT 1```",
        "```sqlite\nSELECT 1",
        "Here it is:\n```SQL\nSELECT 1\n```\nIt counts.",
        "~~~sql\nSELECT 1\n~~~",
        '````sql title="q"\nSELECT 1\n````',
        "```postgres SELECT 1```",
        "SELECT 1",
    ],
)
def test_fences_around_gold_are_taken_off(text: str) -> None:
    assert without_fence(text) == "SELECT 1"


# One database of one's own


@pytest.mark.kind("one database of one's own")
@pytest.mark.parametrize(
    "place,flag",
    [
        ("databases/shop/shop.sqlite", None),
        ("databases/shop.db", None),
        ("shop.sqlite3", None),
        ("elsewhere/shop.sqlite", "elsewhere/shop.sqlite"),
        ("elsewhere/shop.db", "elsewhere"),
        ("elsewhere/shop/data.sqlite3", "elsewhere"),
    ],
)
def test_the_only_database_needs_no_db_id(
    make_config: Any, tmp_path: Path, place: str, flag: str | None
) -> None:
    make_shop(tmp_path / place)
    file = tmp_path / "q.jsonl"
    file.write_text(jsonl([{"question": q, "query": sql} for q, sql in QUESTIONS]))
    where = {"data.databases": str(tmp_path / flag)} if flag else {}
    corpus = data.load(make_config(dataset_id=str(file), **where))
    assert read(corpus) == set(QUESTIONS)
    assert {one.db_id for split in corpus.splits.values() for one in split} == {"shop"}
    assert corpus.schemas["shop"].table_names == ("customer", "product", "sale")
    assert "database shop for all questions that name none" in corpus.notes


@pytest.mark.kind("one database of one's own")
def test_a_file_that_is_named_is_the_database_whatever_it_is_called(
    make_config: Any, tmp_path: Path
) -> None:
    make_shop(tmp_path / "company.db")
    file = tmp_path / "q.jsonl"
    file.write_text(jsonl(ROWS))
    where = {"data.databases": str(tmp_path / "company.db")}
    corpus = data.load(make_config(dataset_id=str(file), **where))
    assert read(corpus) == set(QUESTIONS)
    assert corpus.databases == {"shop": str(tmp_path / "company.db")}


@pytest.mark.kind("one database of one's own")
def test_questions_without_db_id_on_two_databases_are_refused_with_the_way_out(
    make_config: Any, tmp_path: Path
) -> None:
    for name in ("shop", "store"):
        make_shop(tmp_path / "databases" / f"{name}.sqlite")
    file = tmp_path / "q.jsonl"
    file.write_text(jsonl([{"question": q, "query": sql} for q, sql in QUESTIONS]))
    message = refusal(make_config(dataset_id=str(file)))
    assert "there are 2 databases: shop, store" in message
    assert "--data.columns db_id=THEIR_COLUMN" in message


@pytest.mark.kind("one database of one's own")
def test_a_place_without_databases_is_named_with_the_layouts(
    make_config: Any, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    file = tmp_path / "q.jsonl"
    file.write_text(jsonl(ROWS))
    where = {"data.databases": str(tmp_path / "empty")}
    message = refusal(make_config(dataset_id=str(file), **where))
    assert message.startswith(f"--data.databases {tmp_path}/empty: holds no database; give a file")


# File formats


def csv_text(delimiter: str = ",", end: str = "\n") -> str:
    lines = [delimiter.join(("db_name", "question", "query"))]
    lines += [
        delimiter.join(f'"{value}"' for value in ("shop", q, sql.replace('"', '""')))
        for q, sql in QUESTIONS
    ]
    return end.join(lines) + end


def parquet(file: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(ROWS), file)


FORMATS: dict[str, str | bytes | Callable[[Path], None]] = {
    "q.csv": csv_text(),
    "excel.csv": "\ufeff" + csv_text(";", "\r\n"),
    "q.tsv": csv_text("\t"),
    "lines.json": jsonl(ROWS),
    "list.jsonl": json.dumps(ROWS),
    "indented.json": json.dumps(ROWS, indent=2),
    "wrapped.json": json.dumps({"version": 1, "data": ROWS}),
    "numbered.json": json.dumps({str(n): row for n, row in enumerate(ROWS)}),
    "columns.json": json.dumps({key: [row[key] for row in ROWS] for key in ROWS[0]}),
    "q.ndjson": jsonl(ROWS),
    "q.jsonl.gz": gzip.compress(jsonl(ROWS).encode()),
    "q.csv.gz": gzip.compress(csv_text().encode()),
    "bom.jsonl": "\ufeff" + jsonl(ROWS).replace("\n", "\r\n"),
    "wide.jsonl": jsonl(ROWS).encode("utf-16"),
    "q.parquet": parquet,
}


@pytest.mark.kind("file formats")
@pytest.mark.parametrize("name", FORMATS)
def test_every_common_format_is_read(make_config: Any, tmp_path: Path, name: str) -> None:
    make_shop(tmp_path / "databases" / "shop.sqlite")
    file, content = tmp_path / name, FORMATS[name]
    if callable(content):
        content(file)
    else:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    corpus = data.load(make_config(dataset_id=str(file)))
    assert read(corpus) == set(QUESTIONS)
    folder = tmp_path / "folder"
    folder.mkdir()
    suffixes = "".join(file.suffixes)
    for split in ("train", "dev"):
        (folder / f"{split}{suffixes}").write_bytes(file.read_bytes())
    make_shop(folder / "database" / "shop" / "shop.sqlite")
    corpus = data.load(make_config(dataset_id=str(folder)))
    assert len(corpus.splits["dev"]) == 8
    assert len(corpus.splits["train"]) + len(corpus.splits["validation"]) == 8


@pytest.mark.kind("file formats")
def test_lists_by_split_in_one_file_are_splits(make_config: Any, tmp_path: Path) -> None:
    make_shop(tmp_path / "databases" / "shop.sqlite")
    file = tmp_path / "q.json"
    file.write_text(json.dumps({"train": ROWS[:5], "dev": ROWS[5:]}))
    corpus = data.load(make_config(dataset_id=str(file)))
    assert [one.question for one in corpus.splits["dev"]] == [q for q, _ in QUESTIONS[5:]]


@pytest.mark.kind("file formats")
@pytest.mark.parametrize(
    "name,content,reason",
    [
        ("q.xls", b"PK\x03\x04", "is there, but in no form that is read here; those are .jsonl"),
        ("q.parquet", b"PAR1 not really", "cannot be read as Parquet"),
        ("q.jsonl.gz", b"\x1f\x8b broken", "cannot be read"),
        ("q.json", b'{"name": "x"}', "must hold JSON objects, one example each"),
        ("q.csv", b"a,b\n1,2\n", "no column 'question' or"),
    ],
)
def test_a_file_that_is_there_is_never_called_missing(
    make_config: Any, tmp_path: Path, name: str, content: bytes, reason: str
) -> None:
    (tmp_path / name).write_bytes(content)
    message = refusal(make_config(dataset_id=str(tmp_path / name)))
    assert f"{tmp_path / name}: " in message and reason in message and "Hub" not in message


@pytest.mark.kind("file formats")
def test_a_row_of_csv_with_a_comma_too_many_is_a_bad_row(make_config: Any, tmp_path: Path) -> None:
    make_shop(tmp_path / "databases" / "shop.sqlite")
    lines = csv_text().splitlines()
    lines[3] = "shop,How many, in all?,SELECT 1"
    (tmp_path / "q.csv").write_text("\n".join(lines))
    (row,) = data.load(make_config(dataset_id=str(tmp_path / "q.csv"))).left_out
    assert row.place.endswith("q.csv, line 4") and "needs double quotes" in row.reason


@pytest.mark.kind("file formats")
def test_a_tables_json_with_a_mark_at_its_beginning_is_read(tmp_path: Path) -> None:
    from ray_sql.database import read_tables_json

    (tmp_path / "tables.json").write_bytes(b"\xef\xbb\xbf[]")
    assert read_tables_json(tmp_path / "tables.json") == {}


# Columns as the docs write them


@pytest.mark.kind("columns as the docs write them")
@pytest.mark.parametrize(
    "words",
    [
        ["--data.columns", "{question: pergunta, query: sql}"],
        ["--data.columns={question: pergunta, query: sql}"],
        ["--data.columns", '{"question": "pergunta", "query": "sql"}'],
        ["--data.columns", "question=pergunta,query=sql"],
        ["--data.columns", "question=pergunta", "--data.columns", "query=sql"],
    ],
)
def test_a_column_map_is_read_as_yaml_json_and_pairs(words: list[str]) -> None:
    needed = ["--model_name", "m", "--output_name", "o", "--task_type", "sql"]
    assert load(Config, needed + words).data.columns == {"question": "pergunta", "query": "sql"}


@pytest.mark.kind("columns as the docs write them")
def test_a_mapping_that_is_none_is_named_with_both_forms() -> None:
    needed = ["--model_name", "m", "--output_name", "o", "--task_type", "sql"]
    with pytest.raises(ConfigError, match=r"^--data.columns: '\{a: b' is no mapping; write it as"):
        load(Config, [*needed, "--data.columns", "{a: b"])


# Plans that say the truth


@pytest.mark.kind("plans that say the truth")
def test_without_a_database_no_query_is_said_to_run(make_config: Any, tmp_path: Path) -> None:
    file = tmp_path / "q.jsonl"
    file.write_text(jsonl([row | {"schema": "customer: id, name"} for row in ROWS]))
    plan = plan_of(make_config(dataset_id=str(file), **{"evaluate.select_examples": 0}))
    assert "gold      no query was executed: " in plan and "every query runs" not in plan


@pytest.mark.kind("plans that say the truth")
@pytest.mark.parametrize("rows", [1, 3, 5])
def test_a_few_rows_are_said_to_hold_nothing_out(
    make_config: Any, tmp_path: Path, rows: int
) -> None:
    make_shop(tmp_path / "databases" / "shop.sqlite")
    (tmp_path / "q.jsonl").write_text(jsonl(ROWS[:rows]))
    settings = {"data.validation_fraction": 0, "data.test_fraction": 0.05}
    plan = plan_of(make_config(dataset_id=str(tmp_path / "q.jsonl"), **settings))
    assert f"nothing is held out as dev: {rows} training examples are too few" in plan
    assert "name such databases" not in plan


@pytest.mark.kind("plans that say the truth")
def test_gold_that_does_not_run_is_named_by_line(one_bad: Callable[..., Config]) -> None:
    plan = plan_of(one_bad({"query": "SELECT colour FROM product"}))
    assert "q.jsonl, line 6: no such column: colour" in plan


# The preview and the training leave out the same rows


@pytest.mark.kind("dry run and training agree")
@pytest.mark.parametrize("bad", [0, 7])
@pytest.mark.parametrize(
    "change,settings",
    [
        ({"query": "SELECT name FROM nowhere"}, {"task_type": "schema"}),
        ({"query": "SELECT name FROM nowhere"}, {"prompt.schema_form": "reduced"}),
        ({"query": "SELECT colour FROM product"}, {}),
        ({"question": None}, {}),
    ],
)
def test_the_preview_shows_the_first_example_that_is_trained_on(
    make_config: Any, tmp_path: Path, bad: int, change: dict[str, Any], settings: dict[str, Any]
) -> None:
    make_shop(tmp_path / "databases" / "shop.sqlite")
    rows = [dict(row) for row in ROWS]
    rows[bad] |= change
    for split in ("train", "dev"):
        (tmp_path / f"{split}.jsonl").write_text(jsonl(rows if split == "train" else ROWS))
    settings |= {"data.validation_fraction": 0, "evaluate.select_examples": 0}
    plan = plan_of(make_config(dataset_id=str(tmp_path), **settings))
    first = QUESTIONS[1 if bad == 0 else 0][0]
    assert f"Question: {first}" in plan and "rows      7 rows" in plan
    assert f"train.jsonl, line {bad + 1}" in plan
