"""For any SQL of a model: no byte changes, no query outlives its limit, and rows are right."""

import hashlib
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from ray_sql.database import Executor, Limits, QueryResult, Rows
from ray_sql.errors import DataError
from tests.waiting import HANGS, wait_until, wait_until_at_work

LIMITS = Limits(seconds=0.5, rows=1000, bytes=2**20, memory=2**29, sql_length=20_000)
ENDLESS = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n"

# Each must be refused for what it is, not merely fail.
FORBIDDEN = [
    "INSERT INTO item VALUES (9, 'x', 1.0)",
    "INSERT INTO item SELECT * FROM item",
    "REPLACE INTO item VALUES (1, 'x', 1.0)",
    "UPDATE item SET price = 0",
    "UPDATE item SET price = 0 WHERE 1 = 0 RETURNING id",
    "DELETE FROM item",
    "DELETE FROM item RETURNING *",
    "/* SELECT */ DELETE FROM item -- SELECT",
    "-- SELECT 1\nDROP TABLE item",
    "  \n\t;DROP TABLE item",
    "WITH x AS (SELECT 1) DELETE FROM item",
    "WITH x AS (SELECT 1) INSERT INTO item SELECT 1, 'a', 2 FROM x",
    "EXPLAIN DELETE FROM item",
    "DROP TABLE item",
    "DROP TABLE IF EXISTS item",
    "CREATE TABLE other (a)",
    "CREATE TABLE other AS SELECT * FROM item",
    "CREATE TEMP TABLE other AS SELECT * FROM item",
    "CREATE VIEW cheap AS SELECT * FROM item",
    "CREATE INDEX by_name ON item (name)",
    "CREATE TRIGGER t AFTER INSERT ON item BEGIN DELETE FROM item; END",
    "CREATE VIRTUAL TABLE words USING fts5(text)",
    "ALTER TABLE item RENAME TO thing",
    "ALTER TABLE item ADD COLUMN extra",
    "ATTACH DATABASE '{folder}/new.sqlite' AS other",
    "ATTACH DATABASE ':memory:' AS other",
    "DETACH DATABASE main",
    "VACUUM",
    "VACUUM INTO '{folder}/copy.sqlite'",
    "REINDEX",
    "ANALYZE",
    "BEGIN",
    "BEGIN EXCLUSIVE",
    "COMMIT",
    "SAVEPOINT a",
    "PRAGMA journal_mode = DELETE",
    "PRAGMA user_version = 7",
    "PRAGMA writable_schema = ON",
    "PRAGMA query_only = OFF",
    "PRAGMA wal_checkpoint(TRUNCATE)",
    "PRAGMA temp_store_directory = '{folder}'",
    "UPDATE sqlite_master SET sql = ''",
    "SELECT load_extension('{folder}/evil.so')",
    "SELECT fts3_tokenizer('simple')",
    "SELECT 1; DROP TABLE item",
    "SELECT 1; SELECT 2",
    "SELECT 1;;",
    "SELECT 1 /* ; */; DELETE FROM item",
    "",
    "   ",
    ";",
    "-- nothing",
]
# Each must end by a limit.
EXHAUSTING = [
    ENDLESS,
    "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT i FROM n",
    "WITH RECURSIVE n(i) AS (SELECT 1 UNION SELECT i + 1 FROM n) SELECT max(i) FROM n",
    "SELECT count(*) FROM big a, big b, big c, big d",
    "SELECT * FROM big a, big b",
    "SELECT a.i FROM big a, big b, big c ORDER BY a.i * b.i",
    "SELECT randomblob(1000000000)",
    "SELECT zeroblob(1000000000)",
    "SELECT printf('%.*c', 1000000000, 'x')",
    "SELECT format('%900000000d', 1) FROM big",
    "SELECT hex(hex(hex(zeroblob(500000))))",
    "SELECT group_concat(randomblob(1000)) FROM big a, big b",
    "SELECT replace(hex(zeroblob(400000)), '0', 'aaaaaaaaaa')",
    "SELECT randomblob(10000) FROM big",
    "SELECT length(hex(zeroblob(1000000)))",
    "SELECT sum(length(replace(hex(zeroblob(300000 + a.i)), '00', 'a'))) FROM big a, big b",
    "SELECT " + "+".join(["1"] * 5000),
    "SELECT 1 " + " " * 20_000,
]
MALFORMED = [
    "SELECT 1\0",
    "SELECT '\ud800'",
    "SELECT " + "(" * 5000 + "1" + ")" * 5000,
    "SELECT colour FROM item",
    "SELEC * FROM item",
    "SELECT * FROM nowhere",
    "SELECT no_such_function(1)",
    "The answer is 42.",
    "```sql\nSELECT 1\n```",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("databases")
    with sqlite3.connect(folder / "shop.sqlite") as connection:
        connection.executescript("""
            CREATE TABLE item (id INTEGER PRIMARY KEY, name TEXT, price REAL);
            INSERT INTO item VALUES
                (1, 'pen', 1.5), (2, 'ink', NULL), (3, CAST(x'63ff61' AS TEXT), 2.0);
            CREATE TABLE big (i);
            WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n LIMIT 5000)
                INSERT INTO big SELECT i FROM n;
        """)
    connection.close()
    return folder


@pytest.fixture(scope="module")
def database(folder: Path) -> Path:
    return folder / "shop.sqlite"


@pytest.fixture(scope="module")
def executor() -> Iterator[Executor]:
    with Executor(2, LIMITS) as executor:
        yield executor


def contents(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def run_safely(executor: Executor, folder: Path, sql: str) -> QueryResult:
    """Run a hostile query and check what holds for every one of them."""
    before = contents(folder)
    result = executor.run(folder / "shop.sqlite", sql.replace("{folder}", str(folder)))
    assert contents(folder) == before
    assert result.status != "ok"
    assert result.rows == () and result.error and "\n" not in result.error
    assert executor.run(folder / "shop.sqlite", "SELECT count(*) FROM item").rows == ((3,),)
    return result


@pytest.mark.parametrize("sql", FORBIDDEN)
def test_what_is_not_one_read_only_query_is_refused(
    executor: Executor, folder: Path, sql: str
) -> None:
    result = run_safely(executor, folder, sql)
    assert (
        result.status == "error"
        and result.error is not None
        and result.error.startswith("refused: ")
    )


@pytest.mark.parametrize("sql", EXHAUSTING, ids=lambda sql: sql[:60])
def test_what_asks_for_too_much_is_stopped(executor: Executor, folder: Path, sql: str) -> None:
    result = run_safely(executor, folder, sql)
    assert result.error is not None
    assert result.status == "timeout" or result.error.startswith("too large: "), result


@pytest.mark.parametrize("sql", MALFORMED, ids=lambda sql: ascii(sql)[:60])
def test_a_mistaken_query_is_an_error_of_its_own(
    executor: Executor, folder: Path, sql: str
) -> None:
    result = run_safely(executor, folder, sql)
    assert (
        result.status == "error"
        and result.error is not None
        and not result.error.startswith("refused")
    )


def test_a_query_gives_rows_names_and_readable_text(executor: Executor, database: Path) -> None:
    result = executor.run(database, "SELECT id, name, price AS cost, x'00ff' FROM item")
    assert result.status == "ok" and result.error is None
    assert result.columns == ("id", "name", "cost", "x'00ff'")
    # The third name is no UTF-8: its broken byte is left out.
    assert result.rows == (
        (1, "pen", 1.5, b"\0\xff"),
        (2, "ink", None, b"\0\xff"),
        (3, "ca", 2.0, b"\0\xff"),
    )


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT 1; -- done",
        "SELECT 1;\n",
        "VALUES (1)",
        "WITH x AS (SELECT 1) SELECT * FROM x",
        "SELECT value FROM json_each('[1]')",
        "SELECT 1 FROM pragma_table_info('item') LIMIT 1",
        "EXPLAIN QUERY PLAN SELECT * FROM item",
        "PRAGMA table_info(item)",
    ],
)
def test_every_form_of_reading_is_allowed(executor: Executor, database: Path, sql: str) -> None:
    assert executor.run(database, sql).status == "ok"


def test_full_text_tables_can_be_searched(executor: Executor, tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "words.sqlite") as connection:
        connection.executescript(
            "CREATE VIRTUAL TABLE note USING fts5(text); INSERT INTO note VALUES ('ink and pen')"
        )
    connection.close()
    result = executor.run(tmp_path / "words.sqlite", "SELECT text FROM note WHERE note MATCH 'pen'")
    assert result.rows == (("ink and pen",),)


def test_limits_hold_to_the_row_and_to_the_byte(executor: Executor, database: Path) -> None:
    rows = "SELECT i FROM big LIMIT {}"
    assert executor.run(database, rows.format(1000)).status == "ok"
    assert executor.run(database, rows.format(1001)).error == "too large: more than 1000 rows"
    few = Limits(bytes=1000)
    assert executor.run(database, "SELECT zeroblob(500) FROM big LIMIT 2", few).status == "ok"
    assert executor.run(database, "SELECT zeroblob(500), 1 FROM big LIMIT 2", few).status == "error"


def test_a_worker_out_of_memory_still_serves_the_next_query(
    executor: Executor, database: Path
) -> None:
    large = Limits(seconds=10, rows=10**6, bytes=2**31, memory=2**28)
    greedy = executor.run(database, "SELECT randomblob(1000000) FROM big LIMIT 1000", large)
    assert greedy.error == "too large: out of memory"
    assert [executor.run(database, f"SELECT {number}").rows for number in range(4)] == [
        ((n,),) for n in range(4)
    ]


def test_results_come_in_the_order_of_the_questions(executor: Executor, database: Path) -> None:
    done: list[tuple[int, int]] = []
    queries = [(database, ENDLESS if number == 3 else f"SELECT {number}") for number in range(20)]
    results = executor.run_many(queries, progress=lambda count, total: done.append((count, total)))
    assert [result.rows for result in results if result.status == "ok"] == [
        ((n,),) for n in range(20) if n != 3
    ]
    assert results[3].status == "timeout"
    assert done == [(count, 20) for count in range(1, 21)]


def test_queries_run_side_by_side(database: Path) -> None:
    def running() -> list[psutil.Process]:
        return [child for child in psutil.Process().children() if child not in before]

    before = psutil.Process().children()
    queries = [(database, f"{ENDLESS} -- {number}") for number in range(4)]
    done: list[int] = []
    with Executor(4, Limits(seconds=HANGS)) as executor, ThreadPoolExecutor(1) as threads:
        answers = threads.submit(
            executor.run_many, queries, progress=lambda count, total: done.append(count)
        )
        wait_until(lambda: len(running()) == 4)
        workers = running()
        for worker in workers:
            wait_until_at_work(worker)
        assert done == [], "four are at work, and none has ended"
        for worker in workers:
            worker.kill()
        assert [result.status for result in answers.result()] == ["crash"] * 4


def test_a_query_runs_once_until_its_database_changes(tmp_path: Path) -> None:
    path = tmp_path / "a.sqlite"
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("CREATE TABLE t (a)")
    with Executor(2) as executor:
        first, *others = executor.run_many([(path, "SELECT count(*) FROM t")] * 8)
        assert all(result is first for result in others)
        assert executor.run(path, "SELECT count(*) FROM t") is first
        assert executor.run(path, "SELECT count(*) FROM t", Limits(rows=7)) is not first
        connection.execute("INSERT INTO t VALUES (1)")
        assert executor.run(path, "SELECT count(*) FROM t").rows == ((1,),)
        draws = executor.run_many([(path, "SELECT random()")] * 8)
        assert len({result.rows for result in draws}) == 8
    connection.close()


@dataclass(frozen=True)
class Lone:
    """An executor of one worker, and that worker."""

    executor: Executor
    worker: psutil.Process

    def rows(self, database: Path, sql: str) -> Rows:
        return self.executor.run(database, sql).rows


@pytest.fixture
def lone(executor: Executor, database: Path) -> Iterator[Lone]:
    others = set(psutil.Process().children())  # those of the shared executor
    with Executor(1, LIMITS) as alone:
        assert alone.run(database, "SELECT 'started'").status == "ok"
        (worker,) = set(psutil.Process().children()) - others
        yield Lone(alone, worker)
    assert set(psutil.Process().children()) <= others, "a worker outlived its executor"


def test_a_worker_that_hangs_is_killed_and_replaced(lone: Lone, database: Path) -> None:
    lone.worker.send_signal(signal.SIGSTOP)
    assert lone.executor.run(database, "SELECT 'hung'").status == "timeout"
    assert not lone.worker.is_running()
    assert lone.rows(database, "SELECT 'hung'") == (("hung",),)


def test_a_worker_that_dies_gives_a_crash_and_is_replaced(lone: Lone, database: Path) -> None:
    with ThreadPoolExecutor(1) as threads:
        answer = threads.submit(lone.executor.run, database, ENDLESS, Limits(seconds=HANGS))
        wait_until_at_work(lone.worker)
        lone.worker.kill()
        result = answer.result()
    assert (
        result.status == "crash" and result.error is not None and result.error.startswith("crash: ")
    )
    assert lone.rows(database, "SELECT 1") == ((1,),)


def test_a_worker_that_died_between_queries_is_not_blamed_on_the_next(
    lone: Lone, database: Path
) -> None:
    lone.worker.kill()
    psutil.wait_procs([lone.worker], timeout=HANGS)
    assert lone.rows(database, "SELECT 1") == ((1,),)


def test_a_worker_that_died_between_queries_leaves_no_descriptor(
    lone: Lone, database: Path
) -> None:
    before = psutil.Process().num_fds()
    lone.worker.kill()
    psutil.wait_procs([lone.worker], timeout=HANGS)
    assert lone.rows(database, "SELECT 1") == ((1,),)
    assert psutil.Process().num_fds() == before


def test_a_missing_database_of_one_caller_ends_no_query_of_another(
    lone: Lone, database: Path, tmp_path: Path
) -> None:
    with ThreadPoolExecutor(1) as threads:
        other = threads.submit(lone.executor.run, database, ENDLESS, Limits(seconds=HANGS))
        wait_until_at_work(lone.worker)
        with pytest.raises(DataError, match=r"gone\.sqlite"):
            lone.executor.run_many([(tmp_path / "gone.sqlite", "SELECT 1")])
        wait_until_at_work(lone.worker)
        assert not other.done()
        lone.worker.kill()
        assert other.result().status == "crash"


def test_workers_hold_no_secret_of_the_parent(
    executor: Executor, database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    others = set(psutil.Process().children())
    with Executor(1) as alone:
        alone.run(database, "SELECT 1")
        (worker,) = set(psutil.Process().children()) - others
        assert "HF_TOKEN" not in worker.environ()


def test_workers_end_when_their_parent_is_killed(database: Path) -> None:
    script = (
        "import sys, psutil\nfrom pathlib import Path\nfrom ray_sql.database import Executor\n"
        f"executor = Executor(1)\nexecutor.run(Path({str(database)!r}), 'SELECT 1')\n"
        "print(psutil.Process().children()[0].pid, flush=True)\nsys.stdin.read()"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    worker = psutil.Process(int(parent.stdout.readline()))
    parent.kill()
    parent.communicate()
    assert psutil.wait_procs([worker], timeout=HANGS)[1] == []


def test_a_mistyped_path_is_a_user_error_and_creates_nothing(
    executor: Executor, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=r"shpo\.sqlite"):
        executor.run(tmp_path / "shpo.sqlite", "SELECT 1")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "empty.sqlite").touch()
    (tmp_path / "text.sqlite").write_text("not a database at all, but long enough to look at")
    for name in ("empty.sqlite", "text.sqlite", "."):
        with pytest.raises(DataError):
            executor.run_many([(tmp_path / name, "SELECT 1")])


def test_odd_paths_are_opened_as_they_are(
    executor: Executor, database: Path, tmp_path: Path
) -> None:
    odd = tmp_path / "a b?mode=rwc#%41é'.sqlite"
    shutil.copy(database, odd)
    assert executor.run(odd, "SELECT count(*) FROM item").rows == ((3,),)


def test_a_write_ahead_log_is_read_and_left_alone(executor: Executor, tmp_path: Path) -> None:
    path = tmp_path / "log.sqlite"
    count = "SELECT count(*) FROM t"
    writer = sqlite3.connect(path, isolation_level=None)
    writer.execute("PRAGMA journal_mode = WAL")
    writer.execute("CREATE TABLE t (a)")
    assert executor.run(path, count).rows == ((0,),)
    writer.execute("INSERT INTO t VALUES (1)")
    assert executor.run(path, count).rows == ((1,),)
    (tmp_path / "crashed").mkdir()
    for name in ("log.sqlite", "log.sqlite-wal"):
        shutil.copy(tmp_path / name, tmp_path / "crashed" / name)
    writer.close()
    assert executor.run(path, count).rows == ((1,),)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["crashed", "log.sqlite"]
    with pytest.raises(DataError, match=r"log\.sqlite-wal"):
        executor.run(tmp_path / "crashed" / "log.sqlite", count)


def test_what_a_crash_left_in_a_write_ahead_log_is_read_and_left_alone(
    executor: Executor, tmp_path: Path
) -> None:
    writer = sqlite3.connect(tmp_path / "log.sqlite", isolation_level=None)
    writer.execute("PRAGMA journal_mode = WAL")
    writer.execute("CREATE TABLE t (a)")
    writer.execute("INSERT INTO t VALUES (1)")
    crashed = tmp_path / "crashed"
    crashed.mkdir()
    for name in ("log.sqlite", "log.sqlite-wal", "log.sqlite-shm"):
        shutil.copy(tmp_path / name, crashed / name)
    before = contents(crashed)
    assert executor.run(crashed / "log.sqlite", "SELECT a FROM t").rows == ((1,),)
    assert contents(crashed) == before
    writer.close()


def test_an_error_is_one_short_line_whatever_it_quotes(executor: Executor, database: Path) -> None:
    for sql in (
        'PRAGMA "a\nb\u2028c" = 1',
        "ATTACH '/new\r\nline' AS other",
        'CREATE TABLE "' + "x\n" * 5000 + '" (a)',
        'SELECT "' + "x\n" * 5000 + '".y FROM item',
        "SELECT json_extract('{}', hex(zeroblob(400000)))",
    ):
        error = executor.run(database, sql).error
        assert error is not None and len(error.splitlines()) == 1 and len(error) < 1100


def test_the_names_of_columns_are_limited_as_rows_are(executor: Executor, database: Path) -> None:
    names = 'WITH t("{}") AS (SELECT 1) SELECT {} FROM t'
    assert executor.run(database, names.format("n" * 10_000, ", ".join("*" * 100))).status == "ok"
    result = executor.run(database, names.format("n" * 10_000, ", ".join("*" * 110)))
    assert result.error == f"too large: more than {LIMITS.bytes} bytes of column names"


def test_a_read_only_folder_is_enough(executor: Executor, database: Path, tmp_path: Path) -> None:
    path = tmp_path / "shop.sqlite"
    shutil.copy(database, path)
    path.chmod(0o444)
    tmp_path.chmod(0o555)
    try:
        assert executor.run(path, "SELECT count(*) FROM item ORDER BY 1").rows == ((3,),)
    finally:
        tmp_path.chmod(0o755)


def test_a_closed_executor_says_so(database: Path) -> None:
    with Executor(1) as executor:
        pass
    with pytest.raises(RuntimeError, match="closed"):
        executor.run(database, "SELECT 1")


def test_importing_execution_is_light() -> None:
    heavy = "{'torch', 'ray', 'transformers', 'sqlglot', 'pandas', 'numpy'}"
    script = f"import sys, ray_sql.database; sys.exit(', '.join({heavy} & set(sys.modules)) or 0)"
    subprocess.run([sys.executable, "-c", script], check=True)
