"""Calls that PostgreSQL cannot stop, and functions that act outside: none is begun."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ray_sql import evaluate
from ray_sql.config import EvaluateConfig
from ray_sql.database import Executor
from ray_sql.preflight import rights
from tests.postgres import LIMITS, Server, running
from tests.waiting import wait_until

psycopg = pytest.importorskip("psycopg")
pytestmark = pytest.mark.postgres
KIND = pytest.mark.kind("PostgreSQL calls without an end")

LONG, OTHER = "repeat(repeat('a', 10000), 1000)", "repeat(repeat('b', 10000), 1000)"
LIST = "(SELECT array_agg(i) FROM generate_series(1, 1000000) i)"
OTHERS = "(SELECT array_agg(-i) FROM generate_series(1, 1000000) i)"
JSON = LIST.replace("array_agg", "jsonb_agg")
OTHER_JSON = OTHERS.replace("array_agg", "jsonb_agg")
TEXTS = "(SELECT array_agg(i::text) FROM generate_series(1, 1000000) i)"
NUMBER = f"('1.' || {LONG.replace('10000', '16')})::numeric"
ATTRIBUTES = "'<a ' || string_agg('a' || i || '=\"\"', ' ') || '/>'"


def doubled(letter: str, more: str = "x || x || x || x") -> str:
    """Return a query whose text is four times as long at each of its levels."""
    query = f"SELECT '{letter}'::text x"
    for level in range(11):
        query = f"SELECT {more} AS x FROM ({query}) t{level}"
    return f"({query})"


def nested(function: str, letter: str = "a") -> str:
    """Return calls in calls, each of which writes ten letters for one."""
    flags = ", 'g'" if function == "regexp_replace" else ""
    call = f"'{letter}'"
    for _ in range(7):
        call = f"{function}({call}, '{letter}', '{letter * 10}'{flags})"
    return call


def quoted(times: int) -> str:
    """Return a text that is quoted again and again, which doubles its quotes."""
    return "quote_literal(" * times + "'" * 4 + ")" * times


def steps() -> str:
    """Return common table expressions, each ten times as long as the one before."""
    ten = ", ".join(f"{' || '.join([name] * 10)} {name}" for name in "xy")
    first = "s0 AS (SELECT 'aaaaaaaaaa'::text x, 'bbbbbbbbbb'::text y)"
    return ", ".join([first, *(f"s{n} AS (SELECT {ten} FROM s{n - 1})" for n in range(1, 6))])


ENDLESS = [
    f"SELECT length(translate({LONG}, {OTHER}, ''))",
    f"SELECT length(btrim({LONG}, {OTHER} || 'a'))",
    f"SELECT length(ltrim({LONG}, {OTHER} || 'a'))",
    f"SELECT length(trim(both {OTHER} from {LONG}))",
    f"SELECT position('b' || {LONG} IN {LONG})",
    f"SELECT strpos({LONG}, 'b' || {LONG})",
    f"SELECT replace({LONG}, 'b' || {LONG}, '')",
    f"SELECT split_part({LONG}, 'b' || {LONG}, 2)",
    f"SELECT string_to_array({LONG}, 'b' || {LONG})",
    f"SELECT * FROM string_to_table({LONG}, 'b' || {LONG})",
    f"SELECT position(('b' || {LONG})::bytea IN ({LONG})::bytea)",
    "SELECT position(('1' || repeat('0', 1000000))::bit varying IN '0'::bit(80000000))",
    "WITH a AS (SELECT repeat('a', 1000000) x, repeat('b', 1000000) y) "
    "SELECT translate(x, y, '') FROM a",
    "SELECT translate(s.x, s.y, '') FROM (SELECT lpad('a', 1000000) x, rpad('b', 1000000) y) s",
    "SELECT translate(x, y, '') FROM (SELECT string_agg('a', '') x, string_agg('b', '') y "
    "FROM generate_series(1, 1000000)) s",
    "SELECT translate(x, y, '') FROM (SELECT string_agg('a', '') x, string_agg('b', '') y "
    "FROM item a, item b, item c) s",
    "WITH RECURSIVE r(a, b) AS (SELECT 'a', 'b' UNION ALL SELECT a || a, b || b FROM r "
    "WHERE length(a) < 1000000) SELECT translate(a, b, '') FROM r",
    "SELECT translate((SELECT lpad('a', 1000000)), (SELECT lpad('b', 1000000)), '')",
    f"SELECT {LIST} && {OTHERS}",
    f"SELECT {LIST} @> {OTHERS}",
    f"SELECT {OTHERS} <@ {LIST}",
    "SELECT array_fill(1, ARRAY[1000000]) && array_fill(2, ARRAY[1000000])",
    "SELECT ARRAY(SELECT generate_series(1, 1000000)) && ARRAY(SELECT generate_series(-9, 999999))",
    f"SELECT {JSON} @> {OTHER_JSON}",
    f"SELECT {JSON} ?& {TEXTS}",
    f"SELECT {JSON} ?| {TEXTS}",
    f"SELECT {JSON} - {TEXTS}",
    "SELECT repeat('9', 130000)::numeric % repeat('8', 60000)::numeric",
    f"SELECT array_length(normalize(string_to_array({LONG}, NULL)::text), 1)",
    "SELECT length(normalize(repeat(chr(803) || chr(775), 10000000), NFC))",
    f"SELECT exp({NUMBER})",
    f"SELECT ln({NUMBER})",
    f"SELECT power({NUMBER}, {NUMBER})",
    f"SELECT {NUMBER} ^ {NUMBER}",
    f"SELECT sqrt({NUMBER})",
    "SELECT exp(1.5::numeric(10000, 9000))",
    f"SELECT gcd({NUMBER}, {NUMBER} + 1)",
    "SELECT polygon(1000000, circle '((0,0),1)') && polygon(1000000, circle '((0,0),1)')",
    "SELECT a ?# b FROM (SELECT ('[' || string_agg('(' || i || ',1)', ',') || ']')::path a, "
    "('[' || string_agg('(' || i || ',2)', ',') || ']')::path b "
    "FROM generate_series(1, 1000000) i) s",
    "SELECT xpath('count(//*[count(//*[count(//*) > 0]) > 0])', "
    "('<a>' || repeat('<b/>', 100000) || '</a>')::xml)",
    "SELECT xpath_exists('//*[count(//*[count(//*) > 0]) > 0]', '<a><b/><b/></a>'::xml)",
    "SELECT * FROM xmltable('//*' PASSING '<a/>'::xml COLUMNS x text PATH '.')",
    f"SELECT starts_with({LONG}, {LONG}), translate({LONG}, {LONG}, '')",
    # values made long by other means
    "SELECT strpos(format('%9000000s', ''), 'b' || format('%3000000s', ''))",
    "SELECT strpos(format('%*s', 9000000, ''), 'b' || format('%*s', 3000000, ''))",
    f"SELECT translate({doubled('a')}, {doubled('b')}, '')",
    f"SELECT translate({doubled('a', 'concat(x, x, x, x)')}, {doubled('b')}, '')",
    f"SELECT translate({nested('replace')}, {nested('replace', 'b')}, '')",
    f"SELECT translate({nested('regexp_replace')}, {nested('regexp_replace', 'b')}, '')",
    f"SELECT position('b' || {quoted(20)} IN {quoted(22)})",
    f"WITH {steps()} SELECT translate(x, y, '') FROM s5",
    "SELECT translate('0'::bit/**/(3000000)::text, (~('0'::bit/**/(3000000)))::text, '')",
    "SELECT a @> b FROM (SELECT string_to_array(format('%3000000s', ''), NULL) a, "
    "ARRAY['x'] || string_to_array(format('%3000000s', 'b'), NULL) b) s",
    # rows made by other means
    "SELECT translate(string_agg('a', ''), string_agg('b', ''), '') FROM pg_proc a "
    "JOIN pg_proc b ON true",
    "SELECT array_agg(a.oid::bigint) && array_agg(-b.oid::bigint) FROM pg_proc a "
    "JOIN pg_proc b ON 1 = 1",
    "SELECT array_agg(a.oid::bigint) && array_agg(-b.oid::bigint) FROM pg_proc a "
    "JOIN pg_proc b ON a.oid <> b.oid",
    "SELECT array_agg(a.oid::bigint) && array_agg(-b.oid::bigint) FROM pg_proc a "
    "LEFT JOIN LATERAL (SELECT oid FROM pg_proc WHERE a.oid > 0) b ON true",
    "SELECT translate(string_agg('a', ''), string_agg('b', ''), '') "
    "FROM string_to_table(format('%3000000s', ''), NULL)",
    "SELECT array_agg(m[1]) && array_agg(m[1] || 'x') "
    "FROM regexp_matches(format('%3000000s', ''), '.', 'g') m",
    "SELECT array_agg(v::text) && array_agg(v::text || 'x') FROM json_array_elements("
    "('[' || replace(format('%1000000s', ''), ' ', '1,') || '1]')::json) v",
    # long on a single value
    f"SELECT ({ATTRIBUTES})::xml IS NULL FROM generate_series(1, 400000) i",
    f"SELECT xml_is_well_formed({ATTRIBUTES}) FROM generate_series(1, 400000) i",
    "SELECT ('a' || string_agg(' | a' || i, ''))::tsquery IS NULL "
    "FROM generate_series(1, 900000) i",
    "SELECT numnode(to_tsquery(repeat('a|', 1000000) || 'a'))",
    "SELECT array_length(parse_ident('a' || repeat('.a', 100000000)), 1)",
]
"""One call each that goes on for hours, and that no limit of the server ends."""
ORDINARY = [
    "SELECT string_agg(replace(name, 'n', 'm'), ', ' ORDER BY id) FROM item",
    "SELECT lpad(id::text, 3, '0') || '-' || rpad(name, 5, '.') FROM item",
    "SELECT array_agg(id) @> ARRAY[1, 2], array_agg(name) && ARRAY['pen'] FROM item",
    "SELECT repeat('*', id), translate(name, 'aeiou', 'AEIOU'), position('n' IN name) FROM item",
    "SELECT trim(lpad(id::text, 5, ' ')), power(id, 2), sqrt(weight), exp(1), ln(2) FROM item",
    "SELECT factorial(id + 3) / (factorial(id) * factorial(3)) FROM item",
    "SELECT json_build_object('a', array_agg(id), 'b', array_agg(name)) FROM item",
    "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 9) SELECT sum(i) "
    "FROM n",
    "WITH RECURSIVE r(id, total) AS (SELECT id, weight FROM item WHERE id = 1 UNION ALL "
    "SELECT item.id, r.total + item.weight * r.id - item.id FROM item JOIN r "
    "ON item.id = r.id + 1) SELECT total / (id + total), round(total) FROM r",
    "WITH a AS (SELECT sold, string_agg(name, ',') s FROM item GROUP BY sold) "
    "SELECT replace(s, ',', ';') FROM a",
    "SELECT d::date, count(id) FROM generate_series('2024-01-01'::date, '2024-03-01', '1 month') d "
    "LEFT JOIN item ON date_trunc('month', made) = d GROUP BY d",
    "SELECT a.name FROM item a, item b WHERE a.id = b.id + 1 AND a.name LIKE '%n%'",
    "WITH f AS (SELECT id, name || ' (' || code || ')' AS n FROM item) "
    "SELECT position(a.n IN concat(b.n, '!')) FROM f a JOIN f b ON b.id >= a.id",
    "SELECT strpos(replace(a.name, 'n', ''), replace(b.name, '-', ' ')), "
    "format('%s: %-9s', a.name, b.code), quote_literal(a.name) FROM item a JOIN item b ON true",
    "SELECT a.ids && b.ids FROM (SELECT sold, array_agg(id) ids FROM item GROUP BY sold) a "
    "JOIN (SELECT sold, array_agg(id) ids FROM item GROUP BY sold) b ON a.sold = b.sold",
    "SELECT array_to_string(array_agg(name ORDER BY id), ', '), "
    "regexp_replace(min(name), '[aeiou]', '*', 'g') FROM item",
    "SELECT CAST(price AS decimal(10, 2)), code::char(6) || '-' || name, '<a/>'::xml::text "
    "FROM item",
]
OWN = """
CREATE FUNCTION reads() RETURNS text LANGUAGE sql AS $$ SELECT pg_read_file('/etc/passwd') $$;
CREATE FUNCTION reads_too() RETURNS text LANGUAGE plpgsql AS 'BEGIN RETURN reads(); END';
CREATE FUNCTION sleeps(x int) RETURNS int LANGUAGE sql BEGIN ATOMIC
  SELECT count(pg_sleep(100))::int + x; END;
CREATE FUNCTION raises() RETURNS int LANGUAGE sql SECURITY DEFINER AS 'SELECT 1';
CREATE FUNCTION hidden(int) RETURNS void LANGUAGE internal AS 'pg_sleep';
CREATE AGGREGATE slow(int) (SFUNC = step, STYPE = int);
CREATE VIEW watch AS SELECT pg_terminate_backend(0) AS done;
CREATE VIEW "Over it" AS SELECT done FROM watch;
CREATE VIEW plain AS SELECT random() AS r, upper('a') AS done;
CREATE OPERATOR ### (FUNCTION = step, LEFTARG = int, RIGHTARG = int);
CREATE DOMAIN checked AS int CHECK (sleeps(value) > 0);
CREATE TYPE pair AS (a int, b text);
CREATE FUNCTION to_pair(text) RETURNS pair LANGUAGE sql AS 'SELECT (1, reads())::pair';
CREATE CAST (text AS pair) WITH FUNCTION to_pair(text);
CREATE DOMAIN checked_too AS checked;
CREATE AGGREGATE moves(int) (SFUNC = int4pl, STYPE = int, MSFUNC = step, MINVFUNC = step,
  MSTYPE = int);
CREATE FOREIGN DATA WRAPPER files;
CREATE SERVER filled FOREIGN DATA WRAPPER files;
CREATE FOREIGN TABLE lines (line text) SERVER filled OPTIONS (program 'touch here');
CREATE TABLE guarded AS SELECT 1 AS done;
CREATE POLICY rows_of ON guarded USING (sleeps(done) > 0);
"""
STEP = """
CREATE FUNCTION step(a int, b int) RETURNS int LANGUAGE plpgsql
  AS 'BEGIN PERFORM pg_sleep(100); RETURN a; END';
"""


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running() as started:
        yield started


def own(server: Server) -> str:
    """Return the URL of a database with functions of its own, which act outside."""
    with psycopg.connect(server.url("hostile")) as owner:
        owner.execute("CREATE SCHEMA IF NOT EXISTS own; SET LOCAL search_path = own")
        if not owner.execute("SELECT to_regproc('reads')").fetchone()[0]:
            owner.execute(STEP + OWN)
    return f"{server.url('hostile')}&options=-csearch_path%3Dpublic,own"


@pytest.fixture(scope="module")
def executor(server: Server) -> Iterator[Executor]:
    with Executor(2, LIMITS) as executor:
        yield executor


@KIND
@pytest.mark.parametrize("sql", ENDLESS)
def test_a_call_without_an_end_is_not_begun(server: Server, executor: Executor, sql: str) -> None:
    result = executor.run(server.url("hostile"), sql)
    assert (result.status, result.rows) == ("error", ())
    assert (result.error or "").startswith("refused: FUNCTION ")
    assert server.busy() == []


@KIND
@pytest.mark.parametrize("sql", ORDINARY)
def test_an_ordinary_call_is_run(server: Server, executor: Executor, sql: str) -> None:
    result = executor.run(server.url("hostile"), sql, replace(LIMITS, seconds=20))
    assert result.status == "ok" and result.rows, result


@KIND
@pytest.mark.parametrize(
    "call", ["reads()", "reads_too()", "sleeps(1)", "raises()", "hidden(1)", "slow(id)"]
)
def test_a_function_of_the_database_that_acts_outside_is_refused(server: Server, call: str) -> None:
    url = own(server)
    with Executor(1, LIMITS) as executor:
        result = executor.run(url, f"SELECT {call} FROM item")
        assert result.error == f"refused: FUNCTION {call.partition('(')[0]}"
        assert executor.run(url, "SELECT raised(2) FROM item LIMIT 1").rows == ((4,),)


@KIND
@pytest.mark.parametrize(
    ("name", "sql"),
    [
        ("watch", "SELECT done FROM watch"),
        ("over it", 'SELECT done FROM "Over it"'),
        ("###", "SELECT id ### id FROM item"),
        ("###", "SELECT id OPERATOR(own.###) -1 FROM item"),
        ("checked", "SELECT id::checked FROM item"),
        ("checked_too", "SELECT checked_too(id) FROM item"),
        ("moves", "SELECT moves(id) OVER (ORDER BY id ROWS 1 PRECEDING) FROM item"),
        ("lines", "SELECT line FROM lines"),
        ("pair", "SELECT CAST(name AS pair) FROM item"),
        ("guarded", "SELECT done FROM guarded"),
    ],
)
def test_what_calls_a_function_that_acts_outside_is_refused(
    server: Server, name: str, sql: str
) -> None:
    with Executor(1, LIMITS) as executor:
        assert executor.run(own(server), sql).error == f"refused: FUNCTION {name}"
        assert executor.run(own(server), "SELECT done FROM plain").rows == (("A",),)


@KIND
def test_the_others_are_judged_where_a_call_stays_and_connections_are_few(server: Server) -> None:
    with psycopg.connect(server.url("hostile")) as owner:
        owner.execute("CREATE ROLE few LOGIN CONNECTION LIMIT 2; GRANT SELECT ON item TO few")
        # a table's own data is short in earnest; these take seconds
        owner.execute("CREATE TABLE long AS SELECT repeat('a', 28000) a, repeat('b', 28000) b")
        owner.execute("GRANT SELECT ON long TO few")
    url = server.url("hostile").replace("owner", "few")
    with Executor(1, LIMITS) as executor:
        stays = [executor.run(url, f"SELECT translate(a, b, '{n}') FROM long") for n in range(2)]
        assert {result.status for result in stays} == {"timeout"}
        last = executor.run(url, "SELECT name FROM item WHERE id = 1")
        assert last.status in ("ok", "timeout"), last
        wait_until(lambda: server.busy() == [])
        assert executor.run(url, "SELECT name FROM item WHERE id = 2").rows == (("ink",),)


@KIND
def test_a_file_of_endless_calls_is_judged_to_its_end(
    server: Server, make_config: Any, tmp_path: Path
) -> None:
    gold = "SELECT name FROM customer"
    predicted = [ENDLESS[0], gold, ENDLESS[4], ENDLESS[18], gold]
    rows = [{"db_id": "mall", "gold": gold, "predicted": sql} for sql in predicted]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = tmp_path / "data"
    data.mkdir()
    for split in ("train", "dev"):
        question = {"db_id": "mall", "question": "Who?", "query": gold}
        (data / f"{split}.jsonl").write_text(json.dumps(question))
    settings = {"dataset_id": str(data), "data.databases": server.url("{db_id}")}
    settings |= {"evaluate.limit": "9"}
    file = str(tmp_path / "p.jsonl")
    scores = evaluate.run(make_config(EvaluateConfig, predictions_file=file, **settings))["file"]
    assert [(split["n"], split["correct"]) for split in scores.values()] == [(5, 2)]
    assert server.busy() == []


@KIND
def test_the_rights_of_a_role_are_named(server: Server) -> None:
    with psycopg.connect(server.url("mall")) as owner:
        owner.execute("CREATE ROLE timid LOGIN; GRANT SELECT ON customer TO timid")
        owner.execute("CREATE ROLE bold LOGIN; GRANT pg_read_server_files TO bold")
        owner.execute("GRANT INSERT ON customer TO bold")
    said = {
        role: rights.of_role(server.url("mall").replace("owner", role))
        for role in ("owner", "timid", "bold")
    }
    assert said["owner"] == ["is a superuser"]
    assert said["timid"] == []
    assert said["bold"] == ["is a member of pg_read_server_files", "may write to customer"]
