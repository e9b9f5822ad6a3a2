"""Read many things of one database in bounded time, and lose only those that cannot be read."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TypeVar

from ray_sql.database.pool import Executor
from ray_sql.database.query import Place, QueryResult

Item = TypeVar("Item")

QUERY_SECONDS = 10.0
"""Longest time of one query: a table's first rows take a hundredth of it."""
DATABASE_SECONDS = 60.0
"""Longest time of all queries of a reader: what is left then counts as too slow."""
SQL_LENGTH = 10**6
"""Bytes of a query that names every column of a table, or every table of a database."""


class BoundedReader:
    """Runs our own queries on one database, in a process that is killed on time."""

    def __init__(self, executor: Executor, database: Place) -> None:
        self.executor = executor
        self.database = database
        self._deadline = time.monotonic() + DATABASE_SECONDS

    def run(self, sql: str) -> QueryResult:
        """Run one query within the time that is left."""
        seconds = min(QUERY_SECONDS, self._deadline - time.monotonic())
        if seconds <= 0:
            return QueryResult("timeout", (), (), f"timeout: after {DATABASE_SECONDS:g} s", 0.0)
        limits = replace(self.executor.limits, seconds=seconds, sql_length=SQL_LENGTH)
        return self.executor.run(self.database, sql, limits, again=True)

    def run_on(
        self, items: Sequence[Item], query: Callable[[Sequence[Item]], str]
    ) -> Iterator[tuple[Sequence[Item], QueryResult]]:
        """Yield items with the result of one query on them.

        Where that fails they are halved, down to the single items that fail.
        """
        result = self.run(query(items))
        if result.status == "ok" or len(items) <= 1:
            yield items, result
            return
        middle = len(items) // 2
        yield from self.run_on(items[:middle], query)
        yield from self.run_on(items[middle:], query)
