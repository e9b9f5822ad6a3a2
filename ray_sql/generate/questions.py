"""Questions as they are asked, and answers as they come back.

A `Question` carries everything that asking and scoring need, prompt tokens included, and travels as a line of JSON, so that
generation runs on machines that see neither the dataset nor the databases.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ray_sql import models
from ray_sql.config import Config, strip_password
from ray_sql.data import Corpus, Example, prompts
from ray_sql.data.linking import LinkError
from ray_sql.metrics import hardness
from ray_sql.rows import encode_prompt
from ray_sql.store import storage
from ray_sql.store.run_folder import DATABASES, RunFolder
from ray_sql.tasks import TASKS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Question:
    """One question, ready to be asked (`input_ids`) and scored (`gold`: SQL, or links as JSON text; `database`: path, URL or None)."""

    id: str
    split: str
    db_id: str
    question: str
    gold: str
    hardness: str | None
    database: str | None
    input_ids: list[int]


@dataclass(frozen=True)
class Answer:
    """What a model said: the raw text, how many tokens it read and wrote, its share of the seconds, and, with beams, all it might
    have said instead, best first."""

    raw: str
    prompt_tokens: int
    new_tokens: int
    seconds: float
    candidates: list[str] = field(default_factory=list)


def questions(
    examples: Iterable[Example],
    split: str,
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    config: Config,
) -> list[Question]:
    """The examples of a split as questions; under task `schema`, gold that cannot be linked becomes an empty `gold`."""
    made = []
    for example in examples:
        try:
            schema = prompts.schema_text(example, corpus.schemas, config)
        except LinkError:  # a reduced form of a schema that its gold does not fit; the question is asked all the same
            schema = prompts.schema_text(
                example, corpus.schemas, config.changed({"prompt.schema_form": "full"})
            )
        turns = prompts.messages(
            TASKS[config.task_type], schema, example.question, example.evidence
        )
        made.append(
            Question(
                id=example.id,
                split=split,
                db_id=example.db_id,
                question=example.question,
                gold=gold(example, corpus, config),
                hardness=example.hardness or hardness(example.gold),
                database=corpus.executable(example.db_id),
                input_ids=encode_prompt(tokenizer, prompts.render_prompt(tokenizer, turns)),
            )
        )
    return made


def check_window(folder: str, asked: Sequence[Question], config: Config) -> None:
    """Raise `ModelError` if a prompt and its answer are longer than what the model of `folder` was made for."""
    longest = max((len(question.input_ids) for question in asked), default=0)
    shorter = (
        "lower --evaluate.max_new_tokens, or write schemas shorter (--prompt.serializer compact)"
    )
    models.check_window(
        folder,
        longest + config.evaluate.max_new_tokens,
        f"a prompt and its answer have {{tokens}}: {shorter}",
    )


def gold(example: Example, corpus: Corpus, config: Config) -> str:
    """What an answer is compared with: SQL, or links as JSON; empty where the SQL cannot be linked."""
    if TASKS[config.task_type].executes_sql:
        return example.gold
    try:
        return json.dumps(prompts.gold_links(example, corpus.schemas))
    except LinkError:
        return ""


def carry(asked: Sequence[Question], folder: RunFolder) -> list[Question]:
    """The questions with copies of their SQLite databases in the run's folder, which workers on other machines can read."""
    carried: dict[str, str] = {}
    for question in asked:
        file = question.database
        if file and "://" not in file and file not in carried:
            carried[file] = f"{folder.databases}/{question.db_id}.sqlite"
            storage.put_once(Path(file), carried[file])
    return [replace(one, database=carried.get(one.database or "", one.database)) for one in asked]


def unpack(asked: Sequence[Question], scratch: Path) -> list[Question]:
    """The questions with those databases that were carried in local files."""
    there = {one.database for one in asked if one.database and f"/{DATABASES}/" in one.database}
    local = {uri: str(storage.fetch_file(uri, scratch / Path(uri).name)) for uri in there}
    return [replace(one, database=local.get(one.database or "", one.database)) for one in asked]


def dump(asked: Iterable[Question]) -> str:
    """Questions as JSON lines; a database's password is not written down."""
    return "".join(
        json.dumps(asdict(replace(question, database=strip_password(question.database)))) + "\n"
        for question in asked
    )


def parse(text: str) -> list[Question]:
    """Questions from JSON lines."""
    return [Question(**json.loads(line)) for line in text.splitlines()]
