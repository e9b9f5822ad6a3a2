"""SQL is refused while it is written as soon as a name in it cannot exist any more."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ray_sql.database import Column, Schema, Table
from ray_sql.generate.name_guard import NameGuard
from ray_sql.generate.sql_words import known_functions

SHOP = Schema(
    "shop",
    (
        Table("item", (Column("id", "INTEGER"), Column("name", "TEXT"), Column("price", "REAL"))),
        Table("sale", (Column("sale_id", "INTEGER"), Column("item_id", "INTEGER"))),
        Table("Shop Floor", (Column("open since", "DATE"), Column("area", "REAL"))),
    ),
)
CAN_EXIST = [
    "SEL",
    "SELECT na",
    "SELECT name FROM item",
    "select NAME from Item where PRICE > 3",
    "SELECT T1.name, T2.item_id FROM item AS T1 JOIN sale AS T2 ON T1.id = T2.item_id",
    "SELECT i.pri",
    "SELECT s.item_id FROM sale s ORDER BY s.sale",
    "SELECT item.name FROM item",
    "SELECT count(*) AS many FROM item GROUP BY name HAVING many > 2 ORDER BY many DESC",
    "SELECT max(price) top FROM item ORDER BY top",
    "SELECT name FROM item WHERE id IN (SELECT item_id FROM sale WHERE sale_id > item.id)",
    "WITH dear AS (SELECT id AS key FROM item) SELECT key FROM dear JOIN sale ON key = item_id",
    "WITH RECURSIVE n(x) AS (VALUES (1) UNION ALL SELECT x + 1 FROM n) SELECT x FROM n",
    "SELECT x.price FROM (SELECT price FROM item) AS x",
    "SELECT * FROM (SELECT sum(price) AS total FROM item) AS x WHERE x.total > 1",
    'SELECT name FROM item WHERE name = "pen"',
    "SELECT name FROM item WHERE name = 'no such name'",
    "SELECT `open since` FROM `Shop Floor`",
    'SELECT "open since" FROM "Shop Fl',
    "SELECT [open since], area FROM [Shop Floor]",
    "SELECT CAST(price AS INTEGER) FROM item",
    "SELECT CASE WHEN price > 1 THEN 'a' ELSE 'b' END FROM item",
    "SELECT name FROM item UNION SELECT sale_id FROM sale",
    "SELECT round(avg(price), 2) FROM item -- the mean of prices",
    "SELECT * FROM json_each('[1]')",
    "SELECT rowid FROM item",
    "SELECT strftime('%Y', 'now')",
    "SELECT T2.name FROM sale AS T1 JOIN item AS T2 ON T1.item_id = T2.id WHERE T2.price > 1",
    "SELECT name FROM sale JOIN item ON item_id = id ORDER BY name",
    "SELECT name, (SELECT count(*) FROM sale WHERE item_id = id) FROM item WHERE id > 1",
    "SELECT sum(sale_id) FROM sale GROUP BY item_id UNION SELECT price FROM item ORDER BY 1",
    "SELECT count(DISTINCT T1.name) FROM item T1 JOIN sale T2 USING (id) WHERE T2.sale_id = 1",
    "SELECT name FROM item WHERE id IN (SELECT id FROM sale WHERE item_id = id)",
    "SELECT name FROM item JOIN sale ON id = item_id AND price NOT BETWEEN 1 AND 2 LEFT JOIN sale",
    "SELECT name FROM item JOIN sale ON CASE WHEN id THEN id ELSE 1 END = item_id WHERE price > 1",
    "SELECT name FROM sale, sale a, sale b, item WHERE a.sale_id = 1",
    "SELECT T9.name FROM sale, sale a, sale b, item AS T9 WHERE a.sale_id = 1",
    "SELECT T9.name FROM sale, sale a, sale b JOIN item T9 ON T9.id = a.item_id",
    "SELECT name FROM item JOIN sale ON 'a' LIKE 'b' ESCAPE 'c' WHERE price > 1",
    "SELECT name FROM item JOIN sale ON name NOT LIKE upper(item_id) ESCAPE 'c'",
    "SELECT a.id, b.sale_id, c.id, item.price FROM item a, sale b, item c JOIN item ON item.id = 1",
    "SELECT a.id, b.sale_id, c.id, e.id FROM item a, sale b, item c, sale d, item e",
    "WITH dear AS (SELECT id FROM item) SELECT id FROM item, sale, sale a, dear WHERE id > 1",
    'SELECT name FROM item "i" WHERE "i".price > 1',
    'SELECT "i"."name" FROM "item" "i"',
    'SELECT i.name FROM sale "s" JOIN item "i" ON s.item_id = i.id',
    "SELECT name FROM item WHERE name IS DISTINCT FROM 'x' AND price > 1",
    "SELECT name IS DISTINCT FROM 'x' AS d FROM item",
    "SELECT name FROM item JOIN sale ON id IS NOT DISTINCT FROM item_id WHERE price > 1",
    "SELECT name FROM item JOIN sale ON id = item_id, `Shop Floor` WHERE area > 1",
    "SELECT name FROM sale JOIN sale AS s USING (sale_id), item WHERE price > 1",
    "SELECT sale_id FROM 'sale' WHERE item_id > 1",
    "SELECT i.name, (SELECT count(*) FROM sale s WHERE s.item_id = i.id) AS c FROM item i",
    "SELECT (SELECT count(*) FROM sale WHERE item_id = item.id) FROM item",
    "SELECT id FROM item EXCEPT SELECT item_id FROM sale ORDER BY id",
]
CANNOT_EXIST = [
    "SELECT title",
    "SELECT name FROM goods",
    "SELECT name FROM item WHERE cost",
    "SELECT T1.name FROM item AS T1 JOIN sale AS T2 ON T1.sale_id",
    "SELECT T1.name FROM item AS T1 WHERE T1.item_id",
    "SELECT name FROM item WHERE sale_id",  # of a table that is not read
    "SELECT item.sale_id",
    "SELECT `shut since`",
    "SELECT name FROM item GROUP BY kind ",
    "SELECT foo(name",
    "SELECT name FROM item WHERE id IN (SELECT shop_id",
    "SELECT name FROM item ORDER BY T9.name",
    "SELECT name FROM sale WHERE ",  # FROM has to go on: its tables have no such column
    "SELECT name, sale_id FROM item ORDER ",
    "SELECT max(name) FROM sale;",
    "SELECT name FROM item WHERE id IN (SELECT area FROM sale)",
    "SELECT T1.name FROM sale AS T1 ",
    "SELECT T1.name FROM sale T1 ",
    "SELECT T2.name FROM item AS T1 WHERE ",
    "SELECT name FROM item WHERE price \N{MINUS TILDE}",
    "SELECT name FROM item WHERE \N{REPLACEMENT CHARACTER}",
    "SELECT translate(",
    "SELECT name FROM sale GRO",
    "SELECT name FROM sale groups ",
    "SELECT name FROM item SELECT ",
    "SELECT name FROM item OR ",
    "SELECT name FROM item # all",
    'SELECT name FROM sale "SELECT',
    "SELECT name FROM sale AS T1 JOIN sale AS T2 ON T1.sale_id = T2.sale_id groups",
    "SELECT name FROM sale, sale a, sale b WHERE",
    "SELECT name FROM sale, sale a, sale b, sa",
    "SELECT T9.name FROM sale, sale a, sale b, item AS T4",
    "SELECT T9.name FROM sale, sale a, sale b, item JOIN",
    "SELECT name FROM item * 2",
    "SELECT name FROM item WHERE price > SELE",
    'SELECT T9.name FROM sale, sale a, sale b, item AS "zz"',
    'SELECT T9.name FROM sale, sale a, sale b, item "T" JOIN',
    "SELECT T9.name FROM sale, sale a, sale b, item AS 5",
    "SELECT name FROM item 'pen'",
    "SELECT name FROM item AS T1 JOIN T1",
    "SELECT name FROM min(",
    "SELECT name FROM item JOIN sale ON id = item_id WHEN",
    "SELECT name FROM item JOIN sale ON id = item_id ESCAPE",
    "SELECT name FROM item WHERE price > SELECT",
    "SELECT T1.item.name",
]


SERVER = {
    "customer": {"id", "name"},
    "sales.orders": {"order_id", "customer_id"},
    "sales.goods": {"good_id"},
}
ON_SERVER = [
    "SELECT order_id FROM sales.orders WHERE customer_id > 3",
    "SELECT T9.order_id FROM customer, customer a, customer b, sales.orders AS T9",
    "SELECT o.order_id FROM sales.orders AS o JOIN customer ON customer.id = o.customer_id",
    "SELECT orders.order_id FROM sales.orders JOIN sales.goods ON good_id = orders.order_id",
    "SELECT sales.orders.order_id FROM sales.orders WHERE sales.orders.customer_id = 1",
    "SELECT DISTINCT ON (name) name, id FROM customer ORDER BY name",
    "SELECT DISTINCT ON (c.name) c.id FROM customer AS c",
    "SELECT extract(year FROM now()), extract(name FROM now()) FROM customer WHERE id > 1",
    "SELECT name FROM customer FETCH FIRST 5 ROWS ONLY",
    "SELECT string_agg(name, ', ') FROM customer",
]
NOT_ON_SERVER = [
    "SELECT name FROM sales.customer",
    "SELECT name FROM sale.",
    "SELECT order_id FROM orders ",
    "SELECT good_id FROM sales.orders WHERE good_id",
    "SELECT o.good_id FROM sales.orders AS o WHERE o.good_id",
]
TOO_EARLY = ["SELECT x.total FROM (SELECT sum(price) AS total", "SELECT value FROM json_each"]
"""Names that the query makes only later: it is read once, from left to right."""


def guard(dialect: str = "sqlite") -> NameGuard:
    return NameGuard(SHOP.lower_names(), dialect)


@pytest.mark.parametrize("sql", CAN_EXIST)
def test_names_that_exist_are_allowed_from_the_first_letter_on(sql: str) -> None:
    for end in range(len(sql) + 1):
        assert guard().allows(sql[:end]), sql[:end]


@pytest.mark.parametrize("sql", CANNOT_EXIST)
def test_names_that_cannot_exist_are_refused_with_their_last_letter(sql: str) -> None:
    assert not guard().allows(sql)


@pytest.mark.parametrize("sql", ON_SERVER)
def test_tables_of_a_servers_schemas_are_qualified(sql: str) -> None:
    for end in range(len(sql) + 1):
        assert NameGuard(SERVER, "postgres").allows(sql[:end]), sql[:end]


@pytest.mark.parametrize("sql", NOT_ON_SERVER)
def test_tables_of_another_schema_are_refused(sql: str) -> None:
    assert not NameGuard(SERVER, "postgres").allows(sql)


@pytest.mark.parametrize("sql", TOO_EARLY)
def test_names_that_are_made_later_are_refused(sql: str) -> None:
    assert not guard().allows(sql)


def test_a_guard_that_remembers_beginnings_says_what_a_new_one_says() -> None:
    one = guard()
    for sql in (*CAN_EXIST, *CANNOT_EXIST, *CAN_EXIST):
        for end in range(len(sql) + 1):
            assert one.allows(sql[:end]) == guard().allows(sql[:end]), sql[:end]


def test_what_is_refused_stays_refused() -> None:
    for sql in CANNOT_EXIST:
        assert not guard().allows(sql + "x")


@pytest.mark.parametrize(
    ("text", "allowed"),
    [
        ("Here is the title:", True),
        ("```sql", True),
        ("```sql\nSELECT nam", True),
        ("```sql\nSELECT tit", False),
        ("```sql\nSELECT name FROM item\n`", True),
        ("```sql\nSELECT name FROM item\n```", True),
        ("```sql\nSELECT name FROM item\n```\nthe title", True),
        ("```sql\nSELECT nam\n```", False),
        ("```sql\nSELECT name FROM item WHERE name = 'caf\N{REPLACEMENT CHARACTER}", True),
        ("```sql\nSELECT name AS gr\N{REPLACEMENT CHARACTER}", True),
        ("```sql\nSELECT name FROM item WHERE \N{REPLACEMENT CHARACTER}", False),
    ],
)
def test_an_answer_is_free_but_for_the_sql_in_its_block(text: str, allowed: bool) -> None:
    assert guard().allows_answer(text) == allowed


def test_a_complete_answer_ends_with_a_whole_name() -> None:
    assert guard().allows_answer("```sql\nSELECT name FROM ite")
    assert not guard().allows_answer("```sql\nSELECT name FROM ite", complete=True)


def test_a_complete_answer_reads_tables_that_have_its_columns() -> None:
    assert guard().allows_answer("```sql\nSELECT name FROM sale\n``")
    assert not guard().allows_answer("```sql\nSELECT name FROM sale\n```")


def test_functions_are_those_of_the_dialect() -> None:
    own = known_functions("sqlite")
    assert {"count", "strftime", "json_extract", "json_each", "coalesce", "iif"} <= own
    assert "translate" not in own
    assert {"count", "date_trunc", "to_char"} <= known_functions("postgres")


def test_all_gold_of_the_demo_can_be_written() -> None:
    from ray_sql.config import Config
    from ray_sql.data import load_split

    config = Config(model_name="demo", output_name="x", task_type="sql", dataset_id="demo")
    corpus = load_split(config, ("train", "seen", "unseen"))
    for examples in corpus.splits.values():
        for example in examples:
            guard = NameGuard(corpus.schemas[example.db_id].lower_names())
            assert guard.allows(example.gold + "\n", complete=True), example.gold


def test_all_gold_of_spiders_dev_can_be_written(shared: Path) -> None:
    from ray_sql.database import read_tables_json

    schemas = read_tables_json(shared / "data" / "spider" / "tables.json")
    guards = {name: NameGuard(schema.lower_names()) for name, schema in schemas.items()}
    for example in json.loads((shared / "data" / "spider" / "dev.json").read_text()):
        sql = example["query"]
        for end in (*range(1, len(sql), 5), len(sql)):
            assert guards[example["db_id"]].allows(sql[:end]), sql[:end]
        assert guards[example["db_id"]].allows(sql + "\n", complete=True), sql
