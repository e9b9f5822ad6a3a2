"""Files of pairs as people have them go through `prepare`: a dataset, or one line that says why."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ray_sql.config import PrepareConfig, load
from ray_sql.curate import prepare
from ray_sql.errors import RaySqlError
from tests.conftest import QUESTIONS, SHOP
from tests.test_field_data import make_shop

Make = Callable[[Path], Any]
"""Writes a case into a folder, and returns what `--pairs` names, if not its only file."""

CREATE = "CREATE TABLE customer (id INTEGER, name TEXT, city TEXT)"
PLAIN = [{"question": q, "query": sql} for q, sql in QUESTIONS]


def table(rows: list[Any], mark: str = ",", end: str = "\n", head: str = "question,query") -> str:
    lines = [head.replace(",", mark)]
    lines += [mark.join('"' + value.replace('"', '""') + '"' for value in row) for row in rows]
    return end.join(lines) + end


def named(question: str, query: str, **more: Any) -> list[dict[str, Any]]:
    return [{question: q, query: sql, **more} for q, sql in QUESTIONS]


def text(name: str, content: str, encoding: str = "utf-8") -> Make:
    return lambda folder: (folder / name).write_bytes(content.encode(encoding))


def raw(name: str, content: bytes) -> Make:
    return lambda folder: (folder / name).write_bytes(content)


def jsonl(rows: list[Any], name: str = "p.jsonl", encoding: str = "utf-8") -> Make:
    return text(name, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding)


def value(content: Any, name: str = "p.json") -> Make:
    return text(name, json.dumps(content))


def parquet(folder: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(PLAIN), folder / "p.parquet")


def workbook(**sheets: list[Any]) -> Make:
    def make(folder: Path) -> None:
        openpyxl = pytest.importorskip("openpyxl")
        book = openpyxl.Workbook()
        book.remove(book.active)
        for title, rows in sheets.items():
            sheet = book.create_sheet(title)
            for row in rows:
                sheet.append(list(row))
        book.save(folder / "p.xlsx")

    return make


def several(*makes: Make) -> Make:
    def make(folder: Path) -> Path:
        folder /= "folder"
        folder.mkdir()
        for one in makes:
            one(folder)
        return folder

    return make


def spider(folder: Path) -> Path:
    make_shop(folder / "spider" / "database" / "shop" / "shop.sqlite")
    rows = [row | {"db_id": "shop"} for row in PLAIN]
    for name in ("train_spider.json", "dev.json"):
        (folder / "spider" / name).write_text(json.dumps(rows))
    (folder / "spider" / "tables.json").write_text("[]")
    return folder / "spider"


def bird(folder: Path) -> Path:
    for split in ("train", "dev"):
        place = folder / "bird" / split
        make_shop(place / f"{split}_databases" / "shop" / "shop.sqlite")
        rows = named("question", "SQL", db_id="shop", evidence="a hint")
        (place / f"{split}.json").write_text(json.dumps(rows))
        (place / f"{split}_tables.json").write_text("[]")
    return folder / "bird"


def pipe(folder: Path) -> Path:
    os.mkfifo(folder / "p.csv")
    return folder / "p.csv"


def turns(who: str, said: str, human: str, model: str) -> list[Any]:
    return [
        [{who: human, said: f"Question: {q}"}, {who: model, said: f"```sql\n{sql}\n```"}]
        for q, sql in QUESTIONS
    ]


DATASETS: dict[str, Make] = {
    "csv": text("p.csv", table(QUESTIONS)),
    "csv, semicolons": text("p.csv", table(QUESTIONS, ";")),
    "csv, tabs": text("p.csv", table(QUESTIONS, "\t")),
    "csv, mark at its head": text("p.csv", table(QUESTIONS), "utf-8-sig"),
    "csv, lines of Windows": text("p.csv", table(QUESTIONS, end="\r\n")),
    "csv, Windows-1252": text("p.csv", table([("Größe?", "SELECT 'ü'"), *QUESTIONS]), "cp1252"),
    "csv, UTF-16": text("p.csv", table(QUESTIONS), "utf-16"),
    "csv, Excel's first line": text("p.csv", "sep=;\n" + table(QUESTIONS, ";")),
    "csv, packed": raw("p.csv.gz", gzip.compress(table(QUESTIONS).encode())),
    "csv, capitals": text("p.csv", table(QUESTIONS, head="Question,SQL")),
    "csv, SQL on lines": text("p.csv", table([(q, s.replace(" ", "\n")) for q, s in QUESTIONS])),
    "csv, blank lines": text("p.csv", table(QUESTIONS).replace("\n", "\n\n")),
    "csv, empty columns": text(
        "p.csv", table([(*p, "") for p in QUESTIONS], head="question,query,")
    ),
    "csv, a column of splits": text(
        "p.csv",
        table([(*p, s) for s in ("train", "dev") for p in QUESTIONS], head="question,query,split"),
    ),
    "csv, names of files": text(
        "p.csv", table([(*p, "shop.db") for p in QUESTIONS], head="question,query,db_id")
    ),
    "csv, one bad row": text("p.csv", table([*QUESTIONS, ("", "SELECT 1"), ("x", "")])),
    "csv, nl and sql": text("p.csv", table(QUESTIONS, head="nl,sql")),
    "csv, input and output": text("p.csv", table(QUESTIONS, head="input,output")),
    "csv, prompt and response": text("p.csv", table(QUESTIONS, head="prompt,response")),
    "csv, question and gold_sql": text("p.csv", table(QUESTIONS, head="question,gold_sql")),
    "tsv": text("p.tsv", table(QUESTIONS, "\t")),
    "tsv, no quotes": text("p.tsv", 'question\tquery\nSay "x"?\tSELECT \'a"b\'\nWho?\tSELECT 2\n'),
    "xlsx": workbook(Sheet=[("question", "query"), *QUESTIONS]),
    "xlsx, a title": workbook(Sheet=[("Our pairs",), (), ("Question", "SQL"), *QUESTIONS]),
    "xlsx, a sheet beside that of a split": workbook(
        Pairs=[("question", "query"), *QUESTIONS], Test=[("question", "query"), *QUESTIONS[:2]]
    ),
    "xlsx, sheets of splits": workbook(
        train=[("question", "query"), *QUESTIONS], dev=[("question", "query"), *QUESTIONS]
    ),
    "json": value(PLAIN),
    "json, wrapped": value({"data": PLAIN, "version": 1}),
    "json, by split": value({"train": PLAIN, "dev": PLAIN}),
    "json, by column": value(
        {"question": dict(enumerate(q for q, _ in QUESTIONS))}
        | {"query": dict(enumerate(s for _, s in QUESTIONS))}
    ),
    "json, by row": value(dict(enumerate(PLAIN))),
    "json, of lines": jsonl(PLAIN, "p.json"),
    "json lines": jsonl(PLAIN),
    "json lines, a list": value(PLAIN, "p.jsonl"),
    "json lines, ndjson": jsonl(PLAIN, "p.ndjson"),
    "json lines, mark at its head": jsonl(PLAIN, encoding="utf-8-sig"),
    "json lines, packed": raw(
        "p.jsonl.gz", gzip.compress(b"\n".join(json.dumps(r).encode() for r in PLAIN))
    ),
    "json lines, ids": jsonl([row | {"id": 7 * n} for n, row in enumerate(PLAIN)]),
    "json lines, one NaN": jsonl([*PLAIN, {"question": float("nan"), "query": "SELECT 1"}]),
    "json lines, one broken row": jsonl([*PLAIN, ["no", "object"]]),
    "json lines, several golds": jsonl(
        [{"question": q, "queries": [s, "SELECT 1"]} for q, s in QUESTIONS]
    ),
    "json lines, fences": jsonl(
        [{"question": q, "answer": f"```sql\n{s}\n```"} for q, s in QUESTIONS]
    ),
    "json lines, thoughts": jsonl(
        [{"question": q, "answer": f"<think>Hm.</think>\n```sql\n{s}\n```"} for q, s in QUESTIONS]
    ),
    "parquet": parquet,
    "alpaca": jsonl([{"instruction": q, "input": "", "output": s} for q, s in QUESTIONS]),
    "alpaca, a schema": jsonl(
        [{"instruction": q, "input": CREATE, "output": s} for q, s in QUESTIONS]
    ),
    "alpaca, rows in its schema": jsonl(
        [{"instruction": q, "input": SHOP, "output": s} for q, s in QUESTIONS]
    ),
    "messages": jsonl([{"messages": t} for t in turns("role", "content", "user", "assistant")]),
    "sharegpt": jsonl([{"conversations": t} for t in turns("from", "value", "human", "gpt")]),
    "prompt and completion": jsonl(
        [{"prompt": f"{CREATE};\n\nQuestion: {q}", "completion": s} for q, s in QUESTIONS]
    ),
    "sql-create-context": jsonl(
        [{"question": q, "answer": s, "context": CREATE} for q, s in QUESTIONS]
    ),
    "gretel": jsonl(named("sql_prompt", "sql", sql_context=SHOP, sql_complexity="basic")),
    "a folder of tables": several(
        text("train.csv", table(QUESTIONS)), text("dev.csv", table(QUESTIONS))
    ),
    "a folder of Excel's files": several(
        lambda folder: (
            workbook(S=[("question", "query"), *QUESTIONS])(folder),
            (folder / "p.xlsx").rename(folder / "train.xlsx"),
        )
    ),
    "spider": spider,
    "bird": bird,
}

REFUSED: dict[str, tuple[Make, str]] = {
    "no such file": (lambda folder: folder / "p.csv", "no such file or folder"),
    "empty csv": (text("p.csv", ""), "can be used|no row|holds no"),
    "only a head": (text("p.csv", "question,query\n"), "can be used|no row|holds no"),
    "no column of SQL": (
        text("p.csv", table(QUESTIONS, head="question,reply")),
        "no column 'query'",
    ),
    "a column twice": (
        text("p.csv", table(QUESTIONS, head="query,query")),
        "'query' is there twice",
    ),
    "broken json": (text("p.json", '[{"question": "a"'), "not valid JSON"),
    "json of depth": (text("p.json", "[" * 100_000), "not valid JSON"),
    "json of nothing": (text("p.json", "{}"), "must hold JSON objects"),
    "bird's predictions": (
        value({"0": "SELECT 1\t----- bird -----\tshop"}),
        "must hold JSON objects",
    ),
    "bytes": (raw("p.csv", b"\x00\x81\xff\x8d,\x00\n"), "not UTF-8 text"),
    "an image called xlsx": (raw("p.xlsx", b"\x89PNG\r\n"), "cannot be read as an Excel file"),
    "Excel's old form": (raw("p.xls", b"\xd0\xcf\x11\xe0"), "in no form that is read here"),
    "a PDF": (raw("p.pdf", b"%PDF-1.4"), "in no form that is read here"),
    "ids twice": (jsonl([row | {"id": 1} for row in PLAIN]), "both have id '1'"),
    "all are NaN": (jsonl([{"question": float("nan"), "query": "SELECT 1"}]), "no row can be used"),
    "none runs": (
        text("p.csv", table([("a", "SELECT nope"), ("b", "DROP TABLE sale")])),
        "none of 2 pairs can be used",
    ),
    "numbers": (jsonl([{"question": 1, "query": 2}]), "no row can be used"),
    "another database": (
        jsonl([row | {"db_id": f"bank{n}"} for n, row in enumerate(PLAIN)]),
        "can be used",
    ),
    "cut off": (raw("p.csv.gz", gzip.compress(table(QUESTIONS).encode())[:60]), "cannot be read"),
    "an open quote": (text("p.csv", 'question,query\n"a,b\nc,d\n'), "a quote that opens there"),
    "an empty folder": (several(), "in no known form"),
    "a pipe": (pipe, "is a pipe or device"),
    "parquet that is none": (raw("p.parquet", b"PAR1"), "cannot be read as Parquet"),
}


def run(make: Make, tmp_path: Path) -> dict[str, Any]:
    place = tmp_path / "given"
    place.mkdir()
    made = make(place)
    pairs = made if isinstance(made, Path) else next(place.iterdir())
    words = ["--pairs", str(pairs), "--output_dir", str(tmp_path), "--evaluate.processes", "1"]
    words += ["--cache_dir", str(tmp_path / "cache")]
    brings = any("database" in path.name for path in place.rglob("*"))
    if not brings:
        words += ["--url", str(make_shop(tmp_path / "shop.db"))]
    return prepare(load(PrepareConfig, words))


def test_there_are_sixty() -> None:
    assert len(DATASETS) + len(REFUSED) >= 60


@pytest.mark.parametrize("case", DATASETS)
def test_a_file_becomes_a_dataset(case: str, tmp_path: Path) -> None:
    record = run(DATASETS[case], tmp_path)
    good = 2 if case == "tsv, no quotes" else len(QUESTIONS)
    kept = sum(record["counts"].get(split, 0) for split in ("train", "dev"))
    assert kept >= good
    assert (tmp_path / "dataset" / "report.html").is_file()


@pytest.mark.parametrize("case", REFUSED)
def test_a_file_is_refused_in_one_line(case: str, tmp_path: Path) -> None:
    make, reason = REFUSED[case]
    with pytest.raises(RaySqlError, match=reason) as caught:
        run(make, tmp_path)
    assert "\n" not in str(caught.value) and "--dataset_id" not in str(caught.value)
    assert not (tmp_path / "dataset").exists()
