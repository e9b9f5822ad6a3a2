"""Our verdicts and hardness grades equal the official evaluators', on every row of the reference that settles one."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.agreement import JUDGEMENTS, compare_execution, compare_hardness, read
from ray_sql.execution import Executor

pytestmark = pytest.mark.skipif("RAY_SQL_SHARED" not in os.environ, reason="needs the reference data: RAY_SQL_SHARED")

# What may be refused though officially right: empty text, several statements, and anything that is no query.
NO_QUERY = ("err_blank_or_stub", "multi_", "stmt_")


@pytest.fixture(scope="module")
def data() -> Path:
    return Path(os.environ["RAY_SQL_SHARED"]) / "data"


@pytest.fixture(scope="module")
def executor() -> Iterator[Executor]:
    with Executor() as executor:
        yield executor


@pytest.mark.parametrize("column", JUDGEMENTS)
def test_verdicts_equal_the_official_ones(executor: Executor, data: Path, column: str) -> None:
    rows = read(data / "agreement" / "execution.jsonl")
    found = compare_execution(executor, rows, data / "spider" / "database", column)
    assert found.compared > 7000
    assert found.differing == ()
    kinds = {row["id"]: row.get("kind", "prediction") for row in rows}
    assert [row for row in found.refused if not kinds[row].startswith(NO_QUERY)] == []


def test_hardness_equals_the_official_grade(data: Path) -> None:
    queries = json.loads((data / "spider" / "dev.json").read_text(encoding="utf-8"))
    found = compare_hardness(read(data / "agreement" / "hardness.jsonl"), queries)
    assert found.compared == len(queries) == 1034
    assert found.differing == ()
