"""Columns and names that mean something else than a first look says."""

from __future__ import annotations

import sqlite3
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from ray_sql import data
from ray_sql.data import Corpus, prompts
from ray_sql.data.read import by_column
from ray_sql.errors import DataError
from ray_sql.evaluate.scored import load_scored
from tests.conftest import QUESTIONS, SHOP
from tests.test_field_predictions import lines, refused, score  # noqa: F401

ROWS: list[dict[str, Any]] = [
    {"db_id": "shop", "question": q, "query": sql} for q, sql in QUESTIONS
]
DDL = "CREATE TABLE customer (id INTEGER, name TEXT);"

split_column = pytest.mark.kind("splits in a column")
schema_in_the_row = pytest.mark.kind("the schema in the row")
bad_rows = pytest.mark.kind("bad rows")
database_names = pytest.mark.kind("names of databases")


def make_database(file: Path) -> None:
    if file.exists():
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    connection = sqlite3.connect(file)
    connection.executescript(SHOP)
    connection.close()


@pytest.fixture
def config(make_config: Any, tmp_path: Path) -> Callable[..., Any]:
    """`config(rows)`: settings of a run on one file of these rows, beside two databases."""

    def make(rows: Sequence[dict[str, Any]], **settings: Any) -> Any:
        for name in ("shop", "mall"):
            make_database(tmp_path / "databases" / f"{name}.sqlite")
        (tmp_path / "q.jsonl").write_text(lines(rows))
        return make_config(dataset_id=str(tmp_path / "q.jsonl"), **settings)

    return make


def examples(corpus: Corpus) -> list[data.Example]:
    return [one for rows in corpus.splits.values() for one in rows]


def shown(corpus: Corpus, config: Any) -> set[str]:
    """Return the schemas that prompts show."""
    return {prompts.schema_text(one, corpus.schemas, config.prompt) for one in examples(corpus)}


@split_column
@pytest.mark.parametrize("column,train,dev", [("split", "train", "dev"), ("Split", "Train", "val")])
def test_a_column_that_names_the_split_is_followed(
    config: Any, column: str, train: str, dev: str
) -> None:
    rows = [row | {column: train if n % 2 else dev} for n, row in enumerate(ROWS)]
    corpus = data.load(config(rows, **{"data.validation_fraction": 0}))
    # test rows were trained on, and rows to train on were scored
    assert [one.question for one in corpus.splits["dev"]] == [q for q, _ in QUESTIONS[::2]]
    assert [one.question for one in corpus.splits["train"]] == [q for q, _ in QUESTIONS[1::2]]
    assert any(note.startswith("splits ← column split: ") for note in corpus.notes)
    scored = load_scored(config(rows))
    assert len(scored.splits["dev"]) == 4


@split_column
def test_a_row_without_a_split_is_left_out_where_others_have_one(config: Any) -> None:
    names = ["train", "dev", None, "train", 0, " ", "dev", "train"]
    rows = [row | {"split": name} for row, name in zip(ROWS, names, strict=True)]
    corpus = data.load(config(rows, **{"data.validation_fraction": 0}))
    reasons = [row.reason for row in corpus.left_out]
    assert reasons == ["its split is empty", "its split is no text: 0", "its split is empty"]
    assert len(examples(corpus)) == 5


@split_column
@pytest.mark.parametrize("values", [["train"], ["dev"], ["a", "b"], [1, 2]])
def test_other_columns_of_that_name_divide_nothing(config: Any, values: list[Any]) -> None:
    rows = [row | {"split": values[n % len(values)]} for n, row in enumerate(ROWS)]
    corpus = data.load(config(rows, **{"data.test_fraction": 0.25}))
    assert len(corpus.splits["dev"]) == 2 and len(examples(corpus)) == 8
    assert by_column([]) == {"": []}


@split_column
@pytest.mark.parametrize("name", ["val", "valid"])
def test_a_split_is_found_by_its_own_name(make_config: Any, tmp_path: Path, name: str) -> None:
    make_database(tmp_path / "shop.sqlite")
    (tmp_path / "train.jsonl").write_text(lines(ROWS))
    (tmp_path / f"{name}.jsonl").write_text(lines(ROWS[:3]))
    corpus = data.load(make_config(dataset_id=str(tmp_path), split=(name,)))
    assert len(corpus.splits[name]) == 3
    assert len(data.load(make_config(dataset_id=str(tmp_path))).splits["dev"]) == 3


@split_column
def test_the_split_validation_of_a_dataset_is_never_a_part_of_train(
    make_config: Any, tmp_path: Path
) -> None:
    make_database(tmp_path / "shop.sqlite")
    (tmp_path / "train.jsonl").write_text(lines(ROWS))
    (tmp_path / "validation.jsonl").write_text(lines(ROWS[:3]))
    config = make_config(dataset_id=str(tmp_path), split=("validation",))
    with pytest.raises(DataError, match=r"which is called dev here.*give --split dev"):
        load_scored(config)


@schema_in_the_row
@pytest.mark.parametrize("name", ["public", "main", "sales.v2", "dbo"])
def test_a_name_is_no_schema(config: Any, name: str) -> None:
    settings = config([row | {"schema": name} for row in ROWS])
    corpus = data.load(settings)
    # prompts showed the name in place of all tables
    (text,) = shown(corpus, settings)
    assert text.startswith("customer(") and not any(one.schema_text for one in examples(corpus))
    assert f"column schema holds a name ({name}) and no schema: it is not shown" in corpus.notes


@schema_in_the_row
def test_a_short_schema_is_one(config: Any) -> None:
    settings = config([row | {"schema": "customer(id, name)"} for row in ROWS])
    assert shown(data.load(settings), settings) == {"customer(id, name)"}


def chat(question: str, sql: str, *before: dict[str, str]) -> list[dict[str, str]]:
    asked = {"role": "user", "content": question}
    return [*before, asked, {"role": "assistant", "content": sql}]


def share_gpt(question: str, sql: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": sql}]


SAID_BY_THE_SYSTEM: dict[str, Callable[[str, str], dict[str, Any]]] = {
    "ShareGPT": lambda q, sql: {"system": DDL, "conversations": share_gpt(q, sql), "tools": "[]"},
    "chat": lambda q, sql: {"system": DDL, "messages": chat(q, sql)},
    "developer": lambda q, sql: {"messages": chat(q, sql, {"role": "developer", "content": DDL})},
    "Alpaca": lambda q, sql: {
        "system": DDL,
        "instruction": q,
        "input": "",
        "output": sql,
        "history": [],
    },
    "completion": lambda q, sql: {"system": DDL, "prompt": q, "completion": sql},
}


@schema_in_the_row
@pytest.mark.parametrize("form", SAID_BY_THE_SYSTEM)
def test_a_schema_that_the_system_says_is_shown(config: Any, form: str) -> None:
    asked = [QUESTIONS[0], ("Name them.", "SELECT name FROM customer")]
    settings = config([SAID_BY_THE_SYSTEM[form](*one) for one in asked] * 4)
    corpus = data.load(settings)
    assert shown(corpus, settings) == {DDL}
    assert {(one.question, one.gold) for one in examples(corpus)} == set(asked)


@bad_rows
def test_a_question_with_a_history_is_left_out(config: Any) -> None:
    rows = [
        {"db_id": "shop", "instruction": q, "output": sql, "history": [["Hello?", "SELECT 1"]] * n}
        for n, (q, sql) in enumerate(QUESTIONS[:2])
    ]
    corpus = data.load(config(rows * 4))
    assert {one.question for one in examples(corpus)} == {QUESTIONS[0][0]}
    assert {row.reason for row in corpus.left_out} == {
        "has a history, and a later question needs what was said before"
    }


@bad_rows
def test_an_answer_that_calls_a_tool_is_left_out(config: Any) -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "run_sql"}}]}
    rows = [{"db_id": "shop", "messages": [{"role": "user", "content": "How many?"}, call]}]
    with pytest.raises(DataError, match="line 1 has an answer without text, such as a call"):
        data.load(config(rows))


@bad_rows
@pytest.mark.parametrize("word", ["nan", "None", "NULL", float("nan")])
def test_a_word_for_nothing_is_no_hint_and_no_name(config: Any, word: Any) -> None:
    rows = [row | {"evidence": word, "difficulty": word, "id": word} for row in ROWS]
    corpus = data.load(config(rows))
    assert {(one.evidence, one.hardness) for one in examples(corpus)} == {("", None)}
    assert {one.id for one in examples(corpus)} == {str(n) for n in range(8)}


@pytest.mark.kind("columns as the docs write them")
def test_a_column_that_is_mapped_is_no_guess_for_another_field(config: Any) -> None:
    rows = [{"db_id": "shop", "query": q, "sql": sql} for q, sql in QUESTIONS]
    corpus = data.load(config(rows, **{"data.columns": {"question": "query"}}))
    assert {(one.question, one.gold) for one in examples(corpus)} == set(QUESTIONS)


@database_names
@pytest.mark.parametrize(
    "name", ["shop.sqlite", "databases/shop.db", r"C:\data\shop.sqlite", "Shop", "SHOP.SQLITE"]
)
def test_a_database_is_found_by_its_file_whatever_the_case(config: Any, name: str) -> None:
    corpus = data.load(config([row | {"db_id": name} for row in ROWS]))
    assert {one.db_id for one in examples(corpus)} == {"shop"}
    assert f"databases: shop for {name}" in corpus.notes


@database_names
def test_letters_that_look_the_same_are_the_same_name(make_config: Any, tmp_path: Path) -> None:
    there, asked = unicodedata.normalize("NFD", "café"), unicodedata.normalize("NFC", "Café")
    for name in (there, "shop"):
        make_database(tmp_path / "databases" / f"{name}.sqlite")
    (tmp_path / "q.jsonl").write_text(lines([row | {"db_id": asked} for row in ROWS]))
    corpus = data.load(make_config(dataset_id=str(tmp_path / "q.jsonl")))
    assert {one.db_id for one in examples(corpus)} == {there}


@database_names
def test_a_name_that_several_databases_might_have_is_refused(config: Any, tmp_path: Path) -> None:
    settings = config([row | {"db_id": "SHOP"} for row in ROWS])
    make_database(tmp_path / "databases" / "Shop.sqlite")
    with pytest.raises(DataError, match="unknown db_id 'SHOP'"):
        data.load(settings)
    # a name that is there is meant, whatever else looks like it
    (tmp_path / "q.jsonl").write_text(lines([row | {"db_id": "Shop"} for row in ROWS]))
    assert {one.db_id for one in examples(data.load(settings))} == {"Shop"}


@database_names
def test_databases_with_endings_in_capitals_are_found(make_config: Any, tmp_path: Path) -> None:
    make_database(tmp_path / "SHOP.SQLITE")
    (tmp_path / "q.jsonl").write_text(lines(ROWS))
    corpus = data.load(make_config(dataset_id=str(tmp_path / "q.jsonl")))
    assert {one.db_id for one in examples(corpus)} == {"SHOP"}


@database_names
@pytest.mark.parametrize("name", ["Mall", "mall.sqlite", "database/mall/mall.sqlite"])
def test_a_prediction_may_name_the_file_of_its_database(score: Any, name: str) -> None:  # noqa: F811
    records = [{"id": n, "db_id": name, "predicted": sql} for n, (_, sql) in enumerate(QUESTIONS)]
    assert score(lines(records), "a.jsonl")[:2] == (1.0, 8)
    own = [record | {"id": f"x{n}", "gold": "SELECT 1"} for n, record in enumerate(records)]
    assert score(lines(own), "a.jsonl")[1] == 8
    assert "is on 'mall'" in refused(score, lines([records[0] | {"db_id": "shop"}]), "a.jsonl")


@pytest.mark.kind("predictions matched to questions")
def test_ids_that_a_table_made_decimal_are_whole(config: Any, make_config: Any) -> None:
    from ray_sql.evaluate import matching, prediction_forms

    rows = [row | {"id": n + 10.0 if n else None} for n, row in enumerate(ROWS)]
    settings = config(rows)
    corpus = load_scored(settings)
    assert {one.id for one in examples(corpus)} == {"0", *(str(n) for n in range(11, 18))}
    file = Path(settings.dataset_id).with_name("p.jsonl")
    file.write_text(lines([{"id": n + 10, "predicted": "x"} for n in (7, 3, 1)]))
    questions = matching.questions_of(corpus, ["dev"])
    matched = matching.match(prediction_forms.read(file, 8, {"shop"}), questions, ["dev"])
    assert [found and found[1].question for found in matched.found] == [
        QUESTIONS[n][0] for n in (7, 3, 1)
    ]


@pytest.mark.kind("predictions matched to questions")
@pytest.mark.parametrize("first,doubted", [(1, True), (0, False), (3, False)])
def test_a_part_that_may_count_from_one_is_doubted(
    score: Any,  # noqa: F811
    first: int,
    doubted: bool,
) -> None:
    records = [{"idx": n, "predicted": "SELECT 1"} for n in range(first, first + 4)]
    said = score(lines(records), "a.jsonl")[2]
    assert "matched by idx" in said
    assert ("they begin at 1, where the first question is 0" in said) is doubted


@database_names
def test_a_database_without_tables_is_named(config: Any, tmp_path: Path) -> None:
    settings = config([row | {"db_id": ("shop", "bare")[n % 2]} for n, row in enumerate(ROWS)])
    connection = sqlite3.connect(tmp_path / "databases" / "bare.sqlite")
    connection.execute("VACUUM")
    connection.close()
    corpus = data.load(settings)
    assert {row.reason.partition(";")[0] for row in corpus.left_out} == {
        "database bare has no table"
    }
    assert len(corpus.left_out) == 4 and {one.db_id for one in examples(corpus)} == {"shop"}
    (tmp_path / "q.jsonl").write_text(lines([row | {"db_id": "bare"} for row in ROWS]))
    with pytest.raises(DataError, match="database bare has no table; give the file that was"):
        data.load(settings)


@pytest.mark.kind("thinking models")
@pytest.mark.parametrize(
    "answer",
    [
        "<think>\nFirst ```sql\nSELECT 9\n``` but no.\n</think>\n\n```sql\n{}\n```",
        "<think>Count them.</think>\n{}",
        "Count them.\n</think>\n\n```sql\n{}\n```",
        "Look:\n```sql\nSELECT DISTINCT city FROM customer\n```\nThen:\n```sql\n{}\n```\nDone.",
    ],
)
def test_a_gold_answer_with_thoughts_is_its_query(config: Any, answer: str) -> None:
    """A draft in the thoughts was trained on."""
    messages = [chat(q, answer.format(sql)) for q, sql in QUESTIONS]
    corpus = data.load(config([{"db_id": "shop", "messages": turns} for turns in messages]))
    assert {(one.question, one.gold) for one in examples(corpus)} == set(QUESTIONS)
    assert any("taken off 8 gold queries" in note for note in corpus.notes)
    # thoughts without an answer are none
    rows = [
        row | {"query": "<think>Well, SELECT 1"} if not n else row for n, row in enumerate(ROWS)
    ]
    (bad,) = data.load(config(rows)).left_out
    assert bad.reason == "query is empty"
