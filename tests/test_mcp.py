"""The tool of an assistant, asked by the protocol's own client over standard input and output."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

import pytest

from ray_sql import cli
from tests.conftest import QUESTIONS
from tests.waiting import HANGS

mcp = pytest.importorskip("mcp")

COUNTED, COUNT = QUESTIONS[6]
"""A question whose answer the tuned run knows, and its SQL."""


def words(run: Path, *more: str) -> list[str]:
    """Return the flags that name a run and its database mall."""
    named = ["--output_name", run.name, "--output_dir", str(run.parent), "--database", "mall"]
    return [*named, *more]


@pytest.mark.slow
def test_an_assistant_asks_the_tool(tuned_run: Path, tmp_path: Path) -> None:
    command = ["-m", "ray_sql", "mcp", *words(tuned_run, "--max_rows", "1")]
    server = mcp.StdioServerParameters(command=sys.executable, args=command, cwd=tmp_path)

    async def ask() -> tuple[Any, ...]:
        async with mcp.Client(server, read_timeout_seconds=HANGS) as client:
            (tool,) = (await client.list_tools()).tools
            right = await client.call_tool("ask_database", {"question": COUNTED})
            several = await client.call_tool("ask_database", {"question": QUESTIONS[5][0]})
            long = await client.call_tool("ask_database", {"question": "why " * 3000})
            return tool, right, several, long

    tool, right, several, long = asyncio.run(ask())
    assert (tool.name, tool.input_schema["required"]) == ("ask_database", ["question"])
    assert "Tables: customer, product, sale." in tool.description
    assert right.structured_content["sql"] == COUNT
    assert right.structured_content["rows"] == [[2]]
    assert several.structured_content["row_count"] == 4
    assert several.structured_content["rows"] == [["Lisbon"]]
    assert (long.is_error, "reads up to 2,048 tokens" in long.content[0].text) == (True, True)


def test_what_is_wrong_is_said_before_an_assistant_waits(
    tuned_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cli.main("mcp", [*words(tuned_run), "--dry_run"])
    assert "about the database mall: a model tuned for it writes SQL" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        cli.main("mcp", [*words(tuned_run)[:-1], "moon"])
    assert ended.value.code == 2
    assert "--database moon: no such file" in capsys.readouterr().err
