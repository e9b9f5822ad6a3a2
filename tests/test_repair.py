"""Names that do not exist are mended where it is clear by which; valid SQL is never touched."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ray_sql.data.repair import nearest, repair_links, repair_sql
from ray_sql.database import Column, Schema, Table
from ray_sql.evaluate.candidates import mended

SHOP = Schema(
    "shop",
    (
        Table(
            "item", (Column("id", "INTEGER"), Column("name", "TEXT"), Column("unit_price", "REAL"))
        ),
        Table(
            "sale",
            (Column("sale_id", "INTEGER"), Column("item_id", "INTEGER"), Column("day", "DATE")),
        ),
        Table("Shop Floor", (Column("open since", "DATE"), Column("area", "REAL"))),
    ),
)
MENDED = {
    "SELECT nam FROM item": "SELECT name FROM item",
    "SELECT name FROM items": "SELECT name FROM item",
    "SELECT unitprice FROM item WHERE unit_prices > 2": (
        "SELECT unit_price FROM item WHERE unit_price > 2"
    ),
    "SELECT price_unit FROM item": "SELECT unit_price FROM item",
    "SELECT T1.nam, T2.dayy FROM item AS T1 JOIN sale AS T2 ON T1.id = T2.item_id": (
        "SELECT T1.name, T2.day FROM item AS T1 JOIN sale AS T2 ON T1.id = T2.item_id"
    ),
    # behind the wrong alias
    "SELECT T1.day FROM item AS T1 JOIN sale AS T2 ON T1.id = T2.item_id": (
        "SELECT t2.day FROM item AS T1 JOIN sale AS T2 ON T1.id = T2.item_id"
    ),
    "SELECT items.name FROM items": "SELECT item.name FROM item",
    "SELECT name FROM item WHERE id IN (SELECT items_id FROM sales)": (
        "SELECT name FROM item WHERE id IN (SELECT item_id FROM sale)"
    ),
    "SELECT `open sinc` FROM `Shop Floor`": 'SELECT "open since" FROM `Shop Floor`',
}
KEPT = [
    "SELECT name FROM item",
    "select NAME from ITEM order by UNIT_PRICE",
    'SELECT name FROM item WHERE name = "nam"',
    "SELECT name FROM item WHERE name = 'nam'",
    "SELECT count(*) AS many FROM item GROUP BY name ORDER BY many",
    "WITH dear AS (SELECT id AS nam FROM item) SELECT nam FROM dear",
    "SELECT x.top FROM (SELECT max(unit_price) AS top FROM item) AS x",
    "SELECT value FROM json_each('[1]')",
    "SELECT rowid FROM item",
    "SELECT colour FROM item",  # nothing is near
    "SELECT FROM item WHERE",
    "DELETE FROM items",
    "no SQL at all",
]


@pytest.mark.parametrize(("sql", "mended"), MENDED.items())
def test_the_clearly_nearest_name_in_scope_takes_the_place(sql: str, mended: str) -> None:
    assert repair_sql(sql, SHOP) == mended
    assert repair_sql(mended, SHOP) == mended


@pytest.mark.parametrize("sql", KEPT)
def test_valid_sql_and_what_is_unclear_stay_to_the_letter(sql: str) -> None:
    assert repair_sql(sql, SHOP) == sql


def test_two_names_that_are_equally_near_are_unclear() -> None:
    assert nearest("name1", ["name2", "name3"]) is None
    assert nearest("singer_nam", ["singer_name", "song_name"]) == "singer_name"
    assert nearest("x", []) is None


def test_links_are_mended_by_table_and_column() -> None:
    text = '{"items": ["nam", "id"], "sale": ["colour"], "staff": ["name"]}'
    expected = {"item": ["name", "id"], "sale": ["colour"], "staff": ["name"]}
    assert json.loads(repair_links(text, SHOP)) == expected


def test_all_gold_of_spiders_dev_stays(shared: Path) -> None:
    from ray_sql.database import read_tables_json

    folder = shared / "data" / "spider"
    schemas = read_tables_json(folder / "tables.json")
    for example in json.loads((folder / "dev.json").read_text()):
        assert repair_sql(example["query"], schemas[example["db_id"]]) == example["query"]


def test_a_schema_of_a_server_is_read_in_its_own_dialect() -> None:
    schema = Schema("shop", (Table("client", (Column("name", "text"),)),), dialect="postgresql")
    assert mended("SELECT nam FROM client", schema) == "SELECT name FROM client"
