"""The audit finds golds whose result is empty, open or by chance, by running them."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from benchmarks.curation import PLANTED, STORE
from ray_sql import evaluate
from ray_sql.cli import main
from ray_sql.config import AuditConfig, EvaluateConfig, load
from ray_sql.curate import Subject, bench, examine
from ray_sql.database import Executor, reflect
from ray_sql.errors import DataError
from ray_sql.evaluate.audit import audit

SOUND = (
    "SELECT name FROM item",
    "SELECT count(*) FROM item",
    "SELECT name FROM item ORDER BY price DESC LIMIT 2",
    "SELECT name FROM item WHERE age = (SELECT max(age) FROM item)",
    "SELECT shelf, count(*) FROM item GROUP BY shelf",
    "SELECT avg(age) FROM item",
    "SELECT name FROM item ORDER BY CAST(size AS INTEGER)",
    "SELECT name FROM item WHERE name <> 'now' AND name <> 'random() today'",
    "SELECT word FROM note WHERE word = 'RED'",
    "SELECT item_id FROM red",
    "SELECT v FROM code ORDER BY k LIMIT 1",
    "SELECT rowid FROM item WHERE name = 'desk'",
    "SELECT shelf FROM item UNION SELECT word FROM note ORDER BY 1 LIMIT 1",
    "SELECT name AS n FROM item WHERE size = '9' ORDER BY n",
    # which of the tied shelves the inner query keeps does not matter
    "SELECT count(*) FROM item WHERE shelf = (SELECT shelf FROM item GROUP BY shelf "
    "ORDER BY count(*) DESC LIMIT 1)",
    "SELECT id FROM part WHERE length = 'null' OR length > 'a'",
)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("store") / "store.sqlite"
    connection = sqlite3.connect(file)
    connection.executescript(STORE)
    connection.close()
    return file


def kinds(store: Path, *queries: str) -> list[list[str]]:
    schema = reflect(store, "store")
    with Executor(1) as executor, bench(executor, [store], lambda done, total: None) as tried:
        assert tried.copies_of(store).left_out == ()
        return [
            [flag.kind for flag in examine(tried, Subject(store, sql, schema))] for sql in queries
        ]


def test_planted_faults_are_found(store: Path) -> None:
    found = kinds(store, *PLANTED)
    missed = {
        sql: flags for sql, flags in zip(PLANTED, found, strict=True) if PLANTED[sql] not in flags
    }
    assert not missed


def test_sound_queries_are_not_flagged(store: Path) -> None:
    found = dict(zip(SOUND, kinds(store, *SOUND), strict=True))
    assert not {sql: flags for sql, flags in found.items() if flags}


def test_the_database_and_its_folder_stay_as_they_are(store: Path) -> None:
    before = store.read_bytes(), sorted(store.parent.iterdir())
    kinds(store, "SELECT name FROM item ORDER BY age LIMIT 1")
    assert (store.read_bytes(), sorted(store.parent.iterdir())) == before


def write_pairs(store: Path, folder: Path) -> Path:
    rows = [
        ("Which items?", "SELECT name FROM item"),
        ("Which is the oldest?", "SELECT name FROM item ORDER BY age DESC LIMIT 1"),
        ("How many?", "SELECT count(*) FROM item"),
    ]
    lines = [json.dumps({"question": q, "query": sql}) for q, sql in rows]
    folder.mkdir(exist_ok=True)
    (folder / "dev.jsonl").write_text("\n".join(lines))
    train = {"question": "Please list all items", "query": "SELECT name FROM item"}
    (folder / "train.jsonl").write_text(json.dumps(train))
    (folder / "store.sqlite").write_bytes(store.read_bytes())
    return folder


def options(tmp_path: Path, *more: str) -> list[str]:
    return [*more, "--output_dir", str(tmp_path / "out"), "--cache_dir", str(tmp_path / "cache")]


def test_a_dataset_is_audited_and_scored_without_what_is_flagged(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_pairs(store, tmp_path / "data")
    words = options(tmp_path, "--dataset_id", str(folder), "--output_name", "a")
    main("audit", words)
    said = capsys.readouterr().out
    assert "2 of 4 queries are flagged" in said or "3 of 4 queries are flagged" in said
    found = json.loads((tmp_path / "out" / "a" / "audit.json").read_text())
    by_id = {
        (one["split"], one["id"]): {f["kind"] for f in one["flags"]} for one in found["questions"]
    }
    assert by_id["dev", "1"] == {"limit_tie"}
    assert by_id["dev", "0"] == by_id["train", "0"] == {"near_duplicate"}

    predictions = tmp_path / "p.sql"
    predictions.write_text("SELECT name FROM item\nSELECT 'desk'\nSELECT 4\n")
    words = options(tmp_path, "--dataset_id", str(folder), "--predictions_file", str(predictions))
    words += ["--output_name", "s", "--audit", str(tmp_path / "out" / "a" / "audit.json")]
    scores = evaluate.run(load(EvaluateConfig, words))["file"]["dev"]
    assert scores["flagged"] == 2
    assert scores["unflagged"]["n"] == 1 and scores["unflagged"]["correct"] == 0
    assert (scores["undetermined"], scores["determined"]["n"]) == (1, 2)
    assert scores["n"] == 3
    said = capsys.readouterr().out
    assert "without the 2 questions whose gold the audit flags" in said
    assert "without the 1 of them whose gold has several right results" in said

    (tmp_path / "none.json").write_text(json.dumps(found | {"questions": []}))
    words = [*words[:-3], "t", "--audit", str(tmp_path / "none.json")]
    assert evaluate.run(load(EvaluateConfig, words))["file"]["dev"]["flagged"] == 0
    assert "whose gold" not in capsys.readouterr().out


def test_predictions_are_audited(store: Path, tmp_path: Path) -> None:
    folder = write_pairs(store, tmp_path / "data")
    (tmp_path / "p.sql").write_text(
        "SELECT nam FROM item\nSELECT 'desk'\nSELECT count(*) FROM item\n"
    )
    words = ["--dataset_id", str(folder), "--split", "dev", "--output_name", "p"]
    words = options(tmp_path, *words, "--predictions_file", str(tmp_path / "p.sql"))
    found = audit(load(AuditConfig, words))
    assert [one["flags"][0]["kind"] for one in found["questions"]] == ["does_not_run", "constant"]
    with pytest.raises(DataError, match="is no audit of gold queries"):
        evaluate.run(
            load(
                EvaluateConfig,
                [
                    *words,
                    "--output_name",
                    "q",
                    "--audit",
                    str(tmp_path / "out" / "p" / "audit.json"),
                ],
            )
        )


def test_public_questions_are_known_by_hashes(store: Path, tmp_path: Path) -> None:
    folder, hashes = write_pairs(store, tmp_path / "data"), tmp_path / "hashes.txt"
    words = options(tmp_path, "--dataset_id", str(folder), "--split", "train")
    audit(load(AuditConfig, [*words, "--write_hashes", str(hashes)]))
    assert "items" not in hashes.read_text()
    found = audit(load(AuditConfig, [*words, "--hashes", str(hashes)]))
    assert [flag["kind"] for flag in found["questions"][0]["flags"]] == ["public"]
    hashes.write_text("select name from item")
    with pytest.raises(DataError, match="make it with ray-sql audit --write_hashes"):
        audit(load(AuditConfig, [*words, "--hashes", str(hashes)]))


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--split", "tset"], "--split tset: .* has no such split; it has dev, train"),
        (["--predictions_file", "none.sql"], "cannot be read"),
    ],
)
def test_mistakes_are_one_line(store: Path, tmp_path: Path, words: list[str], reason: str) -> None:
    folder = write_pairs(store, tmp_path / "data")
    with pytest.raises(DataError, match=reason):
        audit(load(AuditConfig, options(tmp_path, "--dataset_id", str(folder), *words)))


def test_a_question_with_several_golds_is_right_by_any(store: Path, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"question": "Oldest?", "queries": ["SELECT 'desk'", "SELECT 'chair'"]},
        {"question": "How many?", "query": "SELECT 5", "queries": '["SELECT 5", "SELECT 6"]'},
        {"question": "Bad?", "queries": "no list"},
    ]
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "dev.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "store.sqlite").write_bytes(store.read_bytes())
    (tmp_path / "p.jsonl").write_text(
        '{"id": "0", "predicted": "SELECT \'chair\'"}\n{"id": "1", "predicted": "SELECT 7"}\n'
    )
    words = ["--dataset_id", str(folder), "--predictions_file", str(tmp_path / "p.jsonl")]
    words += ["--output_name", "several"]
    scores = evaluate.run(load(EvaluateConfig, options(tmp_path, *words)))["file"]["dev"]
    assert (scores["correct"], scores["n"]) == (1, 2)
    left_out = (tmp_path / "out" / "several" / "left_out.jsonl").read_text()
    assert "queries is no JSON list of texts" in left_out
