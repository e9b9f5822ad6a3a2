"""Questions that arrive together are answered together, by one thread."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

from ray_sql.serve.engine import Reply
from ray_sql.serve.prompter import Asked

GATHER_SECONDS = 0.005
"""Seconds for which the first question waits for others."""
Answer = Callable[[Sequence[Asked]], list[Reply]]


class Full(Exception):
    """As many questions wait as may."""


class Batcher:
    """Hands questions to `answer`, at most `most` at a time; at most `most_waiting` wait for it.

    It belongs to one event loop, in which `run` is a task.
    """

    def __init__(self, answer: Answer, most: int, most_waiting: int) -> None:
        self._answer, self._most, self._most_waiting = answer, most, most_waiting
        self._waiting: dict[asyncio.Future[Reply], Asked] = {}
        self._came = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ray_sql-answers")

    @property
    def waiting(self) -> int:
        """Return how many questions wait."""
        return len(self._waiting)

    def submit(self, asked: Asked) -> asyncio.Future[Reply]:
        """Return the reply to come; cancelled, it frees its place. Raises `Full`."""
        if len(self._waiting) >= self._most_waiting:
            raise Full
        reply = asyncio.get_running_loop().create_future()
        self._waiting[reply] = asked
        reply.add_done_callback(lambda done: self._waiting.pop(done, None))
        self._came.set()
        return reply

    async def run(self) -> None:
        """Answer what waits, for ever."""
        while True:
            await self._came.wait()
            await asyncio.sleep(GATHER_SECONDS)
            batch = dict(islice(self._waiting.items(), self._most))
            for reply in batch:
                del self._waiting[reply]
            if not self._waiting:
                self._came.clear()
            if batch:
                await self._answer_all(batch)

    async def _answer_all(self, batch: dict[asyncio.Future[Reply], Asked]) -> None:
        """Answer a batch; where that fails, one by one, so that only the culprit fails."""
        loop = asyncio.get_running_loop()
        try:
            answers = await loop.run_in_executor(self._thread, self._answer, list(batch.values()))
        except Exception as error:  # whatever it is, whoever waits for it must learn of it
            if len(batch) > 1:
                for reply, asked in batch.items():
                    await self._answer_all({reply: asked})
                return
            for reply in batch:
                if not reply.done():
                    reply.set_exception(error)
            return
        for reply, answer in zip(batch, answers, strict=True):
            if not reply.done():
                reply.set_result(answer)
