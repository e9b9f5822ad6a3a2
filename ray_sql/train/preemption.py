"""When to save at once, before the next `save_steps`."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from ray_sql.cluster.ranks import gather_all

COST_RATIO = 100
"""Training takes at least this many times as long as the ranks take to ask each other ..."""
MAX_SECONDS = 5.0
"""... unless they last asked longer ago than this. Ray itself looks every five seconds for nodes
that are to be taken away."""


class PreemptionWatch:
    """Tells when to save: the driver was told to stop, or Ray takes away a node that a rank is on.

    All ranks learn of it after the same step. They ask each other as often as costs a hundredth of
    training, but every few seconds. Where asking `is_free`, they ask after every step.
    """

    def __init__(self, stopping: Callable[[], bool], is_free: bool = False) -> None:
        self.stops = False
        self._stopping, self._is_free = stopping, is_free
        self._preempted: set[str] = set()
        self._next_step = 0
        self._last: tuple[int, float, float] | None = None
        """Step, time and duration of the last question."""

    def told_to_stop(self) -> bool:
        """Return on all ranks whether rank 0 sees that the driver was told to stop."""
        return bool(gather_all(self._stopping())[0])

    def __call__(self, step: int) -> bool:
        """Return on all ranks alike whether to save after this step."""
        import ray.train

        if step < self._next_step:
            return False
        start = time.monotonic()
        info = ray.train.get_preemption_info()
        next_step = step + self._interval(step, start)
        self.stops, self._next_step = gather_all((self._stopping(), next_step))[0]
        self._last = (step, start, time.monotonic() - start)
        new = (set(info.preempted_node_ids) if info else set()) - self._preempted
        self._preempted |= new
        return self.stops or bool(new)

    def _interval(self, step: int, now: float) -> int:
        """Return the number of steps until the ranks ask again."""
        if self._is_free or self._last is None:
            return 1
        last_step, last_time, duration = self._last
        step_seconds = max((now - last_time) / (step - last_step), 1e-6)
        affordable = math.ceil(COST_RATIO * duration / step_seconds)
        return max(1, min(affordable, int(MAX_SECONDS / step_seconds)))
