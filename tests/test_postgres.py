"""Questions on a real PostgreSQL server: no write, every query ends, verdicts are SQLite's."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ray_sql import data, evaluate, finetune, generate
from ray_sql.config import EvaluateConfig
from ray_sql.database import Executor, reflect
from ray_sql.errors import ConfigError, DataError
from ray_sql.evaluate import scoring
from ray_sql.evaluate.predictions_file import require_executable
from ray_sql.finetune import plan, prepare
from ray_sql.generate import Answer, Question
from ray_sql.tasks import SQL
from tests.conftest import QUESTIONS, SHOP
from tests.databases import ERROR_KINDS, ends_as, error_kinds
from tests.postgres import LIMITS, Server, running
from tests.waiting import wait_until

psycopg = pytest.importorskip("psycopg")
pytestmark = pytest.mark.postgres

ENDLESS = "SELECT count(*) FROM generate_series(1, 1000000) a, generate_series(1, 1000000) b"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running() as started:
        yield started


@pytest.fixture(scope="module")
def executor(server: Server) -> Iterator[Executor]:
    with Executor(2, LIMITS) as executor:
        yield executor


REFUSED = [
    "INSERT INTO item VALUES (9)",
    "UPDATE item SET price = 0",
    "DELETE FROM item",
    "  ;DELETE FROM item",
    "TRUNCATE item",
    "DROP TABLE item",
    "CREATE TABLE other (a int)",
    "CREATE TEMP TABLE other AS SELECT 1",
    "SELECT * INTO other FROM item",
    "WITH gone AS (DELETE FROM item RETURNING *) SELECT * FROM gone",
    "WITH new AS (INSERT INTO item VALUES (9) RETURNING *) SELECT * FROM new",
    "SELECT * FROM item FOR UPDATE",
    "SELECT 1; DELETE FROM item",
    "SELECT 1; COMMIT; DELETE FROM item",
    "COMMIT",
    "ROLLBACK",
    "BEGIN READ WRITE",
    "SET TRANSACTION READ WRITE",
    "SET statement_timeout = 0",
    "RESET ALL",
    "COPY item TO '/tmp/ray_sql-copy'",
    "COPY item FROM PROGRAM 'echo 9'",
    "COPY (SELECT 1) TO PROGRAM 'touch {folder}/made'",
    "DO 'BEGIN DELETE FROM item; END'",
    "CALL remove()",
    "EXPLAIN ANALYZE SELECT remove()",
    "VACUUM",
    "GRANT ALL ON item TO PUBLIC",
    "CREATE ROLE evil SUPERUSER",
    "LISTEN x",
    "LOCK TABLE item",
    "PREPARE x AS SELECT 1",
    "DECLARE c CURSOR FOR SELECT 1",
    "SELECT remove()",
    "SELECT nextval('number')",
    "SELECT setval('number', 100)",
    "SELECT lo_import('/etc/passwd')",
    "SELECT lo_create(0)",
    "SELECT lo_from_bytea(0, 'x')",
    "SELECT pg_read_file('/etc/passwd')",
    "SELECT pg_ls_dir('/')",
    "SELECT pg_sleep(100)",
    'SELECT "pg_sleep"(100)',
    "SELECT pg_catalog.pg_sleep /* a comment */ (100)",
    "SELECT PG_SLEEP(100)",
    'SELECT U&"pg\\005fsleep"(100)',
    "SELECT U&\"pg!005fsleep\" UESCAPE '!' (100)",
    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity",
    "SELECT pg_cancel_backend(1)",
    "SELECT pg_reload_conf()",
    "SELECT pg_rotate_logfile()",
    "SELECT pg_advisory_lock(1)",
    "SELECT set_config('transaction_read_only', 'off', false), remove()",
    "SELECT set_config('statement_timeout', '0', false)",
    "SELECT query_to_xml('SELECT pg_terminate_backend(1)', true, true, '')",
    "SELECT * FROM ts_stat('SELECT pg_sleep(100)::text::tsvector')",
    "SELECT pg_logical_emit_message(false, 'x', 'y')",
    "SELECT pg_notify('x', 'y')",
    "SELECT pg_switch_wal()",
    "SELECT pg_stat_reset()",
    "SELECT pg_create_restore_point('x')",
    "SELECT 1\0; DELETE FROM item",
]
STOPPED = [
    ENDLESS,
    "SELECT * FROM generate_series(1, 1000000000)",
    "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT i FROM n",
    "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT max(i) FROM n",
    "SELECT a.x FROM generate_series(1, 1000000) a(x), generate_series(1, 1000000) b "
    "ORDER BY a.x DESC",
    "SELECT repeat('x', 100000000)",
    "SELECT repeat('x', 2000000)",
    "SELECT repeat('x', 10000) FROM generate_series(1, 1000)",
    "SELECT array_agg(a) FROM generate_series(1, 100000000) a",
    "SELECT string_agg(repeat('x', 1000), '') FROM generate_series(1, 10000)",
    "SELECT 1 " + " " * 20_000,
]
FAILED = [
    "",
    ";",
    "-- nothing",
    "SELEC 1",
    "The answer is 42.",
    "SELECT $1",
    "SELECT '\ud800'",
    "SELECT 1 / 0",
    "SELECT 'x'::int",
    "SELECT no_such_function(1)",
    "SELECT repeat('9', 5000)::numeric",  # more digits than Python reads
    "SELECT * FROM other.item",
]


@pytest.mark.parametrize(
    ("statements", "outcome"), [(REFUSED, "refused"), (STOPPED, "stopped"), (FAILED, "failed")]
)
def test_hostile_statements_do_no_harm(
    server: Server, executor: Executor, statements: list[str], outcome: str
) -> None:
    before, files = server.state(), server.files()
    wrong = []
    for index, sql in enumerate(statements):
        result = executor.run(server.url("hostile"), sql)
        if not ends_as(result, outcome):
            wrong.append((sql[:80], result.status, (result.error or "")[:100]))
        after = executor.run(
            server.url("hostile"), f"SELECT count(*), {len(wrong)} FROM item -- {outcome} {index}"
        )
        assert after.rows == ((3, len(wrong)),), (sql, after)
    assert wrong == []
    assert server.state() == before and server.files() == files and server.busy() == []


def test_values_are_plain_and_equal_values_are_equal(server: Server, executor: Executor) -> None:
    def cells(sql: str) -> tuple[Any, ...]:
        result = executor.run(server.url("hostile"), sql)
        assert result.status == "ok", result
        return result.rows[0]

    assert cells("SELECT id, name, price, weight, made, sold, code FROM item WHERE id = 1") == (
        *(1, "pen", 1.5, 0.5, "2024-01-02", 1, "p1"),
    )
    assert cells("SELECT sum(id), avg(id), avg(weight), count(*) FROM item WHERE id < 3") == (
        3,
        1.5,
        0.5,
        2,
    )
    assert [
        type(cell) for cell in cells("SELECT sum(id::bigint), avg(id), max(id)::float8 FROM item")
    ] == [*(int, float, float)]
    numeric, double = cells("SELECT sum(price) / 3 AS a, sum(price)::float8 / 3 AS b FROM item")
    assert numeric == double
    assert cells(
        "SELECT 'NaN'::float8, 'NaN'::numeric, 'Infinity'::float8, NULL, true, 0.1::real"
    ) == (*("NaN", "NaN", float("inf"), None, 1, 0.1),)
    assert cells(
        "SELECT timestamptz '2024-01-02 03:04:05+02', interval '90 minutes', '\\x00ff'::bytea, "
        "ARRAY[1, 2]"
    ) == (*("2024-01-02 01:04:05+00", "01:30:00", b"\x00\xff", "{1,2}"),)
    assert cells("SELECT 12345678901234567890::numeric, -7::numeric, raised(1.5)") == (
        12345678901234567890,
        -7,
        3.0,
    )
    assert executor.run(server.url("hostile"), "SELECT id AS a, id AS a FROM item;").columns == (
        "a",
        "a",
    )
    many = executor.run(server.url("hostile"), "SELECT i, i::text FROM generate_series(1, 1000) i")
    assert many.rows == tuple((number, str(number)) for number in range(1, 1001))


def test_a_server_that_hangs_is_given_up_at_the_limit(server: Server) -> None:
    with Executor(1, replace(LIMITS, seconds=2)) as executor:
        assert executor.run(server.url("hostile"), "SELECT 1").rows == ((1,),)
        with ThreadPoolExecutor() as threads:
            answer = threads.submit(executor.run, server.url("hostile"), ENDLESS)
            (working,) = wait_until(server.busy)
            os.kill(working, signal.SIGSTOP)
            result = answer.result()
            os.kill(working, signal.SIGCONT)
        assert result.status == "timeout" and "killed" in (result.error or "")
        assert executor.run(server.url("hostile"), "SELECT 2").rows == ((2,),)
    wait_until(lambda: server.busy() == [])  # the backend itself ends by its own timeout


def test_a_lock_of_another_session_is_waited_for_no_longer_than_the_limit(
    server: Server, executor: Executor
) -> None:
    with psycopg.connect(server.url("hostile")) as other:
        other.execute("LOCK TABLE item IN ACCESS EXCLUSIVE MODE")
        result = executor.run(server.url("hostile"), "SELECT name FROM item WHERE id = 2")
        assert result.status == "timeout", "while the other still holds the lock"
    assert executor.run(server.url("hostile"), "SELECT name FROM item WHERE id = 2").rows == (
        ("ink",),
    )


def test_a_role_without_rights_reads_what_it_may(server: Server, executor: Executor) -> None:
    with psycopg.connect(server.url("hostile")) as owner:
        owner.execute("CREATE ROLE reader LOGIN; GRANT SELECT (id, name) ON item TO reader")
    reader = server.url("hostile").replace("owner", "reader")
    assert executor.run(reader, "SELECT name FROM item WHERE id = 3").rows == (("nib",),)
    refused = executor.run(reader, "SELECT price FROM item")
    assert (refused.status, refused.error) == ("error", "refused: permission denied for table item")
    with psycopg.connect(server.url("hostile")) as owner:
        owner.execute("DROP OWNED BY reader; DROP ROLE reader")


def test_errors_are_named_as_those_of_sqlite(server: Server, executor: Executor) -> None:
    kinds = ERROR_KINDS | {"SELECT c.nom FROM customer c": "no such column", ENDLESS: "timeout"}
    assert error_kinds(executor, server.url("mall"), kinds) == kinds


def test_what_cannot_be_reached_or_is_no_postgresql_is_said(server: Server, tmp_path: Path) -> None:
    with Executor(1, LIMITS) as executor:
        with pytest.raises(
            DataError, match=r"cannot connect to PostgreSQL: .*nowhere.*check the URL"
        ):
            executor.run(server.url("nowhere"), "SELECT 1")
        with pytest.raises(DataError, match=r"cannot connect to PostgreSQL: .*refused"):
            executor.run("postgresql://me:secret@127.0.0.1:9/x", "SELECT 1")
        with pytest.raises(
            DataError,
            match=r"^mssql\+pyodbc: queries can be executed on SQLite and DuckDB files, on Postgre",
        ):
            executor.run("mssql+pyodbc://me:secret@host/x", "SELECT 1")
        # one worker serves both kinds in turn
        sqlite3.connect(tmp_path / "x.sqlite").executescript(SHOP).close()
        for _ in range(2):
            assert executor.run(tmp_path / "x.sqlite", "SELECT count(*) FROM customer").rows == (
                (4,),
            )
            assert executor.run(
                str(tmp_path / "x.sqlite"), "SELECT max(id) FROM customer"
            ).rows == ((4,),)
            assert executor.run(server.url("mall"), "SELECT count(*) FROM customer").rows == ((4,),)
            assert executor.run(
                server.url("mall").replace("://", "+psycopg://"), "SELECT 5"
            ).rows == ((5,),)


@pytest.fixture
def questions(server: Server, tmp_path: Path) -> dict[str, str]:
    """Settings of a run on questions of the database `mall`, which is on the server."""
    folder = tmp_path / "questions"
    folder.mkdir()
    for split, pairs in (
        ("train", QUESTIONS),
        ("dev", QUESTIONS[:6] + [("What fails?", "SELECT x FROM nowhere")]),
    ):
        lines = [
            json.dumps({"db_id": "mall", "question": question, "query": sql})
            for question, sql in pairs
        ]
        (folder / f"{split}.jsonl").write_text("\n".join(lines))
    return {"dataset_id": str(folder), "data.databases": server.url("{db_id}")}


def test_the_schema_is_read_with_psycopg_3(server: Server) -> None:
    schema = reflect(server.url("mall"), "mall")
    assert [table.name for table in schema.tables] == ["customer", "product", "sale"]


def test_a_predictions_file_is_scored_on_a_server(
    questions: dict[str, str], make_config: Any, tmp_path: Path
) -> None:
    predicted = [sql for _, sql in QUESTIONS[:6]] + ["SELECT 1"]
    predicted[1:4] = [
        "SELECT upper(name) FROM customer",
        "SELECT nom FROM customer",
        "DELETE FROM product",
    ]
    (tmp_path / "p.jsonl").write_text(
        "\n".join(json.dumps({"id": str(n), "predicted": p}) for n, p in enumerate(predicted))
    )
    given = {"predictions_file": str(tmp_path / "p.jsonl"), "evaluate.limit": 9}
    config = make_config(EvaluateConfig, **given, **questions)
    scores = evaluate.run(config)["file"]["dev"]
    assert (scores["n"], scores["correct"], scores["gold_errors"]) == (6, 3, 1)
    assert scores["errors"] == {"wrong rows": 1, "no such column": 1, "refused": 1}


def test_gold_and_answers_of_a_run_are_judged_on_a_server(
    questions: dict[str, str], make_config: Any
) -> None:
    config = make_config(**questions)
    prepared = prepare.prepare(config)
    assert [(row["split"], row["gold"]) for row in prepared.gold_errors] == [
        ("dev", "SELECT x FROM nowhere")
    ]
    scored = prepared.questions()
    answers = [Answer(f"```sql\n{question.gold}\n```", 1, 1, 0.1) for question in scored]
    judged = scoring.score(scored, answers, SQL, config.evaluate)
    assert {row["verdict"] for row in judged} <= {"correct", "gold_error"} and len(judged) == 4
    assert prepared.validation() != []
    assert not [line for line in plan.lines(prepared) if "nothing can be executed" in line]


def test_a_run_trains_and_measures_on_a_server(questions: dict[str, str], make_config: Any) -> None:
    config = make_config(save_steps=2, **questions)
    metrics = finetune.run(config)
    assert metrics["tuned"]["dev"]["n"] + metrics["tuned"]["dev"]["gold_errors"] == 4
    rows = [
        json.loads(line)
        for line in (Path(config.run_dir) / "predictions.jsonl").read_text().splitlines()
    ]
    assert len(rows) == 4


def test_a_password_is_in_no_file_and_workers_that_need_it_are_refused(
    questions: dict[str, str], make_config: Any
) -> None:
    open_url = questions["data.databases"]
    secret = open_url.replace("owner@", "owner:verysecret@")
    with pytest.raises(ConfigError, match="PGPASSWORD"):
        prepare.prepare(make_config(**questions | {"data.databases": secret}))
    config = make_config(**questions | {"data.databases": secret, "evaluate.select_examples": 0})
    prepared = prepare.prepare(config)
    scored = prepared.questions()
    assert "verysecret" in (scored[0].database or "")
    assert generate.parse(generate.dump(scored))[0] == replace(
        scored[0], database=open_url.replace("{db_id}", "mall")
    )
    prepare.write_inputs(prepared)
    for place in (Path(config.run_dir), config.cache):
        assert not [
            path
            for path in place.rglob("*")
            if path.is_file() and b"verysecret" in path.read_bytes()
        ]


def test_other_servers_are_refused_where_sql_is_to_be_scored() -> None:
    corpus = data.Corpus({"dev": ()}, {}, {"a": "mssql://host/a"})
    with pytest.raises(DataError, match="not on mssql"):
        require_executable(corpus, SQL)
    require_executable(replace(corpus, databases={"a": "postgresql+psycopg://host/a"}), SQL)
    assert corpus.executable("a") is None and corpus.executable("b") is None
    assert (
        replace(corpus, databases={"a": "sqlite:////data/a.sqlite"}).executable("a")
        == "/data/a.sqlite"
    )


def test_questions_of_a_server_survive_their_file(server: Server) -> None:
    question = Question("1", "dev", "mall", "?", "SELECT 1", None, server.url("mall"), [1])
    assert generate.parse(generate.dump([question])) == [question]
