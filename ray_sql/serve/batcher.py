"""Questions that arrive together are answered together; those that come later join them."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from traceback import format_tb

from ray_sql.errors import RaySqlError
from ray_sql.serve.engine import Reply
from ray_sql.serve.prompter import Asked

log = logging.getLogger(__name__)
GATHER_SECONDS = 0.005
"""Seconds for which the first question waits for others."""
MOST_JOINED = 1000
"""Questions after which a call of `answer` takes no more: it holds all that it has answered."""
Coming = asyncio.Future[Reply]
"""A reply that a request waits for."""
Take = Callable[[int, Callable[[Asked], bool]], dict[Coming, Asked]]
"""Takes up to a number of questions that wait, and none behind one that does not fit."""


class Full(Exception):
    """As many questions wait as may."""


@dataclass
class Batch:
    """The questions of one call of `answer`: those it begins with, and those that join.

    `more`, `needs` and `tell` are for the thread that answers.
    """

    asked: list[Asked]
    coming: list[Coming]
    take: Take
    observe: Callable[[int], None]
    """Receives how many questions were on their way as one was answered."""
    most: int
    told: set[int] = field(default_factory=set)

    def more(self, fits: Callable[[Asked], bool]) -> list[Asked]:
        """Return the questions that came since; none behind one that does not fit."""
        room = min(self.most - self._on_their_way(), MOST_JOINED - len(self.asked))
        joined = self.take(room, fits) if room > 0 else {}
        self.asked += joined.values()
        self.coming += joined
        return list(joined.values())

    def needs(self, index: int) -> bool:
        """Tell whether somebody still waits for the reply to a question."""
        return not self.coming[index].done()

    def _on_their_way(self) -> int:
        return sum(one not in self.told and self.needs(one) for one in range(len(self.asked)))

    def tell(self, index: int, reply: Future[Reply]) -> None:
        """Hand on the reply to a question, once it is there."""
        self.told.add(index)
        self.observe(self._on_their_way() + 1)
        coming = self.coming[index]

        def pass_on(done: Future[Reply]) -> None:
            with suppress(RuntimeError):  # the service has ended, and nobody waits
                coming.get_loop().call_soon_threadsafe(_pass_on, done, coming)

        reply.add_done_callback(pass_on)


Answer = Callable[[Batch], None]
"""Answers all questions of a batch, or raises; those that were told of are answered."""


class Batcher:
    """Hands questions to `answer`, at most `most` on their way; at most `most_waiting` wait.

    It belongs to one event loop, in which `run` is a task. `observe` receives how many questions
    were on their way as one was answered.
    """

    def __init__(
        self,
        answer: Answer,
        most: int,
        most_waiting: int,
        observe: Callable[[int], None] = lambda together: None,
    ) -> None:
        self._answer, self._most, self._most_waiting = answer, most, most_waiting
        self._observe = observe
        self._waiting: dict[Coming, Asked] = {}
        self._lock = threading.Lock()
        self._came = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ray_sql-answers")

    @property
    def waiting(self) -> int:
        """Return how many questions wait."""
        return len(self._waiting)

    def submit(self, asked: Asked) -> Coming:
        """Return the reply to come; cancelled, it frees its place, also while it is written.

        Raises `Full`.
        """
        with self._lock:
            if len(self._waiting) >= self._most_waiting:
                raise Full
            reply: Coming = asyncio.get_running_loop().create_future()
            self._waiting[reply] = asked
        reply.add_done_callback(self._leave)
        self._came.set()
        return reply

    async def run(self) -> None:
        """Answer what waits, for ever."""
        while True:
            await self._came.wait()
            await asyncio.sleep(GATHER_SECONDS)
            first = self._take(1, lambda asked: True)
            if first:
                await self._answer_all(first)
            else:
                self._came.clear()

    def _take(self, most: int, fits: Callable[[Asked], bool]) -> dict[Coming, Asked]:
        taken: dict[Coming, Asked] = {}
        with self._lock:
            for reply, asked in self._waiting.items():
                if len(taken) == most or not fits(asked):
                    break
                taken[reply] = asked
            for reply in taken:
                del self._waiting[reply]
        return taken

    def _leave(self, reply: Coming) -> None:
        with self._lock:
            self._waiting.pop(reply, None)

    async def _answer_all(self, first: dict[Coming, Asked], take: Take | None = None) -> None:
        """Answer a question and those that join; where that fails, each alone: one is the cause."""
        batch = Batch(
            list(first.values()), list(first), take or self._take, self._observe, self._most
        )
        loop = asyncio.get_running_loop()
        try:
            await loop.run_in_executor(self._thread, self._answer, batch)
        except Exception as error:  # whatever it is, whoever waits for it must learn of it
            _log(error)
            left = [
                index
                for index in range(len(batch.asked))
                if index not in batch.told and batch.needs(index)
            ]
            for index in left:
                if len(batch.asked) == 1:
                    batch.tell(index, _failed(error))
                else:
                    alone = {batch.coming[index]: batch.asked[index]}
                    await self._answer_all(alone, lambda most, fits: {})


def _log(error: Exception) -> None:
    """Log where an error of ours came from, without its text, which may hold a question."""
    if not isinstance(error, RaySqlError):
        trace = "".join(format_tb(error.__traceback__))
        log.error("answering failed: %s\n%s", type(error).__name__, trace)


def _failed(error: Exception) -> Future[Reply]:
    reply: Future[Reply] = Future()
    reply.set_exception(error)
    return reply


def _pass_on(reply: Future[Reply], coming: Coming) -> None:
    """Give a reply, or what went wrong, to who waits for it."""
    if coming.done():
        return
    if error := reply.exception():
        coming.set_exception(error)
    else:
        coming.set_result(reply.result())
