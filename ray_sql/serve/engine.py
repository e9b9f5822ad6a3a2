"""Answer questions with a tuned model, many together: what the terminal and the service share."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Protocol, Self

from ray_sql.config.sections import AnswersSection
from ray_sql.data.linking import LinkError, gold_links
from ray_sql.database import Links, QueryResult
from ray_sql.database.places import EXECUTABLE
from ray_sql.errors import DataError
from ray_sql.evaluate import candidates, scoring
from ray_sql.generate import Answer
from ray_sql.generate.answers import Fits, OnAnswer
from ray_sql.generate.decoder import Needed, always
from ray_sql.serve.linker import Linker
from ray_sql.serve.prompter import Asked, Prompter

More = Callable[[Fits], list[Asked]]
"""Returns questions of like settings that came meanwhile, and that fit."""


class Model(Protocol):
    """A model that answers prompts, for one thread at a time."""

    described: dict[str, str]
    """Of what it is made, where that is known."""

    def answer(
        self,
        asked: Sequence[Asked],
        settings: AnswersSection,
        on_answer: OnAnswer,
        more: More | None = None,
        needed: Needed = always,
    ) -> None:
        """Answer prompts, and those that join them; `on_answer` receives each with its place.

        With `more`, those that are not `needed` any more may be left out.
        """

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


def completed(reply: Reply) -> Future[Reply]:
    """Return a reply that is there as the future of one."""
    coming: Future[Reply] = Future()
    coming.set_result(reply)
    return coming


class Joinable(Protocol):
    """Questions of a service, which others may join while they are answered."""

    asked: list[Asked]
    """They, and behind them those that joined."""

    def more(self, fits: Callable[[Asked], bool]) -> list[Asked]:
        """Return the questions that came meanwhile, up to one that does not fit."""

    def needs(self, index: int) -> bool:
        """Tell whether somebody still waits for the reply to a question."""

    def tell(self, index: int, reply: Future[Reply]) -> None:
        """Hand on the reply to a question."""


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
        for settings, members in groups.items():
            group = [asked[index] for index in members]
            answers: dict[int, Answer] = {}
            self._model.answer(group, settings, answers.__setitem__)
            in_order = [answers[place] for place in range(len(group))]
            replies |= zip(members, self._replies(group, in_order, settings), strict=True)
        return [replies[index] for index in range(len(asked))]

    def answer_joinable(self, batch: Joinable) -> None:
        """Answer questions and those of like settings that join them, each as it is ready.

        One that nobody waits for any more is left out, unless the model is an endpoint.

        A linker is asked about all questions first, so that none joins later.
        """
        if self._linker is not None:
            batch.more(lambda one: True)
            for index, reply in enumerate(self.answer(batch.asked)):
                batch.tell(index, completed(reply))
            return
        settings = batch.asked[0].settings

        def more(fits: Fits) -> list[Asked]:
            return batch.more(lambda one: one.settings == settings and fits(one.question))

        workers = self._executor.workers
        with ThreadPoolExecutor(workers, thread_name_prefix="ray_sql-choices") as threads:

            def choose(index: int, answer: Answer) -> None:
                batch.tell(index, threads.submit(self._reply, batch.asked[index], answer))

            asked = list(batch.asked)  # `more` adds to it
            self._model.answer(asked, settings, choose, more, batch.needs)

    @property
    def workers(self) -> int:
        """Return how many queries run at a time."""
        return self._executor.workers

    def run(self, database: str, sql: str, most_bytes: int | None = None) -> QueryResult:
        """Run one query, read-only and within the limits; its result has at most `most_bytes`.

        Raises `DataError` if none can be run on the database.
        """
        place = self.prompter.databases[database].place
        if place is None:
            raise DataError(f"database {database}: SQL runs on {EXECUTABLE}, not on this one")
        limits = self._executor.limits
        if most_bytes is not None:
            limits = replace(limits, bytes=min(limits.bytes, most_bytes))
        return self._executor.run(place, sql, limits, again=True)

    def links(self, database: str, sql: str) -> Links | None:
        """Return the tables and columns that a query reads; None where they cannot be told."""
        try:
            return gold_links(sql, self.prompter.databases[database].schema)
        except LinkError:
            return None

    def _reply(self, asked: Asked, answer: Answer) -> Reply:
        (reply,) = self._replies([asked], [answer], asked.settings)
        return reply

    def _replies(
        self, asked: Sequence[Asked], answers: Sequence[Answer], settings: AnswersSection
    ) -> list[Reply]:
        """Choose among the answers to each question, all of like settings."""
        self._executor.forget()  # a server's content may have changed
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
