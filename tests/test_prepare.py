"""Raw pairs and a database become a dataset's folder, which every other job reads as it is."""

from __future__ import annotations

import csv
import json
import re
import shutil
import sqlite3
import unicodedata
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import yaml

from ray_sql import evaluate, finetune
from ray_sql.cli import main
from ray_sql.config import Config, EvaluateConfig, PrepareConfig, load
from ray_sql.curate import prepare
from ray_sql.errors import ConfigError, DataError, StoreError
from ray_sql.store.run_folder import RunFolder
from tests.conftest import QUESTIONS
from tests.test_field_data import make_shop

BAD = [
    ("How many clients?", "SELECT COUNT(*) FROM custmer", "no such table: custmer"),
    ("First client?", "SELECT TOP 1 name FROM customer ORDER BY id", "syntax error"),
    ("Which city?", "SELECT citty FROM customer", "no such column: citty"),
    ("Curled?", "SELECT name FROM customer WHERE city = ‘Lisbon’", "no such column"),
    ("Delete?", "DELETE FROM customer", "refused"),
    ("Nothing?", "", "query is empty"),
]


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """Return a spreadsheet's CSV beside a database: good pairs, many alike, and bad ones."""
    make_shop(tmp_path / "shop.db")
    numbered = [
        (
            f"How many products cost more than {n}?",
            f"SELECT COUNT(*) FROM product WHERE price > {n}",
        )
        for n in range(10)
    ]
    rows = [*QUESTIONS, *numbered, *[(q, sql) for q, sql, _ in BAD], QUESTIONS[0]]
    with (tmp_path / "pairs.csv").open("w", newline="") as file:
        writer = csv.writer(file, delimiter=";")
        writer.writerows([("Question", "SQL"), *rows])
    return tmp_path / "pairs.csv"


def settings(pairs: Path, *more: str) -> PrepareConfig:
    folders = [
        "--output_dir",
        str(pairs.parent / "out"),
        "--cache_dir",
        str(pairs.parent / "cache"),
    ]
    url = ["--url", str(pairs.parent / "shop.db")]
    return load(PrepareConfig, ["--pairs", str(pairs), *url, *folders, *more])


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_good_pairs_are_kept_and_bad_ones_named(
    pairs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = prepare(settings(pairs))
    folder = pairs.parent / "out" / "dataset"
    assert {path.name for path in folder.iterdir()} >= {
        *("train.jsonl", "dev.jsonl", "databases", "rejected.jsonl", "audit.json"),
        *("report.html", "dataset.json"),
    }
    counts = record["counts"]
    assert counts["train"] + counts["dev"] == len(QUESTIONS) + 10
    assert counts["rejected"] == len(BAD) + 1
    rejected = {row.get("question", ""): row for row in lines(folder / "rejected.jsonl")}
    for question, _, reason in BAD[:-1]:
        assert reason in rejected[question]["reason"], question
    assert rejected[BAD[0][0]]["fix"] == "SELECT COUNT(*) FROM customer"
    assert rejected[BAD[1][0]]["fix"].endswith("LIMIT 1")
    assert rejected[BAD[1][0]]["fix_how"] == "written for tsql"
    assert rejected[BAD[3][0]]["fix_how"] == "quotes"
    assert "is the same pair as" in rejected[QUESTIONS[0][0]]["reason"]
    assert f"{pairs}, line 20" in rejected[BAD[0][0]]["place"]
    said = capsys.readouterr().out
    assert "columns: query ← SQL" in said or "question ← Question" in said
    assert "--fix would take" in said and "next      ray-sql finetune" in said


def test_near_duplicates_stay_on_one_side(pairs: Path) -> None:
    prepare(settings(pairs, "--data.test_fraction", "0.4"))
    folder = pairs.parent / "out" / "dataset"
    sides = {
        split: [row for row in lines(folder / f"{split}.jsonl") if "cost more" in row["question"]]
        for split in ("train", "dev")
    }
    assert sorted(map(len, sides.values())) in ([0, 10], [0, 11])
    assert lines(folder / "dev.jsonl")
    audit = json.loads((folder / "audit.json").read_text())
    assert "near_duplicate" not in audit["counts"]


def test_pairs_that_differ_in_a_quoted_text_stay_on_one_side(pairs: Path) -> None:
    asked = ("Which clients live in {}?", "Who is from {}?", "List everybody of {}", "{}: names?")
    queries = [
        (asked[n % 4].format(city), f'SELECT name FROM customer WHERE "city" = "{city}"')
        for n, city in enumerate(("Lisbon", "Porto", "Faro", "Braga", "Coimbra", "Aveiro"))
    ]
    other = ("Cheapest product?", "SELECT MIN(price) FROM product")
    with pairs.open("w", newline="") as file:
        csv.writer(file, delimiter=";").writerows([("Question", "SQL"), *queries, other])
    prepare(settings(pairs, "--data.test_fraction", "0.2"))
    folder = pairs.parent / "out" / "dataset"
    assert [row["question"] for row in lines(folder / "dev.jsonl")] == [other[0]]


def test_the_smallest_group_is_set_aside_where_all_are_large(pairs: Path) -> None:
    alike = [
        (f"How many {what} over {n}?", f"SELECT COUNT(*) FROM {table} WHERE id > {n}")
        for what, table, count in (("products", "product", 5), ("clients", "customer", 3))
        for n in range(count)
    ]
    with pairs.open("w", newline="") as file:
        csv.writer(file, delimiter=";").writerows([("Question", "SQL"), *alike])
    assert (
        prepare(settings(pairs))["counts"] | {"dev": 3, "train": 5}
        == (prepare(settings(pairs))["counts"])
    )


def test_the_only_file_of_a_folder_is_divided(
    pairs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = pairs.parent / "mine"
    folder.mkdir()
    inside = pairs.rename(folder / "questions.csv")
    words = ["--pairs", str(folder), "--url", str(pairs.parent / "shop.db")]
    words += ["--output_dir", str(pairs.parent / "out"), "--cache_dir", str(pairs.parent / "cache")]
    record = prepare(load(PrepareConfig, words))
    assert record["splits"] == ["train", "dev"] and inside.is_file()
    said = capsys.readouterr().out
    assert "questions: the only file of the folder, divided here" in said
    assert "next      ray-sql finetune" in said


def test_another_gold_that_does_not_run_is_not_mended_by_changing_the_first(pairs: Path) -> None:
    file = pairs.with_suffix(".jsonl")
    two = ["select count(*) from customer", "select count(id) from custmer"]
    rows = [{"question": q, "query": sql} for q, sql in QUESTIONS] + [
        {"question": "How many clients are there?", "queries": two}
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepare(settings(file, "--fix"))
    (rejected,) = lines(pairs.parent / "out" / "dataset" / "rejected.jsonl")
    assert rejected["query"] == two[0] and "another of its queries" in rejected["reason"]
    assert "fix" not in rejected


def test_a_mended_query_is_judged_as_the_others(pairs: Path) -> None:
    with pairs.open("a") as file:
        file.write("Nobody?;SELECT name FROM custmer WHERE id < 0\n")
    prepare(settings(pairs, "--fix", "--reject", "does_not_run,empty"))
    rejected = lines(pairs.parent / "out" / "dataset" / "rejected.jsonl")
    (nobody,) = [row for row in rejected if row.get("question") == "Nobody?"]
    assert nobody["reason"].startswith("empty") and nobody["fix"].endswith("WHERE id < 0")


def test_no_nearest_query_is_tried_for_one_that_took_too_much(pairs: Path) -> None:
    rows = "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n) SELECT count(*) FROM n"
    with pairs.open("a") as file:
        file.write(f"Endless?;{rows}\n")
    prepare(settings(pairs, "--evaluate.timeout", "0.5"))
    rejected = lines(pairs.parent / "out" / "dataset" / "rejected.jsonl")
    (endless,) = [row for row in rejected if row.get("question") == "Endless?"]
    assert "timeout" in endless["reason"] and "fix" not in endless


def test_what_is_known_of_tables_is_in_the_template(pairs: Path) -> None:
    known = {"shop": {"customer": {"description": "who bought once", "columns": {"city": "home"}}}}
    (pairs.parent / "descriptions.yaml").write_text(yaml.safe_dump(known))
    prepare(settings(pairs))
    template = pairs.parent / "out" / "dataset" / "descriptions.yaml"
    customer = yaml.safe_load(template.read_text())["shop"]["customer"]
    assert customer["description"] == "who bought once" and customer["columns"]["city"] == "home"
    assert customer["columns"]["name"] == ""


def test_a_score_of_few_questions_is_said_to_tell_little(
    pairs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for more in ([], ["--data.test_fraction", "0.9"]):
        few = prepare(settings(pairs, *more))["counts"]["dev"]
        said = capsys.readouterr().out
        assert f"a score of {few} questions is known to ±" in said


def test_fixes_are_taken_where_they_are_asked_for(pairs: Path) -> None:
    record = prepare(settings(pairs, "--fix"))
    folder = pairs.parent / "out" / "dataset"
    assert record["counts"]["fixed"] == 4
    assert record["counts"]["rejected"] == len(BAD) + 1 - 4
    fixed = json.loads((folder / "audit.json").read_text())["fixed"]
    assert {one["before"] for one in fixed} == {sql for _, sql, _ in BAD[:4]}


def test_flagged_pairs_are_kept_or_rejected_as_asked(pairs: Path) -> None:
    with pairs.open("a") as file:
        file.write("Cheapest?;SELECT 1\n")
    record = prepare(settings(pairs))
    assert record["counts"]["flagged"] >= 1
    again = prepare(settings(pairs, "--reject", "does_not_run,constant"))
    assert again["counts"]["rejected"] > record["counts"]["rejected"]
    with pytest.raises(ConfigError, match="--reject constnt: no such kind"):
        prepare(settings(pairs, "--reject", "constnt"))


def test_a_dry_run_writes_nothing(pairs: Path) -> None:
    prepare(settings(pairs, "--dry_run"))
    assert not (pairs.parent / "out").exists()


def test_the_folder_is_its_own_or_is_left_alone(pairs: Path) -> None:
    folder = pairs.parent / "out" / "dataset"
    folder.mkdir(parents=True)
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(StoreError, match="exists, and is no dataset of ray-sql prepare"):
        prepare(settings(pairs))
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]
    (folder / "notes.txt").unlink()

    first = prepare(settings(pairs))
    offered = yaml.safe_load((folder / "descriptions.yaml").read_text())
    assert offered and all(tables for tables in offered.values())
    (folder / "descriptions.yaml").write_text("mine")
    assert prepare(settings(pairs)) == first
    assert (folder / "descriptions.yaml").read_text() == "mine"
    other = pairs.rename(pairs.with_name("other.csv"))
    with pytest.raises(StoreError, match="holds a dataset of other sources"):
        prepare(settings(other))
    assert prepare(settings(other, "--overwrite"))["counts"] == first["counts"]


def test_a_folder_that_was_not_finished_is_refused_and_made_again(pairs: Path) -> None:
    prepare(settings(pairs))
    folder = pairs.parent / "out" / "dataset"
    record = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps(record | {"finished": False}))
    predictions = pairs.parent / "p.sql"
    predictions.write_text("SELECT 1\n")
    words = ["--dataset_id", str(folder), "--predictions_file", str(predictions)]
    with pytest.raises(DataError, match="was not written to its end"):
        evaluate.run(load(EvaluateConfig, [*words, "--output_name", "x"]))
    prepare(settings(pairs))
    assert json.loads((folder / "dataset.json").read_text())["finished"]


def test_the_other_jobs_read_the_folder(pairs: Path, make_config: Any, tmp_path: Path) -> None:
    prepare(settings(pairs, "--data.test_fraction", "0.3"))
    folder = pairs.parent / "out" / "dataset"
    (pairs.parent / "shop.db").unlink()  # the folder has its own copy
    gold = lines(folder / "dev.jsonl")
    predictions = tmp_path / "gold.jsonl"
    rows = [{"id": row["id"], "predicted": row["query"]} for row in gold]
    predictions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--dataset_id", str(folder), "--predictions_file", str(predictions)]
    words += ["--output_name", "gold", "--output_dir", str(tmp_path / "out")]
    scores = evaluate.run(load(EvaluateConfig, words))["file"]["dev"]
    assert scores["execution_accuracy"] == 1.0 and scores["n"] == len(gold) > 0

    config: Config = make_config(dataset_id=str(folder), data={"validation_fraction": 0})
    finetune.dry_run(config)


def test_databases_in_a_folder_are_divided_whole(tmp_path: Path) -> None:
    rows = []
    for name in ("a", "b", "c", "d", "e"):
        make_shop(tmp_path / "dbs" / f"{name}.sqlite3")
        rows += [{"db_name": name, "nl": q, "output": sql} for q, sql in QUESTIONS]
    rows.append({"db_name": "zzz", "nl": "Who?", "output": "SELECT 1"})
    file = tmp_path / "pairs.json"
    file.write_text(json.dumps(rows))
    words = ["--pairs", str(file), "--url", str(tmp_path / "dbs"), "--output_name", "many"]
    words += ["--output_dir", str(tmp_path), "--data.test_fraction", "0.2"]
    record = prepare(load(PrepareConfig, words))
    assert record["divided"] == "by database"
    assert (record["counts"]["train"], record["counts"]["dev"]) == (32, 8)
    train, dev = (
        {row["db_id"] for row in lines(tmp_path / "many" / f"{s}.jsonl")} for s in ("train", "dev")
    )
    assert not train & dev
    (lost,) = lines(tmp_path / "many" / "rejected.jsonl")
    assert lost["reason"].startswith("unknown database 'zzz'; there are a, b, c, d, e")


def test_splits_that_are_there_stay_and_what_they_share_is_flagged(tmp_path: Path) -> None:
    make_shop(tmp_path / "p" / "shop.sqlite")
    for split, rows in (
        ("train", QUESTIONS),
        ("dev", [("Please, how many customers?", "SELECT 4")]),
    ):
        text = "".join(json.dumps({"question": q, "sql": sql}) + "\n" for q, sql in rows)
        (tmp_path / "p" / f"{split}.jsonl").write_text(text)
    words = ["--pairs", str(tmp_path / "p"), "--output_dir", str(tmp_path / "out")]
    record = prepare(load(PrepareConfig, words))
    assert record["divided"] == "as they came" and record["counts"]["dev"] == 1
    audit = json.loads((tmp_path / "out" / "dataset" / "audit.json").read_text())
    assert audit["counts"] == {"near_duplicate": 2, "constant": 1}


@pytest.mark.parametrize(
    "name",
    [
        *("a,b", "a/b", "a\\b", "..", ".hidden", "-x", "[a]", '"a"', "a\nb", "a:b", "null", "TRUE"),
        *("rejected", "audit", "dataset", "shop_tables", "train_others", "x-00000-of-00002"),
        *("x" * 101, "ü" * 60, "CON", "con.x", "com¹", "nul .a.b", "conin$", "end."),
    ],
)
def test_a_split_that_would_be_lost_by_its_name_is_refused(pairs: Path, name: str) -> None:
    rows = [(*pair, split) for pair, split in zip(QUESTIONS, cycle(["train", name]))]
    with pairs.open("w", newline="") as file:
        csv.writer(file).writerows([("question", "sql", "split"), *rows])
    with pytest.raises(DataError) as caught:
        prepare(settings(pairs))
    named = f"{pairs}, line 3: column split holds {name.lower()[:60]!r}; "
    assert str(caught.value).startswith(named) and "write another there" in str(caught.value)
    assert not (pairs.parent / "out").exists()


def test_files_whose_names_cannot_be_splits_are_to_be_renamed(pairs: Path) -> None:
    folder = pairs.parent / "asked"
    folder.mkdir()
    odd = pairs.rename(folder / "export [2024], new.csv")
    record = prepare(settings(folder))
    assert record["splits"] == ["train", "dev"], "a file alone is divided, whatever its name"
    for other, lost in (("dev.csv", odd), ("DEV.csv", folder / "dev.csv")):
        if (folder / other).exists():
            continue  # this file system does not tell cases apart
        shutil.copy(odd, folder / other)
        with pytest.raises(DataError, match=re.escape(f"{lost}, line ")) as caught:
            prepare(settings(folder, "--overwrite"))
        assert "rename it" in str(caught.value)
        reason = "it differs from 'DEV' in case alone, and on some systems both are one file"
        assert other == "dev.csv" or reason in str(caught.value)
        odd = odd.rename(folder / "train.csv")


def test_files_that_differ_in_case_from_what_training_looks_for_are_to_be_renamed(
    pairs: Path,
) -> None:
    folder = pairs.parent / "asked"
    folder.mkdir()
    for name in ("Train.csv", "test.csv"):
        shutil.copy(pairs, folder / name)
    way_out = "training looks for 'train', which differs in case alone; rename it, such as train"
    with pytest.raises(DataError, match=re.escape(f"gives split 'Train'; {way_out}")):
        prepare(settings(folder))


def test_splits_whose_letters_are_composed_otherwise_are_one(pairs: Path) -> None:
    names = [unicodedata.normalize(form, "café") for form in ("NFC", "NFD")]
    rows = [(*pair, split) for pair, split in zip(QUESTIONS, cycle(["train", *names]))]
    with pairs.open("w", newline="") as file:
        csv.writer(file).writerows([("question", "sql", "split"), *rows])
    with pytest.raises(DataError, match="in how its letters are composed alone"):
        prepare(settings(pairs))


@pytest.mark.parametrize("db_id", ["../../../lost", "a/b", "con", "shop."])
def test_a_database_is_copied_into_a_folder_of_its_own(pairs: Path, db_id: str) -> None:
    with pairs.open("w", newline="") as file:
        rows = [("question", "sql", "db_id"), *((*pair, db_id) for pair in QUESTIONS)]
        csv.writer(file).writerows(rows)
    called = f"{pairs}, line 2: its database is called {db_id!r}, which cannot name the folder"
    with pytest.raises(DataError, match=re.escape(called)):
        prepare(settings(pairs))
    assert not [*pairs.parent.rglob("lost*")] and not (pairs.parent / "out").exists()
    place = RunFolder("/runs/one").database(db_id)
    folder, _, name = place.rpartition("/")
    assert folder == RunFolder("/runs/one").database("shop").removesuffix("/shop.sqlite")
    assert "\\" not in name


def test_counts_tell_a_split_from_pairs_of_that_kind(pairs: Path) -> None:
    names = ["train", "fixed", "flagged", "databases"]
    rows = [(*pair, split) for pair, split in zip(QUESTIONS, cycle(names))]
    with pairs.open("w", newline="") as file:
        csv.writer(file).writerows([("question", "sql", "split"), *rows])
    counts = prepare(settings(pairs))["counts"]
    sizes = [counts["train"], *[counts[f"split {name}"] for name in names[1:]]]
    assert sum(sizes) == len(QUESTIONS) and (counts["fixed"], counts["databases"]) == (0, 1)


def test_a_split_that_the_pairs_name_no_more_is_gone(pairs: Path) -> None:
    for names, files in ((("train", "test"), {"train", "test"}), (("", ""), {"train", "dev"})):
        rows = [(*pair, names[n % 2]) for n, pair in enumerate(QUESTIONS)]
        with pairs.open("w", newline="") as file:
            csv.writer(file).writerows([("question", "sql", "split"), *rows])
        prepare(settings(pairs, "--data.test_fraction", "0.3"))
        written = {path.stem for path in (pairs.parent / "out" / "dataset").glob("*.jsonl")}
        assert written == files | {"rejected"}


def test_a_database_that_is_written_meanwhile_is_copied_whole(pairs: Path) -> None:
    writer = sqlite3.connect(pairs.parent / "shop.db")
    writer.execute("PRAGMA journal_mode = WAL")
    writer.execute("INSERT INTO customer VALUES (9, 'Eve', 'Faro')")
    writer.commit()
    prepare(settings(pairs))
    writer.close()
    copy = pairs.parent / "out" / "dataset" / "databases" / "shop" / "shop.sqlite"
    connection = sqlite3.connect(copy)
    assert connection.execute("SELECT name FROM customer WHERE id = 9").fetchall() == [("Eve",)]
    assert connection.execute("PRAGMA journal_mode").fetchone() == ("delete",)
    connection.close()


def test_one_line_for_what_cannot_be_used(pairs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs.write_text("question,query\nWho?,SELECT nobody\n")
    url = str(pairs.parent / "shop.db")
    with pytest.raises(SystemExit):
        main("prepare", [str(pairs), "--url", url, "--output_dir", str(pairs.parent / "out")])
    error = capsys.readouterr().err
    assert error.startswith(
        f"error: --pairs {pairs}: none of 1 pair can be used: {pairs}, line 2: "
    )
    assert not (pairs.parent / "out").exists()
    with pytest.raises(SystemExit):
        main("prepare", [str(pairs), "--url", "none.db"])
    assert capsys.readouterr().err.startswith("error: --url none.db: no such file or folder")
