"""Five forms of data become one corpus; splits are disjoint; mistakes are named by their place."""

import json
import shutil
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from ray_sql import data
from ray_sql.config import Config
from ray_sql.data import Corpus, Example
from ray_sql.data.splits import set_aside
from ray_sql.errors import DataError
from tests.conftest import QUESTIONS, SHOP, make_spider_folder

SPIDER_TABLES = {
    "table_names_original": ["customer"],
    "column_names_original": [[-1, "*"], [0, "id"], [0, "name"]],
    "column_types": ["text", "number", "text"],
    "primary_keys": [1],
    "foreign_keys": [],
}


def rows(*db_ids: str, **more: Any) -> list[dict[str, Any]]:
    return [
        {"db_id": db_id, "question": q, "query": sql} | more
        for db_id in db_ids
        for q, sql in QUESTIONS
    ]


def write_jsonl(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    return path


def make_databases(folder: Path, *db_ids: str) -> Path:
    for db_id in db_ids:
        (folder / db_id).mkdir(parents=True)
        connection = sqlite3.connect(folder / db_id / f"{db_id}.sqlite")
        connection.executescript(SHOP)
        connection.close()
    return folder


def refusal(config: Config) -> str:
    with pytest.raises(DataError) as caught:
        data.load(config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def all_ids(corpus: Corpus) -> set[tuple[str, str]]:
    return {
        (example.db_id, example.question) for rows in corpus.splits.values() for example in rows
    }


# The five forms


def test_a_spider_folder_joins_its_train_files_and_reads_schemas_from_the_databases(
    make_config: Any,
) -> None:
    corpus = data.load(make_config())
    assert {split: len(rows) for split, rows in corpus.splits.items()} == {
        "train": 22,
        "validation": 2,
        "dev": 8,
    }
    train = [*corpus.splits["train"], *corpus.splits["validation"]]
    assert sorted(int(example.id) for example in train) == list(range(24))
    assert corpus.schemas["mall"].table_names == ("customer", "product", "sale")
    assert corpus.schemas["mall"].tables[2].primary_key == ("customer_id", "product_id", "day")
    assert Path(corpus.databases["mall"]).is_file()


def test_a_database_that_is_missing_leaves_its_schema_from_tables_json(
    make_config: Any, tmp_path: Path
) -> None:
    folder = make_spider_folder(tmp_path / "spider")
    shutil.rmtree(folder / "database" / "kiosk")
    (folder / "tables.json").write_text(json.dumps([{"db_id": "kiosk"} | SPIDER_TABLES]))
    corpus = data.load(make_config(dataset_id=str(folder)))
    assert corpus.schemas["kiosk"].table_names == ("customer",)
    assert "kiosk" not in corpus.databases and "shop" in corpus.databases


@pytest.mark.parametrize("layout", ["together", "a folder for each split"])
def test_a_bird_folder_is_read_in_both_layouts(
    make_config: Any, tmp_path: Path, layout: str
) -> None:
    for split, db_id in (("train", "shop"), ("dev", "mall")):
        place = tmp_path / "bird" / (f"{split}_20240627" if layout != "together" else "")
        make_databases(place / f"{split}_databases", db_id)
        (place / f"{split}_tables.json").write_text("[]")
        records = [
            {
                "question_id": n,
                "db_id": db_id,
                "question": q,
                "evidence": "a hint",
                "SQL": sql,
                "difficulty": "simple",
            }
            for n, (q, sql) in enumerate(QUESTIONS)
        ]
        (place / f"{split}.json").write_text(json.dumps(records))
    corpus = data.load(make_config(dataset_id=str(tmp_path / "bird")))
    assert {split: len(rows) for split, rows in corpus.splits.items()} == {
        "train": 7,
        "validation": 1,
        "dev": 8,
    }
    first = corpus.splits["dev"][0]
    assert (first.id, first.db_id, first.evidence, first.hardness) == (
        "0",
        "mall",
        "a hint",
        "simple",
    )
    assert (first.question, first.gold) == QUESTIONS[0]
    assert set(corpus.schemas) == {"shop", "mall"}


def test_one_jsonl_file_is_divided_here(make_config: Any, tmp_path: Path) -> None:
    make_databases(tmp_path / "database", "shop", "mall")
    file = write_jsonl(tmp_path / "questions.jsonl", rows("shop", "mall"))
    corpus = data.load(make_config(dataset_id=str(file), **{"data.test_fraction": 0.25}))
    assert {split: len(examples) for split, examples in corpus.splits.items()} == {
        "train": 11,
        "validation": 1,
        "dev": 4,
    }
    assert len(all_ids(corpus)) == 16


def test_a_held_out_part_is_the_same_whatever_it_is_called(
    make_config: Any, tmp_path: Path
) -> None:
    make_databases(tmp_path / "database", "shop", "mall")
    config = make_config(dataset_id=str(write_jsonl(tmp_path / "q.jsonl", rows("shop", "mall"))))
    corpus = data.load(config)
    assert data.load(config.changed({"split": ["test"]})).splits["test"] == corpus.splits["dev"]
    assert data.load_split(config, ["dev"]).splits["dev"] == corpus.splits["dev"]
    assert (
        data.load_split(config, ["validation"]).splits["validation"] == corpus.splits["validation"]
    )


def test_a_folder_of_jsonl_files_has_a_split_for_each(make_config: Any, tmp_path: Path) -> None:
    databases = make_databases(tmp_path / "elsewhere", "shop", "mall")
    folder = tmp_path / "questions"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", rows("shop"))
    write_jsonl(folder / "hard.jsonl", rows("mall")[:3])
    write_jsonl(folder / "validation.jsonl", rows("mall")[3:5])
    config = make_config(
        dataset_id=str(folder), split=["hard", "dev"], **{"data.databases": str(databases)}
    )
    corpus = data.load(config)
    # a file called validation is scored as `dev`; our `validation` comes out of train
    assert {split: len(r) for split, r in corpus.splits.items()} == {
        "train": 7,
        "validation": 1,
        "hard": 3,
        "dev": 2,
    }


def hub_folder(folder: Path) -> Path:
    """Parquet files with the columns of the dataset that the original project trains on."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir()
    for split, n in (("train", 8), ("dev", 3)):
        records = [
            {
                "db_id": "shop",
                "question_en": q,
                "query": sql,
                "schema_SQLDatabase": "CREATE TABLE customer (id, name)",
                "schema_SQLDatabase_min": "customer(id, name)",
                "selector_correct": "```json\n{'customer': ['name'], 'sale': []}\n```",
                "hardness": "easy",
                "demo": 1,
            }
            for q, sql in QUESTIONS[:n]
        ]
        pq.write_table(pa.Table.from_pylist(records), folder / f"{split}-00000-of-00001.parquet")
    return folder


def test_the_hub_datasets_columns_are_chosen_by_the_task(
    make_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    from ray_sql.data import prompts

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    config = make_config(dataset_id=str(hub_folder(tmp_path / "hub")), split=["dev"])
    corpus = data.load(config)
    assert {split: len(rows) for split, rows in corpus.splits.items()} == {
        "train": 7,
        "validation": 1,
        "dev": 3,
    }
    example = corpus.splits["dev"][0]
    assert (example.question, example.gold, example.hardness) == (*QUESTIONS[0], "easy")
    assert (example.schema_text, example.links_text) == ("CREATE TABLE customer (id, name)", None)

    example = data.load(config.changed({"task_type": "schema"})).splits["dev"][0]
    assert example.schema_text == "customer(id, name)"
    assert prompts.gold_links(example, {}) == {"customer": ["name"], "sale": []}


def test_the_demo_needs_nothing_but_the_package(make_config: Any) -> None:
    config = make_config(dataset_id="demo", split=["seen", "unseen"])
    corpus = data.load(config)
    train, seen, unseen = (
        {e.db_id for e in corpus.splits[name]} for name in ("train", "seen", "unseen")
    )
    assert len(corpus.splits["train"]) >= 500 and corpus.splits["seen"] and corpus.splits["unseen"]
    assert seen <= train and not unseen & train and len(train | unseen) >= 8
    assert all(Path(place).is_file() for place in corpus.databases.values())


def test_a_column_map_names_other_columns(make_config: Any, tmp_path: Path) -> None:
    make_databases(tmp_path / "database", "shop")
    records = [{"base": "shop", "pergunta": q, "consulta": sql} for q, sql in QUESTIONS]
    columns = {"db_id": "base", "question": "pergunta", "query": "consulta"}
    file = write_jsonl(tmp_path / "q.jsonl", records)
    corpus = data.load(make_config(dataset_id=str(file), **{"data.columns": columns}))
    assert {(e.question, e.gold) for split in corpus.splits.values() for e in split} == set(
        QUESTIONS
    )


def test_a_line_may_hold_any_character_that_json_allows(make_config: Any, tmp_path: Path) -> None:
    make_databases(tmp_path / "database", "shop")
    odd = "a\u2028b\u0085c — ção"
    file = write_jsonl(
        tmp_path / "q.jsonl", [r | {"question": r["question"] + odd} for r in rows("shop")]
    )
    corpus = data.load(make_config(dataset_id=str(file)))
    assert all(
        example.question.endswith(odd) for split in corpus.splits.values() for example in split
    )


# Splits


def test_a_split_by_database_shares_no_database(make_config: Any) -> None:
    corpus = data.load(
        make_config(**{"data.split_by": "database", "data.validation_fraction": 0.3})
    )
    databases = {name: {e.db_id for e in corpus.splits[name]} for name in ("train", "validation")}
    assert (
        databases["train"]
        and databases["validation"]
        and not databases["train"] & databases["validation"]
    )
    assert len(corpus.splits["train"]) + len(corpus.splits["validation"]) == 24


def test_databases_are_what_is_split_by_where_there_are_several(make_config: Any) -> None:
    third = {"data.validation_fraction": 0.3}
    by_default, by_database = (
        data.load(make_config(**third, **{"data.split_by": by})) for by in (None, "database")
    )
    assert by_default.splits == by_database.splits


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("sizes", [(500, 40), (500, 40, 60), (300, 20, 20, 20, 40)])
def test_one_large_database_is_not_what_is_set_aside(seed: int, sizes: tuple[int, ...]) -> None:
    names = [f"db{number}" for number in range(len(sizes))]
    examples = tuple(
        Example(f"{name}-{n}", name, "Who?", "SELECT 1")
        for name, size in zip(names, sizes, strict=True)
        for n in range(size)
    )
    left, aside = set_aside(examples, 0.1, None, f"{seed}-held-out")
    assert 0.05 * len(examples) <= len(aside) <= 0.2 * len(examples)
    assert len(left) + len(aside) == len(examples)
    assert not {e.db_id for e in left} & {e.db_id for e in aside}, "and it is whole databases"


def test_where_no_databases_come_near_the_share_questions_are_set_aside() -> None:
    uneven = tuple(
        Example(f"{n}", "small" if n < 3 else "large", "Who?", "SELECT 1") for n in range(500)
    )
    assert len(set_aside(uneven, 0.1, None, "14")[1]) == 50, "three questions are no test"
    even = tuple(Example(f"{n}", "a" if n % 2 else "b", "Who?", "SELECT 1") for n in range(100))
    assert all(set_aside(even, 0.9, "database", "14")), "something is left to train on"


def test_where_every_database_is_too_large_questions_are_set_aside() -> None:
    examples = tuple(
        Example(f"{name}-{n}", name, "Who?", "SELECT 1")
        for name in ("erp", "web")
        for n in range(100)
    )
    assert len(set_aside(examples, 0.1, None, "14")[1]) == 20
    assert len(set_aside(examples, 0.1, "database", "14")[1]) == 100, "the setting is obeyed"


def test_ids_that_are_not_ids_are_refused(make_config: Any, tmp_path: Path) -> None:
    file = write_jsonl(
        tmp_path / "q.jsonl", [r | {"id": number % 3} for number, r in enumerate(rows("shop"))]
    )
    assert f"{file}, line 1 and {file}, line 4: both have id '0'" in refusal(
        make_config(dataset_id=str(file))
    )


def test_a_mapped_column_may_be_empty_in_a_row(make_config: Any, tmp_path: Path) -> None:
    make_databases(tmp_path / "databases", "shop")
    hinted = [r | {"hint": None if number else "by name"} for number, r in enumerate(rows("shop"))]
    file = write_jsonl(tmp_path / "q.jsonl", hinted)
    corpus = data.load(make_config(dataset_id=str(file), **{"data.columns": {"evidence": "hint"}}))
    assert sorted({e.evidence for split in corpus.splits.values() for e in split}) == [
        "",
        "by name",
    ]


def test_a_split_by_question_has_exactly_the_size_asked_for(make_config: Any) -> None:
    for fraction, n in ((0.0, 0), (0.25, 6), (0.5, 12)):
        corpus = data.load(make_config(**{"data.validation_fraction": fraction}))
        assert (len(corpus.splits["validation"]), len(corpus.splits["train"])) == (n, 24 - n)


@pytest.mark.parametrize("split_by", ["database", "question"])
def test_the_seed_decides_the_split(make_config: Any, split_by: str) -> None:
    def validation(seed: int) -> tuple[Example, ...]:
        config = make_config(
            seed=seed, **{"data.split_by": split_by, "data.validation_fraction": 0.3}
        )
        return data.load(config).splits["validation"]

    assert validation(1) == validation(1)
    assert len({validation(seed) for seed in range(8)}) > 1


def test_a_limit_draws_from_train_alone_with_the_seed(make_config: Any) -> None:
    whole, limited = data.load(make_config()), data.load(make_config(**{"data.limit": 5}))
    assert len(limited.splits["train"]) == 5 and set(limited.splits["train"]) < set(
        whole.splits["train"]
    )
    assert (
        limited.splits["dev"] == whole.splits["dev"]
        and limited.splits["validation"] == whole.splits["validation"]
    )


@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_run_is_never_scored_on_what_it_trained_or_was_chosen_on(
    make_config: Any, split: str
) -> None:
    assert f"--split {split}: " in refusal(make_config(split=[split]))


def test_leakage_counts_shared_databases_and_repeated_questions() -> None:
    def example(db_id: str, question: str) -> Example:
        return Example("0", db_id, question, "SELECT 1")

    train = (example("a", "How many?"), example("b", "Which one?"))
    dev = (example("a", "how  MANY?"), example("a", "Who?"), example("c", "How many?"))
    assert data.leakage(Corpus({"train": train, "dev": dev, "empty": ()})) == [
        "dev: 3 questions on 2 databases, 1 of them also in train; 1 question also in train"
    ]


# The fingerprint


def test_the_fingerprint_follows_the_content_and_not_the_place(
    make_config: Any, tmp_path: Path
) -> None:
    one, other = (
        make_spider_folder(tmp_path / "one"),
        make_spider_folder(tmp_path / "other" / "place"),
    )

    def fingerprint(folder: Path) -> str:
        return data.load(make_config(dataset_id=str(folder))).fingerprint()

    first = fingerprint(one)
    assert fingerprint(other) == first
    records = json.loads((other / "dev.json").read_text())
    (other / "dev.json").write_text(
        json.dumps([*records[:-1], records[-1] | {"question": "Another?"}])
    )
    second = fingerprint(other)
    connection = sqlite3.connect(one / "database" / "shop" / "shop.sqlite")
    connection.execute("ALTER TABLE product ADD COLUMN colour TEXT")
    connection.close()
    third = fingerprint(one)
    assert len({first, second, third}) == 3


# What a user can get wrong


def test_a_missing_folder_is_named_with_what_may_be_given(make_config: Any, tmp_path: Path) -> None:
    message = refusal(make_config(dataset_id=str(tmp_path / "nowhere")))
    assert message == (
        f"--dataset_id {tmp_path}/nowhere: no such file or folder; give a path, a Hub id "
        "(owner/name), or demo"
    )


def test_a_folder_in_no_known_form_is_named_with_the_forms(
    make_config: Any, tmp_path: Path
) -> None:
    message = refusal(make_config(dataset_id=str(tmp_path)))
    assert (
        message.startswith(f"--dataset_id {tmp_path}: ")
        and "tables.json" in message
        and "*.jsonl" in message
    )


def test_a_hub_dataset_that_cannot_be_had_is_named_with_the_way_out(make_config: Any) -> None:
    message = refusal(make_config(dataset_id="nobody/nothing"))
    assert message.startswith("--dataset_id nobody/nothing: ") and "--read_token" in message


def test_a_malformed_line_is_named_by_its_number(make_config: Any, tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "q.jsonl", rows("shop"))
    lines = file.read_text().split("\n")
    lines[4:4] = ["", '{"db_id": "shop", ']
    file.write_text("\n".join(lines))
    message = refusal(make_config(dataset_id=str(file)))
    assert (
        message.startswith(f"{file}, line 6: not valid JSON")
        and "correct the line or remove it" in message
    )


def test_malformed_json_is_named_by_its_line(make_config: Any, tmp_path: Path) -> None:
    folder = make_spider_folder(tmp_path / "spider")
    (folder / "dev.json").write_text('[\n{"db_id": "shop",\n]')
    message = refusal(make_config(dataset_id=str(folder)))
    assert message.startswith(f"{folder}/dev.json, line 3: not valid JSON")


def test_text_that_is_not_utf8_and_json_that_is_no_list_are_named(
    make_config: Any, tmp_path: Path
) -> None:
    folder = make_spider_folder(tmp_path / "spider")
    (folder / "dev.json").write_bytes(b"\xff\xfa")
    assert refusal(make_config(dataset_id=str(folder))).startswith(
        f"{folder}/dev.json, line 1: not UTF-8 text"
    )
    (folder / "dev.json").write_text('{"db_id": "shop"}')
    assert refusal(make_config(dataset_id=str(folder))).startswith(
        f"{folder}/dev.json: must hold JSON objects"
    )


def test_a_missing_column_is_named_with_the_columns_found(make_config: Any, tmp_path: Path) -> None:
    folder = make_spider_folder(tmp_path / "spider")
    records = json.loads((folder / "dev.json").read_text())
    records = [{"db_id": "shop", "text": "Who?", "query": "SELECT 1"} for _ in records]
    (folder / "dev.json").write_text(json.dumps(records))
    message = refusal(make_config(dataset_id=str(folder)))
    assert message.startswith(f"{folder}/dev.json: no column 'question' or 'question_en' or ")
    assert "found db_id, query, text" in message and "--data.columns question=" in message


def test_a_column_map_that_names_nothing_is_refused(make_config: Any) -> None:
    message = refusal(make_config(**{"data.columns": {"question": "pergunta"}}))
    assert "no column 'pergunta' for question" in message
    message = refusal(make_config(**{"data.columns": {"questoin": "question"}}))
    assert message.startswith(
        "--data.columns questoin: no such field; fields are id, db_id, question"
    )


def test_an_unknown_database_is_named_with_its_row_and_those_there_are(
    make_config: Any, tmp_path: Path
) -> None:
    folder = make_spider_folder(tmp_path / "spider")
    shutil.rmtree(folder / "database" / "mall")
    message = refusal(make_config(dataset_id=str(folder)))
    assert f"--dataset_id {folder}, dev example 0: unknown db_id 'mall'" in message
    assert "mall/mall.sqlite" in message and "have kiosk, shop, store" in message


def test_a_missing_folder_of_databases_is_named_with_the_flag(
    make_config: Any, tmp_path: Path
) -> None:
    folder = make_spider_folder(tmp_path / "spider")
    shutil.rmtree(folder / "database")
    message = refusal(make_config(dataset_id=str(folder)))
    assert message.startswith(f"--dataset_id {folder}: no databases found beside it; name them")
    assert "shop/shop.sqlite" in message and "a file (.sqlite, .db, .sqlite3, .duckdb)" in message
    elsewhere = make_config(dataset_id=str(folder), **{"data.databases": str(tmp_path / "no")})
    assert refusal(elsewhere).startswith(
        f"--data.databases {tmp_path}/no: no such file or folder; give a file"
    )
    file = write_jsonl(tmp_path / "q.jsonl", rows("shop"))
    message = refusal(make_config(dataset_id=str(file)))
    assert (
        message.startswith(f"--dataset_id {file}: no databases found")
        and "--data.databases" in message
    )


def test_a_file_that_is_no_database_is_named(make_config: Any, tmp_path: Path) -> None:
    folder = make_spider_folder(tmp_path / "spider")
    (folder / "database" / "mall" / "mall.sqlite").write_text(
        "no database, but long enough to look at"
    )
    assert "mall.sqlite" in refusal(make_config(dataset_id=str(folder)))


def test_a_split_that_is_not_there_is_named_with_those_there_are(make_config: Any) -> None:
    message = refusal(make_config(split=["test"]))
    assert message.startswith("--split test: ") and message.endswith("it has dev, train")
    message = refusal(make_config(split=["Dev"]))
    assert message.endswith("dev, train; dev differs in case alone: give --split dev")


def test_data_without_training_examples_is_refused(make_config: Any, tmp_path: Path) -> None:
    folder = make_spider_folder(tmp_path / "spider")
    for name in ("train_spider.json", "train_others.json"):
        (folder / name).unlink()
    assert refusal(make_config(dataset_id=str(folder))).endswith(
        "no training examples; found splits dev"
    )
    (folder / "dev.json").unlink()
    (folder / "tables.json").unlink()  # of Spider's folder, other names are no splits
    (folder / "Train.jsonl").write_text('{"db_id": "mall", "question": "a", "query": "SELECT 1"}')
    (folder / "dev.jsonl").write_text('{"db_id": "mall", "question": "a", "query": "SELECT 1"}')
    assert refusal(make_config(dataset_id=str(folder))).endswith(
        "found splits Train, dev; Train differs from train in case alone: rename it"
    )


def test_one_database_cannot_be_split_by_database(make_config: Any, tmp_path: Path) -> None:
    make_databases(tmp_path / "database", "shop")
    file = write_jsonl(tmp_path / "q.jsonl", rows("shop"))
    message = refusal(make_config(dataset_id=str(file), **{"data.split_by": "database"}))
    assert (
        message.startswith("--data.split_by database: ")
        and "use --data.split_by question" in message
    )


# The real Spider


def test_spider_loads_whole(make_config: Any, shared: Path) -> None:
    config = make_config(
        dataset_id=str(shared / "data" / "spider"), **{"data.split_by": "database"}
    )
    corpus = data.load(config)
    train, validation, dev = (corpus.splits[name] for name in ("train", "validation", "dev"))
    assert (len(train) + len(validation), len(dev)) == (7000 + 1659, 1034)
    assert not {e.db_id for e in train} & {e.db_id for e in validation}
    # two databases are not shipped; tables.json has their schemas
    assert {"baseball_1", "soccer_1"} <= set(corpus.schemas) - set(corpus.databases)
    assert len({e.db_id for e in train} | {e.db_id for e in validation}) == 146
