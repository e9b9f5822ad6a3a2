"""SQLite files as people have them: views, odd names and types, WAL, and what is no database."""

from __future__ import annotations

import json
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from ray_sql import data
from ray_sql.data import prompts
from ray_sql.data.linking import gold_links
from ray_sql.database import Executor, reflect, render
from ray_sql.database.serialize import Serializer
from ray_sql.errors import DataError
from tests.waiting import HANGS

VIEWS = pytest.mark.kind("views and schemas")
NAMES = pytest.mark.kind("names that need quotes")
TYPES = pytest.mark.kind("declared types")
ODD = pytest.mark.kind("one odd table or value")
WAL = pytest.mark.kind("read-only and WAL databases")
SLOW = pytest.mark.kind("example values that take long")

FARM = """
CREATE TABLE field (id INTEGER PRIMARY KEY, crop TEXT, area REAL);
CREATE TABLE harvest (field_id INT REFERENCES field, day DATE, kilos INT);
INSERT INTO field VALUES (1, 'rye', 2.5), (2, 'oats', 4);
INSERT INTO harvest VALUES (1, '2024-08-01', 900);
"""
FARM_COMPACT = (
    "field(id int pk, crop text, area real)\nharvest(field_id int -> field.id, day date, kilos int)"
)
YIELDS = "CREATE VIEW yields AS SELECT crop, kilos / area AS per_area FROM field JOIN harvest"


def build(path: Path, *scripts: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with closing(sqlite3.connect(path)) as connection:
        for script in scripts:
            connection.executescript(script)
    return path


def compact(path: Path, *scripts: str) -> str:
    return render(reflect(build(path, *scripts), "farm"), "compact")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "farm" / "farm.sqlite"


# Views


@VIEWS
def test_views_follow_the_tables_and_a_database_without_any_reads_as_ever(file: Path) -> None:
    assert compact(file, FARM) == FARM_COMPACT
    assert compact(file, YIELDS) == f"{FARM_COMPACT}\nyields(crop text, per_area)"
    assert "CREATE VIEW yields (\n  crop TEXT," in render(reflect(file, "farm"), "ddl")


@VIEWS
@pytest.mark.parametrize(
    ("view", "sql", "links"),
    [
        ("CREATE VIEW v AS SELECT crop FROM field", "SELECT crop FROM v", {"v": ["crop"]}),
        (
            "CREATE VIEW v (kind, n) AS SELECT crop, 1 FROM field",
            "SELECT f.id FROM field f JOIN v ON v.kind = f.crop",
            {"field": ["id", "crop"], "v": ["kind"]},
        ),
        (
            "CREATE VIEW v AS WITH a AS (SELECT 1 AS x) SELECT x FROM a",
            "SELECT x FROM v",
            {"v": ["x"]},
        ),
        (
            "CREATE VIEW w AS SELECT 1 AS y; CREATE VIEW v AS SELECT y FROM w",
            "SELECT y FROM main.v",
            {"v": ["y"]},
        ),
    ],
)
def test_gold_on_a_view_has_links(file: Path, view: str, sql: str, links: dict[str, Any]) -> None:
    assert gold_links(sql, reflect(build(file, FARM, view), "farm")) == links


@VIEWS
def test_examples_of_views_are_read_as_those_of_tables(file: Path) -> None:
    build(file, FARM, YIELDS)
    text = render(reflect(file, "farm", 2), "m_schema")
    assert "# Table: yields\n[\n(crop:TEXT, Examples: [oats, rye])" in text


@VIEWS
def test_gold_on_a_view_is_trained_on_in_both_tasks(file: Path, make_config: Any) -> None:
    build(file, FARM, YIELDS)
    rows = [
        {"db_id": "farm", "question": f"{n}?", "query": "SELECT crop FROM yields"} for n in range(8)
    ]
    questions = file.parent.parent / "questions.jsonl"
    questions.write_text("\n".join(map(json.dumps, rows)))
    config = make_config(dataset_id=str(questions), **{"data.databases": str(file)})
    corpus = data.load(config)
    example = corpus.splits["train"][0]
    assert "yields(crop text" in prompts.schema_text(example, corpus.schemas, config.prompt)
    assert prompts.gold_links(example, corpus.schemas) == {"yields": ["crop"]}


# Names and types


@NAMES
@pytest.mark.parametrize("serializer", ["ddl", "compact", "m_schema"])
@pytest.mark.parametrize(
    "name", ["two words", "order", "1st", "a-b", 'say "hi"', "größe", "a\nb", "```", "%s", "a.b"]
)
def test_a_name_is_written_so_that_a_query_can_take_it_from_the_prompt(
    file: Path, name: str, serializer: Serializer
) -> None:
    quoted = '"' + name.replace('"', '""') + '"'
    build(file, f"CREATE TABLE {quoted} ({quoted} INT, plain INT)")
    text = render(reflect(file, "farm"), serializer)
    assert text.count(quoted) == 2
    assert "plain" in text and '"plain"' not in text
    with Executor(1) as executor:
        assert executor.run(file, f"SELECT {quoted} FROM {quoted}").status == "ok"


@TYPES
@pytest.mark.parametrize(
    ("declared", "shown"),
    [
        ("STRING", "STRING"),
        ("varchar(20)", "varchar(20)"),
        ("BIGINT UNSIGNED", "BIGINT UNSIGNED"),
        ("DECIMAL(10,2)", "DECIMAL(10,2)"),
        ("NVARCHAR2(5)", "NVARCHAR2(5)"),
        ("jsonb", "jsonb"),
        ("text", "TEXT"),
        ("", ""),
        ("INT GENERATED ALWAYS AS (1)", "INT"),
        ("double   precision", "double precision"),
        ('"odd\n\n```\x1b[2J type"', "odd ```[2J type"),
    ],
)
def test_a_type_is_shown_as_it_is_declared_on_one_line(
    file: Path, declared: str, shown: str
) -> None:
    schema = reflect(build(file, f"CREATE TABLE t (x INT, a {declared})"), "farm")
    assert schema.tables[0].columns[1].type == shown


# One odd thing


def drop(file: Path, table: str) -> None:
    with closing(sqlite3.connect(file)) as connection:
        connection.execute(f"DROP TABLE {table}")
        connection.commit()


def without_module(file: Path) -> str:
    """Make a virtual table whose module nobody has."""
    build(file, "CREATE VIRTUAL TABLE odd USING fts5(a)", "PRAGMA writable_schema = ON")
    with closing(sqlite3.connect(file)) as connection:
        connection.execute("PRAGMA writable_schema = ON")
        connection.execute("UPDATE sqlite_master SET sql = replace(sql, 'fts5', 'vec9')")
        connection.commit()
    return "odd is not shown: no such module: vec9"


def on_a_dropped_table(file: Path) -> str:
    build(file, "CREATE TABLE gone (a); CREATE VIEW odd AS SELECT a FROM gone; DROP TABLE gone")
    return "odd is not shown: no such table: main.gone"


def of_a_missing_function(file: Path) -> str:
    build(file, "CREATE VIEW odd AS SELECT st_area(area) AS a FROM field")
    return "odd is not shown: no such function: st_area"


def around_itself(file: Path) -> str:
    build(file, "CREATE VIEW odd AS SELECT * FROM odd2; CREATE VIEW odd2 AS SELECT * FROM odd")
    return "odd is not shown: view odd is circularly defined"


@ODD
@pytest.mark.parametrize(
    "spoil", [without_module, on_a_dropped_table, of_a_missing_function, around_itself]
)
def test_what_cannot_be_read_is_left_out_and_named(
    file: Path, spoil: Callable[[Path], str]
) -> None:
    build(file, FARM)
    line = spoil(file)
    schema = reflect(file, "farm", 2)
    assert schema.table_names[:2] == ("field", "harvest")
    assert schema.table("odd") is None
    assert line in schema.left_out


@ODD
@pytest.mark.parametrize(
    ("index", "shown"),
    [("rtree(id, low, high)", "places(id int, low real, high real)"), ("fts5(a)", "places(a)")],
)
def test_an_index_that_sqlite_has_is_shown_and_read(file: Path, index: str, shown: str) -> None:
    build(file, FARM, f"CREATE VIRTUAL TABLE places USING {index}")
    schema = reflect(file, "farm", 2)
    assert render(schema, "compact").splitlines()[2:] == [shown]
    assert not schema.left_out
    with Executor(1) as executor:
        assert executor.run(file, "SELECT * FROM places").status == "ok"
        refused = executor.run(file, "DELETE FROM places_node")
        assert refused.status == "error" and refused.rows == ()


@ODD
def test_what_is_left_out_is_said_to_people(file: Path, make_config: Any) -> None:
    build(file, FARM)
    line = on_a_dropped_table(file)
    questions = file.parent.parent / "questions.jsonl"
    row = {"db_id": "farm", "question": "?", "query": "SELECT crop FROM field"}
    questions.write_text("\n".join(json.dumps(row) for _ in range(8)))
    corpus = data.load(make_config(dataset_id=str(questions), **{"data.databases": str(file)}))
    assert f"database farm: {line}" in corpus.notes


@ODD
def test_a_database_of_which_nothing_can_be_read_is_refused(file: Path) -> None:
    with pytest.raises(DataError, match=r"farm\.sqlite: .* nothing in it can be read: odd is not"):
        reflect(file, on_a_dropped_table(file))


@ODD
@pytest.mark.parametrize(
    "value", ["x'ff00'", "CAST(x'61ff62' AS TEXT)", "1e999", "'a' || char(10)", "'a' || char(0)"]
)
def test_an_odd_value_costs_no_other_its_place(file: Path, value: str) -> None:
    build(file, FARM, f"INSERT INTO field VALUES (3, {value}, 1)")
    schema = reflect(file, "farm", 9)
    assert {"oats", "rye"} <= set(schema.tables[0].columns[1].examples)
    assert not schema.left_out


# Example values that take long


@SLOW
@pytest.mark.parametrize(
    "column",
    [
        "TEXT AS (substr(hex(zeroblob(400000000 + id)), 1, 3))",
        "INT AS (length(hex(zeroblob(300000000 + id))))",
        "INT AS (abs(-9223372036854775807 - 1 + 0 * id))",
        "TEXT AS (json_extract(name, '$.a'))",
    ],
)
def test_a_generated_column_loses_its_examples_and_is_named(file: Path, column: str) -> None:
    build(
        file,
        "CREATE TABLE item (id INTEGER PRIMARY KEY, name TEXT)",
        "INSERT INTO item VALUES (1, 'pen'), (2, 'ink')",
        f"ALTER TABLE item ADD COLUMN g {column}",
    )
    started = time.monotonic()
    schema = reflect(file, "shop", 3)
    assert time.monotonic() - started < HANGS
    assert [c.examples for c in schema.tables[0].columns] == [("1", "2"), ("ink", "pen"), ()]
    (line,) = schema.left_out
    assert line.startswith("item.g has no example values: ")


@SLOW
def test_a_view_without_an_end_is_given_up(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray_sql.database.bounded.QUERY_SECONDS", 0.5)
    endless = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n)"
    build(file, FARM, f"CREATE VIEW v AS {endless} SELECT count(*) AS c FROM n")
    schema = reflect(file, "farm", 2)
    assert schema.tables[0].columns[1].examples == ("oats", "rye")
    assert schema.left_out == ("v.c has no example values: timeout: stopped after 0.5 s",)


@SLOW
def test_what_is_no_time_left_for_is_named(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(file, FARM)
    monkeypatch.setattr("ray_sql.database.examples.EXAMPLE_ROWS", 10**9)
    monkeypatch.setattr("ray_sql.database.bounded.QUERY_SECONDS", 0.3)
    build(
        file, "CREATE VIEW a AS SELECT count(*) AS c FROM " + ", ".join(f"n t{i}" for i in range(9))
    )
    build(
        file,
        "CREATE TABLE n AS WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n "
        "LIMIT 50) SELECT i FROM n",
    )
    schema = reflect(file, "farm", 2)
    assert schema.left_out == ("a.c has no example values: timeout: stopped after 0.3 s",)


# What is no database


def pipe(path: Path) -> None:
    os.mkfifo(path)


def folder(path: Path) -> None:
    path.mkdir()


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def endpoint(path: Path) -> None:
    with closing(socket.socket(socket.AF_UNIX)) as unix:
        here = Path.cwd()
        os.chdir(path.parent)  # the address of a socket is short
        try:
            unix.bind(path.name)
        finally:
            os.chdir(here)


@SLOW
@pytest.mark.parametrize("make", [pipe, folder, device, endpoint])
@pytest.mark.parametrize("end", ["", "-journal", "-wal"])
def test_what_is_no_file_is_named_at_once(
    file: Path, make_config: Any, make: Callable[[Path], None], end: str
) -> None:
    build(file, FARM, "PRAGMA journal_mode = WAL" if end == "-wal" else "")
    odd = file.with_name(file.name + end)
    odd.unlink(missing_ok=True)
    make(odd)
    questions = file.parent.parent / "questions.jsonl"
    row = {"db_id": "farm", "question": "?", "query": "SELECT crop FROM field"}
    questions.write_text("\n".join(json.dumps(row) for _ in range(8)))
    where = {"data.databases": str(file.parent.parent)}
    started = time.monotonic()
    with pytest.raises(DataError, match=rf"farm\.sqlite{end}: "):
        data.load(make_config(dataset_id=str(questions), **where))
    assert time.monotonic() - started < HANGS


# Read-only and WAL


class Writer:
    """A process that holds a database open."""

    def __init__(self, file: Path, *statements: str) -> None:
        code = (
            "import sqlite3, sys\nc = sqlite3.connect(sys.argv[1], isolation_level=None)\n"
            "for s in sys.argv[2:]: c.execute(s).fetchall()\nprint('ready', flush=True)\n"
            "sys.stdin.read()"
        )
        command = [sys.executable, "-c", code, str(file), *statements]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe)
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == b"ready\n"

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def hold() -> Iterator[Callable[..., Writer]]:
    writers: list[Writer] = []

    def start(file: Path, *statements: str) -> Writer:
        writers.append(Writer(file, *statements))
        return writers[-1]

    yield start
    for writer in writers:
        writer.end()


LOGGED = ("PRAGMA journal_mode = WAL", "PRAGMA wal_autocheckpoint = 0")
MORE = "INSERT INTO field VALUES (3, 'flax', 1)"
CROPS = ("flax", "oats", "rye")


def crops(file: Path) -> tuple[str, ...]:
    """Read all examples; the folder must stay as it was."""
    before = {path.name: path.read_bytes() for path in file.parent.iterdir()}
    schema = reflect(file, "farm", 9)
    after = {path.name: path.read_bytes() for path in file.parent.iterdir()}
    assert after.keys() == before.keys() and after[file.name] == before[file.name]
    return schema.tables[0].columns[1].examples


@WAL
def test_a_database_in_wal_mode_is_read_without_a_trace(file: Path) -> None:
    build(file, FARM, LOGGED[0], MORE)
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    assert crops(file) == CROPS


@WAL
@pytest.mark.parametrize(
    ("statements", "found"),
    [
        ((*LOGGED, MORE), CROPS),
        ((*LOGGED, "SELECT * FROM field"), CROPS[1:]),
        ((*LOGGED, MORE, "PRAGMA wal_checkpoint(TRUNCATE)"), CROPS),
        ((*LOGGED, MORE, "BEGIN IMMEDIATE", "DELETE FROM field"), CROPS),
        (("BEGIN IMMEDIATE", MORE), CROPS[1:]),
    ],
)
def test_a_database_that_another_process_writes_is_read_as_it_was_last_left_whole(
    file: Path, hold: Callable[..., Writer], statements: tuple[str, ...], found: tuple[str, ...]
) -> None:
    hold(build(file, FARM), *statements)
    assert crops(file) == found


@WAL
@pytest.mark.parametrize("statements", [(*LOGGED, MORE), (*LOGGED, "SELECT * FROM field")])
def test_what_a_crash_left_is_read(
    file: Path, hold: Callable[..., Writer], statements: tuple[str, ...]
) -> None:
    hold(build(file, FARM), *statements).end()
    assert crops(file) == (CROPS if MORE in statements else CROPS[1:])


@WAL
def test_a_change_that_was_cut_off_is_named_with_the_way_out(
    file: Path, hold: Callable[..., Writer]
) -> None:
    many = "INSERT INTO field SELECT NULL, hex(randomblob(9000)), 1 FROM field a, field b"
    hold(build(file, FARM), "PRAGMA cache_size = 1", "BEGIN", *[many] * 3).end()
    with pytest.raises(DataError, match="a change to it was cut off; open it once with sqlite3"):
        reflect(file, "farm")


@WAL
def test_a_copy_without_its_index_is_named_with_the_way_out(
    file: Path, hold: Callable[..., Writer]
) -> None:
    hold(build(file, FARM), *LOGGED, MORE)
    copy = file.with_name("copy.sqlite")
    for end in ("", "-wal"):
        shutil.copy(f"{file}{end}", f"{copy}{end}")
    with pytest.raises(DataError, match=r"copy\.sqlite: holds changes .* open it once"):
        reflect(copy, "farm")


@WAL
@pytest.mark.parametrize("mode", ["WAL", "DELETE", "TRUNCATE"])
def test_a_folder_that_may_not_be_written_is_enough(file: Path, mode: str) -> None:
    build(file, FARM, f"PRAGMA journal_mode = {mode}", MORE)
    before = sorted(file.parent.iterdir())
    file.chmod(0o444)
    file.parent.chmod(0o555)
    code = (
        "import sys; from ray_sql.database import reflect; "
        "print(reflect(sys.argv[1], 'farm', 9).tables[0].columns[1].examples)"
    )
    command = [sys.executable, "-c", code, str(file)]
    if os.geteuid() == 0:  # root may write everywhere, unless it gives that up
        if shutil.which("setpriv") is None:
            pytest.skip("no setpriv to give up root's rights")
        command = ["setpriv", "--bounding-set=-dac_override", *command]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    finally:
        file.parent.chmod(0o755)
    assert done.stdout.strip() == str(CROPS), done.stderr
    assert sorted(file.parent.iterdir()) == before
