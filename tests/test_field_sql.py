"""SQL as people write it is kept, read and linked: odd names, dialects, what SQLite runs."""

import sqlite3

import pytest

from ray_sql.data.answers import one_line, parse_sql


@pytest.mark.kind("names in brackets")
@pytest.mark.parametrize(
    "name", ["a  b", "x--y", "a;b", "it's", 'so "called"', "/* no comment", "tab\there", "`", "[x"]
)
def test_a_name_in_brackets_is_kept_and_reads_the_same_column(name: str) -> None:
    connection = sqlite3.connect(":memory:")
    connection.execute(f"CREATE TABLE t ([{name}] TEXT)")
    connection.execute("INSERT INTO t VALUES ('found')")
    sql = f"SELECT [{name}]\n  FROM t -- all\n WHERE [{name}] != '; [x'"
    answers = one_line(sql), parse_sql(f"```sql\n{sql};\n```"), parse_sql(f"{sql}; SELECT 2")
    for answer in answers:
        assert answer == f"SELECT [{name}] FROM t WHERE [{name}] != '; [x'"
        assert connection.execute(answer).fetchall() == [("found",)]
    connection.close()


@pytest.mark.kind("names in brackets")
@pytest.mark.parametrize(
    ("sql", "line"),
    [
        ("SELECT ARRAY[1, -- one\n 2]", "SELECT ARRAY[1, 2]"),
        ("SELECT tags[1] FROM [a  b]", "SELECT tags[1] FROM [a  b]"),
        ("SELECT m[1][2] -- cell\nFROM t", "SELECT m[1][2] FROM t"),
        ("SELECT ARRAY['a]b', 'c--d']", "SELECT ARRAY['a]b', 'c--d']"),
    ],
)
def test_the_brackets_of_an_array_are_no_name(sql: str, line: str) -> None:
    assert one_line(sql) == line
