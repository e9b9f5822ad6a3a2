"""Ask a tuned model from the terminal: the door of `ray-sql ask`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path

from ray_sql import cluster
from ray_sql.config import AskConfig, OneDatabaseConfig, absolute, mask_password
from ray_sql.display import Display, loading
from ray_sql.errors import RaySqlError
from ray_sql.serve import databases, recipe
from ray_sql.serve.dialogue import HELP, Dialogue
from ray_sql.serve.opening import find_linker, open_engine
from ray_sql.serve.prompter import Prompter


def run(config: AskConfig) -> None:
    """Answer the question of the settings, or the lines that are typed."""
    display = Display()
    with _waiting(config):
        prompter = find_prompter(config)
        cluster.set_threads()
        opened = open_engine(prompter, find_linker(config, prompter))
    (database,) = prompter.databases
    interactive = not config.question and sys.stdin.isatty()
    with opened as engine:
        corrections = absolute(config.corrections)
        dialogue = Dialogue(engine, database, corrections, display, config.json)
        if config.question:
            dialogue.ask(" ".join(config.question))
            return
        if interactive:
            display.line(f"{prompter.name} on database {database}")
            display.line(HELP)
        for line in _typed(prompter.config.cache) if interactive else sys.stdin:
            try:
                if not dialogue.take(line):
                    return
            except RaySqlError as error:
                display.line(f"error: {error}")


def dry_run(config: AskConfig) -> None:
    """Show the prompt of the question, and who would be asked about what."""
    display, prompter = Display(), find_prompter(config)
    linker = find_linker(config, prompter)
    ((name, database),) = prompter.databases.items()
    asked = prompter.ask(" ".join(config.question) or "…", name)
    prompt = prompter.tokenizer.decode(asked.question.input_ids)
    display.line(f"--- prompt ---\n{prompt}\n--- plan ---")
    if linker is not None:
        display.line(f"would ask {linker.adapter} first, which makes the schema smaller")
    display.line(f"would ask {prompter.adapter} about {name} ({mask_password(database.place)})")


def find_prompter(config: OneDatabaseConfig) -> Prompter:
    """Return the prompts of the adapter that settings name, on the database that they name."""
    found = recipe.find(config)
    database = databases.find(config.database, found.config)
    return Prompter(found, {database.name: database})


def _waiting(config: AskConfig) -> AbstractContextManager[None]:
    """Say that the model is waited for, unless a program reads what is printed."""
    return nullcontext() if config.json else loading("model")


def _typed(cache: Path) -> Iterator[str]:
    """Yield the lines that are typed, which arrow keys bring back, also in the next dialogue."""
    import readline

    history = cache / "ask_history"
    with suppress(OSError):
        readline.read_history_file(history)
    try:
        while True:
            yield input("? ")
    except EOFError:
        print()
    finally:
        with suppress(OSError):
            cache.mkdir(parents=True, exist_ok=True)
            readline.write_history_file(history)
