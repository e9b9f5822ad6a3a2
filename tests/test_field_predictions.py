"""Predictions in the forms that other tools write are matched with their questions, or refused."""

from __future__ import annotations

import csv
import gzip
import io
import json
import sqlite3
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from ray_sql.display import Display
from ray_sql.errors import DataError
from ray_sql.evaluate import results
from ray_sql.evaluate.predictions_file import evaluate_file
from ray_sql.tasks import SQL
from tests.conftest import QUESTIONS, SHOP

GOLD = [sql for _, sql in QUESTIONS]
TURNED = [(n, *QUESTIONS[n]) for n in (4, 7, 0, 3, 6, 1, 5, 2)]
"""(number, question, gold SQL) in another order than the split's."""


@pytest.fixture
def score(make_config: Any, tmp_path: Path) -> Callable[..., Any]:
    """`score(text, name)`: (execution accuracy, n, what was said, rows) of a file with the text."""

    def run(text: str | bytes, name: str = "answers.txt", **settings: Any) -> Any:
        file = tmp_path / name
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        said = io.StringIO()
        config = make_config(**{"evaluate.limit": None} | settings)
        evaluation = evaluate_file(file, config, Display(Console(file=said, width=500)))
        scores = results.summarise(evaluation, SQL, config.evaluate)["file"]
        (split,) = scores.values()
        rows = evaluation["file"]
        return split["execution_accuracy"], split["n"], said.getvalue(), rows

    return run


def refused(score: Callable[..., Any], text: str, name: str = "answers.txt") -> str:
    with pytest.raises(DataError) as caught:
        score(text, name)
    assert name in str(caught.value) and "\n" not in str(caught.value)
    return str(caught.value)


def lines(records: Sequence[Any]) -> str:
    return "".join(f"{json.dumps(record)}\n" for record in records)


@pytest.mark.kind("predictions matched to questions")
@pytest.mark.parametrize("name", ["id", "question_id", "qid", "idx", "index", "Instance ID", "key"])
@pytest.mark.parametrize("number", [int, float, str])
def test_an_id_is_found_under_the_names_that_people_use(
    score: Callable[..., Any], name: str, number: type
) -> None:
    records = [{name: number(n), "predicted": sql} for n, _, sql in TURNED]
    accuracy, n, said, _ = score(lines(records), "answers.jsonl")
    assert (accuracy, n) == (1.0, 8)
    assert f"matched by {name.lower().replace(' ', '_')}" in said


@pytest.mark.kind("predictions matched to questions")
def test_without_ids_the_text_of_the_question_counts(score: Callable[..., Any]) -> None:
    records = [{"question": f" {q.upper()} ", "pred_sql": sql} for _, q, sql in TURNED]
    accuracy, n, said, _ = score(lines(records), "answers.jsonl")
    assert (accuracy, n) == (1.0, 8)
    assert "matched by the question's text" in said and "read from 'pred_sql'" in said
    # ids of another world, and the questions beside them
    foreign = [{"id": f"run7-{n}", "question": q, "predicted": sql} for n, q, sql in TURNED]
    assert score(lines(foreign), "answers.jsonl")[:2] == (1.0, 8)
    assert "is not in --split dev" in refused(
        score, lines([*records, {"question": "Why?", "pred_sql": "SELECT 1"}]), "answers.jsonl"
    )


@pytest.mark.kind("predictions matched to questions")
def test_order_counts_only_where_there_is_nothing_else_and_is_said(
    score: Callable[..., Any],
) -> None:
    accuracy, _, said, _ = score(lines([{"predicted": sql} for sql in GOLD]), "answers.jsonl")
    assert accuracy == 1.0 and "matched by order, for they have neither ids nor questions" in said
    positions = [{"idx": n + 1, "predicted": sql} for n, _, sql in TURNED]
    accuracy, _, said, _ = score(lines(positions), "answers.jsonl")
    assert accuracy == 1.0 and "by place in the split, as their idx counts from 1" in said


@pytest.mark.kind("predictions matched to questions")
@pytest.mark.parametrize("name", ["db_id", "db_name"])
@pytest.mark.parametrize("with_id", [True, False])
def test_a_database_that_contradicts_is_refused(
    score: Callable[..., Any], name: str, with_id: bool
) -> None:
    records = [{name: "mall", "predicted": sql} for sql in GOLD]
    records[5][name] = "kiosk"
    if with_id:
        records = [record | {"id": n} for n, record in enumerate(records)]
    message = refused(score, lines(records), "answers.jsonl")
    assert "answers.jsonl, line 6: db_id 'kiosk', but question 5" in message
    assert "is on 'mall'" in message


@pytest.mark.kind("predictions matched to questions")
def test_a_question_that_contradicts_its_id_is_refused(score: Callable[..., Any]) -> None:
    records = [{"id": n, "question": q, "predicted": sql} for n, (q, sql) in enumerate(QUESTIONS)]
    assert score(lines(records), "answers.jsonl")[0] == 1.0
    records[2]["id"], records[3]["id"] = 3, 2
    message = refused(score, lines(records), "answers.jsonl")
    assert "line 3: asks 'List the titles of all products.', but question 3" in message


@pytest.mark.kind("predictions matched to questions")
def test_a_plain_query_with_another_database_behind_it_is_refused(
    score: Callable[..., Any],
) -> None:
    text = "".join(f"{sql}\tmall\n" for sql in GOLD)
    assert score(text)[0] == 1.0
    assert "line 8: db_id 'shop', but" in refused(score, text[: -len("mall\n")] + "shop\n")
    unknown = refused(score, text.replace("\tmall", "\tatlantis"))
    assert "line 1: unknown db_id 'atlantis' after the tab" in unknown


BIRD = {str(n): f"{sql}\t----- bird -----\tmall" for n, sql in enumerate(GOLD)}


def as_csv(delimiter: str, index: bool = False) -> str:
    stream = io.StringIO(newline="")
    table = csv.writer(stream, delimiter=delimiter)
    table.writerow([*([""] if index else []), "question_id", "Predicted SQL"])
    for row, (n, _, sql) in enumerate(TURNED):
        table.writerow([*([row] if index else []), n, sql.replace(" FROM", "\nFROM")])
    return stream.getvalue()


def batch(answer: Callable[[str], Any]) -> str:
    return lines([{"id": f"req_{n}", "custom_id": str(n), **answer(sql)} for n, _, sql in TURNED])


def openai(sql: str) -> Any:
    choices = [{"index": 0, "message": {"role": "assistant", "content": f"```sql\n{sql}\n```"}}]
    return {"response": {"status_code": 200, "body": {"choices": choices}}, "error": None}


def anthropic(sql: str) -> Any:
    return {
        "result": {"type": "succeeded", "message": {"content": [{"type": "text", "text": sql}]}}
    }


def parquet() -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    stream = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([{"id": n, "pred": sql} for n, _, sql in TURNED]), stream)
    return stream.getvalue()


FORMS: dict[str, tuple[str | bytes, str]] = {
    "several lines with ;": (
        ";\n\n".join(sql.replace(" FROM", "\n  FROM") for sql in GOLD),
        "a.sql",
    ),
    "; in a literal": ("SELECT\n';' = 'x';" + "\n".join(f"{sql};" for sql in GOLD[1:]), "a.sql"),
    "list of objects": (
        json.dumps([{"id": n, "predicted": sql} for n, _, sql in TURNED], indent=2),
        "a.json",
    ),
    "list of texts": (json.dumps(GOLD), "a.json"),
    "wrapped list": (json.dumps({"model": "m", "predictions": GOLD}), "a.json"),
    "BIRD, pretty": (json.dumps(BIRD, indent=4), "predict_dev.json"),
    "BIRD, one line": (json.dumps(dict(reversed(BIRD.items()))), "predict_dev.json"),
    "BIRD, a line each": ("".join(f"{text}\n" for text in BIRD.values()), "a.sql"),
    "CSV": (as_csv(","), "a.csv"),
    "CSV with semicolons": (as_csv(";"), "a.csv"),
    "CSV with pandas' index": (as_csv(",", index=True), "a.csv"),
    "TSV with a mark": ("\ufeff" + as_csv("\t"), "a.tsv"),
    "blank lines at the end": ("\n".join(GOLD) + "\n\n\n", "a.sql"),
    "blank lines between": ("\n\n".join(GOLD), "a.txt"),
    "lines of Windows": ("\r\n".join(GOLD) + "\r\n", "a.txt"),
    "JSON texts a line": (lines(GOLD), "a.jsonl"),
    "LLaMA-Factory": (
        lines([{"prompt": "p", "predict": sql, "label": "l"} for sql in GOLD]),
        "a.jsonl",
    ),
    "DIN-SQL": (
        "NLQ,PREDICTED SQL,DATABASE\n" + "".join(f'"{q}","{sql}",mall\n' for _, q, sql in TURNED),
        "a.csv",
    ),
    "UTF-16, as PowerShell writes it": ("\r\n".join(GOLD).encode("utf-16"), "a.sql"),
    "UTF-16 JSON lines": (lines(GOLD).encode("utf-16"), "a.jsonl"),
    "packed lines": (gzip.compress("\n".join(GOLD).encode()), "a.sql.gz"),
    "packed CSV": (gzip.compress(as_csv(",").encode()), "a.csv.gz"),
    "Parquet": (parquet(), "a.parquet"),
    "Excel's line above": ("sep=;\r\n" + as_csv(";"), "a.csv"),
    "numbers of a list": ("".join(f"{n}. {sql}\n" for n, sql in enumerate(GOLD, 1)), "a.txt"),
    "a comment above each": ("".join(f"-- Q: {q}\n{sql}\n" for q, sql in QUESTIONS), "a.sql"),
    "OpenAI's batch": (batch(openai), "a.jsonl"),
    "Anthropic's batch": (batch(anthropic), "a.jsonl"),
    "tabs as white space": ("\n".join(sql.replace(" ", "\t") for sql in GOLD), "a.sql"),
    "tabs, then the database": (
        "\n".join(f"{sql.replace(' ', chr(9))}\tmall" for sql in GOLD),
        "a.sql",
    ),
}


@pytest.mark.kind("predictions in other tools' forms")
@pytest.mark.parametrize("form", FORMS)
def test_forms_that_other_tools_write_are_read(score: Callable[..., Any], form: str) -> None:
    accuracy, n, _, _ = score(*FORMS[form])
    wrong = int(form == "; in a literal")
    assert (round(accuracy * n), n) == (8 - wrong, 8)


@pytest.mark.kind("predictions in other tools' forms")
def test_a_folder_of_one_file_a_question_is_read(make_config: Any, tmp_path: Path) -> None:
    folder = tmp_path / "answers"
    folder.mkdir()
    for n, _, sql in TURNED:
        (folder / f"{n}.sql").write_text(f"{sql}\n")
    config = make_config(**{"evaluate.limit": None})
    evaluation = evaluate_file(folder, config, Display(Console(file=io.StringIO())))
    assert [row["verdict"] for row in evaluation["file"]] == ["correct"] * 8


@pytest.mark.kind("predictions in other tools' forms")
def test_a_request_of_a_batch_that_failed_is_no_answer(score: Callable[..., Any]) -> None:
    failed = {"id": "r", "custom_id": "2", "response": None, "error": {"code": "expired"}}
    text = batch(openai).splitlines()
    text[TURNED.index((2, *QUESTIONS[2]))] = json.dumps(failed)
    accuracy, n, _, _ = score("\n".join(text), "a.jsonl")
    assert (accuracy, n) == (7 / 8, 8)
    text = batch(lambda sql: {"response": {"status_code": 200, "body": {"output": sql}}})
    assert "req_4' is in none of --split dev" in refused(score, text, "a.jsonl")


@pytest.mark.kind("predictions in other tools' forms")
def test_empty_cells_of_a_table_count_as_not_given(score: Callable[..., Any]) -> None:
    table = "id,db_id,gold,split,predicted\n" + "".join(
        f'{n},,,,"{sql}"\n' for n, _, sql in TURNED[1:]
    )
    accuracy, n, _, rows = score(f"{table}{TURNED[0][0]},,,,\n", "a.csv")
    assert (accuracy, n) == (7 / 8, 8) and rows[-1]["error_kind"] == "unparsable"


@pytest.mark.kind("predictions in other tools' forms")
def test_a_tab_before_a_table_that_is_called_as_a_database_belongs_to_the_query(
    score: Callable[..., Any],
) -> None:
    text = "\n".join([*GOLD[:-1], "SELECT\tname\tFROM customer WHERE 'mall' =\tmall"])
    rows = score(text)[3]
    assert rows[-1]["predicted"].endswith("=\tmall")


@pytest.mark.kind("predictions in other tools' forms")
@pytest.mark.parametrize(
    ("text", "name", "reason"),
    [
        (
            "id,predicted\n0,SELECT name, city FROM customer\n",
            "a.csv",
            "line 2: has 3 fields where",
        ),
        ("id,sql_text,label\n0,SELECT 1,x\n", "a.csv", "line 2: no field 'predicted'; found id, l"),
        ('{"0": "SELECT 1", "0": "SELECT 2"}', "a.json", "key '0' is there twice"),
        ('[\n{"id": 0,\n "predicted": }]', "a.json", "line 3: not valid JSON"),
        ("[]", "a.json", "holds no prediction; give one a question"),
        ("id,predicted\n", "a.csv", "holds no prediction; give one a question"),
        ("id,pred,pred\n0,SELECT 1,SELECT 2\n", "a.csv", "column 'pred' is there twice"),
        ("SELECT 1;\nSELECT 2;\n", "a.sql", "2 lines, but --split dev has 8 examples"),
    ],
)
def test_a_form_that_cannot_be_read_is_named(
    score: Callable[..., Any], text: str, name: str, reason: str
) -> None:
    assert reason in refused(score, text, name)


@pytest.mark.kind("answers in fences or with a prefix")
@pytest.mark.parametrize(
    "frame",
    [
        "```sql\n{}\n```",
        "```\n{}```",
        "Here is the query:\n```sql\n{}\n```\nIt counts.",
        "SQL: {}",
        "SQLite query:\n{}",
        "**Answer:** {}",
        "{}\n```",
    ],
)
def test_sql_in_a_frame_is_read_and_said(score: Callable[..., Any], frame: str) -> None:
    framed = [frame.format(sql) for sql in GOLD]
    accuracy, _, said, rows = score(lines([{"predicted": text} for text in framed]), "a.jsonl")
    assert accuracy == 1.0
    assert "8 of 8 predictions were in code fences or behind words" in said
    assert (rows[0]["predicted"], rows[0]["raw"]) == (GOLD[0], framed[0])


@pytest.mark.kind("answers in fences or with a prefix")
def test_answers_that_are_no_query_are_counted_and_shown(score: Callable[..., Any]) -> None:
    accuracy, _, said, rows = score("\n".join([*GOLD[:6], "I cannot say.", "DROP TABLE customer"]))
    assert accuracy == 6 / 8 and "raw" not in rows[6]
    assert "2 of 8 predictions do not begin like a query, as that of 6: 'I cannot say.'" in said


@pytest.mark.kind("answers in fences or with a prefix")
@pytest.mark.parametrize("sql", ["SELECT '```'", "SELECT 'a: select' AS x", "-- SQL: no\nSELECT 1"])
def test_a_query_with_a_fence_or_a_colon_inside_stays(score: Callable[..., Any], sql: str) -> None:
    rows = score(json.dumps([*GOLD[:7], sql]), "a.json")[3]
    assert rows[7]["predicted"] == sql and "raw" not in rows[7]


@pytest.mark.kind("predictions matched to questions")
@pytest.mark.parametrize("form", ["id", "order", "order of the rest"])
def test_predictions_of_rows_that_are_left_out_have_their_place(
    score: Callable[..., Any], tmp_path: Path, form: str
) -> None:
    rows = [{"db_id": "shop", "question": q, "query": sql} for q, sql in QUESTIONS]
    rows[2]["query"] = ""
    data = tmp_path / "own"
    database = data / "database" / "shop" / "shop.sqlite"
    database.parent.mkdir(parents=True)
    connection = sqlite3.connect(database)
    connection.executescript(SHOP)
    connection.close()
    (data / "dev.jsonl").write_text(lines(rows))
    records: list[dict[str, Any]] = [{"predicted": sql} for sql in GOLD]
    if form == "id":
        records = [record | {"id": n} for n, record in enumerate(records)][::-1]
    if form == "order of the rest":
        del records[2]
    accuracy, n, said, _ = score(lines(records), "answers.jsonl", dataset_id=str(data))
    assert (accuracy, n) == (1.0, 7)
    assert ("1 of them answer rows that are left out" in said) is (len(records) == 8)
