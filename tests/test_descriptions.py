"""What tables and columns mean reaches prompts, from three sources and within a budget."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

import pytest

from ray_sql import data
from ray_sql.data import descriptions
from ray_sql.data.contract import check_described, described
from ray_sql.data.descriptions import Sources, describe, template
from ray_sql.database import Schema, reflect, render
from ray_sql.errors import ContractError, DataError
from ray_sql.finetune import plan, prepare
from tests.conftest import make_spider_folder

TABLES = """
CREATE TABLE card (id INTEGER PRIMARY KEY, kind TEXT, "no use" TEXT);
CREATE TABLE owner (id INTEGER PRIMARY KEY, card_id INTEGER REFERENCES card (id), yes TEXT);
"""
YAML = """
bank:
  card:
    description: what a customer pays with
    columns:
      kind: "G for gold,\\n  C for classic"
  OWNER:
    columns:
      yes: consents to mail
"""
CSV = (
    "original_column_name,column_name,column_description,data_format,value_description\r\n"
    'kind,kind of card,"the card’s kind, in short",text,\r\n'
    "no use,,not useful,text,commonsense: ignore\r\n"
    "id,id,,integer,\r\n"
)


@pytest.fixture
def bank(tmp_path: Path) -> Path:
    """Make a database of cards in BIRD's layout."""
    file = tmp_path / "databases" / "bank" / "bank.sqlite"
    file.parent.mkdir(parents=True)
    connection = sqlite3.connect(file)
    connection.executescript(TABLES)
    connection.close()
    return file


def describe_bank(bank: Path, chars: int = 1000) -> tuple[Schema, list[str]]:
    sources = Sources.of(str(bank), str(bank.parents[2] / "questions.json"))
    return describe(reflect(bank, "bank"), sources, chars)


def write_csv(bank: Path, encoding: str = "cp1252") -> None:
    folder = bank.parent / descriptions.BIRD_FOLDER
    folder.mkdir()
    (folder / "card.csv").write_bytes(CSV.encode(encoding))


def test_words_of_a_person_come_before_those_of_the_dataset(bank: Path) -> None:
    write_csv(bank)
    (bank.parents[2] / descriptions.FILE).write_text(YAML)
    schema, notes = describe_bank(bank)
    assert notes == []
    card, owner = schema.tables
    assert card.description == "what a customer pays with"
    said = [column.description for column in card.columns]
    assert said == ["", "G for gold, C for classic", "not useful; commonsense: ignore"]
    assert [column.description for column in owner.columns] == ["", "", "consents to mail"]


@pytest.mark.parametrize("encoding", ["cp1252", "utf-8", "utf-8-sig"])
def test_files_of_any_editor_are_read(bank: Path, encoding: str) -> None:
    write_csv(bank, encoding)
    schema, _ = describe_bank(bank)
    kind = schema.tables[0].column("kind")
    assert kind is not None and kind.description == "the card’s kind, in short"


def test_each_serialiser_writes_descriptions_and_changes_nothing_without(bank: Path) -> None:
    plain = reflect(bank, "bank")
    (bank.parents[2] / descriptions.FILE).write_text(YAML)
    schema, _ = describe_bank(bank)
    assert render(schema, "ddl").startswith(
        "CREATE TABLE card ( -- what a customer pays with\n"
        "  id INTEGER,\n"
        "  kind TEXT, -- G for gold, C for classic\n"
    )
    assert render(schema, "compact").startswith(
        "card [what a customer pays with] (id int pk, kind text [G for gold, C for classic], "
    )
    text = render(schema, "m_schema")
    assert "# Table: card, what a customer pays with\n" in text
    assert "(kind:TEXT, G for gold, C for classic)" in text
    assert describe_bank(bank, 0)[0] == plain
    assert describe_bank(bank, 0)[0].to_dict() == plain.to_dict()
    assert "description" not in str(plain.to_dict())
    connection = sqlite3.connect(":memory:")
    connection.executescript(render(schema, "ddl"))


@pytest.mark.parametrize("chars", [1, 2, 30, 60, 75, 1000])
def test_a_budget_is_kept_and_the_cut_is_said(bank: Path, chars: int) -> None:
    (bank.parents[2] / descriptions.FILE).write_text(YAML)
    schema, notes = describe_bank(bank, chars)
    texts = [table.description for table in schema.tables]
    texts += [column.description for table in schema.tables for column in table.columns]
    assert sum(map(len, texts)) <= chars
    assert len(notes) == (chars < 66)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("bank: [", "is no YAML"),
        ("- bank", "expected database → table"),
        ("bank: {card: {colums: {a: b}}}", "bank → card → colums"),
        ("bank: {card: {columns: [kind]}}", "bank → card → columns"),
        ("bank: " + "[" * 2000, "is no YAML"),
    ],
)
def test_a_file_that_is_wrong_is_refused_in_one_line(
    bank: Path, content: str, message: str
) -> None:
    file = bank.parents[2] / descriptions.FILE
    file.write_text(content)
    with pytest.raises(DataError, match=message) as caught:
        describe_bank(bank)
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)


def test_names_that_do_not_exist_are_said(bank: Path) -> None:
    file = bank.parents[2] / descriptions.FILE
    file.write_text("bank: {cards: {description: all}, card: {columns: {kid: x, kind: y}}}")
    _, notes = describe_bank(bank)
    assert notes == [f"{file}: bank has no cards, card.kid"]


def test_a_template_is_read_as_it_is_written(bank: Path) -> None:
    file = bank.parents[2] / descriptions.FILE
    plain = reflect(bank, "bank")
    file.write_text(template([plain]))
    assert "yes" in file.read_text() and describe_bank(bank)[0] == plain
    file.write_text(YAML)
    schema, _ = describe_bank(bank)
    file.write_text(template([schema]))
    assert describe_bank(bank)[0] == schema


def test_descriptions_reach_the_prompt_and_the_contract(make_config: Any, tmp_path: Path) -> None:
    folder = make_spider_folder(tmp_path / "spider")
    settings = {"dataset_id": str(folder), "prompt.description_chars": 500}
    without = prepare.prepare(make_config(**settings))
    assert "descriptions: there are none" in "\n".join(plan.lines(without))
    file = folder / descriptions.FILE
    file.write_text("shop: {sale: {columns: {amount: pieces that were sold}}}")
    config = make_config(**settings)
    prepared = prepare.prepare(config)
    example = next(one for one in prepared.corpus.splits["train"] if one.db_id == "shop")
    text = prepared.tokenizer.decode(prepared.encoder.encode_question(example))
    assert "amount int [pieces that were sold]" in text
    contract = prepared.contract
    assert contract["description_chars"] == 500
    check_described(contract, prepared.corpus.schemas, "a/adapter")
    file.write_text("shop: {sale: {columns: {amount: what was paid}}}")
    schemas = data.load(config).schemas
    with pytest.raises(ContractError, match="other descriptions of shop"):
        check_described(contract, schemas, "a/adapter")
    file.unlink()
    with pytest.raises(ContractError, match="other descriptions of shop"):
        check_described(contract, data.load(config).schemas, "a/adapter")
    assert described(data.load(config).schemas) == without.contract["described"]
    assert "description_chars" not in make_config().prompt.of_training()
