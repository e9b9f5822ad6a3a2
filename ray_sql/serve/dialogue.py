"""A dialogue with a tuned model: questions, queries of one's own, corrections that are kept."""

from __future__ import annotations

import json
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from rich.table import Table

from ray_sql.data.answers import one_line
from ray_sql.database import QueryResult
from ray_sql.display import Display, cell
from ray_sql.errors import ConfigError
from ray_sql.serve import corrections, wire
from ray_sql.serve.engine import Engine, Reply

MOST_ROWS = 50
"""Rows of a result that are shown; JSON has all."""
HELP = r"""Type a question, or
  \schema      to see the schema as the model reads it
  \sql QUERY   to run a query of your own, which corrects the last answer
  \save        to append the last question and its query to the file of corrections
  \quit        to leave, as the end of the input does"""


class Dialogue:
    """Answers lines about one database. It remembers the last question and its query."""

    def __init__(
        self, engine: Engine, database: str, kept: Path, display: Display, as_json: bool
    ) -> None:
        self._engine, self._database, self._corrections = engine, database, kept
        self._display, self._as_json = display, as_json
        self._question = ""
        self._sql: str | None = None

    def take(self, line: str) -> bool:
        """Do what a line asks for; False for the line that ends the dialogue."""
        command, _, rest = line.strip().partition(" ")
        match command:
            case "":
                pass
            case "\\quit" | "\\q":
                return False
            case "\\schema":
                self._display.line(self._engine.prompter.schema_text(self._database))
            case "\\sql":
                self.run(rest)
            case "\\save":
                self.save()
            case _ if command.startswith("\\"):
                self._display.line(HELP)
            case _:
                self.ask(line.strip())
        return True

    def ask(self, question: str) -> None:
        """Answer a question, and run its SQL."""
        began = time.monotonic()
        task = self._engine.prompter.task
        result = None
        self._question, self._sql = question, None
        with self._waiting():
            (reply,) = self._engine.answer([self._engine.prompter.ask(question, self._database)])
            seconds = time.monotonic() - began
            if task.executes_sql and reply.predicted:
                self._sql = reply.predicted
                result = self._engine.run(self._database, reply.predicted)
        if self._as_json:
            model = self._engine.prompter.name
            self._print_json(wire.reply(reply, result, task, model))
            return
        self._show(reply, result, seconds)

    def run(self, sql: str) -> None:
        """Run a query that was typed; without one, show the last query."""
        if not sql.strip():
            self._display.line(self._sql or "there is no query yet; write it behind \\sql")
            return
        self._sql = one_line(sql)
        result = self._engine.run(self._database, self._sql)
        if self._as_json:
            self._print_json({"sql": self._sql, **wire.rows(result)})
            return
        self._show_result(result)

    def save(self) -> None:
        """Append the last question with its query, as a dataset has it."""
        if not self._question or not self._sql:
            raise ConfigError(r"nothing to save: ask a question, and correct its query with \sql")
        corrections.append(self._corrections, self._database, self._question, self._sql)
        self._display.line(f"saved to {self._corrections}: {self._sql}")

    def _waiting(self) -> AbstractContextManager[object]:
        """Show on a terminal that an answer is waited for, unless a program reads what is shown."""
        return nullcontext() if self._as_json else self._display.console.status("answering")

    def _print_json(self, value: object) -> None:
        print(json.dumps(value, ensure_ascii=False), flush=True)

    def _show(self, reply: Reply, result: QueryResult | None, seconds: float) -> None:
        self._display.line(reply.predicted or f"no answer was found in: {reply.raw}")
        if result is not None:
            self._show_result(result)
        for warning in reply.warnings:
            self._display.line(f"note: {warning}")
        self._display.line(f"{seconds:.1f} s")

    def _show_result(self, result: QueryResult) -> None:
        if result.status != "ok":
            self._display.line(f"not run: {result.error}")
            return
        table = Table()
        for name in result.columns:
            table.add_column(cell(name))
        for row in result.rows[:MOST_ROWS]:
            table.add_row(*(cell(_shown(value)) for value in row))
        self._display.console.print(table)
        more = len(result.rows) - MOST_ROWS
        if more > 0:
            self._display.line(f"and {more:,} rows more")


def _shown(value: object) -> str:
    return "NULL" if value is None else str(wire.cell(value))
