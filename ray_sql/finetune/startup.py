"""Where the time between a command and its first step goes."""

from __future__ import annotations

import os
import time


class Timeline:
    """Stages that follow each other, from the start of this process; a stage ends where it is marked."""

    def __init__(self) -> None:
        self._marks = [("", process_started())]

    def mark(self, stage: str, at: float | None = None) -> None:
        """The stage called so ended at `at` (seconds since the epoch), by default now; another process may have seen it end."""
        self._marks.append((stage, time.time() if at is None else at))

    def stages(self) -> dict[str, float]:
        """Seconds by stage, in the order marked."""
        return {
            stage: round(ended - before, 2)
            for (_, before), (stage, ended) in zip(self._marks, self._marks[1:], strict=False)
        }

    def line(self) -> str:
        """`first step after 31 s: imports 1.2, data 4.0, …`."""
        stages = self.stages()
        parts = ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in stages.items())
        return f"first step after {sum(stages.values()):.0f} s: {parts}"


def process_started() -> float:
    """When this process was started, in seconds since the epoch."""
    import psutil

    return float(psutil.Process(os.getpid()).create_time())
