"""Where a training step's time goes, and the memory it takes.

On a GPU time is that between events of its stream. They are read where a point is logged and the
device is waited for anyway, so that a step waits for nothing. Elsewhere it is the clock's.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import psutil
import torch

Phase = Literal["data", "forward", "backward", "optimizer", "report"]
"""`backward` holds the exchange of gradients, and so the wait for slower ranks. `report` holds
logs, checkpoints and validation."""
GIB = 2**30


@dataclass(frozen=True)
class Reading:
    """A rank's steps since the last reading, and the seconds of all of them by phase."""

    steps: int
    seconds: dict[Phase, float]

    def metrics(self) -> dict[str, float]:
        """Return the mean seconds of a step by phase; they add up to the step."""
        steps = max(1, self.steps)
        return {f"time/{phase}": seconds / steps for phase, seconds in self.seconds.items()}


class StepClock:
    """The phases of steps; each lasts until the next is entered."""

    def __init__(self, device: torch.device) -> None:
        self._gpu = device.type == "cuda"
        self._entered: list[tuple[Phase, Any]] = []
        self._steps = 0

    def enter(self, phase: Phase) -> None:
        """Begin a phase. A step is over where `report` begins."""
        self._steps += phase == "report"
        self._entered.append((phase, self._now()))

    def read(self) -> Reading:
        """Return the time since the last reading; the phase that is under way goes on."""
        seconds: dict[Phase, float] = {}
        if self._entered:
            self._entered.append((self._entered[-1][0], self._now()))
            if self._gpu:
                self._entered[-1][1].synchronize()
            for (phase, start), (_, end) in pairwise(self._entered):
                seconds[phase] = seconds.get(phase, 0.0) + self._between(start, end)
        reading = Reading(self._steps, seconds)
        self._entered = self._entered[-1:]
        self._steps = 0
        return reading

    def _now(self) -> Any:
        if not self._gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, start: Any, end: Any) -> float:
        return float(start.elapsed_time(end) / 1000 if self._gpu else end - start)


def memory_use(device: torch.device) -> dict[str, float]:
    """Return the GiB of memory that this process takes: now, or of a GPU at most so far."""
    if device.type != "cuda":
        return {"system/process_memory_gib": psutil.Process(os.getpid()).memory_info().rss / GIB}
    return {"system/gpu_memory_gib": torch.cuda.max_memory_allocated(device) / GIB}
