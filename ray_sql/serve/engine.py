"""Answer questions with a tuned model, many together: what the terminal and the service share.

A database's schema is computed once, and kept while there is room.
"""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from ray_sql import cluster, models
from ray_sql.config.sections import AnswersSection, ScalingSection
from ray_sql.database import QueryResult
from ray_sql.errors import DataError
from ray_sql.evaluate import candidates, scoring
from ray_sql.generate import Answer, Question
from ray_sql.generate.answerer import Answerer
from ray_sql.generate.answers import Decoding
from ray_sql.generate.name_guard import guards
from ray_sql.serve.prompter import Asked, Prompter
from ray_sql.store import storage

if TYPE_CHECKING:
    import torch

SCHEMA_BYTES = 2**30
"""Bytes of the schemas that are kept computed."""


@dataclass(frozen=True)
class Reply:
    """The answer to a question: SQL or links, how it was chosen, and what else was proposed."""

    database: str
    predicted: str | None
    raw: str
    chosen_by: str
    candidates: list[str | None]
    prompt_tokens: int
    new_tokens: int
    seconds: float
    warnings: list[str]


class Engine:
    """A tuned model that answers questions about databases; a context manager.

    `answer` is for one thread at a time, `run` for any.
    """

    def __init__(self, prompter: Prompter, schema_bytes: int = SCHEMA_BYTES) -> None:
        self.prompter, self.config = prompter, prompter.config
        base = models.load_base(
            prompter.model_folder,
            self.config.quantization,
            self.config.train.bf16,
            _device(self.config.scaling),
        )
        with tempfile.TemporaryDirectory(prefix="ray_sql-") as scratch:
            adapter = storage.fetch(prompter.adapter.uri, Path(scratch))
            model = models.load_adapter(base, adapter)
        self._open = ExitStack()
        answerer = Answerer(model, prompter.tokenizer, schema_bytes)
        self._answerer = self._open.enter_context(answerer)
        self._executor = self._open.enter_context(scoring.executor(self.config.evaluate))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._open.close()

    def answer(self, asked: Sequence[Asked]) -> list[Reply]:
        """Return the replies in the order of the questions, those of like settings together."""
        groups: dict[AnswersSection, list[int]] = defaultdict(list)
        for index, one in enumerate(asked):
            groups[one.settings].append(index)
        replies: dict[int, Reply] = {}
        self._executor.forget()  # a server's content may have changed
        for settings, members in groups.items():
            questions = [asked[index].question for index in members]
            replies |= zip(members, self._replies(questions, settings), strict=True)
        return [replies[index] for index in range(len(asked))]

    def run(self, database: str, sql: str) -> QueryResult:
        """Run one query, read-only and within the limits. Raises `DataError` if none can be."""
        place = self.prompter.databases[database].place
        if place is None:
            raise DataError(
                f"database {database}: SQL runs on SQLite files and PostgreSQL, not on this one"
            )
        return self._executor.run(place, sql, again=True)

    def _replies(self, questions: Sequence[Question], settings: AnswersSection) -> list[Reply]:
        decoding = Decoding.from_settings(settings, self.config.eval_batch_size, self.config.seed)
        schemas = {
            name: database.schema
            for name, database in self.prompter.databases.items()
            if any(one.db_id == name for one in questions)
        }
        names = None
        if settings.ground == "constrain":
            names = guards({name: s.lower_names() for name, s in schemas.items()}, questions)
        answers = self._answerer.answer(questions, decoding, self.prompter.begins, names)
        task, mend = self.prompter.task, settings.ground == "repair"
        parse = scoring.JUDGES[task.name].parse
        options = [
            candidates.options(answer, one.database, schemas.get(one.db_id), parse, mend)
            for one, answer in zip(questions, answers, strict=True)
        ]
        choices = candidates.choose(options, task, settings, self._executor)
        return [
            Reply(
                database=one.db_id,
                predicted=choice.chosen[settings.way],
                raw=answer.raw,
                chosen_by=settings.way,
                candidates=[proposal.predicted for proposal in option.proposals],
                prompt_tokens=answer.prompt_tokens,
                new_tokens=answer.new_tokens,
                seconds=answer.seconds,
                warnings=self._warnings(one.db_id, answer, settings),
            )
            for one, answer, option, choice in zip(
                questions, answers, options, choices, strict=True
            )
        ]

    def _warnings(self, database: str, answer: Answer, settings: AnswersSection) -> list[str]:
        known = self.prompter.databases.get(database)
        left_out = known.schema.left_out if known else ()
        warnings = [f"not in the schema: {reason}" for reason in left_out]
        form = self.config.prompt.schema_form
        if form not in ("full", "noisy"):
            warnings.append(
                f"the adapter was trained with schema_form {form}, which needs gold SQL: the "
                "prompt shows the full schema"
            )
        if answer.new_tokens >= settings.max_new_tokens:
            warnings.append(f"the answer was cut off at max_new_tokens {settings.max_new_tokens}")
        return warnings


def _device(scaling: ScalingSection) -> torch.device:
    import torch

    if cluster.on_gpu(scaling):
        return torch.device("cuda")
    cluster.keep_freed_memory()
    return torch.device("cpu")
