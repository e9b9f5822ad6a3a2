"""A schema that does not fit is shown in part: the tables that the question is likely to need."""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from ray_sql import data, evaluate, generate
from ray_sql.config import EvaluateConfig
from ray_sql.data import Example
from ray_sql.data.ranking import rank_tables
from ray_sql.data.shown import AskedLinks
from ray_sql.database import reflect
from ray_sql.errors import ModelError
from ray_sql.evaluate.models import scored_questions
from ray_sql.finetune import prepare
from ray_sql.models import load_tokenizer

AREAS = (
    "airport bakery cinema dental energy forestry garden harbour insurance jewellery kitchen "
    "library museum nursery orchestra pharmacy quarry railway school theatre"
).split()
PARTS = {
    "employee": ("full_name", "salary", "hired_on"),
    "supplier": ("company", "rating", "city"),
    "invoice": ("amount", "due_date", "employee_id"),
    "shipment": ("weight", "shipped_on", "supplier_id"),
    "equipment": ("model", "price", "bought_in"),
    "inspection": ("result", "inspected_on", "equipment_id"),
    "complaint": ("subject", "severity", "invoice_id"),
    "training": ("topic", "hours", "employee_id"),
    "contract": ("signed_on", "duration", "supplier_id"),
    "budget": ("year", "planned", "spent"),
}


def statements() -> Iterator[str]:
    """Yield the tables of 20 areas with 10 tables each, and their foreign keys."""
    for area, (part, columns) in product(AREAS, PARTS.items()):
        lines = [f"{part}_id INTEGER PRIMARY KEY"]
        for column in columns:
            target = column.removesuffix("_id")
            key = f" REFERENCES {area}_{target} ({column})" if target in PARTS else ""
            lines.append(f"{column} {'INTEGER' if key else 'TEXT'}{key}")
        yield f"CREATE TABLE {area}_{part} ({', '.join(lines)});"


def rows() -> Iterator[dict[str, str]]:
    """Yield questions on one table, on two, and on two that a third joins."""
    for number, area in enumerate(AREAS):
        yield {
            "question": f"How many {area} suppliers have a rating above {number}?",
            "query": f"SELECT count(*) FROM {area}_supplier WHERE rating > {number}",
        }
        yield {
            "question": f"What are the topics of the trainings of {area} employees?",
            "query": f"SELECT topic FROM {area}_training JOIN {area}_employee USING (employee_id)",
        }
        yield {
            "question": f"Which {area} employee got the most severe complaint?",
            "query": (
                f"SELECT full_name FROM {area}_complaint JOIN {area}_invoice USING (invoice_id) "
                f"JOIN {area}_employee USING (employee_id) ORDER BY severity DESC LIMIT 1"
            ),
        }
        yield {
            "question": f"How much did the {area} plan to spend in 20{number:02}?",
            "query": f"SELECT planned FROM {area}_budget WHERE year = 20{number:02}",
        }


@pytest.fixture(scope="module")
def works(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a dataset on one database of 200 tables."""
    folder = tmp_path_factory.mktemp("works")
    connection = sqlite3.connect(folder / "works.sqlite")
    connection.executescript("".join(statements()))
    connection.close()
    questions = list(rows())
    for split, part in {"train": questions[::2], "dev": questions[1::2]}.items():
        (folder / f"{split}.json").write_text(json.dumps(part))
    return folder


@pytest.fixture
def config(make_config: Any, works: Path) -> Any:
    """Make settings with a budget of 2,048 tokens."""
    return make_config(
        **{"dataset_id": str(works), "rows.max_length": 2048, "rows.too_long": "trim_schema"},
        **{"evaluate.limit": None, "prompt.serializer": "ddl"},
    )


def asked(config: Any) -> list[generate.Question]:
    """Return the scored questions as prompts."""
    tokenizer = load_tokenizer(config.model_name)
    return scored_questions(data.load(config), tokenizer, config, AskedLinks())


def test_gold_tables_of_two_hundred_are_shown_within_the_budget(config: Any) -> None:
    questions = asked(config)
    most = config.rows.max_length - config.evaluate.max_new_tokens
    assert max(len(question.input_ids) for question in questions) <= most
    assert min(len(question.input_ids) for question in questions) > 0.9 * most
    rooms = [question.room for question in questions if question.room]
    assert len(rooms) == len(questions) == 40
    needed = sum(room.gold_tables for room in rooms)
    missing = sum(len(room.gold_left_out) for room in rooms)
    assert needed >= 60 and 1 - missing / needed >= 0.95


def test_the_prompt_says_that_tables_are_left_out(config: Any) -> None:
    (first, *_) = asked(config)
    assert first.room is not None
    text = load_tokenizer(config.model_name).decode(first.input_ids)
    assert f"-- {first.room.left_out} tables left out\n" in text
    assert text.count("CREATE TABLE") == 200 - first.room.left_out


def test_training_and_answering_have_the_same_budget(config: Any) -> None:
    prepared = prepare.prepare(config)
    assert prepared.audit.trimmed == prepared.audit.rows == len(prepared.corpus.splits["train"])
    assert prepared.audit.longest > 2048
    assert prepared.steps > 0 and prepared.questions()


def test_an_evaluation_answers_all_and_says_what_had_no_room(config: Any) -> None:
    settings = config.model_dump() | {"output_name": "scored"}
    settings["evaluate"] |= {"limit": 4, "max_new_tokens": 4}
    metrics = evaluate.run(EvaluateConfig(**settings))
    scores = metrics["base"]["dev"]
    assert scores["n"] + scores["gold_errors"] == 4
    assert scores["no_room"]["prompts"] == 4
    assert scores["no_room"]["gold_table_recall"] >= 0.95


def test_what_fits_stays_whole(make_config: Any) -> None:
    config = make_config()
    questions = scored_questions(
        data.load(config), load_tokenizer(config.model_name), config, AskedLinks()
    )
    assert all(question.room is None for question in questions)


def with_window(model: Path, copy: Path, tokens: int) -> Path:
    """Copy a model, made for this many tokens."""
    shutil.copytree(model, copy)
    file = copy / "config.json"
    shape = json.loads(file.read_text()) | {"max_position_embeddings": tokens}
    file.write_text(json.dumps(shape))
    return copy


def test_one_prompt_over_the_window_refuses_no_run(
    make_config: Any, works: Path, tiny_model: Path, tmp_path: Path
) -> None:
    small = with_window(tiny_model, tmp_path / "small", 600)
    settings = {"dataset_id": str(works), "model_name": str(small), "evaluate.limit": None}
    config = make_config(**settings)
    questions = scored_questions(
        data.load(config), load_tokenizer(str(small)), config, AskedLinks()
    )
    generate.check_window(str(small), questions, config.evaluate.max_new_tokens)
    assert max(len(question.input_ids) for question in questions) <= 592


def test_a_prompt_that_no_table_can_shorten_is_refused(
    make_config: Any, works: Path, tiny_model: Path, tmp_path: Path
) -> None:
    tiny = with_window(tiny_model, tmp_path / "tiny", 40)
    config = make_config(**{"dataset_id": str(works), "model_name": str(tiny)})
    questions = asked(config)
    with pytest.raises(ModelError, match="leaving tables out does not help"):
        generate.check_window(str(tiny), questions, config.evaluate.max_new_tokens)


def test_tables_are_ranked_by_words_cells_and_keys(works: Path) -> None:
    schema = reflect(works / "works.sqlite", "works")

    def best(question: str, **fields: Any) -> list[str]:
        return rank_tables(Example("", "works", question, "", **fields), schema)

    assert best("the supplier of the bakery")[0] == "bakery_supplier"
    assert best("INSPECTIONS AT THE MUSEUM")[0] == "museum_inspection"
    assert "bakery_invoice" in best("bakery complaints by employee")[:4]
    cells = (data.corpus.CellValue("quarry_equipment", "model", "'X'"),)
    assert best("Where is X?", values=cells)[0] == "quarry_equipment"
    assert sorted(best("")) == sorted(schema.table_names)
    assert best("What?")[0] == schema.table_names[0]
