"""PostgreSQL as people have it: schemas, views, names in quotes, odd types and values."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ray_sql import data
from ray_sql.config.sections import PromptSection
from ray_sql.data import prompts, values
from ray_sql.data.descriptions import Sources, describe
from ray_sql.data.linking import LinkError, gold_links
from ray_sql.database import Executor, Schema, reflect, render
from tests.postgres import Server, running

psycopg = pytest.importorskip("psycopg")
pytestmark = pytest.mark.postgres

VIEWS = pytest.mark.kind("views and schemas")
NAMES = pytest.mark.kind("names that need quotes")
TYPES = pytest.mark.kind("declared types")
ODD = pytest.mark.kind("one odd table or value")
SLOW = pytest.mark.kind("example values that take long")

SCRIPT = """
CREATE TABLE vet (id int PRIMARY KEY, name text);
CREATE SCHEMA ward;
CREATE TABLE ward.stay (id int PRIMARY KEY, vet_id int REFERENCES vet, nights numeric(4, 1));
CREATE TABLE bill (id int PRIMARY KEY, stay_id int REFERENCES ward.stay, cents int);
CREATE SCHEMA "Old Ward";
CREATE TABLE "Old Ward"."Stay" ("Id" int PRIMARY KEY, "firstNight" date);
CREATE VIEW busy AS SELECT vet_id, count(*) AS stays FROM ward.stay GROUP BY vet_id;
CREATE VIEW ward.short AS SELECT id FROM ward.stay WHERE nights < 2;
CREATE MATERIALIZED VIEW totals AS SELECT sum(cents) AS cents FROM bill;
CREATE TABLE visit (day date, animal text) PARTITION BY RANGE (day);
CREATE TABLE visit_2024 PARTITION OF visit FOR VALUES FROM ('2024-01-01') TO ('2025-01-01');
CREATE EXTENSION file_fdw;
CREATE SERVER files FOREIGN DATA WRAPPER file_fdw;
CREATE FOREIGN TABLE breeds (breed text) SERVER files OPTIONS (filename '/dev/null');
CREATE SCHEMA hidden;
CREATE TABLE hidden.secret (a int);
CREATE ROLE reader LOGIN;
GRANT USAGE ON SCHEMA ward TO reader;
GRANT SELECT ON vet, ward.stay, busy TO reader;

CREATE TYPE owner AS (name text, phone text);
CREATE TYPE size AS ENUM ('small', 'large');
CREATE TABLE kinds (a owner, b owner[], c point, d xml, e size, f tsvector, g int4range, h text[],
  i varchar(9), j timestamptz, k double precision);

CREATE TABLE odd (id int, d date, t time, s timestamptz, j jsonb, ok boolean, n numeric(5, 2),
  l text[], i interval, b bytea);
INSERT INTO odd VALUES (1, 'infinity', '24:00', '-infinity', '{"a": 1}', true, 1.50, '{x,y}',
  '1 day', 'x'), (2, '0044-03-15 BC', '10:00', '2024-01-01', NULL, false, 'NaN', NULL, NULL, NULL),
  (3, '12000-01-01', '11:00', '2024-01-02', NULL, false, 2, NULL, NULL, NULL);

CREATE TABLE slow (id int, g text GENERATED ALWAYS AS (repeat('x', 10)) STORED);
INSERT INTO slow VALUES (1), (2);
CREATE VIEW endless AS SELECT id, (SELECT count(*) FROM generate_series(1, 1000000) a,
  generate_series(1, 1000000) b WHERE a + b > id) AS c FROM slow;
CREATE VIEW broken AS SELECT id, 1 / (id - 1) AS c FROM slow;
"""


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running() as started:
        with psycopg.connect(started.url("postgres"), autocommit=True) as connection:
            connection.execute("CREATE DATABASE clinic")
        with psycopg.connect(started.url("clinic")) as connection:
            connection.execute(SCRIPT)
        yield started


@pytest.fixture(scope="module")
def clinic(server: Server) -> Schema:
    return reflect(server.url("clinic"), "clinic")


@VIEWS
@pytest.mark.parametrize(
    "line",
    [
        "bill(id int pk, stay_id int -> ward.stay.id, cents int)",
        "ward.stay(id int pk, vet_id int -> vet.id, nights num)",
        '"Old Ward"."Stay"("Id" int pk, "firstNight" date)',
        "busy(vet_id int, stays int)",
        "ward.short(id int)",
        "totals(cents int)",
        "visit(day date, animal text)",
        "visit_2024(day date, animal text)",
        "breeds(breed text)",
    ],
)
def test_all_that_sql_may_read_is_shown(clinic: Schema, line: str) -> None:
    assert line in render(clinic, "compact").splitlines()


@VIEWS
def test_tables_come_first_and_those_of_the_default_schema_before_all(clinic: Schema) -> None:
    shown = [table.name for table in clinic.tables]
    views = [table.name for table in clinic.tables if table.is_view]
    assert shown[-len(views) :] == views and shown[0] == "bill"
    assert shown.index("vet") < shown.index("Old Ward.Stay") < shown.index("ward.stay")


@VIEWS
def test_schemas_that_a_role_may_not_read_are_not_shown(server: Server) -> None:
    url = server.url("clinic").replace("owner@", "reader@")
    names = reflect(url, "clinic").table_names
    assert {"vet", "bill", "ward.stay", "busy"} <= set(names)
    assert not {"hidden.secret", "totals", "Old Ward.Stay", "ward.short"} & set(names)


@VIEWS
@pytest.mark.parametrize(
    ("sql", "links"),
    [
        ("SELECT nights FROM ward.stay", {"ward.stay": ["nights"]}),
        ("SELECT ward.stay.id FROM ward.stay", {"ward.stay": ["id"]}),
        ("SELECT stay.id FROM ward.stay, public.vet", {"vet": [], "ward.stay": ["id"]}),
        ("SELECT id FROM short", {"ward.short": ["id"]}),
        (
            "WITH stay AS (SELECT name AS nights FROM vet) SELECT nights FROM stay",
            {"vet": ["name"]},
        ),
        ('SELECT "firstNight" FROM "Old Ward"."Stay"', {"Old Ward.Stay": ["firstNight"]}),
        (
            "SELECT name FROM vet WHERE name ~* 'a' AND id IN (SELECT vet_id FROM busy)",
            {"vet": ["id", "name"], "busy": ["vet_id"]},
        ),
    ],
)
def test_gold_on_other_schemas_and_views_has_links(
    clinic: Schema, sql: str, links: dict[str, Any]
) -> None:
    assert gold_links(sql, clinic) == links


@VIEWS
@pytest.mark.parametrize("name", ["elsewhere.vet", "stay"])
def test_a_table_that_may_be_another_is_not_guessed(clinic: Schema, name: str) -> None:
    with pytest.raises(LinkError, match=f"lacks: {name}"):
        gold_links(f"SELECT 1 FROM {name}", clinic)


@VIEWS
def test_gold_on_another_schema_is_trained_on(
    server: Server, tmp_path: Path, make_config: Any
) -> None:
    row = {"db_id": "clinic", "question": "?", "query": "SELECT nights FROM ward.stay"}
    (tmp_path / "q.jsonl").write_text("\n".join(json.dumps(row) for _ in range(8)))
    config = make_config(
        dataset_id=str(tmp_path / "q.jsonl"), **{"data.databases": server.url("{db_id}")}
    )
    corpus = data.load(config)
    example = corpus.splits["train"][0]
    assert prompts.gold_links(example, corpus.schemas) == {"ward.stay": ["nights"]}
    assert "ward.stay(id int pk" in prompts.schema_text(example, corpus.schemas, config.prompt)


@NAMES
def test_every_name_is_written_as_the_server_reads_it(server: Server) -> None:
    url = server.url("names")
    with psycopg.connect(server.url("postgres"), autocommit=True) as connection:
        connection.execute("CREATE DATABASE names")
    with psycopg.connect(url) as connection:
        words = [word for (word,) in connection.execute("SELECT word FROM pg_get_keywords()")]
        words += ["firstName", "two words", "1st", "größe", "a.b", 'say "hi"', "a$b", "a-b", "UP"]
        for number, word in enumerate(words):
            quoted = '"' + word.replace('"', '""') + '"'
            connection.execute(f"CREATE TABLE t{number} ({quoted} int)")
    schema = reflect(url, "names")
    with Executor(1) as executor:
        for table in schema.tables:
            line = render(Schema("names", (table,), schema.dialect), "compact")
            column = line.partition("(")[2].removesuffix(" int)")
            result = executor.run(url, f"SELECT {column} FROM {table.name}")
            assert result.status == "ok", (line, result.error)


@NAMES
@pytest.mark.parametrize("serializer", ["ddl", "compact", "m_schema"])
def test_names_in_capitals_are_quoted_in_every_form(clinic: Schema, serializer: Any) -> None:
    text = render(clinic, serializer)
    assert '"Old Ward"."Stay"' in text and '"firstNight"' in text
    assert '"nights"' not in text and '"vet"' not in text


@TYPES
@pytest.mark.parametrize(
    ("column", "shown"),
    [
        ("a", "owner"),
        ("b", "owner[]"),
        ("c", "point"),
        ("d", "xml"),
        ("e", "size"),
        ("f", "TSVECTOR"),
        ("g", "INT4RANGE"),
        ("h", "TEXT[]"),
        ("i", "VARCHAR(9)"),
        ("j", "TIMESTAMP WITH TIME ZONE"),
    ],
)
def test_every_type_of_the_server_is_named(clinic: Schema, column: str, shown: str) -> None:
    table = clinic.table("kinds")
    assert table is not None
    found = table.column(column)
    assert found is not None and found.type == shown


@ODD
@pytest.mark.parametrize(
    ("column", "examples"),
    [
        ("d", ("0044-03-15 BC", "12000-01-01", "infinity")),
        ("t", ("10:00:00", "11:00:00", "24:00:00")),
        ("s", ("-infinity", "2024-01-01 00:00:00+00", "2024-01-02 00:00:00+00")),
        ("j", ('{"a": 1}',)),
        ("ok", ("false", "true")),
        ("n", ("1.50", "2.00", "NaN")),
        ("l", ("{x,y}",)),
        ("i", ("1 day",)),
        ("b", ()),
    ],
)
def test_values_are_shown_as_the_server_writes_them(
    examples_of_clinic: Schema, column: str, examples: tuple[str, ...]
) -> None:
    table = examples_of_clinic.table("odd")
    assert table is not None
    found = table.column(column)
    assert found is not None and found.examples == examples


@pytest.fixture(scope="module")
def examples_of_clinic(server: Server) -> Iterator[Schema]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ray_sql.database.bounded.QUERY_SECONDS", 2.0)
        yield reflect(server.url("clinic"), "clinic", 3)


@SLOW
@pytest.mark.parametrize(
    ("column", "reason"), [("endless.c", "timeout: "), ("broken.c", "division by zero")]
)
def test_a_column_of_a_view_loses_its_examples_and_is_named(
    examples_of_clinic: Schema, column: str, reason: str
) -> None:
    line = f"{column} has no example values: {reason}"
    assert any(one.startswith(line) for one in examples_of_clinic.left_out)
    view = examples_of_clinic.table(column.split(".")[0])
    assert view is not None and view.columns[0].examples == ("1", "2")


@SLOW
def test_a_table_that_the_role_may_not_read_is_named(server: Server) -> None:
    schema = reflect(server.url("clinic").replace("owner@", "reader@"), "clinic", 2)
    assert any(
        line.startswith("bill.id has no example values: refused: ") for line in schema.left_out
    )
    vet = schema.table("vet")
    assert vet is not None


@ODD
def test_cells_of_odd_types_are_found_as_the_server_writes_them(server: Server) -> None:
    prompt = PromptSection(values="matched")
    with Executor(1) as executor:
        schema = reflect(server.url("clinic"), "clinic", 0, executor)
        tables = tuple(table for table in schema.tables if table.name in ("odd", "kinds", "bill"))
        found = values.search(
            replace(schema, tables=tables), server.url("clinic"), prompt, executor
        )
    assert found is not None and not found.cells.unread
    question = "What was on January 1, 2024 or on 'infinity', after 1.5 nights?"
    literals = {value.literal for value in found.index.find(question, 50)}
    assert "1.5" in literals and "'infinity'" in literals
    assert any(literal.startswith("'2024-01-01 ") for literal in literals)


def test_comments_describe_tables_and_columns_where_they_are_asked_for(server: Server) -> None:
    with psycopg.connect(server.url("clinic")) as connection:
        connection.execute("COMMENT ON TABLE ward.stay IS 'a night, or more,\n of an animal'")
        connection.execute("COMMENT ON COLUMN vet.name IS 'as on the door'")
    plain = reflect(server.url("clinic"), "clinic")
    assert not any(table.is_described for table in plain.tables)
    read = reflect(server.url("clinic"), "clinic", comments=True)
    schema, _ = describe(read, Sources.of(server.url("clinic"), "questions.json"), 100)
    text = render(schema, "compact")
    assert "ward.stay [a night, or more, of an animal] (id int pk, " in text
    assert "vet(id int pk, name text [as on the door])" in text
    assert describe(plain, Sources.of(server.url("clinic"), "questions.json"), 100)[0] == plain
