"""Scores come from the databases and foreign keys that the dataset means, through the command."""

import json
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from ray_sql import data, evaluate
from ray_sql.config import Config, EvaluateConfig, load
from ray_sql.database import Schema, reflect, render
from ray_sql.store.run_folder import RunFolder

Row = dict[str, Any]
Pairs = list[tuple[str, str]]

SCHOOL = """
    CREATE TABLE pupil (id INTEGER PRIMARY KEY, name TEXT, age INTEGER);
    CREATE TABLE loan (pupil_id INTEGER{keys}, book TEXT);
    INSERT INTO pupil VALUES (1, 'Ada', 9), (2, 'Bo', 11);
    INSERT INTO loan VALUES (1, 'Maps'), (1, 'Stars'), (2, 'Maps');
"""
DECLARED = " REFERENCES pupil (id)"
BY_LOAN = "SELECT T1.id FROM pupil AS T1 JOIN loan AS T2 ON T1.id = T2.pupil_id"
BY_PUPIL = BY_LOAN.replace("T1.id FROM", "T2.pupil_id FROM")


def database(file: Path, script: str) -> Path:
    """Make a SQLite file from a script."""
    file.parent.mkdir(parents=True, exist_ok=True)
    connection = sqlite3.connect(file)
    connection.executescript(script)
    connection.close()
    return file


def tables_entry(schema: Schema, keys: Pairs) -> Row:
    """Return a schema as tables.json lists it, with foreign keys as pairs of "table.column"."""
    columns = [[-1, "*"]]
    for place, table in enumerate(schema.tables):
        columns += [[place, column.name] for column in table.columns]
    names = [f"{schema.tables[table].name}.{name}" for table, name in columns]
    return {
        "db_id": schema.db_id,
        "table_names_original": list(schema.table_names),
        "column_names_original": columns,
        "column_types": ["text"] * len(columns),
        "primary_keys": [],
        "foreign_keys": [[names.index(name), names.index(ref)] for name, ref in keys],
    }


def spider(folder: Path, script: str, golds: list[str], keys: Pairs) -> Path:
    """Make a dataset in Spider's layout: one database `school`, its questions for train and dev."""
    file = database(folder / "database" / "school" / "school.sqlite", script)
    entry = tables_entry(reflect(file, "school"), keys)
    (folder / "tables.json").write_text(json.dumps([entry]))
    rows = [{"db_id": "school", "question": f"q{n}", "query": sql} for n, sql in enumerate(golds)]
    for name in ("train_spider.json", "dev.json"):
        (folder / name).write_text(json.dumps(rows))
    return folder


def run_in(tmp_path: Path) -> list[str]:
    """Return the flags of a run that needs no model."""
    where = ["--output_name", "e", "--output_dir", str(tmp_path / "out")]
    return [*where, "--model_name", "demo", "--task_type", "sql"]


def score(
    folder: Path, tmp_path: Path, predicted: list[str], *flags: str, split: str = "dev"
) -> tuple[Row, list[Row]]:
    """Score predictions by `ray-sql evaluate`; return the scores of a split and the judged rows."""
    file = tmp_path / "p.sql"
    file.write_text("".join(f"{sql}\n" for sql in predicted))
    settings = ["--dataset_id", str(folder), "--predictions_file", str(file), "--split", split]
    config = load(EvaluateConfig, [*settings, *run_in(tmp_path), *flags])
    metrics = evaluate.run(config)
    rows = RunFolder(config.run_dir).read_predictions("file") if metrics else []
    return metrics.get("file", {}).get(split, {}), rows


@pytest.mark.kind("foreign keys of tables.json")
@pytest.mark.parametrize(
    ("declared", "listed", "matches"),
    [
        ("", [], False),
        (DECLARED, [], False),
        ("", [("loan.pupil_id", "pupil.id")], True),
        (DECLARED, [("loan.pupil_id", "pupil.id")], True),
    ],
)
def test_exact_set_match_merges_the_columns_that_tables_json_joins(
    declared: str, listed: Pairs, matches: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = spider(tmp_path / "data", SCHOOL.format(keys=declared), [BY_LOAN], listed)
    scores, _ = score(folder, tmp_path, [BY_PUPIL])
    assert (scores["execution_accuracy"], scores["exact_set_match"]) == (1.0, float(matches))
    said = "foreign keys" in capsys.readouterr().out
    assert said is (bool(declared) != bool(listed))


@pytest.mark.kind("foreign keys of tables.json")
def test_without_tables_json_the_keys_of_the_database_count(tmp_path: Path) -> None:
    folder = spider(tmp_path / "data", SCHOOL.format(keys=DECLARED), [BY_LOAN], [])
    (folder / "tables.json").unlink()
    scores, _ = score(folder, tmp_path, [BY_PUPIL])
    assert scores["exact_set_match"] == 1.0


@pytest.mark.kind("foreign keys of tables.json")
@pytest.mark.parametrize("declared", ["", DECLARED])
@pytest.mark.parametrize("listed", [[], [("loan.pupil_id", "pupil.id")]])
def test_prompts_show_the_keys_of_both_once(declared: str, listed: Pairs, tmp_path: Path) -> None:
    folder = spider(tmp_path / "data", SCHOOL.format(keys=declared), [BY_LOAN], listed)
    config = load(Config, ["--dataset_id", str(folder), *run_in(tmp_path)])
    corpus = data.load_split(config, ["dev"])
    shown = render(corpus.schemas["school"], "ddl").count("REFERENCES")
    assert shown == int(bool(declared or listed))


OTHER = "CREATE TABLE pupil (id INTEGER PRIMARY KEY, nickname TEXT); CREATE TABLE old (x);"
GOLDS = ["SELECT name FROM pupil WHERE age > 10", "SELECT count(*) FROM loan", BY_LOAN]
STRANGERS = {
    "another schema": OTHER,
    "a table more": SCHOOL.format(keys="") + "CREATE TABLE note (id INTEGER);",
    "a table less": "CREATE TABLE pupil (id INTEGER PRIMARY KEY, name TEXT, age INTEGER);",
    "columns in another order": SCHOOL.format(keys="")
    .replace("id INTEGER PRIMARY KEY, name TEXT", "name TEXT, id INTEGER PRIMARY KEY")
    .replace("(1, 'Ada', 9), (2, 'Bo', 11)", "('Ada', 1, 9), ('Bo', 2, 11)"),
    "no table": "",
}


@pytest.mark.kind("files beside a database")
@pytest.mark.parametrize("stranger", STRANGERS)
def test_a_stray_file_beside_a_database_is_no_test_suite(
    stranger: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = spider(tmp_path / "data", SCHOOL.format(keys=""), GOLDS, [])
    backup = database(folder / "database" / "school" / "school_backup.sqlite", STRANGERS[stranger])
    scores, rows = score(folder, tmp_path, [*GOLDS[:2], "SELECT id FROM pupil"])
    assert (scores["n"], scores["correct"], scores["gold_errors"]) == (3, 2, 0)
    assert [row["verdict"] for row in rows] == ["correct", "correct", "wrong"]
    assert f"school/{backup.name}" in " ".join(capsys.readouterr().out.split())


@pytest.mark.kind("files beside a database")
@pytest.mark.parametrize("content", [b"", b"no database at all", b"SQLite format 3\0" + b"\0" * 90])
def test_a_file_beside_a_database_that_is_none_is_named(
    content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = spider(tmp_path / "data", SCHOOL.format(keys=""), GOLDS, [])
    (folder / "database" / "school" / "copy.sqlite").write_bytes(content)
    scores, _ = score(folder, tmp_path, GOLDS)
    assert (scores["n"], scores["execution_accuracy"]) == (3, 1.0)
    assert "school/copy.sqlite" in capsys.readouterr().out


@pytest.mark.kind("files beside a database")
def test_a_file_of_the_same_schema_is_a_test_suite_and_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = spider(tmp_path / "data", SCHOOL.format(keys=""), GOLDS, [])
    script = SCHOOL.format(keys="").replace("'Bo', 11", "'Bo', 8").replace("TEXT", "text")
    database(folder / "database" / "school" / "school_2.sqlite", script)
    lucky = ["SELECT 'Bo'", *GOLDS[1:]]
    scores, rows = score(folder, tmp_path, lucky)
    assert [row["verdict"] for row in rows] == ["wrong", "correct", "correct"]
    said = " ".join(capsys.readouterr().out.split())
    assert "test suites: answers on 1 of 1 databases" in said and "school/school_2.sqlite" in said
    scores, _ = score(folder, tmp_path, lucky, "--evaluate.semantics", "bird")
    assert (scores["correct"], scores["n"]) == (3, 3)
    assert "suite" not in capsys.readouterr().out


@pytest.mark.kind("files beside a database")
@pytest.mark.parametrize("semantics", ["spider", "bird"])
def test_the_dry_run_names_what_the_scoring_will_do(
    semantics: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = spider(tmp_path / "data", SCHOOL.format(keys=""), GOLDS, [])
    database(folder / "database" / "school" / "school_backup.sqlite", OTHER)
    score(folder, tmp_path, GOLDS, "--evaluate.semantics", semantics, "--dry_run")
    said = "school/school_backup.sqlite" in " ".join(capsys.readouterr().out.split())
    assert said is (semantics == "spider")
