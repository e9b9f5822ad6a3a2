"""Questions on DuckDB files: nothing outside is touched, every query ends, verdicts are SQLite's.

Without the package duckdb these tests skip.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ray_sql import evaluate
from ray_sql.config import EvaluateConfig, PrepareConfig, load
from ray_sql.curate import Subject, bench, examine, prepare
from ray_sql.database import Executor, Limits, reflect, render
from ray_sql.errors import DataError
from ray_sql.generate.name_guard import guards
from ray_sql.generate.questions import Question
from ray_sql.metrics import Pair, judge
from tests.conftest import QUESTIONS, SHOP
from tests.databases import ERROR_KINDS, ends_as, error_kinds, hashes

duckdb = pytest.importorskip("duckdb")

LIMITS = Limits(seconds=1, rows=1000, bytes=2**20, memory=2**30, sql_length=20_000)
PATIENT = Limits(seconds=20, rows=1000, bytes=2**20, memory=2**30, sql_length=20_000)
SECRET = "hf_hush"
ENDLESS = "SELECT count(*) FROM range(10000000) a, range(10000000) b WHERE a.range % 7 <> b.range"
TABLES = """
CREATE TABLE item (id INT PRIMARY KEY, name TEXT, price DECIMAL(8, 2), weight DOUBLE, made DATE,
  sold BOOLEAN);
INSERT INTO item VALUES (1, 'pen', 1.50, 0.5, '2024-01-02', true),
  (2, 'ink', NULL, NULL, '2024-02-03', false), (3, 'nib', 2.00, 0.25, NULL, NULL);
CREATE SEQUENCE number;
CREATE SCHEMA sales;
CREATE TABLE sales.order (id INT PRIMARY KEY, item INT, note BLOB);
CREATE TABLE sales.line (id INT, "order" INT REFERENCES sales.order (id));
CREATE VIEW cheap AS SELECT name FROM item WHERE price < 2;
COMMENT ON TABLE item IS 'things that are sold';
COMMENT ON COLUMN item.made IS 'day of production';
"""


@dataclass(frozen=True)
class Place:
    """A folder with databases, and an executor whose workers sit in it."""

    folder: Path
    executor: Executor

    @property
    def database(self) -> Path:
        return self.folder / "shop.duckdb"

    def state(self) -> dict[str, str]:
        return hashes(self.folder)


def make_database(path: Path, script: str = TABLES) -> Path:
    with duckdb.connect(str(path)) as connection:
        connection.execute(script)
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("duckdb")
    make_database(folder / "shop.duckdb")
    make_database(folder / "other.duckdb")
    (folder / "note.csv").write_text("not,to,be\n1,2,read\n")
    (folder / "note.json").write_text('[{"a": 1}]')
    (folder / "work").mkdir()
    with pytest.MonkeyPatch.context() as patch, Executor(2, LIMITS) as executor:
        patch.chdir(folder / "work")
        patch.setenv("HF_TOKEN", SECRET)
        yield Place(folder, executor)


REFUSED = [
    "INSERT INTO item VALUES (9)",
    "UPDATE item SET price = 0",
    "DELETE FROM item",
    "  ;DELETE FROM item",
    "TRUNCATE item",
    "DROP TABLE item",
    "ALTER TABLE item ADD COLUMN x INT",
    "CREATE TABLE other (a INT)",
    "CREATE TEMP TABLE other AS SELECT 1",
    "CREATE MACRO m() AS 1",
    "CREATE SECRET s (TYPE http)",
    "CREATE FUNCTION m() AS 1",
    "SELECT 1; DELETE FROM item",
    "BEGIN",
    "COMMIT",
    "CHECKPOINT",
    "VACUUM",
    "ATTACH '{folder}/other.duckdb' AS other",
    "ATTACH ':memory:' AS other",
    "DETACH shop",
    "USE memory",
    "COPY item TO '{folder}/made.csv'",
    "COPY (SELECT 1) TO '{folder}/made.parquet'",
    "COPY item FROM '{folder}/note.csv'",
    "EXPORT DATABASE '{folder}/made'",
    "IMPORT DATABASE '{folder}/made'",
    "INSTALL httpfs",
    "LOAD httpfs",
    "LOAD '{folder}/note.csv'",
    "FORCE INSTALL json",
    "SET enable_external_access = true",
    "SET GLOBAL threads = 8",
    "RESET memory_limit",
    "PRAGMA enable_profiling",
    "CALL pragma_version()",
    "EXPLAIN SELECT 1",
    "EXPLAIN ANALYZE SELECT count(*) FROM item",
    "PREPARE x AS SELECT 1",
    "",
    ";",
    "-- nothing",
    "SELECT * FROM read_csv('{folder}/note.csv')",
    "SELECT * FROM read_csv_auto('{folder}/note.csv')",
    "SELECT * FROM sniff_csv('{folder}/note.csv')",
    "SELECT * FROM read_json('{folder}/note.json')",
    "SELECT * FROM read_json_objects('{folder}/note.json')",
    "SELECT * FROM read_ndjson('{folder}/note.json')",
    "SELECT * FROM read_text('/etc/passwd')",
    "SELECT * FROM read_blob('/etc/passwd')",
    "SELECT * FROM read_parquet('{folder}/note.csv')",
    "SELECT * FROM parquet_metadata('{folder}/note.csv')",
    "SELECT * FROM glob('{folder}/*')",
    "SELECT * FROM '{folder}/note.csv'",
    "SELECT * FROM 'https://example.org/x.parquet'",
    "SELECT * FROM read_text('https://example.org/')",
    "SELECT * FROM read_csv('/dev/stdin')",
    "SELECT (SELECT content FROM read_text('/etc/passwd'))",
    "WITH x AS (SELECT * FROM read_text('/etc/passwd')) SELECT * FROM x",
    "SELECT * FROM item, read_text('/etc/passwd')",
    "SELECT * FROM range(1), LATERAL (SELECT * FROM read_text('/etc/passwd'))",
    "SELECT * FROM query('SELECT * FROM read_text(''/etc/passwd'') ')",
    "SELECT * FROM json_execute_serialized_sql(json_serialize_sql("
    "'SELECT * FROM read_text(''/etc/passwd'') '))",
    # files by pattern, list, name without quotes, and other ways of writing a path
    "SELECT * FROM read_text('{folder}/*')",
    "SELECT * FROM glob('**')",
    "SELECT * FROM read_text(['{folder}/note.csv', '/etc/passwd'])",
    "SELECT * FROM read_csv('/etc/pass*', sep = ':')",
    "SELECT * FROM '../*.csv'",
    'FROM "../note.csv"',
    "FROM read_csv('cat /etc/passwd |')",
    "SELECT * FROM read_text('/proc/self/environ')",
    "SELECT * FROM read_text('file:///etc/passwd')",
    "SELECT * FROM read_text('s3://bucket/x')",
    "SELECT * FROM read_parquet('hf://datasets/x/y.parquet')",
    "SELECT * FROM read_csv('//host/share/x.csv')",
    "SELECT * FROM read_single_csv_file('{folder}/note.csv')",
    "SELECT * FROM parquet_kv_metadata('{folder}/note.csv')",
    # the database's own file, as bytes, and another one
    "SELECT * FROM read_blob('{folder}/shop.duckdb')",
    "SELECT * FROM read_text('../shop.duckdb')",
    "SELECT * FROM glob('{folder}/shop.duckdb')",
    "SELECT * FROM read_duckdb('{folder}/shop.duckdb', table_name = 'item')",
    "SELECT * FROM read_duckdb('{folder}/other.duckdb')",
    # logs, profiles and extensions
    "CALL enable_logging()",
    "SELECT * FROM enable_logging('QueryLog', storage = 'stdout')",
    "SELECT * FROM enable_logging(storage = 'file', storage_path = '{folder}/made')",
    "SELECT * FROM enable_profiling(format = 'json', save_location = '{folder}/made')",
    "SELECT * FROM disable_logging()",
    "SELECT * FROM duckdb_extensions()",
    "UPDATE EXTENSIONS",
    "LOAD 'https://example.org/x.duckdb_extension'",
    "INSTALL spatial FROM community",
    "INSTALL '{folder}/note.csv'",
    # settings, secrets and other databases
    "SET lock_configuration = false",
    "SET SESSION TimeZone = 'Asia/Tokyo'",
    "SET VARIABLE x = 1",
    "SET allowed_paths = ['/etc']",
    "SET disabled_filesystems = ''",
    "RESET disabled_filesystems",
    "PRAGMA memory_limit = '1TB'",
    "PRAGMA database_list",
    "PRAGMA table_info('item')",
    "PRAGMA add_parquet_key('k', 'abcdefghijklmnop')",
    "PRAGMA import_database('{folder}')",
    "CREATE PERSISTENT SECRET s (TYPE http)",
    "DROP SECRET s",
    "SELECT * FROM duckdb_secrets(redact = false)",
    "ATTACH '{folder}/made.duckdb'",
    "ATTACH 'https://example.org/x.duckdb' AS x (READ_ONLY)",
    "ATTACH OR REPLACE DATABASE '{folder}/other.duckdb' AS shop",
    "COPY FROM DATABASE shop TO memory",
    "COPY item TO '/dev/stdout'",
    "COPY (SELECT * FROM read_text('/etc/passwd')) TO '{folder}/made'",
    "EXPLAIN COPY item TO '{folder}/made'",
    # writes
    "WITH x AS (DELETE FROM item RETURNING *) SELECT * FROM x",
    "WITH x AS (SELECT 1) DELETE FROM item",
    "MERGE INTO item USING (SELECT 1 AS id) s ON item.id = s.id WHEN MATCHED THEN DELETE",
    "INSERT OR REPLACE INTO item (id) VALUES (1)",
    "COMMENT ON TABLE item IS 'x'",
    "CREATE SCHEMA x",
    "CREATE TYPE x AS ENUM ('a')",
    "CREATE VIEW v AS SELECT 1",
    "FORCE CHECKPOINT",
    "ANALYZE item",
    "ROLLBACK",
    "SELECT nextval('number')",
    "SELECT setval('number', 5)",
]
"""None answers with rows, whatever words it is refused with."""
HARMLESS = [
    "SELECT * FROM duckdb_secrets()",
    "SELECT * FROM which_secret('s3://x', 's3')",
    "SELECT * FROM duckdb_logs()",
    "SELECT * FROM truncate_duckdb_logs()",
    "SELECT write_log('x', level := 'ERROR')",
    "SELECT * FROM duckdb_temporary_files()",
    "SELECT * FROM duckdb_external_resources()",
    "SELECT * FROM checkpoint()",
    "SELECT * FROM duckdb_settings()",
    "SELECT * FROM duckdb_databases()",
    "SELECT * FROM pg_catalog.pg_settings",
    "SELECT current_setting('home_directory'), current_setting('http_proxy')",
    "SELECT getvariable('HF_TOKEN')",
    "SELECT setseed(0.5)",
    "SELECT json_serialize_plan('DELETE FROM item')",
    "SELECT json_serialize_plan('SELECT * FROM read_text(''/etc/passwd'') ')",
    "SHOW TABLES",
    "DESCRIBE item",
    "SUMMARIZE item",
    "VALUES (1)",
]
"""They may answer. No row tells of the environment, and nothing is changed."""
STOPPED = [
    ENDLESS,
    "SELECT * FROM range(1000000000)",
    "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT max(i) FROM n",
    "SELECT repeat('x', 100000000)",
    "SELECT repeat('x', 2000000)",
    "SELECT list(a.range) FROM range(1000000000) a",
    "SELECT string_agg(repeat('x', 1000), '') FROM range(10000000)",
    "SELECT a.range FROM range(100000000) a ORDER BY hash(a.range)",
    "SELECT sleep_ms(1000000)",
    "SELECT pg_sleep(1000)",
    "SELECT * FROM repeat_row('x', num_rows = 1000000000000)",
    "SELECT 1 " + " " * 20_000,
]
FAILED = [
    "FROM '/etc/passwd'",
    "SELEC 1",
    "The answer is 42.",
    "SELECT ?",
    "SELECT '\ud800'",
    "SELECT CAST('x' AS INT)",
    "SELECT no_such_function(1)",
    "SELECT * FROM other.item",
    "SELECT getenv('HOME')",
    "SELECT * FROM query('DELETE FROM item')",
    "SELECT * FROM force_checkpoint('shop')",
    "SELECT error('refused')",
    "SELECT currval('number')",
    "SELECT * FROM query('COPY item TO ''{folder}/made'' ')",
    "SELECT * FROM query_table('/etc/passwd')",
    "SELECT * FROM (INSERT INTO item (id) VALUES (9) RETURNING id)",
    "SELECT * FROM force_checkpoint()",
    "SELECT * FROM sqlite_scan('{folder}/x', 'y')",
    "SELECT * FROM postgres_query('x', 'y')",
    "SELECT * FROM st_read('/etc/passwd')",
    "SELECT * FROM arrow_scan(1, 1, 1)",
    "SELECT * FROM pandas_scan(1)",
    "SELECT * FROM python_map_function((SELECT 1))",
    ".shell ls",
    ".read /etc/passwd",
]


@pytest.mark.parametrize(
    ("statements", "outcome"), [(REFUSED, "refused"), (STOPPED, "stopped"), (FAILED, "failed")]
)
def test_hostile_statements_do_no_harm(place: Place, statements: list[str], outcome: str) -> None:
    before, wrong = place.state(), []
    limits = LIMITS if outcome == "stopped" else PATIENT
    for index, text in enumerate(statements):
        sql = text.replace("{folder}", str(place.folder))
        result = place.executor.run(place.database, sql, limits)
        if not ends_as(result, outcome):
            wrong.append((sql[:80], result.status, (result.error or "")[:100]))
        if index % 8 == 0:
            after = place.executor.run(
                place.database, f"SELECT count(*) FROM item -- {outcome} {index}", PATIENT
            )
            assert after.rows == ((3,),), (sql, after)
    assert wrong == []
    assert place.state() == before


def test_what_may_answer_changes_nothing_and_tells_no_secret(place: Place) -> None:
    before = place.state()
    told = {sql: place.executor.run(place.database, sql, PATIENT) for sql in HARMLESS}
    assert {sql: result.error for sql, result in told.items() if result.error} == {}
    assert SECRET not in str(told) and "root:" not in str(told)
    again = place.executor.run(place.database, "SELECT count(*) FROM item -- again", PATIENT)
    assert again.rows == ((3,),)
    assert place.state() == before


def test_values_are_plain_and_equal_values_are_equal(place: Place) -> None:
    def cells(sql: str) -> tuple[Any, ...]:
        result = place.executor.run(place.database, sql, PATIENT)
        assert result.status == "ok", result
        return result.rows[0]

    assert cells("SELECT id, name, price, weight, made, sold FROM item WHERE id = 1") == (
        *(1, "pen", 1.5, 0.5, "2024-01-02", 1),
    )
    assert cells("SELECT sum(id), avg(id), count(*), sum(price) FROM item") == (6, 2.0, 3, 3.5)
    assert cells("SELECT 'NaN'::DOUBLE, 'Infinity'::DOUBLE, NULL, true") == (
        *("NaN", float("inf"), None, 1),
    )
    assert cells("SELECT TIMESTAMPTZ '2024-01-02 03:04:05+02', '\\x00\\xFF'::BLOB, [1, 2]") == (
        *("2024-01-02 01:04:05+00:00", b"\x00\xff", "[1, 2]"),
    )
    assert cells("SELECT 12345678901234567890::HUGEINT, {'a': 1}") == (
        *(12345678901234567890, '{"a": 1}'),
    )
    many = place.executor.run(place.database, "SELECT range FROM range(1000)", PATIENT)
    assert many.rows == tuple((number,) for number in range(1000))


def test_a_schema_has_keys_comments_and_example_values(place: Place) -> None:
    schema = reflect(f"duckdb:///{place.database}", "shop", 2, place.executor, comments=True)
    assert schema == reflect(place.database, "shop", 2, place.executor, comments=True)
    assert schema.dialect == "duckdb"
    assert schema.table_names == ("item", "sales.order", "sales.line", "cheap")
    item, order, line, cheap = schema.tables
    assert [column.type for column in item.columns][:3] == ["INTEGER", "VARCHAR", "DECIMAL(8,2)"]
    assert (item.primary_key, order.primary_key) == (("id",), ("id",))
    assert item.description == "things that are sold"
    assert item.columns[4].description == "day of production"
    assert item.columns[1].examples == ("ink", "nib") and not order.columns[2].examples
    assert item.columns[5].examples == ("false", "true")
    (key,) = line.foreign_keys
    assert (key.columns, key.ref_table, key.ref_columns) == (("order",), "sales.order", ("id",))
    assert cheap.is_view and cheap.column_names == ("name",)
    assert 'CREATE TABLE sales."order" (' in render(schema, "ddl")
    bare = reflect(place.database, "shop", 0, place.executor)
    assert not any(table.is_described for table in bare.tables)


def test_reserved_words_are_quoted(place: Place) -> None:
    words = place.executor.run(
        place.database,
        "SELECT keyword_name FROM duckdb_keywords() WHERE keyword_category <> 'unreserved'",
        PATIENT,
    )
    assert words.status == "ok" and len(words.rows) > 50
    names = [name for (name,) in words.rows]
    script = "".join(f'CREATE TABLE t{n} ("{name}" INT);' for n, name in enumerate(names))
    file = make_database(place.folder.parent / "words.duckdb", script)
    schema = reflect(file, "words", executor=place.executor)
    with duckdb.connect() as connection:  # as written, its statements run
        for statement in render(schema, "ddl").split("\n\n"):
            connection.execute(statement)


def test_errors_are_named_as_those_of_sqlite(tmp_path: Path) -> None:
    mall = make_database(tmp_path / "mall.duckdb", SHOP)
    kinds = ERROR_KINDS | {
        "SELECT c.nom FROM customer c": "no such column",
        "SELECT x.name FROM customer c": "no such table",
    }
    with Executor(1, PATIENT) as executor:
        assert error_kinds(executor, mall, kinds) == kinds
        for _, sql in QUESTIONS:
            assert judge(executor, Pair(mall, sql, sql), semantics="spider").verdict == "correct"


def test_a_database_that_is_written_is_named(tmp_path: Path) -> None:
    file = make_database(tmp_path / "shop.db", "CREATE TABLE a (b INT)")
    code = "import duckdb, sys; c = duckdb.connect(sys.argv[1]); print(1, flush=True); input()"
    with (
        subprocess.Popen(
            [sys.executable, "-c", code, str(file)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as writer,
        Executor(1, PATIENT) as executor,
    ):
        assert writer.stdout is not None and writer.stdout.readline() == "1\n"
        with pytest.raises(DataError, match=r"DuckDB: .*shop\.db.*close the program"):
            executor.run(file, "SELECT 1")
        writer.communicate("\n")
        assert executor.run(file, "SELECT 1").rows == ((1,),)
        (tmp_path / "shop.db.wal").write_bytes(b"x")
        with pytest.raises(DataError, match=r"changes are still in shop\.db\.wal"):
            executor.run(file, "SELECT 1")
        (tmp_path / "broken.duckdb").write_bytes(file.read_bytes()[:5000])
        with pytest.raises(DataError, match=r"cannot connect to DuckDB: .*check it with duckdb"):
            executor.run(tmp_path / "broken.duckdb", "SELECT 1")


def write_pairs(folder: Path) -> Path:
    lines = [{"question": question, "query": sql} for question, sql in QUESTIONS]
    lines.append({"question": "What fails?", "query": "SELECT nam FROM customer"})
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder / "pairs.jsonl"


@pytest.mark.parametrize("where", ["mall.duckdb", "duckdb:///mall.duckdb", "mall.db"])
def test_pairs_become_a_dataset_and_are_scored(
    where: str, make_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    made = make_database(tmp_path / "mall.duckdb", SHOP)
    if where.endswith(".db"):
        shutil.move(made, tmp_path / where)
    flags = {"pairs": str(write_pairs(tmp_path)), "url": where, "output_dir": str(tmp_path)}
    flags["cache_dir"] = str(tmp_path / "cache")
    words = [word for name, value in flags.items() for word in (f"--{name}", value)]
    record = prepare(load(PrepareConfig, words))
    assert record["counts"]["rejected"] == 1 and record["server"] is None
    folder = tmp_path / "dataset"
    rejected = json.loads((folder / "rejected.jsonl").read_text())
    assert "no such column" in rejected["reason"] and "SELECT name" in str(rejected["fix"])
    assert [path.name for path in folder.glob("databases/*/*")] == ["mall.duckdb"]
    rows = [json.loads(line) for line in (folder / "dev.jsonl").read_text().splitlines()]
    predicted = [{"id": row["id"], "predicted": row["query"]} for row in rows]
    predicted[0]["predicted"] = "SELECT 'wrong', 1, 2, 3"
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, predicted)))
    settings = {"predictions_file": str(tmp_path / "p.jsonl"), "dataset_id": str(folder)}
    (score,) = evaluate.run(make_config(EvaluateConfig, **settings))["file"].values()
    assert (score["n"], score["correct"]) == (len(rows), len(rows) - 1)


def test_answers_on_duckdb_are_not_constrained(place: Place) -> None:
    question = Question("1", "dev", "shop", "", "", None, str(place.database), [])
    assert guards({"shop": {}}, [question]) == {}


def test_ties_are_found_by_their_keys(place: Place) -> None:
    file = place.database
    schema = reflect(file, "shop")
    queries = {
        "SELECT name FROM (VALUES ('a', 1), ('b', 2), ('c', 2)) v(name, n) ORDER BY n DESC "
        "LIMIT 1 OFFSET 1": "limit_tie",
        "SELECT name FROM (VALUES ('a', 1), ('b', 2), ('c', 2)) v(name, n) ORDER BY n": "tie_order",
        "SELECT name FROM (VALUES ('a', 1), ('b', 2), ('c', 2)) v(name, n) ORDER BY n LIMIT 1": "",
        "SELECT name FROM (VALUES ('a', 1), ('b', 2)) v(name, n) ORDER BY n OFFSET 1": "",
    }
    with Executor(1) as executor, bench(executor, [file], lambda done, total: None) as tried:
        for sql, kind in queries.items():
            found = {flag.kind for flag in examine(tried, Subject(file, sql, schema))}
            assert found & {"limit_tie", "tie_order"} == ({kind} if kind else set()), sql
