"""Numbers of the settings have bounds, and so has the time to read and compare untrusted text."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, get_args

import pytest

from ray_sql import tracking
from ray_sql.config import CheckConfig, Config, EvaluateConfig, SweepConfig, load, names
from ray_sql.config.sections import TrackingSection
from ray_sql.data.answers import parse_sql, unwrap_sql
from ray_sql.data.formats import Record
from ray_sql.data.linking import LinkError, gold_links, parse_links
from ray_sql.data.prompted import unfold
from ray_sql.data.schema_texts import read_schema
from ray_sql.database import Column, Schema, Table
from ray_sql.errors import ConfigError, ModelError, StoreError
from ray_sql.metrics import exact_set_verdict, hardness, prepare_spider, soft_f1, spider_match
from ray_sql.models import patterns
from ray_sql.models.patterns import check_patterns
from tests.waiting import HANGS

ODD = ["0", "-1", "1e10", "10000000000", "1e308", "9" * 400, "9" * 5000, "nan", "inf", "-inf"]
LARGE = 1e9
"""More than any setting counts or waits for."""
WITHOUT_LIMIT = {"train.max_grad_norm": "a norm that is never reached turns clipping off"}
PASSWORD = "Opensesame77"
GIVEN = ["--model_name", "demo", "--output_name", "r", "--task_type", "sql"]


def is_number(annotation: Any) -> bool:
    """Tell whether a setting may hold a number."""
    if annotation in (int, float):
        return True
    return any(is_number(inner) for inner in get_args(annotation))


NUMBERS = sorted({name for name, field in names(SweepConfig) if is_number(field.annotation)})


def as_number(value: Any) -> float:
    """Return the largest number in a setting's value."""
    if isinstance(value, tuple | list):
        return max(map(as_number, value))
    if isinstance(value, dict):
        return max(map(as_number, value.values()))
    return abs(float(value))


def outcome(kind: type[Any], name: str, value: str) -> str:
    """Return why a value of a setting is wrong, in a line; nothing where it is right."""
    started = time.monotonic()
    try:
        accepted = load(kind, [*GIVEN, f"--{name}={value}"]).setting(name)
    except ConfigError as error:
        message = str(error)
        is_clear = name in message and "\n" not in message and len(message) < 6000
        wrong = "" if is_clear else f"{name} {value}: {message[:300]}"
    else:
        is_sane = accepted is None or as_number(accepted) <= LARGE or name in WITHOUT_LIMIT
        wrong = "" if is_sane else f"{name} {value}: accepted as {accepted}"
    return wrong if time.monotonic() - started < HANGS / 10 else f"{name} {value}: too slow"


@pytest.mark.kind("time in the parent")
@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_of_a_setting_is_refused_or_sane(name: str) -> None:
    assert [wrong for value in ODD if (wrong := outcome(SweepConfig, name, value))] == []


STORES = [
    f"postgresql://me:{PASSWORD}@127.0.0.1:9/runs",
    f"mysql+pymysql://me:{PASSWORD}@127.0.0.1:9/runs",
    f"mssql+pyodbc://me:{PASSWORD}@127.0.0.1:9/runs",
    "postgresql://127.0.0.1:x/runs",
    "sqlite:///{folder}/a-folder",
    "oracle://127.0.0.1/runs",
]


@pytest.mark.kind("time in the parent")
@pytest.mark.parametrize("uri", STORES)
def test_a_record_that_cannot_be_opened_is_said_at_once(tmp_path: Path, uri: str) -> None:
    (tmp_path / "a-folder").mkdir()
    settings = TrackingSection(uri=uri.format(folder=tmp_path))
    started = time.monotonic()
    with pytest.raises(StoreError, match=r"^--tracking.uri ") as refused:
        tracking.require_store(settings)
    assert PASSWORD not in str(refused.value)
    assert time.monotonic() - started < HANGS / 2  # MLflow's own tries take 102 s


def test_the_numbers_of_every_job_are_among_those_of_a_sweep() -> None:
    assert len(NUMBERS) > 30
    for kind in (Config, EvaluateConfig, CheckConfig):
        own = {name for name, field in names(kind) if is_number(field.annotation)}
        assert own <= set(NUMBERS)


@pytest.mark.kind("time in the parent")
@pytest.mark.parametrize(
    "given",
    [
        ["--scaling.num_workers", "1,999999999"],
        ["--scaling.num_workers", "1,10000"],
        ["--scaling.num_workers", "2,9999", "--train.global_batch_size", "1000"],
        ["--scaling.num_workers", "-5,3"],
        ["--scaling.resources_per_worker", '{"CPU": 1e308}'],
        ["--scaling.resources_per_worker", '{"CPU": -1}'],
        ["--seed", "4294967296"],
        ["--tune.space", '{"learning_rate": {"loguniform": [1e-5, 1e308]}}', "--num_epochs", "nan"],
    ],
)
def test_numbers_in_lists_have_bounds_too(given: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load(Config, [*GIVEN, *given])
    assert len(str(caught.value)) < 500 and "\n" not in str(caught.value)


SCHEMA = Schema(
    "shop", (Table("item", (Column("id", "int", True), Column("name", "text", True)), (), ()),)
)
LINES = {
    "joins without conditions": "SELECT 1 FROM item" + " JOIN item" * 100,
    "a megabyte of parentheses": "SELECT " + "(" * 1_000_000,
    "nested parentheses": "SELECT " + "(" * 9_000 + "1" + ")" * 9_000,
    "nested queries": "SELECT * FROM " + "(SELECT * FROM " * 5_000 + "item" + ")" * 5_000,
    "nested cases": "SELECT " + "CASE WHEN 1 THEN " * 5_000,
    "conditions": "SELECT name FROM item WHERE " + " AND ".join(["id = 1"] * 1_200),
    "unions": " UNION ".join(["SELECT name FROM item"] * 700),
    "brackets": "SELECT " + "[" * 99_000,
    "quotes": "SELECT " + "''" * 49_000 + "'",
    "comments": "SELECT /*" * 11_000,
    "blanks": "```json" + " " * 90_000 + "x",
    "braces": "{" * 99_000,
    "objects": '{"a": [' * 14_000,
    "dotted names": "SELECT a" + ".a" * 9_000 + " FROM item",
    "a list": "SELECT " + "1, " * 6_000 + "1 FROM item",
    "blank lines": "\n" * 99_000,
    "a chat of blank lines": "### CREATE TABLE" + "\n" * 50_000 + "question" + "\n" * 40_000,
    "open comments": "CREATE TABLE a (" + "/*" * 45_000,
    "tables of joins": ("CREATE TABLE a AS SELECT 1 FROM a" + " JOIN a" * 40 + ";") * 3,
    "tables without an end": "CREATE TABLE " * 7_000,
    "rows without an end": "INSERT INTO a (" * 6_000,
    "fences": "~~~\n" * 24_000,
    "long fences": "~" * 99_000,
    "thoughts": "<think>" * 14_000,
    "withs": "with a" * 16_000,
    "year": "YEAR (" * 16_000,
}


def analyse(text: str) -> None:
    """Do all that a run does with the text of an answer or of a gold query."""
    parse_sql(text)
    unwrap_sql(text)
    parse_links(text)
    read_schema(text, "a")
    unfold([Record("line 1", 0, {"instruction": text, "input": text, "output": text})])
    prepare_spider(text)
    hardness(text)
    exact_set_verdict("SELECT name FROM item", text, SCHEMA)
    with suppress(LinkError):
        gold_links(text, SCHEMA)


@pytest.mark.kind("time in the parent")
@pytest.mark.parametrize("text", LINES.values(), ids=LINES)
def test_a_text_of_any_form_is_read_in_seconds(text: str) -> None:
    started = time.monotonic()
    analyse(text)
    assert time.monotonic() - started < HANGS / 4


def alike(columns: Sequence[Sequence[int]]) -> tuple[tuple[int, ...], ...]:
    return tuple(zip(*columns, strict=True))


@pytest.mark.kind("time in the parent")
def test_results_are_compared_in_seconds_whatever_their_columns() -> None:
    started = time.monotonic()
    # two matrices of Hadamard: any two columns of one stand to each other as any two of the other
    doubled = [[(i & j).bit_count() % 2 for j in range(128)] for i in range(128)]
    squares = {i * i % 127 for i in range(1, 127)}
    quadratic = [[0] * 128] + [
        [0] + [int((i - j) % 127 not in squares) for j in range(127)] for i in range(127)
    ]
    with pytest.raises(OverflowError, match="too large: "):
        spider_match(alike(doubled), alike(quadratic), ordered=False)
    # one column of sixty differs
    rows = [tuple(range(60 * i, 60 * i + 60)) for i in range(5_000)]
    others = [(*row[:-1], -row[-1] - 1) for row in rows]
    assert not spider_match(tuple(rows), tuple(others), ordered=False)
    assert spider_match(tuple(rows), tuple(row[::-1] for row in rows), ordered=False)
    wide = (tuple(range(20_000)),) * 2, (tuple(range(20_000, 40_000)),) * 2
    assert soft_f1(*wide) == 0
    assert time.monotonic() - started < HANGS / 2


@pytest.mark.kind("time in the parent")
@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"target_modules": r"(.*.*)*x"}, "takes over"),
        ({"target_modules": "(([a-z._0-9])+)+!"}, "takes over"),
        ({"exclude_modules": "(([a-z._0-9])+)+!"}, "takes over"),
        ({"rank_pattern": {"(([a-z._0-9])+)+!": 8}}, "takes over"),
        ({"layers_pattern": ["(([a-z._0-9])+)+!"]}, "takes over"),
        ({"target_modules": "(q_proj"}, "no regular expression"),
        ({"modules_to_save": ["a{"], "alpha_pattern": {"*": 8}}, "no regular expression"),
    ],
)
def test_a_pattern_of_an_adapter_is_tried_where_it_can_be_stopped(
    settings: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patterns, "SECONDS", 1.0)
    names = [f"model.layers.{layer}.self_attn.q_proj" for layer in range(32)]
    with pytest.raises(ModelError, match=f"^adapter_config.json: .*{reason}"):
        check_patterns(settings, names, "adapter_config.json")
    good = {"target_modules": r".*\.(q|v)_proj", "rank_pattern": {r"layers\.\d+": 4}}
    monkeypatch.setattr(patterns, "SECONDS", HANGS)
    check_patterns(good, names, "adapter_config.json")
    check_patterns({"target_modules": ["q_proj"], "alpha_pattern": {}}, names, "")
