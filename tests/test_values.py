"""Cells that a question names stand behind its schema, found alike in training and answering."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ray_sql import data, evaluate, finetune, rows
from ray_sql.config import AskConfig, EvaluateConfig, load
from ray_sql.config.sections import PromptSection
from ray_sql.data import prompts, values
from ray_sql.data.contract import check_contract, make_contract
from ray_sql.data.corpus import CellValue
from ray_sql.data.people import people_columns
from ray_sql.database import Executor, cells, reflect
from ray_sql.errors import ContractError
from ray_sql.finetune import plan, prepare
from ray_sql.models import load_tokenizer
from ray_sql.serve import databases, recipe
from ray_sql.serve.prompter import Prompter
from ray_sql.store.run_folder import RunFolder
from tests.conftest import make_encoder

TABLES = """
CREATE TABLE artist (id INTEGER PRIMARY KEY, "full name" TEXT, country TEXT, born TEXT, fee REAL,
  agent_email TEXT, debut INTEGER);
INSERT INTO artist VALUES
  (1, 'Joe O''Hara', 'France', '1970-03-05', 1200.5, 'joe@stage.example', 1994),
  (2, 'José Núñez', 'Côte d''Ivoire', '1981-11-30', 800, 'jn@stage.example', 2001),
  (3, 'Smith, Anna', 'United States', '05/06/1990', 950, 'anna@stage.example', 2014);
CREATE TABLE concert (id INTEGER PRIMARY KEY, artist_id INTEGER REFERENCES artist (id),
  title TEXT, kind TEXT, year INTEGER, place TEXT);
INSERT INTO concert VALUES
  (1, 1, 'Auditions', 'Solo', 2014, 'France'), (2, 2, 'Super bootcamp', 'Choir', 2015, '東京'),
  (3, 3, 'Home Visits', 'title', 2014, ' Hall 3 ');
CREATE VIEW french AS SELECT * FROM artist WHERE country = 'France';
"""


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a database of artists and concerts."""
    file = tmp_path_factory.mktemp("stage") / "stage.sqlite"
    connection = sqlite3.connect(file)
    connection.executescript(TABLES)
    connection.close()
    return file


def searched(file: Path, **settings: Any) -> values.Searched:
    with Executor(1) as executor:
        schema = reflect(file, "stage", 0, executor)
        prompt = PromptSection(**({"values": "matched"} | settings))
        found = values.search(schema, str(file), prompt, executor)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def stage_values(stage: Path) -> values.Searched:
    return searched(stage)


@pytest.mark.parametrize(
    ("question", "literal"),
    [
        ("Which artists are from France?", "'France'"),
        ("which artists come from FRANCE", "'France'"),
        ("Was singt Jose Nunez?", "'José Núñez'"),
        ("Everything by joe o'hara", "'Joe O''Hara'"),
        ("Show concerts of Anna Smith", "'Smith, Anna'"),
        ("artists of the united state", "'United States'"),
        ("Who sings in the audition?", "'Auditions'"),
        ("Who plays Super bootcmap?", "'Super bootcamp'"),
        ("Who had a visit at home?", "'Home Visits'"),
        ("Who was born on March 5, 1970?", "'1970-03-05'"),
        ("Who was born on 30 November 1981?", "'1981-11-30'"),
        ("Who was born on 1990-05-06?", "'05/06/1990'"),
        ("Who costs 1,200.50?", "1200.5"),
        ("How many concerts were in 2014?", "2014"),
        ("谁在東京演出?", "'東京'"),
        ("What is in Hall 3?", "' Hall 3 '"),
        ('Concerts of kind "title"', "'title'"),
    ],
)
def test_a_cell_is_found_as_people_write_it(
    stage_values: values.Searched, question: str, literal: str
) -> None:
    assert literal in [value.literal for value in stage_values.index.find(question, 5)]


@pytest.mark.parametrize(
    "question",
    [
        "What is the title of each concert?",
        "List the 3 highest fees.",
        "How many artists are there?",
        "",
        "???",
        "a" * 20_000,
        "'" * 500 + '"' * 500,
    ],
)
def test_words_that_mean_no_cell_find_none(stage_values: values.Searched, question: str) -> None:
    assert stage_values.index.find(question, 5) == ()


def test_the_column_that_a_question_speaks_of_comes_first(stage_values: values.Searched) -> None:
    first = stage_values.index.find("concerts whose place is France", 5)[0]
    assert (first.table, first.column) == ("concert", "place")
    first = stage_values.index.find("artists whose country is France", 5)[0]
    assert (first.table, first.column) == ("artist", "country")


def test_a_number_of_a_key_is_no_value(stage_values: values.Searched) -> None:
    names = {column.name for column in stage_values.cells.columns}
    assert "concert.artist_id" not in names and "artist.id" not in names
    assert "concert.year" in names


def test_columns_are_left_out_by_setting(stage: Path) -> None:
    for without in ("artist.COUNTRY", "artist", "*.country"):
        found = searched(stage, values_without=[without]).index.find("from France", 5)
        assert [(value.table, value.column) for value in found] == [("concert", "place")]


def test_people_are_recognised_by_what_is_beside_them(stage_values: values.Searched) -> None:
    assert people_columns(stage_values.cells) == ["artist.full name", "artist.agent_email"]


@pytest.mark.parametrize(
    ("cell", "is_people"),
    [
        ("4111 1111 1111 1111", True),
        ("4111111111111112", False),
        ("+44 20 7946 0018", True),
        ("(555) 013-2678", True),
        ("078-05-1120", True),
        ("DE89 3704 0044 0532 0130 00", True),
        ("2024-01-02 10:00:00", False),
        ("12.5", False),
        ("Hall 3", False),
    ],
)
def test_people_are_recognised_by_their_numbers(cell: str, is_people: bool) -> None:
    columns = (cells.ColumnCells("t", "a", (cell,)), cells.ColumnCells("t", "last_name", ("Doe",)))
    assert people_columns(cells.Cells(columns)) == (["t.a", "t.last_name"] if is_people else [])


def test_too_many_cells_are_sampled_alike_and_named(
    stage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cells, "COLUMN_CELLS", 2)
    first, second = searched(stage), searched(stage)
    assert first.cells == second.cells
    assert "artist.country" in first.cells.sampled and "concert.year" not in first.cells.sampled
    assert max(len(column.cells) for column in first.cells.columns) == 2


def test_a_column_that_cannot_be_read_in_time_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "slow.sqlite"
    endless = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT max(i) FROM n"
    connection = sqlite3.connect(file)
    connection.executescript(
        f"CREATE VIEW slow AS SELECT ({endless}) AS never; CREATE VIEW fast AS SELECT 'x' AS word;"
    )
    connection.close()
    monkeypatch.setattr("ray_sql.database.bounded.QUERY_SECONDS", 0.3)
    found = searched(file)
    assert found.cells.unread == ("slow.never",)
    assert [value.literal for value in found.index.find("'x'", 5)] == ["'x'"]


def test_values_stand_behind_the_schema_of_their_columns_only(stage: Path) -> None:
    schema = reflect(stage, "stage")
    both = (CellValue("artist", "full name", "'Ann'"), CellValue("concert", "year", "2014"))
    assert prompts.values_text(both, schema) == "artist.\"full name\" = 'Ann', concert.year = 2014"
    part = replace(schema, tables=schema.tables[1:2])
    assert prompts.values_text(both, part) == "concert.year = 2014"


@pytest.fixture
def matched(make_config: Any) -> Any:
    return make_config(**{"prompt.values": "matched"})


def test_prompts_without_values_stay_as_they_were(make_config: Any, matched: Any) -> None:
    plain, with_values = data.load(make_config()), data.load(matched)
    named = [one for one in with_values.splits["train"] if one.values]
    assert {value.literal for one in named for value in one.values} >= {"'Lisbon'", "'Desk'"}
    assert "values" not in plain.splits["train"][0].content()
    assert "values" not in make_config().prompt.of_training()
    assert data.with_values(with_values, make_config().prompt).splits == plain.splits
    assert with_values.fingerprint() != plain.fingerprint()


def test_the_contract_holds_the_setting(make_config: Any, matched: Any, tiny_model: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_model))
    plain = make_contract(make_config(), tokenizer, None)
    saved = make_contract(matched, tokenizer, None)
    assert "values" not in plain
    check_contract(json.loads(json.dumps(saved)), saved, "a/adapter")
    for one, other in [(saved, plain), (plain, saved)]:
        with pytest.raises(ContractError, match=r"trained with values .*--config"):
            check_contract(one, other, "a/adapter")
    fewer = make_contract(matched.changed({"prompt.values_top": 2}), tokenizer, None)
    with pytest.raises(ContractError, match="values"):
        check_contract(saved, fewer, "a/adapter")


def test_the_plan_names_people_and_says_how_many_questions_name_cells(
    make_config: Any, stage: Path, tmp_path: Path
) -> None:
    questions = [
        {"question": "Who is from France?", "query": "SELECT 1 FROM artist WHERE country='France'"},
        {"question": "How many artists?", "query": "SELECT count(*) FROM artist"},
    ] * 8
    file = tmp_path / "questions.json"
    file.write_text(json.dumps(questions))
    config = make_config(
        **{"dataset_id": str(file), "data.databases": str(stage), "prompt.values": "matched"},
        **{"prompt.values_without": ["nothing.here"], "rows.max_length": 4096},
    )
    lines = "\n".join(plan.lines(prepare.prepare(config)))
    assert "values: 8 of 16 questions name cells" in lines
    assert (
        "2 columns may hold people's data; keep columns out of prompts with "
        "--prompt.values_without 'artist.full name,artist.agent_email'" in lines
    )
    assert "values_without names no column of the data: nothing.here" in lines


def test_training_evaluating_and_asking_read_the_same_tokens(matched: Any) -> None:
    config = matched.changed(
        {"train.max_steps": 1, "evaluate.baseline": False, "evaluate.select_examples": 0}
    )
    finetune.run(config)
    run = RunFolder(config.run_dir)
    tokenizer = load_tokenizer(config.model_name)
    corpus = data.load(config)
    trained = {row.id: row for row in rows.read(run.rows)}
    encoder = make_encoder(tokenizer, config, corpus.schemas)
    for example in corpus.splits["train"]:
        row = trained[example.id]
        assert row.input_ids[: row.prompt_length] == encoder.encode_question(example)
    place = corpus.databases["mall"]
    asking = load(AskConfig, [], output_name="run", output_dir=config.output_dir, database=place)
    found = recipe.find(asking)
    prompter = Prompter(found, {"mall": databases.find(place, found.config)})
    for example in corpus.splits["dev"]:
        asked = prompter.ask(example.question, "mall").question.input_ids
        assert asked == encoder.encode_question(example)
        begin = prompter.begins["mall"]
        assert asked[: len(begin)] == begin and len(begin) > len(asked) / 2
    text = tokenizer.decode(prompter.ask("Who lives in lisbon?", "mall").question.input_ids)
    assert "Values: customer.city = 'Lisbon'\nQuestion: Who lives in lisbon?" in text
    other = config.model_dump() | {"adapter": str(run.adapter), "output_name": "other"}
    other["prompt"]["values"] = "none"
    with pytest.raises(ContractError, match="values"):
        evaluate.run(load(EvaluateConfig, [], **other))


def test_the_cells_that_demo_questions_name_are_found_and_share_their_schemas(
    make_config: Any,
) -> None:
    from benchmarks.values import recall

    config = make_config(**{"dataset_id": "demo", "split": ("seen", "unseen")})
    corpus = data.load_split(config, config.split)
    figures = recall(corpus, corpus.splits["seen"] + corpus.splits["unseen"], config.prompt)
    assert figures["literals_in_cells"] > 50
    assert figures["recall"] >= 90


def test_values_and_descriptions_leave_sharing_intact(make_config: Any, tiny_model: Path) -> None:
    def tokens(**settings: Any) -> tuple[int, int]:
        config = make_config(dataset_id="demo", split=("seen",), **settings)
        corpus = data.load(config)
        encoder = make_encoder(load_tokenizer(str(tiny_model)), config, corpus.schemas)
        examples, _ = rows.build(corpus.splits["train"], encoder, config.rows)
        return rows.count_tokens(examples, config.batching_of(corpus.schemas))

    limits = {"rows.max_length": 8192, "rows.row_length": 20_000}
    computed, alone = tokens(**limits)
    with_values, _ = tokens(**limits, **{"prompt.values": "matched"})
    assert computed < with_values < 1.1 * computed
    corpus = data.load(make_config(dataset_id="demo", split=("seen",), **limits))
    for db_id, schema in corpus.schemas.items():
        place = corpus.databases[db_id]
        words = {table.name: {"description": "a thing"} for table in schema.tables}
        file = Path(place).parent / "descriptions.yaml"
        file.write_text(json.dumps({schema.db_id: words}))
    described, alone_too = tokens(**limits, **{"prompt.description_chars": 1000})
    assert computed < described < 1.1 * computed
    assert alone_too / described > 0.9 * alone / computed


def test_another_process_finds_the_same_in_the_same_order(stage: Path) -> None:
    script = (
        "import sys; from ray_sql.config.sections import PromptSection\n"
        "from ray_sql.data import values; from ray_sql.database import Executor, reflect\n"
        "schema = reflect(sys.argv[1], 'stage')\n"
        "with Executor(1) as executor:\n"
        "    prompt = PromptSection(values='matched')\n"
        "    found = values.search(schema, sys.argv[1], prompt, executor)\n"
        "print(found.index.find('Concerts of Anna Smiht and Jose at home in France in 2014', 50))\n"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", script, str(stage)],
            env=os.environ | {"PYTHONHASHSEED": str(seed)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in (1, 2)
    }
    assert len(outputs) == 1 and "Smith, Anna" in outputs.pop()
