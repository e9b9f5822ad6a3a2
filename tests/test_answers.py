"""An answer is found behind thoughts and among code blocks, whole, and ends where it is whole."""

import json

import pytest

from ray_sql.data.answers import is_complete, parse_sql, unwrap_sql
from ray_sql.data.linking import parse_links

NOT_ONE_FENCE = pytest.mark.kind("answers that are not one plain fence")
THINKING = pytest.mark.kind("thinking models")

SQL = "SELECT city FROM shop WHERE id = 3"

FENCES = [
    f"```sqlite3\n{SQL}\n```",
    f"```t-sql\n{SQL}\n```",
    f"```pl/sql\n{SQL}\n```",
    f'```sql title="the query"\n{SQL}\n```',
    f"```sql {{.numberLines}}\n{SQL}\n```",
    f"```sql showLineNumbers copy\n{SQL}\n```",
    f"```{{sql}}\n{SQL}\n```",
    f"````sql\n{SQL}\n````",
    f"~~~sql\n{SQL}\n~~~",
    f"~~~~\n{SQL}\n~~~~\nThat is ~~~ all.",
    f"```postgresql {SQL}```",
    f"Run this:\n\n  ```sql\n  {SQL};\n  ```\n\nIt finds the city.",
    f"```SQL\n{SQL}\n```",
]
SEVERAL_BLOCKS = [
    f"First I look around:\n```sql\nSELECT DISTINCT city FROM shop\n```\nThen:\n```sql\n{SQL}\n```",
    f"```sql\n{SQL}\n```\nIt gives:\n```\ncity\nPorto\n```",
    f"```python\nwith open('q.sql') as file:\n    run(file)\n```\n```sql\n{SQL}\n```",
    f"```sql\n{SQL}\n```\nAgain:\n```sql\nSELECT city FR",
    f"~~~\nSELECT 1\n~~~\n```sql\n{SQL}\n```",
]


@NOT_ONE_FENCE
@pytest.mark.parametrize("answer", [*FENCES, *SEVERAL_BLOCKS])
def test_a_query_is_read_from_any_kind_of_block(answer: str) -> None:
    assert parse_sql(answer) == SQL


@NOT_ONE_FENCE
@pytest.mark.parametrize(
    ("answer", "sql"),
    [
        (
            "Here:\n\nWITH a AS (\n  SELECT 1 AS x\n),\n\nb AS (\n  SELECT 2 AS y\n)\n\n"
            "SELECT a.x FROM a JOIN b ON a.x = b.y;\n\nIt joins both.",
            "WITH a AS ( SELECT 1 AS x ), b AS ( SELECT 2 AS y ) "
            "SELECT a.x FROM a JOIN b ON a.x = b.y",
        ),
        (
            "with a as (select 1)\n\nselect * from a\n\nThat is all.",
            "with a as (select 1) select * from a",
        ),
        ("SELECT x\n\nFROM t\n\nFrom this you see x.", "SELECT x FROM t"),
        ("select x\n\nfrom t\n\nFrom this you see x.", "select x from t"),
        (
            "SELECT x FROM (\n\nSELECT 1 AS x\n\n)\n\nWHERE x = 1\n\nWhere x is one.",
            "SELECT x FROM ( SELECT 1 AS x ) WHERE x = 1",
        ),
        ("SELECT 1\n\nUNION ALL\n\nSELECT 2\n\nBoth.", "SELECT 1 UNION ALL SELECT 2"),
        ("SELECT 'a\n\nb' AS x\n\nTwo lines.", "SELECT 'a\n\nb' AS x"),
        ("SELECT 1\n\n-- of t\nFROM t\n\nOne.", "SELECT 1 FROM t"),
        ("(SELECT 1) UNION (SELECT 2)", "(SELECT 1) UNION (SELECT 2)"),
        ("It is a count (SELECT count(*) FROM t) of t.", "SELECT count(*) FROM t"),
        ("The query is `SELECT x FROM t`, which reads t.", "SELECT x FROM t"),
        ("SELECT 1\n\nSELECT 2 is another.", "SELECT 1"),
        ("SELECT a) FROM t", "SELECT a) FROM t"),
    ],
)
def test_a_query_without_a_block_is_read_to_its_end(answer: str, sql: str) -> None:
    assert parse_sql(answer) == sql


@THINKING
@pytest.mark.parametrize(
    "thoughts",
    [
        "<think>\nMaybe\n```sql\nSELECT 1\n```\nNo.\n</think>\n\n",
        "Maybe\n```sql\nSELECT 1\n```\nNo.\n</think>\n\n",  # the prompt had the first mark
        "<think>\n\n</think>\n\n",
        "<think>SELECT 1</think> and <think>SELECT 2</think>",
        "<|channel|>analysis<|message|>```SELECT 1```<|end|><|start|>assistant"
        "<|channel|>final<|message|>",
        "analysisMaybe ```SELECT 1```assistantfinal",
        "<|channel>thought\nMaybe ```SELECT 1```<channel|>",
        "[THINK]Maybe SELECT 1[/THINK]",
        " to=self<|message|>```SELECT 1```<|eom|><|start|>assistant to=user<|message|>",
    ],
)
def test_an_answer_stands_behind_the_thoughts(thoughts: str) -> None:
    for answer in (f"```sql\n{SQL}\n```", SQL):
        assert parse_sql(thoughts + answer) == SQL
        assert unwrap_sql(thoughts + answer) == SQL
    assert parse_links(f'{thoughts}```json\n{{"t": ["a"]}}\n```') == {"t": ["a"]}
    assert is_complete(f"{thoughts}```sql\n{SQL}\n```")
    assert not is_complete(thoughts)


@THINKING
def test_a_draft_in_thoughts_without_an_end_is_no_answer() -> None:
    text = f"<think>\nMaybe\n```sql\n{SQL}\n```\nor"
    assert parse_sql(text) is None and not is_complete(text)
    links = '<think>```json\n{"t": []}\n```'
    assert parse_links(links) is None and not is_complete(links)


@NOT_ONE_FENCE
@pytest.mark.parametrize("answer", FENCES)
def test_an_answer_that_ends_with_its_block_is_read_as_the_whole_text_is(answer: str) -> None:
    ends = [end for end in range(len(answer) + 1) if is_complete(answer[:end])]
    written = answer[: ends[0]]
    assert parse_sql(written) == SQL, "generation would stop here"
    assert ends == list(range(ends[0], len(answer) + 1))


@NOT_ONE_FENCE
def test_links_are_read_from_the_last_block_that_has_some() -> None:
    last = json.dumps({"shop": ["city"]})
    assert parse_links(f'```json\n{{"t": []}}\n```\nBetter:\n```json5 title="x"\n{last}\n```') == {
        "shop": ["city"]
    }
    assert parse_links(f"~~~json\n{last}\n~~~\n```\nno links\n```") == {"shop": ["city"]}


@pytest.mark.parametrize(
    "sql",
    ["SELECT 1", "-- all\nSELECT\n  1;", "UPDATE t SET a = 1", "(SELECT 1)", "", "\tSELECT 1"],
)
def test_plain_sql_is_left_to_the_byte(sql: str) -> None:
    assert unwrap_sql(sql) == sql


@NOT_ONE_FENCE
@pytest.mark.parametrize("text", [f"SQL: {SQL}", f"SQLite: {SQL};", f"```{SQL}```", *FENCES])
def test_sql_in_a_wrapping_is_unwrapped(text: str) -> None:
    assert unwrap_sql(text) == SQL
