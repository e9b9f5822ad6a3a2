"""Questions as they are asked, and answers as they come back.

A `Question` carries everything that asking and scoring need, prompt tokens included, and travels as
a line of JSON. So generation runs on machines that see neither the dataset nor the databases.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ray_sql import models
from ray_sql.config import Config, strip_password
from ray_sql.config.files import parse_json
from ray_sql.config.sections import RowsSection
from ray_sql.data import Corpus, Example, prompts
from ray_sql.data.linking import LinkError, format_links
from ray_sql.data.shown import AskedLinks, ShownSchema
from ray_sql.database import Schema
from ray_sql.metrics import hardness
from ray_sql.rows import Encoder
from ray_sql.store import storage
from ray_sql.store.run_folder import DATABASES, RunFolder
from ray_sql.tasks import TASKS, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Room:
    """Count the tables that a prompt had no room for, and name those that gold needs."""

    left_out: int
    gold_tables: int
    gold_left_out: list[str]


@dataclass(frozen=True)
class Question:
    """One question, ready to be asked and scored."""

    id: str
    split: str
    db_id: str
    question: str
    gold: str
    """SQL, or links as JSON text."""
    hardness: str | None
    database: str | None
    """Where SQL is executed: a path or a URL."""
    input_ids: list[int]
    """The tokens of the prompt."""
    links: str | None = None
    """The links that its schema was made smaller by, as JSON text."""
    full_schema: str | None = None
    """Why its schema is shown whole, where links should have made it smaller."""
    other_golds: list[str] = field(default_factory=list)
    """Further SQL that is right as well."""
    room: Room | None = None
    """Tables that its prompt had no room for; None where there was room for all."""


@dataclass(frozen=True)
class Candidate:
    """One of several answers to a question."""

    raw: str
    new_tokens: int
    logprob: float | None = None
    """The sum of the tokens' log-probabilities at temperature 1; None for beams."""


@dataclass(frozen=True)
class Answer:
    """A model's answer: the raw text, tokens read and written, and its share of the seconds."""

    raw: str
    prompt_tokens: int
    new_tokens: int
    seconds: float
    logprob: float | None = None
    """The sum of the tokens' log-probabilities, where there are other answers beside it."""
    constrained: Candidate | None = None
    """The greedy answer among names that exist."""
    candidates: list[Candidate] = field(default_factory=list)
    """All beams, best first, or all samples in the order of their draws."""


def make_questions(
    examples: Iterable[Example],
    split: str,
    corpus: Corpus,
    encoder: Encoder,
    links: AskedLinks | None = None,
) -> list[Question]:
    """Return the examples of a split as questions.

    `links` make their schemas smaller. Without, prompts are as they are trained on.
    """
    questions = []
    for example in examples:
        shown = ShownSchema(None)
        if links is not None:
            shown = links.show(split, example, corpus.schemas)
        asked = encoder.ask(example, shown.schema)
        questions.append(
            Question(
                id=example.id,
                split=links.split_name(split) if links else split,
                db_id=example.db_id,
                question=example.question,
                gold=gold_answer(example, corpus, encoder.task),
                hardness=example.hardness or hardness(example.gold),
                database=corpus.executable(example.db_id),
                input_ids=asked.input_ids,
                links=None if shown.links is None else format_links(shown.links),
                full_schema=shown.why_whole,
                other_golds=list(example.other_golds) if encoder.task.executes_sql else [],
                room=_room(example, asked.shown, corpus),
            )
        )
    return questions


def _room(example: Example, shown: Schema | None, corpus: Corpus) -> Room | None:
    """Say what the part of a schema that is shown lacks; None where all is shown."""
    if shown is None:
        return None
    needed = list[str]()
    with suppress(LinkError):  # gold of another dialect, say: nobody knows what it needs
        needed = list(prompts.gold_links(example, corpus.schemas))
    missing = [name for name in needed if shown.table(name) is None]
    return Room(shown.unshown, len(needed), missing)


def question_encoder(
    tokenizer: PreTrainedTokenizerBase, config: Config, schemas: Mapping[str, Schema]
) -> Encoder:
    """Return the encoder of questions to a tokenizer's model, within the room that it has."""
    most = config.evaluate.max_new_tokens
    room = prompt_room(str(tokenizer.name_or_path), config.rows, most)
    return Encoder(tokenizer, TASKS[config.task_type], config.prompt, schemas, room)


def prompt_room(folder: str, limits: RowsSection, max_new_tokens: int) -> int | None:
    """Return the tokens that a prompt may have beside its answer; None where nothing bounds them.

    The window of the model of `folder` bounds them, and `rows.max_length` under `trim_schema`.
    """
    bounds = [models.window(folder)]
    if limits.too_long == "trim_schema":
        bounds.append(limits.max_length)
    most = min((bound for bound in bounds if bound), default=0) - max_new_tokens
    return most if most > 0 else None


def check_window(folder: str, questions: Sequence[Question], max_new_tokens: int) -> None:
    """Raise `ModelError` if a prompt and its answer are longer than the model of `folder` reads.

    Raises it, too, for a token that the model does not have.
    """
    tokens = itertools.chain.from_iterable(question.input_ids for question in questions)
    models.check_vocabulary(folder, max(tokens, default=0))
    longest = max((len(question.input_ids) for question in questions), default=0)
    shorter = (
        "lower --evaluate.max_new_tokens, or write schemas shorter (--prompt.serializer compact); "
        "leaving tables out does not help"
    )
    models.check_window(
        folder, longest + max_new_tokens, f"a prompt and its answer have {{tokens}}: {shorter}"
    )


def gold_answer(example: Example, corpus: Corpus, task: Task) -> str:
    """Return what answers are compared with: SQL, or links as JSON.

    It is empty where links are wanted and the SQL cannot be linked.
    """
    if task.executes_sql:
        return example.gold
    try:
        return json.dumps(prompts.gold_links(example, corpus.schemas))
    except LinkError:
        return ""


def stage_databases(questions: Sequence[Question], folder: RunFolder) -> list[Question]:
    """Copy the questions' database files into the run's folder, where all workers read them."""
    staged: dict[str, str] = {}
    for question in questions:
        file = question.database
        if file and "://" not in file and file not in staged:
            staged[file] = folder.database(question.db_id)
            storage.put_once(Path(file), staged[file])
    return [_move(question, staged) for question in questions]


def localize(questions: Sequence[Question], scratch: Path) -> list[Question]:
    """Fetch the databases of `stage_databases` into local files.

    A trial's questions name databases in its study's folder.
    """
    local: dict[str, str] = {}
    for question in questions:
        staged = question.database
        if staged and f"/{DATABASES}/" in staged and staged not in local:
            local[staged] = str(storage.fetch_file(staged, scratch / Path(staged).name))
    return [_move(question, local) for question in questions]


def _move(question: Question, places: dict[str, str]) -> Question:
    if question.database is None:
        return question
    return replace(question, database=places.get(question.database, question.database))


def dump(questions: Iterable[Question]) -> str:
    """Write questions as JSON lines, without a database's password."""
    lines = []
    for question in questions:
        values = asdict(replace(question, database=strip_password(question.database)))
        lines.append(json.dumps(values) + "\n")
    return "".join(lines)


def parse(text: str) -> list[Question]:
    """Read questions from JSON lines."""
    way_out = "give the command that began the run again"
    return [
        parse_json(Question, line, "the run's questions", way_out, number)
        for number, line in enumerate(text.splitlines(), 1)
    ]
