"""Queries that requests ask for, run a few at a time."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from ray_sql.database import Links, QueryResult
from ray_sql.serve.batcher import Full
from ray_sql.serve.engine import Engine


@dataclass(frozen=True)
class Executed:
    """The result of a query, and the tables and columns that it reads, where they can be told."""

    result: QueryResult
    links: Links | None

    def named_links(self) -> dict[str, Any]:
        """Return the links as a reply has them."""
        return {} if self.links is None else {"links": self.links}


class Queries:
    """Runs queries in as many threads as processes may run them; for one event loop.

    A request is refused while `most` queries run or wait. That of a question whose answer the model
    has written is run in any case. A result has at most `most_bytes`.
    """

    def __init__(self, engine: Engine, most: int, most_bytes: int) -> None:
        self._engine, self._most, self._most_bytes = engine, most, most_bytes
        # with more, a query that nobody waits for would hold a thread until it has a process
        self._threads = ThreadPoolExecutor(engine.workers, thread_name_prefix="ray_sql-queries")
        self._running: set[Future[Executed]] = set()

    def require_room(self) -> None:
        """Raise `Full` while as many queries run or wait as may."""
        if len(self._running) >= self._most:
            raise Full

    def submit(self, database: str, sql: str) -> asyncio.Future[Executed]:
        """Return the result to come; cancelled, a query that waits is not run."""
        future = self._threads.submit(self._execute, database, sql)
        self._running.add(future)
        future.add_done_callback(self._running.discard)
        return asyncio.wrap_future(future)

    def _execute(self, database: str, sql: str) -> Executed:
        result = self._engine.run(database, sql, self._most_bytes)
        links = self._engine.links(database, sql) if result.status == "ok" else None
        return Executed(result, links)
