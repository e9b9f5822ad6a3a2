"""Run the corpus of `hostile.py`: no byte changes, every query ends, the next one is answered.

Statements run two at a time, as in an evaluation, each kind in a test of its own. A property test
checks the same promises for SQL drawn at random.
"""

import os
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ray_sql.database import Executor, Limits, QueryResult
from tests.databases import hashes
from tests.hostile import REFUSED, SCHEMA, Hostile, corpus
from tests.waiting import HANGS

WORKERS = 2
LIMITS = Limits(seconds=0.3, rows=1000, bytes=2**20, memory=2**28, sql_length=20_000)
PATIENT = replace(
    LIMITS, seconds=5
)  # for what ends by itself, at once: on a busy machine a short limit would come first
GRACE_SECONDS = 0.3  # less than users get: much of this file's time is waiting for it
HARMLESS, ITS_ROWS = "SELECT id, name FROM item ORDER BY id", ((1, "pen"), (2, "ink"), (3, "nib"))
CORPUS = corpus()
KINDS = list(dict.fromkeys(statement.kind for statement in CORPUS))


@dataclass(frozen=True)
class Place:
    """A folder with databases, an executor whose workers sit in it, and its first state."""

    folder: Path
    executor: Executor

    @property
    def database(self) -> Path:
        return self.folder / "shop.sqlite"

    def state(self) -> dict[str, str]:
        return hashes(self.folder)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("hostile")
    make_database(folder / "shop.sqlite")
    make_database(folder / "other.sqlite")
    (folder / "note.txt").write_text("not to be read")
    (folder / "work").mkdir()
    with pytest.MonkeyPatch.context() as patch, Executor(WORKERS, LIMITS) as executor:
        patch.chdir(folder / "work")  # a relative name would land here
        patch.setattr("ray_sql.database.pool.GRACE_SECONDS", GRACE_SECONDS)
        yield Place(folder, executor)


def make_database(path: Path) -> None:
    connection = sqlite3.connect(path)
    connection.executescript(SCHEMA)
    connection.close()


def complaints(
    place: Place, before: dict[str, str], sql: str, limits: Limits = LIMITS
) -> tuple[QueryResult, list[str]]:
    """Run one statement, then a harmless one, and say which promise did not hold."""
    started = time.monotonic()
    result = place.executor.run(place.database, sql, limits)
    elapsed = time.monotonic() - started
    problems = [] if elapsed < HANGS else [f"took {elapsed:.2f} s"]
    if place.state() != before:
        problems.append(f"files changed: {dict(place.state().items() ^ before.items()).keys()}")
    size = sum(
        len(cell) if isinstance(cell, (str, bytes)) else 8 for row in result.rows for cell in row
    )
    if len(result.rows) > LIMITS.rows or max(size, sum(map(len, result.columns))) > LIMITS.bytes:
        problems.append(
            f"too large an answer: {len(result.rows)} rows, {size} bytes, "
            f"{len(result.columns)} columns"
        )
    if result.status == "ok" and result.error is not None:
        problems.append("both an answer and an error")
    if result.status != "ok":
        error = result.error or ""
        if (
            not error
            or len(error.splitlines()) != 1
            or len(error) > 2000
            or result.rows
            or result.columns
        ):
            problems.append(f"no error of one short line: {error[:100]!r} of {len(error)}")
    after = place.executor.run(
        place.database, f"{HARMLESS} -- after {sql!a}"[:1000], Limits(seconds=20)
    )
    if after.rows != ITS_ROWS:
        problems.append(f"the next query gave {after}")
    return result, problems


def unlike(statement: Hostile, result: QueryResult) -> list[str]:
    """Say that the outcome of a statement is not its kind's; nothing where it is."""
    error = result.error or ""
    as_expected = {
        "refused": result.status == "error" and error.startswith("refused: "),
        "stopped": result.status == "timeout" or error.startswith("too large: "),
        "failed": result.status == "error",
        "any": result.status != "crash",
    }
    if as_expected[statement.outcome]:
        return []
    return [f"not {statement.outcome} but {result.status}: {error[:100]}"]


def report(sql: str, problems: list[str]) -> list[str]:
    return [f"{ascii(sql)[:100]}: {'; '.join(problems)}"] if problems else []


@pytest.mark.parametrize("kind", KINDS)
def test_hostile_statements_do_no_harm(place: Place, kind: str) -> None:
    before, files_open = place.state(), psutil.Process().num_fds()

    def judge(statement: Hostile) -> list[str]:
        sql = statement.sql.replace("{folder}", str(place.folder))
        limits = PATIENT if statement.outcome in ("refused", "failed") else LIMITS
        result, problems = complaints(place, before, sql, limits)
        return report(sql, problems + unlike(statement, result))

    statements = [statement for statement in CORPUS if statement.kind == kind]
    assert statements
    problems = [line for lines in place.executor.map(judge, statements) for line in lines]
    assert not problems, "\n".join(["", *problems])
    assert psutil.Process().num_fds() <= files_open + WORKERS
    assert list((place.folder / "work").iterdir()) == [] and Path.cwd() == place.folder / "work"


def test_the_corpus_is_large_and_says_nothing_twice() -> None:
    assert len(CORPUS) >= 300
    assert len({statement.sql for statement in CORPUS}) == len(CORPUS)
    assert {statement.outcome for statement in CORPUS} == {"refused", "stopped", "failed", "any"}


# Hold a database open in its own process: a process that closes a file loses all its locks on it.
WRITER = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("PRAGMA journal_mode = WAL")
connection.execute("UPDATE item SET price = 3 WHERE id = 3")
print("written", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("log", ["merged", "open"])
def test_nothing_is_written_to_a_database_with_a_write_ahead_log(tmp_path: Path, log: str) -> None:
    make_database(tmp_path / "shop.sqlite")
    command = [sys.executable, "-c", WRITER, str(tmp_path / "shop.sqlite")]
    with (
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as writer,
        Executor(WORKERS, LIMITS) as executor,
    ):
        assert writer.stdout is not None and writer.stdout.readline() == "written\n"
        if log == "merged":
            writer.communicate()
        place = Place(tmp_path, executor)
        before = place.state()
        assert any(path.endswith("-wal") for path in before) == (log == "open")
        statements = [line for block in REFUSED.values() for line in block.split("\n") if line]
        results = executor.run_many(
            [(place.database, sql.replace("{folder}", str(tmp_path))) for sql in statements]
        )
        assert [
            sql for sql, result in zip(statements, results, strict=True) if result.status != "error"
        ] == []
        assert place.state() == before
        assert executor.run(place.database, "SELECT price FROM item WHERE id = 3").rows == ((3,),)


# Words of SQL, names of the schema, pieces of the corpus, and values: some draws compile.
NAMES = (
    "item sold big note page box cheap id name price i text body rowid rank sqlite_master "
    "main.item temp.item x"
).split()
WORDS = (
    "SELECT FROM WHERE GROUP BY ORDER HAVING LIMIT OFFSET UNION ALL EXCEPT INTERSECT JOIN LEFT "
    "CROSS ON USING AS DISTINCT CASE WHEN THEN ELSE END IN LIKE GLOB MATCH BETWEEN IS NOT NULL "
    "AND OR EXISTS CAST COLLATE OVER PARTITION WITH RECURSIVE VALUES INSERT INTO REPLACE UPDATE "
    "SET DELETE CREATE TABLE TEMP VIEW INDEX TRIGGER VIRTUAL DROP ALTER RENAME ATTACH DETACH "
    "VACUUM PRAGMA BEGIN COMMIT SAVEPOINT ANALYZE REINDEX EXPLAIN QUERY PLAN RETURNING CONFLICT "
    "DO NOTHING IF"
).split()
MARKS = (
    "( ) , ; . * + - / % || < > = == != << >> & | ~ -> ->> ? :a @b $c -- /* */ ' \" ` [ ]".split()
)
CALLS = (
    "abs({0})|max({0}, {1})|hex({0})|zeroblob({0})|randomblob({0})|printf('%*d', {0}, {1})|"
    "printf('%s%q', {0}, {1})|char({0}, {1})|replace({0}, {1}, {0})|instr({0}, {1})|"
    "substr({0}, {1})|json_array({0}, {1})|json_extract({0}, '$[0]')|json_group_array({0})|"
    "group_concat({0}, {1})|count({0})|sum({0})|date({0}, {1})|strftime({0}, {1})|"
    "load_extension({0})|fts3_tokenizer({0}, {1})|readfile({0})|snippet({0})|optimize({0})|"
    "sum({0}) OVER (ORDER BY {1})|row_number() OVER (PARTITION BY {0})|CAST({0} AS {1})|"
    "CASE WHEN {0} THEN {1} END|({0} IN (SELECT i FROM big))|({0} LIKE {1})|({0} GLOB {1})|({0} |"
    "| {1})|({0} * {1})|({0} << {1})|(SELECT {0})|EXISTS (SELECT {0} FROM sold)|({0} -> {1})|"
    "(SELECT count(*) FROM big x, big y, big z WHERE x.i + y.i < {0})"
).split("|")

values = st.one_of(
    st.integers(-(2**63), 2**63 - 1).map(str),
    st.sampled_from(
        [
            "0",
            "1",
            "1e999",
            "NULL",
            "x'00ff'",
            "'pen'",
            "'%a%a%a'",
            "''",
            "1000000000",
            "'[1, [2]]'",
        ]
    ),
    st.text(max_size=8).map(lambda text: "'" + text.replace("'", "''") + "'"),
)
names = st.sampled_from(NAMES)
columns = st.sampled_from("a.id a.name a.price b.i b.rowid count(*) random() *".split())
expressions = st.recursive(
    st.one_of(values, columns),
    lambda inner: st.builds(str.format, st.sampled_from(CALLS), inner, inner),
    max_leaves=6,
)
queries = st.builds(
    "{}SELECT {} FROM item a, big b{} WHERE {} {}".format,
    st.sampled_from(
        [
            "",
            "",
            "EXPLAIN ",
            "WITH x AS (SELECT 1) ",
            "WITH RECURSIVE x(i) AS (VALUES(1) UNION ALL SELECT i FROM x) ",
        ]
    ),
    expressions,
    st.sampled_from(
        [
            "",
            "",
            ", sold",
            ", big c, big d",
            ", note",
            ", json_each(a.name)",
            ", pragma_database_list",
            ", x",
        ]
    ),
    st.one_of(st.just("1"), expressions),
    st.sampled_from(
        ["", "", "LIMIT 5", "ORDER BY 1", "GROUP BY 1", "; DELETE FROM item", "UNION SELECT 1"]
    ),
)
writes = st.builds(
    "{} {} {} {}".format,
    st.sampled_from(
        [
            "DELETE FROM",
            "UPDATE",
            "INSERT INTO",
            "DROP TABLE",
            "PRAGMA",
            "ATTACH",
            "CREATE TABLE",
            "VACUUM INTO",
        ]
    ),
    st.one_of(names, values),
    st.sampled_from(["", "SET price =", "VALUES", "SELECT", "WHERE", "AS", "="]),
    expressions,
)
tokens = st.one_of(
    st.sampled_from([*WORDS, *NAMES, *MARKS]),
    values,
    st.sampled_from([statement.sql[:200] for statement in CORPUS]),
)
salads = st.builds(str.join, st.sampled_from([" ", " ", "", "\n"]), st.lists(tokens, max_size=12))
# Any text at all: with halves of surrogate pairs, NUL and what no font shows.
noise = st.text(st.characters(exclude_categories=()), max_size=40)


@settings(
    max_examples=300,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(
    st.one_of(queries, writes, salads, noise, st.builds("{}{}{}".format, queries, noise, salads))
)
def test_sql_drawn_at_random_does_no_harm(place: Place, sql: str) -> None:
    before = place.state()
    result, problems = complaints(place, before, sql.replace("{folder}", str(place.folder)))
    assert result.status != "crash", result
    assert not problems, problems
    assert Path(os.getcwd()) == place.folder / "work"
