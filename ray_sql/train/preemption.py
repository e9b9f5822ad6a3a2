"""When to save at once."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from ray_sql.cluster.ranks import gather_all

ASKING = 100
"""Training takes so many times as long as asking whether to save at once ..."""
SECONDS_UNASKED = 5.0
"""... unless that is longer ago than this. Ray itself looks every five seconds for nodes that are to be taken away."""


class PreemptionWatch:
    """Whether to save now, before the next `save_steps`: the driver was told to stop, or Ray takes away a node that a rank is on.

    All ranks learn of it after the same step. They ask each other as often as costs a hundredth of training, but every few seconds.
    """

    def __init__(self, stopping: Callable[[], bool]) -> None:
        self.stops = False
        self._stopping = stopping
        self._leaving: set[str] = set()
        self._next = 0
        self._asked: tuple[int, float, float] | None = None

    def told_to_stop(self) -> bool:
        """What rank 0 sees, on all ranks."""
        return bool(gather_all(self._stopping())[0])

    def __call__(self, step: int) -> bool:
        """Whether all ranks are to save after this step."""
        import ray.train

        if step < self._next:
            return False
        began = time.monotonic()
        info = ray.train.get_preemption_info()
        self.stops, self._next = gather_all((self._stopping(), step + self._pace(step, began)))[0]
        self._asked = (step, began, time.monotonic() - began)
        new = (set(info.preempted_node_ids) if info else set()) - self._leaving
        self._leaving |= new
        return self.stops or bool(new)

    def _pace(self, step: int, now: float) -> int:
        """After how many steps to ask again."""
        if self._asked is None:
            return 1
        before, then, took = self._asked
        each = max((now - then) / (step - before), 1e-6)
        return max(1, min(math.ceil(ASKING * took / each), int(SECONDS_UNASKED / each)))
