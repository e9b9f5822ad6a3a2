"""Questions on a real MariaDB server: no write, every query ends, verdicts are SQLite's.

The server is started from the installed binaries, on a socket in a folder of its own. Without a
server or PyMySQL these tests skip.
"""

from __future__ import annotations

import getpass
import json
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ray_sql import evaluate
from ray_sql.config import EvaluateConfig
from ray_sql.database import Executor, Limits, reflect, render
from ray_sql.errors import DataError
from ray_sql.preflight import rights
from tests.conftest import QUESTIONS, SHOP
from tests.databases import ERROR_KINDS, ends_as, error_kinds
from tests.waiting import wait_until

pymysql = pytest.importorskip("pymysql")
pytestmark = pytest.mark.mysql

LIMITS = Limits(seconds=2, rows=1000, bytes=2**20, memory=2**30, sql_length=20_000)
PATIENT = Limits(seconds=30, rows=1000, bytes=2**20, memory=2**30, sql_length=20_000)
ENDLESS = "SELECT count(*) FROM seq_1_to_1000000 a, seq_1_to_1000000 b WHERE a.seq % 7 <> b.seq"
TABLES = """
CREATE TABLE item (id INT PRIMARY KEY, name VARCHAR(20) COMMENT 'as printed', price DECIMAL(8, 2),
  weight DOUBLE, made DATE, sold BOOLEAN, code CHAR(6), raw BLOB) COMMENT 'things that are sold';
INSERT INTO item VALUES (1, 'pen', 1.50, 0.5, '2024-01-02', true, 'p1', x'00ff'),
  (2, 'ink', NULL, NULL, '2024-02-03', false, 'i1', NULL),
  (3, 'nib', 2.00, 0.25, NULL, NULL, 'n1', NULL);
CREATE SEQUENCE number;
CREATE TABLE `order` (id INT PRIMARY KEY, item INT, FOREIGN KEY (item) REFERENCES item (id));
CREATE VIEW cheap AS SELECT name FROM item WHERE price < 2;
CREATE VIEW slow AS SELECT sleep(100) AS done;
CREATE FUNCTION raised(x DECIMAL(8, 2)) RETURNS DECIMAL(8, 2) DETERMINISTIC RETURN x * 2;
CREATE FUNCTION waits() RETURNS INT RETURN sleep(100);
CREATE FUNCTION waits_too() RETURNS INT RETURN waits()
"""


class Server:
    """A MariaDB server in a folder of its own, with the databases `hostile` and `mall`."""

    def __init__(self, binary: Path) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="ray_sql-my-"))  # short: it names a socket
        own = [f"--datadir={self.folder}/data", f"--user={getpass.getuser()}"]
        with (self.folder / "out").open("w") as out:
            made = subprocess.run(
                ["mariadb-install-db", "--no-defaults", *own, "--skip-test-db"],
                stdout=out,
                stderr=out,
            )
            assert made.returncode == 0, (self.folder / "out").read_text()
            options = [f"--socket={self.folder}/s", "--skip-networking", "--skip-log-bin"]
            quick = ["--innodb-flush-log-at-trx-commit=0", "--innodb-buffer-pool-size=16M"]
            self._process = subprocess.Popen(
                [binary, "--no-defaults", *own, *options, *quick], stdout=out, stderr=out
            )
        wait_until((self.folder / "s").exists)

    def fill(self) -> None:
        """Make the databases, and an account that may read one of them."""
        with self.connect("") as owner, owner.cursor() as cursor:
            cursor.execute("CREATE USER reader IDENTIFIED BY 's:c@t'")
            for name, script in (("hostile", TABLES), ("mall", SHOP.replace(" TEXT", " CHAR(20)"))):
                cursor.execute(f"CREATE DATABASE {name}")
                cursor.execute(f"USE {name}")
                for statement in script.split(";\n"):
                    if statement.strip(" ;\n"):
                        cursor.execute(statement)
            cursor.execute("GRANT SELECT ON mall.* TO reader")
            cursor.execute("CREATE USER writer IDENTIFIED BY 's:c@t'")
            cursor.execute("GRANT SELECT, INSERT ON mall.* TO writer")

    def connect(self, name: str) -> Any:
        return pymysql.connect(
            unix_socket=f"{self.folder}/s", user=getpass.getuser(), database=name or None
        )

    def url(self, name: str) -> str:
        return f"mysql://{getpass.getuser()}@/{name}?unix_socket={self.folder}/s"

    def state(self) -> list[Any]:
        """Read what a query could change: rows, tables, routines, accounts, settings."""
        questions = (
            "SELECT * FROM hostile.item ORDER BY id",
            "SELECT table_schema, table_name FROM information_schema.tables ORDER BY 1, 2",
            "SELECT routine_name FROM information_schema.routines ORDER BY 1",
            "SELECT next_not_cached_value FROM hostile.number",
            "SELECT user, host FROM mysql.user ORDER BY 1",
            "SELECT @@global.max_connections, @@global.read_only",
        )
        with self.connect("hostile") as owner, owner.cursor() as cursor:
            return [(cursor.execute(question), cursor.fetchall()) for question in questions]

    def busy(self) -> int:
        """Count the queries of an executor that the server works on."""
        with self.connect("hostile") as owner, owner.cursor() as cursor:
            return cursor.execute(
                "SELECT id FROM information_schema.processlist WHERE info LIKE '/* ray_sql%'"
            )

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(60)
        shutil.rmtree(self.folder)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    binary = shutil.which("mariadbd") or shutil.which("mariadbd", path="/usr/sbin")
    if binary is None:
        pytest.skip("no MariaDB server is installed")
    started = Server(Path(binary))
    try:
        started.fill()
        yield started
    finally:
        started.close()


@pytest.fixture(scope="module")
def executor(server: Server) -> Iterator[Executor]:
    with Executor(1, LIMITS) as executor:
        yield executor


REFUSED = [
    "INSERT INTO item (id) VALUES (9)",
    "SELECT slÉep(5)",
    "SELECT lóad_file('/etc/passwd')",
    'SELECT "sleep"(5)',
    "UPDATE item SET price = 0",
    "  ;DELETE FROM item",
    "/* a comment */ DELETE FROM item",
    "-- SELECT\nDELETE FROM item",
    "# SELECT\nDELETE FROM item",
    "/*! DELETE FROM item */",
    "SELECT 1 /*!99999 , 2 */",
    "/*M! DELETE FROM item */",
    "TRUNCATE item",
    "DROP TABLE item",
    "CREATE TEMPORARY TABLE other AS SELECT 1",
    "REPLACE INTO item (id) VALUES (9)",
    "COMMIT",
    "START TRANSACTION READ WRITE",
    "SET max_statement_time = 0",
    "SET GLOBAL read_only = 1",
    "SET STATEMENT max_statement_time = 0 FOR SELECT 1",
    "LOAD DATA INFILE '/etc/passwd' INTO TABLE item",
    "LOAD DATA LOCAL INFILE '/etc/passwd' INTO TABLE item",
    "SELECT * FROM item INTO OUTFILE '{folder}/made'",
    "SELECT name INTO DUMPFILE '{folder}/made' FROM item",
    "SELECT name INTO /* */ OUTFILE '{folder}/made' FROM item",
    "SELECT '#' INTO OUTFILE '{folder}/made'",
    "SELECT '/*' INTO OUTFILE '{folder}/*/'",
    "SELECT '-- ' INTO DUMPFILE '{folder}/made'",
    "SELECT '#', next value for number",
    'SELECT "/*", next/**/value for number -- */',
    "SELECT `#`.id FROM item `#` FOR UPDATE",
    "SELECT '#' FROM item FOR UPDATE",
    "SELECT '#' FROM item LOCK /* */ IN SHARE MODE",
    "SELECT id FROM item WHERE id < 1e5for update",
    "/* SELECT */ # SELECT\n(DELETE FROM item)",
    "/**/" * 4_000 + "DELETE FROM item",
    "SELECT load_file('/etc/passwd')",
    "SELECT LOAD_FILE ('/etc/passwd')",
    "SELECT load_file/**/('/etc/passwd')",
    "SELECT sleep(100)",
    "SELECT benchmark(1000000000, md5('x'))",
    "SELECT get_lock('x', 100)",
    "SELECT release_all_locks()",
    "SELECT * FROM item FOR UPDATE",
    "SELECT * FROM item LOCK IN SHARE MODE",
    "SELECT next value for number",
    "SELECT nextval(number)",
    "SELECT setval(number, 100)",
    "SELECT waits()",
    "SELECT hostile.waits_too()",
    "SELECT `waits`()",
    "SELECT done FROM slow",
    "SELECT /*+ MAX_EXECUTION_TIME(0) */ 1",
    "CALL x()",
    "DO sleep(1)",
    "EXPLAIN SELECT 1",
    "ANALYZE SELECT 1",
    "SHOW TABLES",
    "HANDLER item OPEN",
    "KILL 1",
    "FLUSH TABLES",
    "SHUTDOWN",
    "LOCK TABLES item READ",
    "GRANT ALL ON *.* TO evil",
    "PREPARE x FROM 'SELECT 1'",
    "INSTALL SONAME 'x'",
    "SELECT 1 INTO @x",
    "",
    ";",
    "-- nothing",
    "The answer is 42.",
    "SELECT 1\0; DELETE FROM item",
]
STOPPED = [
    ENDLESS,
    "SELECT * FROM seq_1_to_1000000000",
    "SELECT repeat('x', 2000000)",
    "SELECT repeat('x', 10000) FROM seq_1_to_1000",
    "SELECT a.seq FROM seq_1_to_1000000 a, seq_1_to_1000000 b ORDER BY a.seq * b.seq",
    "SELECT 1 " + " " * 20_000,
]
FAILED = [
    "SELECT 1; DELETE FROM item",
    "SELECT 1; SELECT 2",
    "WITH x AS (SELECT 1) DELETE FROM item",
    "SELECT FRM",
    "SELECT '\ud800'",
    "SELECT no_such_function(1)",
    "SELECT * FROM other.item",
    "SELECT (SELECT id FROM item)",
    "VALUES",
]


@pytest.mark.parametrize(
    ("statements", "outcome"), [(REFUSED, "refused"), (STOPPED, "stopped"), (FAILED, "failed")]
)
def test_hostile_statements_do_no_harm(
    server: Server, executor: Executor, statements: list[str], outcome: str
) -> None:
    before, files, wrong = server.state(), sorted(server.folder.iterdir()), []
    limits = LIMITS if outcome == "stopped" else PATIENT
    for text in statements:
        result = executor.run(
            server.url("hostile"), text.replace("{folder}", str(server.folder)), limits
        )
        if not ends_as(result, outcome):
            wrong.append((text[:80], result.status, (result.error or "")[:100]))
    assert wrong == []
    after = executor.run(server.url("hostile"), "SELECT count(*) FROM item", PATIENT)
    assert after.rows == ((3,),)
    assert server.state() == before and sorted(server.folder.iterdir()) == files
    wait_until(lambda: server.busy() == 0)


def test_values_are_plain_and_equal_values_are_equal(server: Server, executor: Executor) -> None:
    def cells(sql: str) -> tuple[Any, ...]:
        result = executor.run(server.url("hostile"), sql, PATIENT)
        assert result.status == "ok", result
        return result.rows[0]

    assert cells("SELECT id, name, price, weight, made, sold, code, raw FROM item LIMIT 1") == (
        *(1, "pen", 1.5, 0.5, "2024-01-02", 1, "p1", b"\x00\xff"),
    )
    assert cells("SELECT sum(id), avg(id), count(*), sum(price), max(made) FROM item") == (
        *(6, 2.0, 3, 3.5, "2024-02-03"),
    )
    assert cells("SELECT timestamp '2024-01-02 03:04:05', NULL, true, raised(1.5), 'ä'") == (
        *("2024-01-02 03:04:05", None, 1, 3.0, "ä"),
    )
    many = executor.run(server.url("hostile"), "SELECT seq FROM seq_1_to_1000", PATIENT)
    assert many.rows == tuple((number,) for number in range(1, 1001))


def test_a_schema_has_keys_comments_and_example_values(server: Server, executor: Executor) -> None:
    schema = reflect(server.url("hostile"), "hostile", 2, executor, comments=True)
    assert schema.dialect == "mysql"
    item, order = schema.table("item"), schema.table("order")
    assert item is not None and order is not None
    assert (item.primary_key, item.description) == (("id",), "things that are sold")
    assert item.columns[1].description == "as printed"
    assert item.columns[1].examples == ("ink", "nib") and not item.columns[7].examples
    assert [(key.columns, key.ref_table) for key in order.foreign_keys] == [(("item",), "item")]
    assert "CREATE TABLE `order` (" in render(schema, "ddl")
    view = schema.table("cheap")
    assert view is not None and view.is_view


def test_errors_are_named_as_those_of_sqlite(server: Server) -> None:
    with Executor(1, PATIENT) as executor:
        assert error_kinds(executor, server.url("mall"), ERROR_KINDS) == ERROR_KINDS


def test_an_account_reads_what_it_may_and_its_password_may_be_a_variable(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"mariadb://reader@/mall?unix_socket={server.folder}/s"
    denied = pytest.raises(DataError, match=r"cannot connect to MySQL: Access denied.*MYSQL_PWD")
    with Executor(1, PATIENT) as executor, denied:
        executor.run(url, "SELECT 1")
    monkeypatch.setenv("MYSQL_PWD", "s:c@t")
    with Executor(1, PATIENT) as executor:
        assert executor.run(url, "SELECT max(id) FROM customer").rows == ((4,),)
        refused = executor.run(url, "SELECT * FROM mysql.user")
        assert (refused.error or "").startswith("refused: SELECT command denied")
        assert reflect(url, "mall", 1, executor).table_names == ("customer", "product", "sale")
        assert rights.check([url]) == "the role of 1 MySQL databases may only read"
        may = rights.of_account(url.replace("reader", "writer"))
        assert may == ["may INSERT on `mall`.*"]
        assert "may INSERT on" in rights.check([url, url.replace("reader", "writer")])
        assert "ALL PRIVILEGES, GRANT OPTION on *.*" in rights.of_account(server.url("mall"))[0]
        monkeypatch.delenv("MYSQL_PWD")
        written = url.replace("reader@", "reader:s%3Ac%40t@")
        assert executor.run(written, "SELECT max(id) FROM product").rows == ((3,),)
        with pytest.raises(DataError, match=r"cannot connect to MySQL: .*nowhere"):
            executor.run(server.url("nowhere"), "SELECT 1")
        with pytest.raises(DataError, match=r"cannot connect to MySQL: socket is no option"):
            executor.run("mysql://x@/mall?socket=y", "SELECT 1")
        with pytest.raises(DataError, match=r"cannot connect to MySQL: .*No such file"):
            executor.run("mysql://x@/mall?ssl_ca=/nowhere", "SELECT 1")


def test_rights_of_columns_and_roles_are_read(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MYSQL_PWD", "s:c@t")
    made = """
CREATE ROLE readers, writers
GRANT SELECT ON mall.* TO readers
GRANT SELECT, DELETE ON mall.sale TO writers
CREATE FUNCTION mall.one() RETURNS INT DETERMINISTIC RETURN 1
CREATE DATABASE `a ON b TO`
CREATE TABLE `a ON b TO`.`c, ``d` (`x, (y)` INT)
"""
    accounts = {
        "columns": "GRANT SELECT (id, name), REFERENCES (id), UPDATE (id, name) ON mall.customer",
        "few": "GRANT SELECT (id, name) ON mall.customer",
        "odd": "GRANT SELECT (`x, (y)`), INSERT (`x, (y)`) ON `a ON b TO`.`c, ``d`",
        "gives": "GRANT SELECT ON mall.*",
        "calls": "GRANT EXECUTE ON FUNCTION mall.one",
        "global": "GRANT SELECT ON *.*",
    }
    with server.connect("") as owner, owner.cursor() as cursor:
        for statement in made.strip().splitlines():
            cursor.execute(statement)
        for name in ("reads", "writes", "both", "idle", *accounts):
            cursor.execute(f"CREATE USER `{name}` IDENTIFIED BY 's:c@t'")
            if name in accounts:
                more = " WITH GRANT OPTION" * (name == "gives")
                cursor.execute(f"{accounts[name]} TO `{name}`{more}")
        cursor.execute("GRANT readers TO writers")
        for name, role in (("reads", "readers"), ("writes", "writers")):
            cursor.execute(f"GRANT {role} TO `{name}`")
            cursor.execute(f"SET DEFAULT ROLE {role} FOR `{name}`")
        cursor.execute("GRANT writers TO idle")

    def of(name: str) -> list[str]:
        return rights.of_account(f"mysql://{name}@/?unix_socket={server.folder}/s")

    columns = "UPDATE (`{0}`, `{1}`), REFERENCES (`id`) on `mall`.`customer`"
    assert of("columns") in [
        ["may " + columns.format(*order)] for order in (("id", "name"), ("name", "id"))
    ]
    assert of("few") == of("reads") == []
    assert of("writes") == ["may DELETE on `mall`.`sale`"]
    assert of("idle") == []  # its role is not active, and no query may make it so
    assert of("odd") == ["may INSERT (`x, (y)`) on `a ON b TO`.`c, ``d`"]
    assert of("gives") == ["may GRANT OPTION on `mall`.*"]
    assert of("calls") == ["may EXECUTE on FUNCTION `mall`.`one`"]
    assert of("global") == ["may read the server's accounts"]
    url = f"mysql://idle@/?unix_socket={server.folder}/s"
    with Executor(1, PATIENT) as executor:
        assert "refused" in str(executor.run(url, "SET ROLE writers").error)
        reads = f"mysql://reads@/mall?unix_socket={server.folder}/s"
        assert executor.run(reads, "SELECT max(id) FROM customer").rows == ((4,),)
        few = f"mysql://few@/mall?unix_socket={server.folder}/s"
        assert executor.run(few, "SELECT max(id) FROM customer").rows == ((4,),)
        hidden = executor.run(few, "SELECT city FROM customer")
        assert (hidden.error or "").startswith("refused: SELECT command denied")


def test_grants_are_read_as_servers_write_them() -> None:
    lines = [  # MySQL 8's, and older ones' under ANSI_QUOTES
        "GRANT USAGE ON *.* TO `u`@`%`",
        "GRANT SELECT (`id`, `name`) ON `mall`.`customer` TO `u`@`%`",
        "GRANT `writers`@`%`,`readers`@`%` TO `u`@`%` WITH ADMIN OPTION",
        "GRANT BACKUP_ADMIN,SYSTEM_VARIABLES_ADMIN ON *.* TO `u`@`%` WITH GRANT OPTION",
        "GRANT SELECT, CREATE TEMPORARY TABLES ON \"mall\".* TO 'u'@'% GRANT OPTION'",
        "GRANT PROXY ON ''@'%' TO 'root'@'localhost' WITH GRANT OPTION",
        "REVOKE SELECT ON `mysql`.* FROM `u`@`%`",
    ]
    assert rights.in_grants(lines) == [
        "may BACKUP_ADMIN, SYSTEM_VARIABLES_ADMIN, GRANT OPTION on *.*",
        'may CREATE TEMPORARY TABLES on "mall".*',
        "may PROXY, GRANT OPTION on ''@'%'",
    ]


@pytest.mark.parametrize("mark", ["/", "#", "?", "/1?", "[", "@/", "?ssl_ca=1&"])
@pytest.mark.parametrize("first", ["hush", "12"])
def test_no_message_has_a_part_of_a_password(mark: str, first: str) -> None:
    url = f"mysql://reader:{first}{mark}secret=1@127.0.0.1:1/mall"
    with Executor(1, PATIENT) as executor, pytest.raises(DataError) as caught:
        executor.run(url, "SELECT 1")
    assert str(caught.value) == (
        "cannot connect to MySQL: percent-encode the password, or use MYSQL_PWD; check the URL, "
        "and its password or MYSQL_PWD"
    )


@pytest.mark.parametrize(
    "sql",
    [
        "-- which\n# items\n/* SELECT */ (SELECT count(*) FROM item)",
        "SELECT count(*) FROM item WHERE name <> '# /* the' OR name <> 'the next -- value'",
        "WITH x AS (SELECT id FROM item) SELECT count(*) FROM x -- FOR a start",
    ],
)
def test_marks_of_comments_hide_no_query_that_reads(
    server: Server, executor: Executor, sql: str
) -> None:
    assert executor.run(server.url("hostile"), sql, PATIENT).rows == ((3,),)


def test_a_predictions_file_is_scored_on_a_server(
    server: Server, make_config: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "questions"
    folder.mkdir()
    for split in ("train", "dev"):
        rows = [{"db_id": "mall", "question": q, "query": sql} for q, sql in QUESTIONS[:4]]
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    predicted = [sql for _, sql in QUESTIONS[:4]]
    predicted[1] = "SELECT nom FROM customer"
    (tmp_path / "p.sql").write_text("\n".join(predicted))
    settings = {"dataset_id": str(folder), "data.databases": server.url("{db_id}")}
    file = str(tmp_path / "p.sql")
    (score,) = evaluate.run(make_config(EvaluateConfig, predictions_file=file, **settings))[
        "file"
    ].values()
    assert (score["n"], score["correct"]) == (4, 3)
