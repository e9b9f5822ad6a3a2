"""Gold links follow scopes as the database does; answers are read as strict JSON or not at all."""

import json
import os
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_sql.data.linking import (
    LinkError,
    format_links,
    gold_links,
    parse_links,
    parse_python_literal,
)
from ray_sql.database import Column, Links, Schema, Table, read_tables_json
from ray_sql.errors import DataError

SHARED = os.environ.get("RAY_SQL_SHARED")
DATA = Path(SHARED or ".") / "data"
needs_spider = pytest.mark.skipif(not SHARED, reason="RAY_SQL_SHARED is unset")


def table(name: str, columns: str) -> Table:
    return Table(name, tuple(Column(column, "TEXT") for column in columns.split()))


ZOO = Schema(
    "zoo",
    (
        table("Animals", "Id Name Keeper_Id Born"),
        table("Keepers", "Id Name Boss"),
        table("order", "Id group"),
    ),
)


@pytest.mark.parametrize(
    ("sql", "links"),
    [
        # Names come out in the schema's spelling and order, whatever the query's
        ("select BORN, name from ANIMALS", {"Animals": ["Name", "Born"]}),
        ("select k.name, a.born from keepers k, animals as A",
         {"Animals": ["Born"], "Keepers": ["Name"]}),
        ('select "Id", [group], `Id` from "order"', {"order": ["Id", "group"]}),
        ("select a.name from main.animals as a;", {"Animals": ["Name"]}),
        # Stars
        ("select * from animals", {"Animals": []}),
        ("select count(*), a.* from animals a", {"Animals": []}),
        ("select count(distinct a.id) from animals a", {"Animals": ["Id"]}),
        # What is no column
        ('select id from animals where name = "Leo"', {"Animals": ["Id", "Name"]}),
        ("select id from animals where name = 'boss'", {"Animals": ["Id", "Name"]}),
        ('select 1 from animals a join keepers k where a.name = "boss"',
         {"Animals": ["Name"], "Keepers": ["Boss"]}),
        ("select count(*) as born from animals order by born", {"Animals": []}),
        ("select name as n, count(*) as c from animals group by n having c > 1 order by c",
         {"Animals": ["Name"]}),
        ("select a.rowid, a.nothing, nothing from animals a", {"Animals": []}),
        ("select value from animals, json_each(animals.name)", {"Animals": ["Name"]}),
        # Scopes
        ("select name from animals where keeper_id in (select id from keepers where boss = 1)",
         {"Animals": ["Name", "Keeper_Id"], "Keepers": ["Id", "Boss"]}),
        ("select t.name from animals t where exists (select 1 from keepers t where t.boss = 2)",
         {"Animals": ["Name"], "Keepers": ["Boss"]}),
        ("select 1 from animals a "
         "where exists (select 1 from keepers where id = a.keeper_id and born > 3)",
         {"Animals": ["Keeper_Id", "Born"], "Keepers": ["Id"]}),
        ("select t.born from animals t intersect select t.boss from keepers t",
         {"Animals": ["Born"], "Keepers": ["Boss"]}),
        ("select id from animals union select id from keepers order by id",
         {"Animals": ["Id"], "Keepers": ["Id"]}),
        ("select n from (select name as n, born from animals) where n > 1",
         {"Animals": ["Name", "Born"]}),
        ("with k as (select boss as name from keepers) select name from k", {"Keepers": ["Boss"]}),
        ("with animals as (select boss as name from keepers) select name from animals",
         {"Keepers": ["Boss"]}),
        ("select (select max(boss) from keepers) from animals limit 3",
         {"Animals": [], "Keepers": ["Boss"]}),
        # Columns that a star passes on
        ("select name from (select * from animals) where born > 3", {"Animals": ["Name", "Born"]}),
        ("select x.name from (select k.* from animals a join keepers k on 1) x",
         {"Animals": [], "Keepers": ["Name"]}),
        ("select name from (select 1 as name, * from animals)", {"Animals": []}),
        ("select name from (select *, 1 as name from animals)", {"Animals": ["Name"]}),
        ("select name from (select * from animals union select * from keepers)",
         {"Animals": ["Name"], "Keepers": ["Name"]}),
        ("with recursive r as (select * from keepers union select * from r) select boss from r",
         {"Keepers": ["Boss"]}),
        # Joins that name their columns by halves, or not at all
        ("select boss from animals join keepers using (name)",
         {"Animals": ["Name"], "Keepers": ["Name", "Boss"]}),
        ("select boss from animals natural join keepers",
         {"Animals": ["Id", "Name"], "Keepers": ["Id", "Name", "Boss"]}),
        ("select 1", {}),
    ],
)  # fmt: skip
def test_links_are_the_columns_that_the_query_reads(sql: str, links: Links) -> None:
    actual = gold_links(sql, ZOO)
    assert actual == links
    assert list(actual) == [name for name in ZOO.table_names if name in links]


def test_other_dialects_are_read_too() -> None:
    postgres = 'select distinct on (a."Name") a.born::text from "Animals" a where a.name ilike $1'
    assert gold_links(postgres, ZOO, dialect="postgres") == {"Animals": ["Name", "Born"]}
    assert gold_links('select `name` from animals where born = "x"', ZOO, "mysql") == {
        "Animals": ["Name", "Born"]
    }


def test_an_unknown_table_is_named_with_its_database() -> None:
    with pytest.raises(LinkError, match=r"the schema of zoo lacks: cages, visitors$"):
        gold_links("select 1 from visitors, animals where exists (select * from cages)", ZOO)


@pytest.mark.parametrize(
    "sql",
    [
        "",
        "select name from",
        "select 'open from animals",
        "selec name from animals",
        "select 1; drop table animals",
        "delete from animals",
        "explain select 1",
        "select " + "(" * 5000 + "1" + ")" * 5000,
    ],
)
def test_what_is_no_single_readable_query_is_one_line_of_data_error(sql: str) -> None:
    with pytest.raises(LinkError) as caught:
        gold_links(sql, ZOO)
    assert isinstance(caught.value, DataError)
    assert "\n" not in str(caught.value)
    assert "\x1b" not in str(caught.value)
    assert len(str(caught.value)) < 500


# The text of links


names = st.text(st.characters(exclude_categories=["Cs"]))


@given(st.dictionaries(names, st.lists(names, unique=True)))
def test_what_is_written_is_read_back_bare_fenced_and_after_talk(links: Links) -> None:
    text = format_links(links)
    assert "\n" not in text
    assert parse_links(text) == links
    if "```" not in text:
        assert parse_links(f"Here {{they}} are:\n```json\n{text}\n```\nDone.") == links


def test_the_written_form_is_pinned() -> None:
    assert format_links({"Zoë": ["a", "b c"], "t": []}) == '{"Zoë": ["a", "b c"], "t": []}'


@pytest.mark.parametrize(
    ("answer", "links"),
    [
        ('```json\n{"t": ["a"]}\n```', {"t": ["a"]}),
        ('```\n{"t": ["a"]}```', {"t": ["a"]}),
        ('```JSON {"t": []}', {"t": []}),
        ('The tables are {"t": ["a", "b", "a"]} {"u": []}', {"t": ["a", "b"]}),
        ('```json\n{"t": ["a"]}\n```\n```json\n{"u": []}\n```', {"u": []}),
        ('[{"t": ["a"]}]', {"t": ["a"]}),
        ("{}", {}),
        ('{"```": ["a"]}', {"```": ["a"]}),
        ('```json\n{"t": ["a"]} and more\n```', None),
        ("```json\n{'t': ['a']}\n```", None),
        ("```python\n{'t': ['a']}\n```", None),
        ("{'t': ['a']}", None),
        ('{"t": "a"}', None),
        ('{"t": [1]}', None),
        ('{"t": {"u": []}}', None),
        ('{"t": null}', None),
        ('{"t": ["\\ud800"]}', None),
        ('```json\n["t"]\n```', None),
        ('{"t": ["a"', None),
        ("no links at all", None),
        ("", None),
        ('{"t":' + "[" * 100_000, None),
        ("```json\n" + "[" * 100_000, None),
    ],
)
def test_an_answer_is_strict_json_or_none(answer: str, links: Links | None) -> None:
    assert parse_links(answer) == links


def test_no_answer_is_run_as_code(tmp_path: Path) -> None:
    target = tmp_path / "made"
    attack = f"__import__('pathlib').Path({str(target)!r}).touch()"
    for text in (attack, f"```json\n{attack}\n```", f"{{'t': [{attack}]}}"):
        assert parse_links(text) is None
        assert parse_python_literal(text) is None
    assert not target.exists()


@given(st.text())
def test_any_answer_gives_links_or_none(answer: str) -> None:
    for links in (parse_links(answer), parse_python_literal(answer)):
        assert links is None or isinstance(links, dict)


@pytest.mark.parametrize(
    ("text", "links"),
    [
        ("{'t': ['a', 'a'], 'u': []}", {"t": ["a"], "u": []}),
        (" ```json\n{'t': ['a']}\n``` ", {"t": ["a"]}),
        ("{'t': ('a',)}", None),
        ("{['t']: []}", None),
        ("{'t': ['a'", None),
        ("['t']", None),
        ("t", None),
        ("-" * 50_000 + "1", None),
        ("{'t': [" + "'a'," * 30_000 + "]}", None),
    ],
)
def test_old_label_columns_are_read_as_literals_of_bounded_length(
    text: str, links: Links | None
) -> None:
    assert parse_python_literal(text) == links


# All of Spider


@needs_spider
def test_all_but_one_train_query_have_links_and_a_hundred_take_less_than_a_second() -> None:
    schemas = read_tables_json(DATA / "spider" / "tables.json")
    files = ("train_spider.json", "train_others.json")
    rows = [row for name in files for row in json.loads((DATA / "spider" / name).read_text())]
    failed = []
    start = time.process_time()
    for number, row in enumerate(rows):
        try:
            gold_links(row["query"], schemas[row["db_id"]])
        except LinkError as error:
            failed.append((number, str(error)))
    assert failed == [
        (3153, "query on tables that the schema of assets_maintenance lacks: ref_company_types")
    ]
    assert (time.process_time() - start) / len(rows) < 0.01  # measured: 0.002 on one core
