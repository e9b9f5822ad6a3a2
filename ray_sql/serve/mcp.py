"""A tuned model as an assistant's tool, by the Model Context Protocol: the door of `ray-sql mcp`.

The assistant starts the process, and speaks with it over its standard input and output.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

from mcp.server import MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from mcp.types import ToolAnnotations

from ray_sql import __version__, cluster
from ray_sql.config import McpConfig
from ray_sql.display import Display
from ray_sql.errors import RaySqlError
from ray_sql.serve import wire
from ray_sql.serve.ask import find_prompter
from ray_sql.serve.opening import find_linker, open_engine
from ray_sql.serve.prompter import Prompter

NAMED = 50
"""Tables that the tool's description names."""


class Tool:
    """A model that is loaded beside its caller, and answers one question at a time."""

    def __init__(self, prompter: Prompter, linker: Prompter | None, most_rows: int) -> None:
        (self._database,) = prompter.databases
        self._prompter, self._most_rows = prompter, most_rows
        cluster.set_threads()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ray_sql-answers")
        self._engine = self._thread.submit(open_engine, prompter, linker)

    def ask(self, question: str, evidence: str) -> dict[str, Any]:
        """Return a reply as JSON, with rows. Raises `ToolError` for what who asks can mend."""
        try:
            return self._thread.submit(self._answer, question, evidence).result()
        except RaySqlError as error:
            raise ToolError(str(error)) from None

    def close(self) -> None:
        """End the processes that run SQL, and give back the model."""
        self._thread.shutdown(cancel_futures=True)
        if not self._engine.cancelled() and self._engine.exception() is None:
            self._engine.result().close()

    def _answer(self, question: str, evidence: str) -> dict[str, Any]:
        engine, task = self._engine.result(), self._prompter.task
        (reply,) = engine.answer([self._prompter.ask(question, self._database, evidence)])
        result = None
        if task.executes_sql and reply.predicted:
            result = engine.run(self._database, reply.predicted)
        return wire.reply(reply, result, task, self._prompter.name, self._most_rows)


def run(config: McpConfig) -> None:
    """Offer the tool until the assistant closes its end."""
    prompter = find_prompter(config)  # what is wrong is said before the assistant waits
    tool = Tool(prompter, find_linker(config, prompter), config.max_rows)

    def ask_database(question: str, evidence: str = "") -> dict[str, Any]:
        return tool.ask(question, evidence)

    server = MCPServer("ray_sql", version=__version__, log_level="ERROR")  # no question in a log
    server.add_tool(
        ask_database,
        description=described(prompter),
        annotations=ToolAnnotations(read_only_hint=True, open_world_hint=False),
    )
    try:
        server.run("stdio")
    finally:
        tool.close()


def dry_run(config: McpConfig) -> None:
    """Show what the assistant reads of the tool."""
    prompter = find_prompter(config)
    find_linker(config, prompter)
    Display().line(f"--- tool ask_database ---\n{described(prompter)}")


def described(prompter: Prompter) -> str:
    """Return what the tool does, with the tables of its database."""
    ((name, database),) = prompter.databases.items()
    tables = [table.name for table in database.schema.tables]
    listed = ", ".join(tables[:NAMED]) + (", …" if len(tables) > NAMED else "")
    does = "writes SQL, runs it read-only, and returns both the SQL and its rows"
    if not prompter.task.executes_sql:
        does = "returns the tables and columns that the question needs"
    return (
        f"Ask a question in plain language about the database {name}: a model tuned for it {does}. "
        "Ask one thing at a time. evidence may say what words of the question mean. "
        f"Tables: {listed}."
    )
