"""Datasets as they are published, and rows that bring their schema: read, trained on, scored."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ray_sql import data, evaluate
from ray_sql.config import Config, EvaluateConfig
from ray_sql.data import Corpus, prompts, schema_texts
from tests.conftest import QUESTIONS, SHOP, make_spider_folder
from tests.test_field_data import jsonl, make_shop, plan_of, read, refusal

TABLES = [
    {
        "db_id": "shop",
        "table_names_original": ["customer", "product", "sale"],
        "column_names_original": [
            [-1, "*"],
            *([0, name] for name in ("id", "name", "city")),
            *([1, name] for name in ("id", "title", "price")),
            *([2, name] for name in ("customer_id", "product_id", "day", "amount")),
        ],
        "column_types": ["text"] * 11,
        "primary_keys": [1, 4],
        "foreign_keys": [[7, 1], [8, 4]],
    }
]
ROWS = [{"db_id": "shop", "question": q, "query": sql} for q, sql in QUESTIONS]


def write(file: Path, value: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value))


# Published layouts: each function lays out eight questions as `dev`, and perhaps as `train`


def sparc(place: Path) -> None:
    dialogues = [
        {
            "database_id": "shop",
            "interaction": [
                {"utterance": "What about it?", "query": "SELECT 1"},
                {"utterance": "And of these?", "query": sql},
            ],
            "final": {"utterance": q, "query": sql},
        }
        for q, sql in QUESTIONS
    ]
    for name in ("train", "dev", "train_no_value", "dev_no_value"):
        write(place / f"{name}.json", dialogues)
    write(place / "tables.json", TABLES)
    make_shop(place / "database" / "shop" / "shop.sqlite")


def cosql(place: Path) -> None:
    inner = place / "cosql_dataset"
    sparc(inner)
    for name in ("train", "dev"):
        (inner / f"{name}_no_value.json").unlink()
        target = inner / "sql_state_tracking" / f"cosql_{name}.json"
        target.parent.mkdir(exist_ok=True)
        (inner / f"{name}.json").rename(target)
    write(inner / "user_intent_prediction" / "cosql_train.json", [{"dialogue": []}])
    (place / "__MACOSX").mkdir()


def spider_dk(place: Path) -> None:
    write(place / "Spider-DK.json", [row | {"type": "T3"} for row in ROWS])
    write(place / "tables.json", TABLES)
    make_shop(place / "database" / "shop" / "shop.sqlite")


def spider_syn(place: Path) -> None:
    rows = [
        {"db_id": "shop", "query": sql, "SpiderQuestion": f"Old: {q}", "SpiderSynQuestion": q}
        for q, sql in QUESTIONS
    ]
    for name in ("train_spider", "dev"):
        write(place / f"{name}.json", rows)
    make_shop(place / "database" / "shop" / "shop.sqlite")


def kaggle(place: Path) -> None:
    rows = [row | {"sql": {"from": {}}, "query_toks": []} for row in ROWS]
    for name, part in (("", rows), ("_fewshot", rows[:2]), ("_test", rows)):
        write(place / "examples" / f"Shop{name}.json", part)
    write(place / "KaggleDBQA_tables.json", TABLES)
    make_shop(place / "databases" / "shop" / "shop.sqlite")


def mini_dev(place: Path) -> None:
    inner = place / "minidev" / "MINIDEV"
    for dialect in ("sqlite", "mysql", "postgresql"):
        rows = [
            {
                "question_id": 100 + n,
                "db_id": "shop",
                "question": q,
                "evidence": "",
                "SQL": sql if dialect == "sqlite" else f"{sql} -- {dialect}",
                "difficulty": "simple",
            }
            for n, (q, sql) in enumerate(QUESTIONS)
        ]
        write(inner / f"mini_dev_{dialect}.json", rows)
    write(inner / "dev_tables.json", TABLES)
    make_shop(inner / "dev_databases" / "shop" / "shop.sqlite")


def spider_without_databases(place: Path) -> None:
    for name in ("train_spider", "dev"):
        write(place / f"{name}.json", ROWS)
    write(place / "tables.json", TABLES)


def followers_train(place: Path) -> None:
    for name in ("train", "dev"):
        write(place / f"{name}.json", ROWS)
    write(place / "tables.json", TABLES)
    make_shop(place / "databases" / "shop" / "shop.sqlite")
    for name in ("._train.json", "._dev.json", "._tables.json"):
        (place / name).write_bytes(b"\x00\x05\x16\x07\x00")


def one_level_down(place: Path) -> None:
    followers_train(place / "spider_data")
    (place / ".DS_Store").write_bytes(b"\x00")


def hub_clone(place: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    (place / "data").mkdir(parents=True)
    for split in ("train", "validation"):
        pq.write_table(
            pa.Table.from_pylist(ROWS), place / "data" / f"{split}-00000-of-00001.parquet"
        )
    (place / "README.md").write_text("# Questions")
    make_shop(place / "databases" / "shop.sqlite")


LAYOUTS: dict[Callable[[Path], None], str] = {
    sparc: "dev",
    cosql: "dev",
    spider_dk: "dev",
    spider_syn: "dev",
    kaggle: "test",
    mini_dev: "dev",
    spider_without_databases: "dev",
    followers_train: "dev",
    one_level_down: "dev",
    hub_clone: "dev",
}


@pytest.mark.kind("published layouts")
@pytest.mark.parametrize("lay_out", LAYOUTS, ids=lambda function: function.__name__)
def test_a_published_layout_is_read_as_it_is(
    make_config: Any, tmp_path: Path, lay_out: Callable[[Path], None]
) -> None:
    place, split = tmp_path / "published", LAYOUTS[lay_out]
    lay_out(place)
    corpus = data.load_split(make_config(dataset_id=str(place)), [split])
    examples = corpus.splits[split]
    assert [(one.question, one.gold) for one in examples] == QUESTIONS
    assert corpus.schemas["shop"].table_names == ("customer", "product", "sale")
    assert ("shop" in corpus.databases) == (lay_out is not spider_without_databases)
    assert not corpus.left_out
    if lay_out not in (spider_dk, mini_dev):
        config = make_config(dataset_id=str(place), split=[split])
        assert data.load(config).splits["train"]


@pytest.mark.kind("published layouts")
def test_without_databases_exact_set_match_is_scored_alone(
    make_config: Any, tmp_path: Path
) -> None:
    spider_without_databases(tmp_path / "spider")
    answers = [sql for _, sql in QUESTIONS[:-1]] + ["SELECT id FROM sale"]
    (tmp_path / "predicted.sql").write_text("".join(f"{sql}\n" for sql in answers))
    config = make_config(
        EvaluateConfig,
        dataset_id=str(tmp_path / "spider"),
        predictions_file=str(tmp_path / "predicted.sql"),
        **{"evaluate.limit": None},
    )
    scores = evaluate.run(config)["file"]["dev"]
    assert (scores["n"], scores["gold_errors"]) == (0, 8)
    assert (scores["exact_set_match_n"], scores["exact_set_match"]) == (8, 7 / 8)


@pytest.mark.kind("published layouts")
def test_it_is_said_which_questions_of_a_dialogue_are_taken(
    make_config: Any, tmp_path: Path
) -> None:
    sparc(tmp_path / "sparc")
    corpus = data.load(make_config(dataset_id=str(tmp_path / "sparc")))
    assert any("the final question of each" in note for note in corpus.notes)


@pytest.mark.kind("published layouts")
def test_spider_realistic_takes_schemas_and_databases_of_spider(
    make_config: Any, tmp_path: Path
) -> None:
    spider_without_databases(tmp_path / "spider")
    make_shop(tmp_path / "spider" / "database" / "shop" / "shop.sqlite")
    write(tmp_path / "spider-realistic.json", ROWS)
    config = make_config(
        dataset_id=str(tmp_path / "spider-realistic.json"),
        **{"data.databases": str(tmp_path / "spider" / "database")},
    )
    assert read(data.load(config)) == set(QUESTIONS)


@pytest.mark.kind("published layouts")
def test_defogs_questions_are_read_with_their_databases(make_config: Any, tmp_path: Path) -> None:
    lines = ["db_name,query_category,query,question,instructions"]
    lines += [f'shop,group_by,"{sql}","{q}",Count each once.' for q, sql in QUESTIONS]
    lines += ['shop,group_by,"SELECT {name, id} FROM customer","Who?",']
    file = tmp_path / "sql-eval" / "data" / "questions_gen_sqlite.csv"
    file.parent.mkdir(parents=True)
    file.write_text("\n".join(lines))
    make_shop(tmp_path / "defog" / "shop.db")
    where = {"data.databases": str(tmp_path / "defog"), "data.validation_fraction": 0}
    config = make_config(dataset_id=str(file), **where, **{"evaluate.select_examples": 0})
    corpus = data.load(config)
    assert {one.evidence for one in corpus.splits["train"]} <= {"Count each once.", ""}
    assert any("db_id ← db_name" in note for note in corpus.notes)
    assert "questions_gen_sqlite.csv, line 10" in plan_of(config)


@pytest.mark.kind("published layouts")
def test_two_files_for_one_split_are_named(make_config: Any, tmp_path: Path) -> None:
    folder = make_spider_folder(tmp_path / "two")
    (folder / "tables.json").unlink()
    (folder / "dev.jsonl").write_text("")
    assert "dev.json and dev.jsonl are both split dev" in refusal(
        make_config(dataset_id=str(folder))
    )


# The schema in the row

FILLED = SHOP
BARE = SHOP[: SHOP.index("INSERT")]


def create_context(schema: str) -> list[dict[str, Any]]:
    return [{"question": q, "context": schema, "answer": sql} for q, sql in QUESTIONS]


def gretel(schema: str) -> list[dict[str, Any]]:
    return [
        {"id": n, "sql_prompt": q, "sql_context": schema, "sql": sql, "domain": "retail"}
        for n, (q, sql) in enumerate(QUESTIONS)
    ]


def alpaca(schema: str) -> list[dict[str, Any]]:
    return [{"instruction": q, "input": schema, "output": sql} for q, sql in QUESTIONS]


def alpaca_other_way(schema: str) -> list[dict[str, Any]]:
    text = f"You write SQL for this database:\n{schema}"
    return [{"instruction": text, "input": q, "output": sql} for q, sql in QUESTIONS]


def messages(schema: str) -> list[dict[str, Any]]:
    return [
        {
            "messages": [
                {"role": "system", "content": f"Answer in SQL.\n\n{schema}"},
                {"role": "user", "content": q},
                {"role": "assistant", "content": f"```sql\n{sql}\n```"},
            ]
        }
        for q, sql in QUESTIONS
    ]


def sharegpt(schema: str) -> list[dict[str, Any]]:
    return [
        {
            "conversations": [
                {"from": "human", "value": f"### Schema:\n{schema}\n### Question: {q}\n### SQL:"},
                {"from": "gpt", "value": sql},
            ]
        }
        for q, sql in QUESTIONS
    ]


def completion(schema: str) -> list[dict[str, Any]]:
    return [
        {"prompt": f"Question: {q}\n\nSchema:\n{schema}\n\nAnswer:", "completion": sql}
        for q, sql in QUESTIONS
    ]


IN_THE_ROW = [create_context, gretel, alpaca, alpaca_other_way, messages, sharegpt, completion]
rows_with_schema = pytest.mark.parametrize("shape", IN_THE_ROW, ids=lambda one: one.__name__)
Shape = Callable[[str], list[dict[str, Any]]]


def config_of(make_config: Any, tmp_path: Path, rows: list[dict[str, Any]], **more: Any) -> Config:
    (tmp_path / "q.jsonl").write_text(jsonl(rows))
    return make_config(dataset_id=str(tmp_path / "q.jsonl"), **more)


@pytest.mark.kind("the schema in the row")
@rows_with_schema
def test_rows_with_their_schema_train_and_score(
    make_config: Any, tmp_path: Path, shape: Shape
) -> None:
    config = config_of(make_config, tmp_path, shape(FILLED))
    corpus = data.load(config)
    assert read(corpus) == set(QUESTIONS)
    (one,) = corpus.splits["dev"]
    assert one.schema_text and "CREATE TABLE customer" in one.schema_text
    assert one.question not in one.schema_text
    assert corpus.executable(one.db_id), "its rows were put into a database"
    assert any("←" in note for note in corpus.notes), "and the columns are said"
    assert "gold      every query runs" in plan_of(config)


@pytest.mark.kind("the schema in the row")
@rows_with_schema
def test_links_are_found_in_the_text_of_a_schema(
    make_config: Any, tmp_path: Path, shape: Shape
) -> None:
    config = config_of(make_config, tmp_path, shape(BARE), task_type="schema")
    corpus = data.load(config)
    by_question = {one.question: one for split in corpus.splits.values() for one in split}
    one = by_question["Which customers live in Lisbon?"]
    assert prompts.gold_links(one, corpus.schemas) == {"customer": ["name", "city"]}
    assert "rows      " in plan_of(config)


@pytest.mark.kind("the schema in the row")
def test_on_empty_tables_nothing_is_scored_but_gold_is_tried(
    make_config: Any, tmp_path: Path
) -> None:
    rows = create_context(BARE)
    rows[4]["answer"] = "SELECT colour FROM product"
    config = config_of(
        make_config, tmp_path, rows, **{"data.validation_fraction": 0, "data.test_fraction": 0.13}
    )
    corpus = data.load(config)
    assert not any(corpus.executable(one.db_id) for one in corpus.splits["dev"])
    plan = plan_of(config)
    assert "q.jsonl, line 5: no such column: colour" in plan
    assert "so it gets no score: its schema texts hold no rows" in plan


@pytest.mark.kind("the schema in the row")
def test_a_text_that_sqlite_cannot_run_is_named_and_trained_on(
    make_config: Any, tmp_path: Path
) -> None:
    text = "CREATE TABLE customer (id INT, kind ENUM('a', 'b'));"
    config = config_of(make_config, tmp_path, create_context(text))
    corpus = data.load(config)
    assert read(corpus) == set(QUESTIONS) and not corpus.databases
    assert any("schema texts do not run, the first: near" in note for note in corpus.notes)


@pytest.mark.kind("the schema in the row")
@pytest.mark.parametrize(
    "script,reason",
    [
        ("CREATE TABLE t (a); INSERT INTO t SELECT zeroblob(999999999)", "too large"),
        ("CREATE TABLE t (a); INSERT INTO t VALUES (load_extension('x'))", "refused: FUNCTION"),
        ("CREATE TABLE t (a); INSERT INTO t VALUES (1", "syntax error"),
    ],
)
def test_a_hostile_text_makes_no_database(tmp_path: Path, script: str, reason: str) -> None:
    ((_, built),) = schema_texts.build([script], tmp_path).items()
    assert built.file is None and reason in built.error
    assert not list(tmp_path.rglob("*.sqlite"))


@pytest.mark.kind("the schema in the row")
def test_what_cannot_be_used_is_named_with_a_way_out_that_leads_somewhere(
    make_config: Any, tmp_path: Path
) -> None:
    rows = [{"prompt": q, "completion": sql} for q, sql in QUESTIONS]
    message = refusal(config_of(make_config, tmp_path, rows))
    assert "no databases found beside it" in message and "CREATE TABLE" in message
    make_shop(tmp_path / "own.sqlite")
    where = {"data.databases": str(tmp_path / "own.sqlite")}
    corpus = data.load(config_of(make_config, tmp_path, rows, **where))
    assert read(corpus) == set(QUESTIONS)
    message = refusal(config_of(make_config, tmp_path, [{"text": "a question and its SQL"}] * 8))
    assert "no column 'question' or" in message and "found text" in message


@pytest.mark.kind("the schema in the row")
def test_answers_to_rows_with_their_schema_are_judged_by_execution(
    make_config: Any, tmp_path: Path
) -> None:
    rows = gretel(FILLED)
    for split in ("train", "dev"):
        (tmp_path / f"{split}.jsonl").write_text(jsonl(rows))
    golds = "".join(f"{sql}\n" for _, sql in QUESTIONS[:-1])
    (tmp_path / "predicted.sql").write_text(golds + "SELECT name FROM customer\n")
    config = make_config(
        EvaluateConfig,
        dataset_id=str(tmp_path),
        predictions_file=str(tmp_path / "predicted.sql"),
        **{"evaluate.limit": None},
    )
    scores = evaluate.run(config)["file"]["dev"]
    assert (scores["n"], scores["correct"]) == (8, 7)


def test_the_corpus_says_what_it_guessed(make_config: Any, tmp_path: Path) -> None:
    corpus: Corpus = data.load(config_of(make_config, tmp_path, create_context(FILLED)))
    assert "columns: query ← answer, schema ← context" in corpus.notes
