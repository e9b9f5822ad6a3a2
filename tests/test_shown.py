"""What the prompt of a scored question shows; gold links there are called an oracle everywhere."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ray_sql import data, evaluate
from ray_sql.config import EvaluateConfig
from ray_sql.config.sections import AnswersSection, PromptSection
from ray_sql.data import Corpus, Example
from ray_sql.data.prompts import shown_schema
from ray_sql.data.shown import ORACLE
from ray_sql.database import Column, ForeignKey, Links, Schema, Table, complete, read_tables_json
from ray_sql.display import Display
from ray_sql.errors import ConfigError, DataError
from ray_sql.evaluate import judge_links
from ray_sql.evaluate.linker import asked_links
from ray_sql.evaluate.models import scored_questions
from ray_sql.generate import Question
from ray_sql.models import load_tokenizer
from ray_sql.report.scores import notes
from ray_sql.store.run_folder import RunFolder
from ray_sql.tune.objective import Objective


@pytest.fixture
def corpus(make_config: Any) -> Corpus:
    return data.load(make_config())


@pytest.fixture
def linked(tmp_path: Path, corpus: Corpus) -> str:
    """A linker's answers to the first questions: too much, too little, unreadable, unknown."""
    answers = ['{"customer": ["id"], "sale": []}', '{"customer": []}', "customer", '{"moon": []}']
    rows = [
        {"id": one.id, "split": "dev", "predicted": f"```json\n{answer}\n```"}
        for one, answer in zip(corpus.splits["dev"], answers, strict=False)
    ]
    file = tmp_path / "links.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def ask(config: Any, corpus: Corpus) -> list[Question]:
    links = asked_links(config, corpus, Display())
    return scored_questions(corpus, load_tokenizer(config.model_name), config, links)


def prompts_of(config: Any, corpus: Corpus) -> list[str]:
    tokenizer = load_tokenizer(config.model_name)
    return [tokenizer.decode(one.input_ids) for one in ask(config, corpus)]


@pytest.mark.parametrize("form", ["full", "tables", "reduced"])
@pytest.mark.parametrize("links", [None, "none", "gold", "FILE"])
def test_no_gold_link_reaches_a_prompt_whose_score_is_not_called_oracle(
    corpus: Corpus, make_config: Any, linked: str, form: str, links: str | None
) -> None:
    place = linked if links == "FILE" else links
    config = make_config(**{"prompt.schema_form": form, "prompt.links": place})
    config = config.changed({"evaluate.limit": None})
    examples = corpus.splits["dev"]
    golds = [one.gold for one in examples[1:]] + [examples[0].gold]
    scrambled = [replace(one, gold=gold) for one, gold in zip(examples, golds, strict=True)]
    other = replace(corpus, splits={**corpus.splits, "dev": tuple(scrambled)})
    before, after = ask(config, corpus), ask(config, other)
    changed = [a.input_ids != b.input_ids for a, b in zip(before, after, strict=True)]
    assert any(changed) == all(one.split == f"dev{ORACLE}" for one in before)


def test_a_linkers_answers_make_schemas_smaller_and_what_is_missing_shows_all(
    corpus: Corpus, make_config: Any, linked: str
) -> None:
    config = make_config(**{"prompt.links": linked, "evaluate.limit": None})
    asked = ask(config, corpus)
    texts = prompts_of(config, corpus)
    assert json.loads(asked[0].links or "") == {
        "customer": ["id"],
        "sale": ["customer_id", "product_id", "day"],
    }
    assert "sale(" in texts[0] and "product(" not in texts[0]
    assert "customer(" in texts[1] and "sale(" not in texts[1]
    assert [one.full_schema for one in asked[:5]] == [
        None,
        None,
        "the linker's answer cannot be read",
        "the linker's answer names no table of the database",
        "the linker has no answer to it",
    ]
    assert all("product(" in text and "sale(" in text for text in texts[2:])


def test_linked_columns_alone_are_shown_where_that_is_asked_for(
    corpus: Corpus, make_config: Any, linked: str
) -> None:
    config = make_config(
        **{"prompt.links": linked, "linking.form": "reduced", "evaluate.limit": None}
    )
    assert "city" not in prompts_of(config, corpus)[0]
    bare = config.changed({"linking.complete": False})
    assert json.loads(ask(bare, corpus)[0].links or "") == {"customer": ["id"], "sale": []}


@pytest.mark.parametrize(
    ("keep", "tables"), [(1.0, {"customer"}), (0.5, {"customer", "sale"}), (0.1, None)]
)
def test_the_dial_goes_from_what_all_samples_name_to_what_any_names(
    corpus: Corpus, make_config: Any, tmp_path: Path, keep: float, tables: set[str] | None
) -> None:
    samples = ['{"customer": ["id"]}', '{"customer": [], "sale": []}', None]
    samples[2:] = ['{"product": [], "customer": []}', '{"sale": [], "customer": []}']
    rows = [
        {"id": one.id, "predicted": None, "candidates": [{"links": text} for text in samples]}
        for one in corpus.splits["dev"]
    ]
    file = tmp_path / "voted.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = make_config(**{"prompt.links": str(file), "linking.keep": keep})
    shown = set(json.loads(ask(config, corpus)[0].links or ""))
    assert shown == (tables or {"customer", "sale", "product"})


def test_a_dial_without_samples_is_refused(corpus: Corpus, make_config: Any, linked: str) -> None:
    config = make_config(**{"prompt.links": linked, "linking.keep": 0.5})
    with pytest.raises(DataError, match=r"links\.jsonl, line 1: --linking.keep counts samples"):
        ask(config, corpus)


def test_a_place_without_links_is_refused(
    corpus: Corpus, make_config: Any, tmp_path: Path, tiny_model: Path
) -> None:
    for place in (tmp_path / "nothing.jsonl", tiny_model):
        config = make_config(**{"prompt.links": str(place)})
        with pytest.raises(ConfigError, match="is neither a linker's predictions"):
            ask(config, corpus)
    with pytest.raises(ConfigError, match="task_type schema finds links, and is shown none"):
        make_config(task_type="schema", **{"prompt.links": "gold"})


def test_every_file_of_an_evaluation_by_gold_links_says_oracle(make_config: Any) -> None:
    config = make_config(EvaluateConfig, **{"prompt.links": "gold", "evaluate.limit": 2})
    metrics = evaluate.run(config)
    assert list(metrics["base"]) == ["dev-oracle"] and metrics["links"] == "gold"
    assert notes(metrics, "base")[0].startswith("dev-oracle: prompts show the gold links")
    folder = RunFolder(config.run_dir)
    rows = [json.loads(line) for line in Path(folder.predictions()).read_text().splitlines()]
    assert {row["split"] for row in rows} == {"dev-oracle"}
    page = Path(folder.report).read_text()
    assert "dev-oracle" in page and "the gold SQL&#39;s: an oracle" in page
    # scored again, the name stays
    again = make_config(EvaluateConfig, predictions_file=folder.predictions(), output_name="again")
    assert list(evaluate.run(again)["file"]) == ["dev-oracle"]


def table(name: str, columns: str, *keys: ForeignKey) -> Table:
    parts = tuple(Column(column, "INTEGER") for column in columns.split())
    return Table(name, parts, (parts[0].name,), keys)


def to(name: str, column: str) -> ForeignKey:
    return ForeignKey((column,), name, ("id",))


COLLEGE = Schema(
    "college",
    (
        table("Student", "id name"),
        table("Course", "id title room_id", to("Room", "room_id")),
        table("Room", "id floor"),
        table(
            "Enrolment", "id student course grade", to("Student", "student"), to("Course", "course")
        ),
        table("Canteen", "id dish"),
    ),
)


@pytest.mark.parametrize(
    ("links", "completed"),
    [
        ({}, {}),
        ({"moon": ["x"]}, {}),
        ({"student": ["NAME", "age"]}, {"Student": ["id", "name"]}),
        (
            {"Room": ["floor"], "Student": []},
            {
                "Student": ["id"],
                "Course": ["id", "room_id"],
                "Room": ["id", "floor"],
                "Enrolment": ["id", "student", "course"],
            },
        ),
        ({"Canteen": [], "Room": []}, {"Room": ["id"], "Canteen": ["id"]}),
    ],
)
def test_links_get_keys_and_the_tables_on_the_way_between_them(
    links: Links, completed: Links
) -> None:
    assert complete(links, COLLEGE) == completed
    assert list(complete(links, COLLEGE)) == list(completed)


@pytest.mark.parametrize(
    ("chances", "tables", "columns"),
    [
        ((0.0, 0.0, 0.0), {"Enrolment"}, {"id", "grade"}),
        ((0.0, 1.0, 0.0), {"Enrolment"}, {"id", "student", "course", "grade"}),
        ((1.0, 0.0, 0.0), set(COLLEGE.table_names), {"id", "student", "course", "grade"}),
        ((0.0, 0.0, 1.0), set(COLLEGE.table_names), {"id", "student", "course", "grade"}),
    ],
)
def test_noise_shows_all_that_is_needed_beside_what_a_linker_would_name(
    chances: tuple[float, float, float], tables: set[str], columns: set[str]
) -> None:
    spare_tables, spare_columns, full_share = chances
    prompt = PromptSection(
        schema_form="noisy",
        spare_tables=spare_tables,
        spare_columns=spare_columns,
        full_share=full_share,
    )
    example = Example("1", "college", "?", "SELECT max(grade) FROM Enrolment")
    shown = shown_schema(example, {"college": COLLEGE}, prompt)
    assert set(shown.table_names) == tables
    enrolment = shown.table("Enrolment")
    assert enrolment and set(enrolment.column_names) == columns


def test_noise_is_drawn_at_the_rates_that_are_given() -> None:
    prompt = PromptSection(schema_form="noisy", spare_tables=0.3, full_share=0.1)
    many = [Example("1", "college", str(n), "SELECT dish FROM Canteen") for n in range(2000)]
    shown = [shown_schema(one, {"college": COLLEGE}, prompt).table_names for one in many]
    assert shown == [shown_schema(one, {"college": COLLEGE}, prompt).table_names for one in many]
    full = sum(len(tables) == 5 for tables in shown) / 2000
    assert 0.1 < full < 0.25  # what is drawn may be all, too
    drawn = [tables for tables in shown if len(tables) < 5]
    assert 0.2 < sum("Course" in tables for tables in drawn) / len(drawn) < 0.4


def test_a_linkers_scores_say_what_completion_gains_and_how_many_names_it_adds() -> None:
    gold = {"Student": ["name"], "Enrolment": ["student", "grade"]}
    said = {"Student": ["name"], "Enrolment": ["grade", "course"], "Canteen": [], "moon": ["x"]}
    rows = [
        {"id": str(n), "db_id": "college", "gold": json.dumps(gold), "predicted": text}
        | {"hardness": "easy"}
        for n, text in enumerate([json.dumps(said), None])
    ]
    settings = AnswersSection()
    judged = judge_links.judge(rows, [None, None], {"college": COLLEGE}, settings)
    scores = judge_links.summarise(judged, settings)
    assert (scores["strict_recall"], scores["completed_strict_recall"]) == (0.0, 0.5)
    # of Course, Room and Canteen one; of 6 unneeded columns in the tables named one
    assert (scores["spare_tables"], scores["spare_columns"]) == (1 / 3, 1 / 5)


def test_the_tables_that_only_join_are_found_again_on_spider(shared: Path) -> None:
    schemas = read_tables_json(shared / "data/spider/tables.json")
    lost = found = 0
    for line in (shared / "data/agreement/links.jsonl").read_text().splitlines():
        row = json.loads(line)
        needed: Links = {table: [] for table in row["tables"]}
        for name in row["columns"]:
            table, _, column = name.partition(".")
            needed[table].append(column)
        schema = schemas[row["db_id"]]
        kept = {
            table: asked
            for table, names in needed.items()
            if (asked := not_keys(schema, table, names))
        }
        if len(kept) < 2 or len(kept) == len(needed):
            continue
        lost += len(needed) - len(kept)
        found += sum(
            name.lower() in needed and name.lower() not in kept for name in complete(kept, schema)
        )
    assert (found, lost) == (39, 47)  # others are on another way, or a linked table needs none


def not_keys(schema: Schema, table: str, names: list[str]) -> list[str]:
    """Return the columns that are no key of their table."""
    place = schema.table(table)
    assert place
    keys = {*place.primary_key, *(name for key in place.foreign_keys for name in key.columns)}
    return [name for name in names if name not in {key.lower() for key in keys}]


@pytest.mark.parametrize(("form", "said"), [("full", False), ("noisy", True), ("tables", True)])
def test_a_sweep_over_gold_links_says_oracle(make_config: Any, form: str, said: bool) -> None:
    objective = Objective.of(make_config(**{"prompt.schema_form": form}))
    assert ("oracle" in objective.axis_label) is said
