"""Answer questions with a tuned model, many together: what the terminal and the service share."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self

from ray_sql.config.sections import AnswersSection
from ray_sql.data.linking import LinkError, gold_links
from ray_sql.database import Links, QueryResult
from ray_sql.database.places import EXECUTABLE
from ray_sql.errors import DataError
from ray_sql.evaluate import candidates, scoring
from ray_sql.generate import Answer
from ray_sql.serve.linker import Linker
from ray_sql.serve.prompter import Asked, Prompter


class Model(Protocol):
    """A model that answers prompts, for one thread at a time."""

    described: dict[str, str]
    """Of what it is made, where that is known."""

    def answer(self, asked: Sequence[Asked], settings: AnswersSection) -> list[Answer]:
        """Return the answers to prompts."""

    def close(self) -> None:
        """Give back what it holds."""


@dataclass(frozen=True)
class Reply:
    """The answer to a question: SQL or links, how it was chosen, and what else was proposed.

    `shown` are the links that its prompt was made of, where a linker was asked first.
    """

    database: str
    predicted: str | None
    raw: str
    chosen_by: str
    candidates: list[str | None]
    prompt_tokens: int
    new_tokens: int
    seconds: float
    warnings: list[str]
    shown: Links | None = None


class Engine:
    """A tuned model that answers questions about databases, maybe after a linker.

    It is a context manager. `answer` is for one thread at a time, `run` for any.
    """

    def __init__(self, prompter: Prompter, model: Model, linker: Linker | None = None) -> None:
        self.prompter, self.config = prompter, prompter.config
        self.described = model.described
        self._model, self._linker = model, linker
        self._open = ExitStack()
        self._executor = self._open.enter_context(scoring.executor(self.config.evaluate))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the processes that run SQL, and give back the models."""
        self._open.close()
        self._model.close()
        if self._linker is not None:
            self._linker.close()

    def answer(self, asked: Sequence[Asked]) -> list[Reply]:
        """Return the replies in the order of the questions, those of like settings together."""
        if self._linker is not None:
            asked = self._linker.narrow(asked)
        groups: dict[AnswersSection, list[int]] = defaultdict(list)
        for index, one in enumerate(asked):
            groups[one.settings].append(index)
        replies: dict[int, Reply] = {}
        self._executor.forget()  # a server's content may have changed
        for settings, members in groups.items():
            group = [asked[index] for index in members]
            replies |= zip(members, self._replies(group, settings), strict=True)
        return [replies[index] for index in range(len(asked))]

    def run(self, database: str, sql: str) -> QueryResult:
        """Run one query, read-only and within the limits. Raises `DataError` if none can be."""
        place = self.prompter.databases[database].place
        if place is None:
            raise DataError(f"database {database}: SQL runs on {EXECUTABLE}, not on this one")
        return self._executor.run(place, sql, again=True)

    def links(self, database: str, sql: str) -> Links | None:
        """Return the tables and columns that a query reads; None where they cannot be told."""
        try:
            return gold_links(sql, self.prompter.databases[database].schema)
        except LinkError:
            return None

    def _replies(self, asked: Sequence[Asked], settings: AnswersSection) -> list[Reply]:
        answers = self._model.answer(asked, settings)
        task, mend = self.prompter.task, settings.ground == "repair"
        parse = scoring.JUDGES[task.name].parse
        options = []
        for one, answer in zip(asked, answers, strict=True):
            known = self.prompter.databases.get(one.question.db_id)
            schema = None if known is None else known.schema
            options.append(candidates.options(answer, one.question.database, schema, parse, mend))
        choices = candidates.choose(options, task, settings, self._executor)
        return [
            Reply(
                database=one.question.db_id,
                predicted=choice.chosen[settings.way],
                raw=answer.raw,
                chosen_by=settings.way,
                candidates=[proposal.predicted for proposal in option.proposals],
                prompt_tokens=answer.prompt_tokens,
                new_tokens=answer.new_tokens,
                seconds=answer.seconds,
                warnings=self._warnings(one, answer),
                shown=one.links,
            )
            for one, answer, option, choice in zip(asked, answers, options, choices, strict=True)
        ]

    def _warnings(self, asked: Asked, answer: Answer) -> list[str]:
        known = self.prompter.databases.get(asked.question.db_id)
        left_out = known.schema.left_out if known else ()
        warnings = [f"not in the schema: {reason}" for reason in left_out]
        form = self.config.prompt.schema_form
        if self._linker is None and form not in ("full", "noisy"):
            warnings.append(
                f"the adapter was trained with schema_form {form}, which needs links: the prompt "
                "shows the full schema; give --linker"
            )
        if asked.why_whole is not None:
            warnings.append(f"the prompt shows the full schema: {asked.why_whole}")
        most = asked.settings.max_new_tokens
        if answer.new_tokens >= most:
            warnings.append(f"the answer was cut off at max_new_tokens {most}")
        return warnings
