"""Schemas are read from real databases and files, restricted and rendered; the text is pinned."""

import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import URL
from sqlalchemy.dialects import mysql, postgresql, sqlite

from ray_sql.database import (
    Column,
    ForeignKey,
    Schema,
    Table,
    read_tables_json,
    reflect,
    render,
    restrict,
)
from ray_sql.database.examples import EXAMPLE_ROWS
from ray_sql.database.reflect_server import type_text
from ray_sql.errors import DataError

SHARED = os.environ.get("RAY_SQL_SHARED")
SPIDER = Path(SHARED or ".") / "data" / "spider"
needs_spider = pytest.mark.skipif(not SHARED, reason="RAY_SQL_SHARED is unset")

SHOP = """
CREATE TABLE "Order" (id INTEGER PRIMARY KEY, customer INT NOT NULL REFERENCES people,
    "Ship To" VARCHAR(40));
CREATE TABLE people (id INTEGER PRIMARY KEY, name TEXT, note);
CREATE TABLE lines (order_id INT, pos INT, amount DECIMAL(8,2), PRIMARY KEY (order_id, pos),
    FOREIGN KEY (order_id) REFERENCES "ORDER" (ID));
CREATE TABLE returns (order_id INT, pos INT, reason text, day DATE,
    FOREIGN KEY (order_id, pos) REFERENCES lines (order_id, pos),
    FOREIGN KEY (reason) REFERENCES reasons (id), FOREIGN KEY (day) REFERENCES people (birthday),
    FOREIGN KEY (pos) REFERENCES lines);
INSERT INTO people VALUES (1, 'Cy', x'00ff'), (2, 'Bo', NULL), (3, 'Bo', 'a');
INSERT INTO people VALUES (4, 'Ada', ''), (5, NULL, 'b' || char(10));
"""
SHOP_SCHEMA = Schema(
    "shop",
    (
        Table(
            "Order",
            (
                Column("id", "INTEGER"),
                Column("customer", "INT", nullable=False),
                Column("Ship To", "VARCHAR(40)"),
            ),
            ("id",),
            (ForeignKey(("customer",), "people", ("id",)),),
        ),
        Table(
            "people", (Column("id", "INTEGER"), Column("name", "TEXT"), Column("note", "")), ("id",)
        ),
        Table(
            "lines",
            (Column("order_id", "INT"), Column("pos", "INT"), Column("amount", "DECIMAL(8,2)")),
            ("order_id", "pos"),
            (ForeignKey(("order_id",), "Order", ("id",)),),
        ),
        Table(
            "returns",
            (
                Column("order_id", "INT"),
                Column("pos", "INT"),
                Column("reason", "TEXT"),
                Column("day", "DATE"),
            ),
            (),
            (ForeignKey(("order_id", "pos"), "lines", ("order_id", "pos")),),
        ),
    ),
)

SHOP_DDL = """\
CREATE TABLE "Order" (
  id INTEGER,
  customer INT,
  "Ship To" VARCHAR(40),
  PRIMARY KEY (id),
  FOREIGN KEY (customer) REFERENCES people (id)
);

CREATE TABLE people (
  id INTEGER,
  name TEXT,
  note,
  PRIMARY KEY (id)
);

CREATE TABLE lines (
  order_id INT,
  pos INT,
  amount DECIMAL(8,2),
  PRIMARY KEY (order_id, pos),
  FOREIGN KEY (order_id) REFERENCES "Order" (id)
);

CREATE TABLE returns (
  order_id INT,
  pos INT,
  reason TEXT,
  day DATE,
  FOREIGN KEY (order_id, pos) REFERENCES lines (order_id, pos)
);"""

SHOP_COMPACT = """\
"Order"(id int pk, customer int -> people.id, "Ship To" text)
people(id int pk, name text, note)
lines(order_id int pk -> "Order".id, pos int pk, amount num)
returns(order_id int, pos int, reason text, day date, (order_id, pos) -> lines(order_id, pos))"""

SHOP_M_SCHEMA = """\
【DB_ID】 shop
【Schema】
# Table: "Order"
[
(id:INTEGER, Primary Key),
(customer:INT),
("Ship To":VARCHAR)
]
# Table: people
[
(id:INTEGER, Primary Key, Examples: [1, 2]),
(name:TEXT, Examples: [Bo, Ada]),
(note:, Examples: [a])
]
# Table: lines
[
(order_id:INT, Primary Key),
(pos:INT, Primary Key),
(amount:DECIMAL)
]
# Table: returns
[
(order_id:INT),
(pos:INT),
(reason:TEXT),
(day:DATE)
]
【Foreign keys】
"Order".customer=people.id
lines.order_id="Order".id
returns.order_id=lines.order_id
returns.pos=lines.pos"""


def build(path: Path, script: str) -> Path:
    connection = sqlite3.connect(path)
    connection.executescript(script)
    connection.close()
    return path


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    return build(tmp_path / "shop #1?.sqlite", SHOP)


def without_nulls(schema: Schema) -> Schema:
    """The schema as far as `ddl` tells it: names, types and keys."""
    tables = (
        replace(t, columns=tuple(Column(c.name, c.type) for c in t.columns)) for t in schema.tables
    )
    return replace(schema, tables=tuple(tables))


def round_trip(schema: Schema, folder: Path) -> Schema:
    path = folder / "round_trip.sqlite"
    path.unlink(missing_ok=True)
    return without_nulls(reflect(build(path, render(schema, "ddl")), schema.db_id))


def spider_databases() -> Iterator[Path]:
    return (path for path in sorted((SPIDER / "database").glob("*/*.sqlite")))


# Reading a live database


def test_reflection_keeps_creation_order_and_whole_keys_and_leaves_out_broken_keys(
    shop: Path,
) -> None:
    assert reflect(shop, "shop") == SHOP_SCHEMA


def test_a_path_and_its_url_read_the_same(shop: Path) -> None:
    plain = shop.rename(shop.with_name("plain.sqlite"))
    assert reflect(f"sqlite:///{plain}", "shop") == reflect(str(plain), "shop") == SHOP_SCHEMA


def test_a_database_file_is_left_alone(shop: Path) -> None:
    before = shop.read_bytes()
    reflect(shop, "shop", example_values=1)
    assert shop.read_bytes() == before
    assert [path.name for path in shop.parent.iterdir()] == [shop.name]


def test_indexes_of_full_text_search_are_no_tables(tmp_path: Path) -> None:
    path = build(
        tmp_path / "a.sqlite",
        "CREATE VIRTUAL TABLE docs USING fts5(title); CREATE TABLE docs_tags (tag TEXT);",
    )
    assert reflect(path, "a").table_names == ("docs", "docs_tags")


@pytest.mark.parametrize("form", ["{}", "sqlite:///{}"])
def test_a_missing_file_is_named_and_never_created(tmp_path: Path, form: str) -> None:
    path = tmp_path / "missing.sqlite"
    with pytest.raises(DataError, match=r"missing\.sqlite: cannot open this database \(No such"):
        reflect(form.format(path), "x")
    assert not path.exists()


def test_a_file_that_is_no_database_is_named(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("nothing of the kind, though long enough to be read as a header" * 20)
    with pytest.raises(DataError, match=r"notes\.txt: not an SQLite database"):
        reflect(path, "x")


@pytest.mark.parametrize(
    "url",
    [
        "oracle+nosuch://me:secret@host/db",
        "no such://me:secret@host/db",
        "postgresql://me:se@/secret@host/db",
        "mysql://me:se@/secret@host/db",
    ],
)
def test_no_error_about_a_url_shows_its_password(url: str) -> None:
    with pytest.raises(DataError) as caught:
        reflect(url, "x")
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_driver_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg2", None)
    with pytest.raises(DataError, match=r"psycopg2://me:\*\*\*@host/db: .*'psycopg2'; install"):
        reflect("postgresql+psycopg2://me:secret@host/db", "x")


def test_types_are_told_in_the_databases_own_words_without_collation() -> None:
    my, pg, lite = (URL.create(name).get_dialect()() for name in ("mysql", "postgresql", "sqlite"))
    assert (
        type_text(mysql.VARCHAR(20, charset="utf8mb4", collation="utf8mb4_bin"), my)
        == "VARCHAR(20)"
    )
    assert type_text(mysql.ENUM("a", "b"), my) == "ENUM('a','b')"
    assert type_text(postgresql.VARCHAR(collation="C"), pg) == "VARCHAR"
    assert type_text(postgresql.ARRAY(postgresql.INTEGER), pg) == "INTEGER[]"
    assert type_text(sqlite.NUMERIC(4, 2), lite) == "NUMERIC(4, 2)"


def test_examples_are_the_most_frequent_short_printable_values_and_ties_go_by_value(
    shop: Path,
) -> None:
    people = reflect(shop, "shop", example_values=2).table("PEOPLE")
    assert people is not None
    assert [column.examples for column in people.columns] == [("1", "2"), ("Bo", "Ada"), ("a",)]


def test_examples_come_from_the_first_rows_only_and_survive_bytes_that_are_no_text(
    tmp_path: Path,
) -> None:
    path = tmp_path / "big.sqlite"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE t (v TEXT, w TEXT)")
        rows = [("early", "x" * 41)] * EXAMPLE_ROWS + [("late", "y")] * 2 * EXAMPLE_ROWS
        connection.executemany("INSERT INTO t VALUES (?, ?)", rows)
        connection.execute("UPDATE t SET v = CAST(x'61ff62' AS TEXT) WHERE rowid = 1")
    table = reflect(path, "big", example_values=3).tables[0]
    assert [column.examples for column in table.columns] == [("early", "ab"), ()]


# Saving, looking up, restricting


def test_names_are_looked_up_in_any_case() -> None:
    table = SHOP_SCHEMA.table("ORDER")
    assert table is SHOP_SCHEMA.tables[0]
    assert table.column("ship TO") is table.columns[2]
    assert SHOP_SCHEMA.table("orders") is None
    assert table.column("ship") is None


def test_full_form_is_the_schema_itself() -> None:
    assert restrict(SHOP_SCHEMA, {"lines": ["pos"]}, "full") is SHOP_SCHEMA


def test_tables_form_keeps_whole_tables_in_schema_order_and_drops_keys_that_lead_out() -> None:
    restricted = restrict(SHOP_SCHEMA, {"LINES": [], "nothing": ["x"], "order": ["id"]}, "tables")
    assert restricted.table_names == ("Order", "lines")
    assert [table.columns for table in restricted.tables] == [
        SHOP_SCHEMA.tables[0].columns,
        SHOP_SCHEMA.tables[2].columns,
    ]
    assert [table.foreign_keys for table in restricted.tables] == [
        (),
        SHOP_SCHEMA.tables[2].foreign_keys,
    ]


def test_reduced_form_keeps_linked_columns_primary_keys_and_both_ends_of_joins() -> None:
    restricted = restrict(SHOP_SCHEMA, {"returns": ["REASON", "nothing"], "lines": []}, "reduced")
    assert {table.name: table.column_names for table in restricted.tables} == {
        "lines": ("order_id", "pos"),
        "returns": ("order_id", "pos", "reason"),
    }
    assert [table.foreign_keys for table in restricted.tables] == [
        (),
        SHOP_SCHEMA.tables[3].foreign_keys,
    ]
    alone = restrict(SHOP_SCHEMA, {"returns": ["reason"]}, "reduced")
    assert [(table.column_names, table.foreign_keys) for table in alone.tables] == [
        (("reason",), ())
    ]


def test_a_join_keeps_the_referred_column_even_if_it_is_no_primary_key() -> None:
    target = Table(
        "city", (Column("id", "INT"), Column("code", "TEXT"), Column("name", "TEXT")), ("id",)
    )
    source = Table(
        "shop",
        (Column("name", "TEXT"), Column("city", "TEXT")),
        (),
        (ForeignKey(("city",), "city", ("code",)),),
    )
    restricted = restrict(Schema("d", (target, source)), {"shop": ["name"], "city": []}, "reduced")
    assert [table.column_names for table in restricted.tables] == [("id", "code"), ("name", "city")]


def test_no_restriction_leaves_a_table_without_columns_and_no_links_leave_no_tables() -> None:
    assert restrict(SHOP_SCHEMA, {"returns": []}, "reduced").tables[0].column_names == ("order_id",)
    assert (
        restrict(SHOP_SCHEMA, {}, "reduced").tables
        == restrict(SHOP_SCHEMA, {}, "tables").tables
        == ()
    )


# Text


def test_the_three_texts_are_as_promised_to_adapters(shop: Path) -> None:
    assert render(SHOP_SCHEMA, "ddl") == SHOP_DDL
    assert render(SHOP_SCHEMA, "compact") == SHOP_COMPACT
    assert render(reflect(shop, "shop", example_values=2), "m_schema") == SHOP_M_SCHEMA


@pytest.mark.parametrize(
    ("declared", "short"),
    [
        ("BIGINT(20)", "int"),
        ("double precision", "real"),
        ("number", "num"),
        ("POINT", "point"),
        ("interval day", "interval"),
    ],
)
def test_compact_types_are_short_and_keep_what_they_do_not_know(declared: str, short: str) -> None:
    assert (
        render(Schema("d", (Table("t", (Column("c", declared),)),)), "compact") == f"t(c {short})"
    )


def test_ddl_of_a_reflected_database_builds_the_same_database(shop: Path, tmp_path: Path) -> None:
    assert round_trip(SHOP_SCHEMA, tmp_path) == without_nulls(reflect(shop, "shop"))


def test_any_word_can_be_a_name_in_the_ddl(tmp_path: Path) -> None:
    odd = {'a "b"', "1st", "é", "%", "a-b", "two words"}
    words = (
        sqlite.base.SQLiteIdentifierPreparer.reserved_words | postgresql.base.RESERVED_WORDS | odd
    )
    tables = (
        Table(word, (Column(word, "TEXT"), Column(f"{word}_2", "TEXT")), (word,))
        for word in sorted(words)
    )
    schema = Schema("words", tuple(tables))
    assert round_trip(schema, tmp_path) == schema


def test_schemas_can_be_read_without_importing_a_database_library() -> None:
    heavy = "{'sqlalchemy', 'sqlglot', 'torch'}"
    code = f"import sys, ray_sql.database; print({heavy} & sys.modules.keys())"
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout
        == "set()\n"
    )


# tables.json


def entry(**changes: object) -> dict[str, object]:
    """A school with BIRD's composite keys, two keys between two tables, and a repeated pair."""
    return {
        "db_id": "school",
        "table_names_original": ["Course", "Class", "Pupil"],
        "column_names_original": [[-1, "*"]]
        + [[0, "Code"], [0, "Year"]]
        + [[1, "Course"], [1, "Year"], [1, "No"]]
        + [[2, "Id"], [2, "Friend"], [2, "Rival"]],
        "column_types": [
            "text",
            "text",
            "number",
            "text",
            "number",
            "number",
            "number",
            "number",
            "number",
        ],
        "primary_keys": [[1, 2], 6],
        "foreign_keys": [[3, 1], [7, 6], [4, 2], [8, 6], [7, 6]],
        **changes,
    }


def write(folder: Path, value: object) -> Path:
    path = folder / "tables.json"
    path.write_text(json.dumps(value))
    return path


def test_tables_json_gives_original_names_types_and_grouped_keys(tmp_path: Path) -> None:
    schema = read_tables_json(write(tmp_path, [entry()]))["school"]
    assert render(schema, "compact") == (
        "Course(Code text pk, Year num pk)\n"
        "Class(Course text, Year num, No num, (Course, Year) -> Course(Code, Year))\n"
        "Pupil(Id num pk, Friend num -> Pupil.Id, Rival num -> Pupil.Id)"
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"primary_keys": [99]}, "`primary_keys` must hold indices of columns, found 99"),
        ({"primary_keys": [0]}, "`primary_keys` must hold indices of columns, found 0"),
        ({"foreign_keys": [[1]]}, r"`foreign_keys` must hold pairs of column indices, found \[1\]"),
        ({"foreign_keys": [[1, "x"]]}, "`foreign_keys` must hold indices of columns, found 'x'"),
        ({"column_types": ["text"]}, "`column_types` has 1 items for 9 columns"),
        ({"column_names_original": [[7, "a"]]}, "`column_names_original` must hold"),
        ({"table_names_original": [None]}, "`table_names_original` must hold texts"),
        ({"table_names_original": None}, "`table_names_original` must be a list"),
    ],
)
def test_a_malformed_tables_json_names_file_database_and_key(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    with pytest.raises(DataError, match=rf"tables\.json: entry 1 \(db_id school\): {message}"):
        read_tables_json(write(tmp_path, [entry(db_id="other"), entry(**change)]))


def test_a_tables_json_that_is_missing_or_no_list_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"tables\.json: cannot be read"):
        read_tables_json(tmp_path / "tables.json")
    for content in ("{", "{}", '["school"]'):
        (tmp_path / "tables.json").write_text(content)
        with pytest.raises(DataError, match=r"tables\.json"):
            read_tables_json(tmp_path / "tables.json")


# All of Spider


@needs_spider
def test_ddl_of_every_spider_database_builds_the_same_database(tmp_path: Path) -> None:
    paths = list(spider_databases())
    assert len(paths) == 164
    for path in paths:
        schema = without_nulls(reflect(path, path.stem))
        assert round_trip(schema, tmp_path) == schema, path.stem


@needs_spider
def test_tables_json_agrees_with_every_spider_database_on_names_and_composite_foreign_keys() -> (
    None
):
    def names(schema: Schema) -> dict[str, list[str]]:
        tables = [
            t for t in schema.tables if t.name != "sqlite_sequence"
        ]  # two entries list SQLite's own counter
        return {t.name.lower(): [c.lower() for c in t.column_names] for t in tables}

    def composites(schema: Schema) -> set[tuple[str, ...]]:
        keys = (
            (t.name, key) for t in schema.tables for key in t.foreign_keys if len(key.columns) > 1
        )
        return {
            tuple(name.lower() for name in (table, key.ref_table, *key.columns))
            for table, key in keys
        }

    written = read_tables_json(SPIDER / "tables.json")
    for path in spider_databases():
        live = reflect(path, path.stem)
        assert names(written[path.stem]) == names(live), path.stem
        assert composites(written[path.stem]) == composites(live), path.stem
