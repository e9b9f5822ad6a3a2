"""Questions that join others while these are answered get the answers that they get alone."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from itertools import cycle
from typing import Any

import pytest

from ray_sql.serve.batcher import Batch, Batcher
from ray_sql.serve.engine import Engine, Reply, completed
from ray_sql.serve.prompter import Asked
from tests.conftest import QUESTIONS

PRIVATE = "How much does Ada earn?"
"""A question that no log may have."""


class Arriving:
    """Questions of which the first is there, and one of the others comes with every second look."""

    def __init__(self, asked: Sequence[Asked]) -> None:
        self.asked, self._later = list(asked[:1]), deque(asked[1:])
        self._coming: dict[int, Future[Reply]] = {}
        self._looks = 0

    def more(self, fits: Callable[[Asked], bool]) -> list[Asked]:
        """Return the next question, if it is time for it."""
        self._looks += 1
        if not self._later or self._looks % 2 or not fits(self._later[0]):
            return []
        self.asked.append(self._later.popleft())
        return self.asked[-1:]

    def needs(self, index: int) -> bool:
        """Need every reply."""
        return True

    def tell(self, index: int, reply: Future[Reply]) -> None:
        """Keep a reply."""
        self._coming[index] = reply

    def results(self) -> list[Reply]:
        """Return the replies in the order in which the questions came."""
        assert not self._later
        return [self._coming[index].result() for index in range(len(self.asked))]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"evaluate.ground": "constrain", "evaluate.choose": "constrained"},
        {"evaluate.samples": 3, "evaluate.temperature": 0.5, "evaluate.choose": "vote"},
    ],
    ids=["greedy", "constrained", "votes"],
)
def test_questions_of_many_databases_that_join_are_answered_as_alone(
    engine: Engine, changes: dict[str, Any]
) -> None:
    settings = engine.config.changed(changes).evaluate
    names = cycle(sorted(engine.prompter.databases))
    asked = [
        engine.prompter.ask(question, name, settings=settings)
        for (question, _), name in zip(QUESTIONS, names, strict=False)
    ]
    batch = Arriving(asked)
    engine.answer_joinable(batch)
    together = batch.results()
    alone = [engine.answer([one])[0] for one in asked]
    for one, other in zip(together, alone, strict=True):
        assert (one.database, one.raw, one.predicted) == (
            other.database,
            other.raw,
            other.predicted,
        )
        assert one.candidates == other.candidates


def test_a_conversation_about_no_database_joins_a_question(engine: Engine) -> None:
    prompter, settings = engine.prompter, engine.config.evaluate
    turns = [{"role": "user", "content": "Say something about cheese."}]
    asked = [
        prompter.ask("How many customers are there?", "mall"),
        prompter.ask_turns(turns, settings),
        prompter.ask_turns([{"role": "user", "content": "And about bread?"}], settings),
        prompter.ask("How many products are there?", "shop"),
    ]
    batch = Arriving(asked)
    engine.answer_joinable(batch)
    alone = [engine.answer([one])[0].raw for one in asked]
    assert [one.raw for one in batch.results()] == alone


def test_where_a_batch_fails_half_way_the_others_are_answered_alone(
    caplog: pytest.LogCaptureFixture,
) -> None:
    asked_for: list[list[Any]] = []

    def answer(batch: Batch) -> None:
        batch.more(lambda one: True)
        asked_for.append(list(batch.asked))
        batch.tell(0, completed(batch.asked[0]))  # type: ignore[arg-type]
        if len(batch.asked) > 1:
            raise MemoryError(PRIVATE)

    async def ask() -> list[Any]:
        batcher = Batcher(answer, 8, 8)
        answering = asyncio.create_task(batcher.run())
        coming = [batcher.submit(word) for word in ("a", "b", "c")]  # type: ignore[arg-type]
        try:
            return await asyncio.gather(*coming)
        finally:
            answering.cancel()

    assert asyncio.run(ask()) == ["a", "b", "c"]
    assert asked_for == [["a", "b", "c"], ["b"], ["c"]]
    assert "answering failed: MemoryError" in caplog.text
    assert PRIVATE not in caplog.text
