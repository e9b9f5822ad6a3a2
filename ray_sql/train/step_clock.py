"""Where a training step's time goes, what it takes of memory, and which rank keeps the others waiting.

On a GPU time is that between events of its stream, read where a point is logged and the device is waited for anyway: a step waits for
nothing. Elsewhere it is the clock's.
"""

from __future__ import annotations

import os
import socket
import statistics
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import psutil
import torch

from ray_sql.generate import gather_all

Phase = Literal["data", "forward", "backward", "optimizer", "report"]
"""`backward` holds the exchange of gradients, and so the wait for slower ranks; `report` logs, checkpoints and validation."""

GIB = 2**30
SLOW = 1.5
"""A rank that takes so many times as long as the others is named."""
ENOUGH_STEPS = 10
"""So few say nothing of a rank. It has to be the slowest in two such stretches: one that waits for a neighbour once is no straggler."""


@dataclass(frozen=True)
class Reading:
    """What a rank did since the last reading: its steps, seconds by phase in all of them, forward passes and the tokens they computed."""

    steps: int
    seconds: dict[Phase, float]
    passes: int
    tokens: int

    def metrics(self) -> dict[str, float]:
        """Mean seconds a step by phase; together they are the step."""
        return {
            f"time/{phase}": seconds / max(1, self.steps) for phase, seconds in self.seconds.items()
        }


class StepClock:
    """The phases of steps: each lasts until the next is entered."""

    def __init__(self, device: torch.device) -> None:
        self._gpu = device.type == "cuda"
        self._entered: list[tuple[Phase, Any]] = []
        self._steps = self._passes = self._tokens = 0

    def enter(self, phase: Phase) -> None:
        """The phase begins now; a step is over where `report` begins."""
        self._steps += phase == "report"
        self._entered.append((phase, self._now()))

    def count(self, tokens: int) -> None:
        """A forward pass of so many tokens is computed."""
        self._passes += 1
        self._tokens += tokens

    def read(self) -> Reading:
        """What happened since the last reading; the phase that is under way goes on."""
        seconds: dict[Phase, float] = {}
        if self._entered:
            self._entered.append((self._entered[-1][0], self._now()))
            if self._gpu:
                self._entered[-1][1].synchronize()
            for (phase, began), (_, ended) in pairwise(self._entered):
                seconds[phase] = seconds.get(phase, 0.0) + self._between(began, ended)
        reading = Reading(self._steps, seconds, self._passes, self._tokens)
        self._entered = self._entered[-1:]
        self._steps = self._passes = self._tokens = 0
        return reading

    def _now(self) -> Any:
        if not self._gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, began: Any, ended: Any) -> float:
        return float(began.elapsed_time(ended) / 1000 if self._gpu else ended - began)


class Stragglers:
    """Finds the rank that keeps the others waiting, from what all ranks say of their forward passes: those wait for nobody."""

    def __init__(self) -> None:
        self._first = True
        self._gathered: list[Reading] = []
        self._suspect: int | None = None
        self._named: int | None = None

    def look(self, reading: Reading) -> str | None:
        """What to tell the user, once for a rank. To be called by all ranks, which exchange some numbers where there were enough steps."""
        if self._first:  # a device's first step loads and compiles
            self._first = False
            return None
        self._gathered.append(reading)
        if sum(one.steps for one in self._gathered) < ENOUGH_STEPS:
            return None
        said = gather_all((*_pace(self._gathered), socket.gethostname()))
        self._gathered = []
        rank, times = slowest([(by_pass, by_token) for by_pass, by_token, _ in said])
        suspected, self._suspect = self._suspect, rank if times >= SLOW else None
        if self._suspect is None or self._suspect != suspected or rank == self._named:
            return None
        self._named = rank
        return (
            f"rank {rank} on {said[rank][2]} computes {times:.1f} times as slowly as the others, which wait for it at every step: look "
            "for what else runs there, or how hot it is, or take that machine out"
        )


def _pace(readings: Sequence[Reading]) -> tuple[float, float]:
    """Seconds by forward pass, and by token."""
    seconds = sum(one.seconds.get("forward", 0.0) for one in readings)
    return seconds / max(1, sum(one.passes for one in readings)), seconds / max(
        1, sum(one.tokens for one in readings)
    )


def slowest(paces: Sequence[tuple[float, float]]) -> tuple[int, float]:
    """(rank, how many times as slow as the median of the others) of the slowest, where `paces` has each rank's seconds by pass and by
    token.

    The smaller of the two counts: a rank whose passes are only fewer and longer, or more and shorter, is none.
    """
    if len(paces) < 2:
        return 0, 1.0
    times = []
    for rank, own in enumerate(paces):
        others = [pace for number, pace in enumerate(paces) if number != rank]
        medians = (statistics.median(column) for column in zip(*others, strict=True))
        times.append(
            min(one / median if median else 1.0 for one, median in zip(own, medians, strict=True))
        )
    rank = times.index(max(times))
    return rank, times[rank]


def use(device: torch.device) -> dict[str, float]:
    """GiB that this process has taken, at most so far of a GPU's memory, now of a machine's; and how busy its GPU was, in per cent of
    the last second or so."""
    if device.type == "cuda":
        found = {"memory/gpu_gib": torch.cuda.max_memory_allocated(device) / GIB}
        with suppress(
            Exception
        ):  # NVML is not there, or has errors of its own where it may not tell, as in part of a GPU
            found["gpu/utilization"] = float(torch.cuda.utilization(device))
        return found
    return {"memory/process_gib": psutil.Process(os.getpid()).memory_info().rss / GIB}
