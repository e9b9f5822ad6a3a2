"""What a person sees while a job runs: one moving line per stage on a terminal, plain lines elsewhere (logs, `ray job`)."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

PLAIN_SECONDS = 10.0
"""How often a stage writes a line where there is no terminal."""


class Display:
    """Progress of training and of counted stages, with the time that is left."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(soft_wrap=True, highlight=False)
        self._progress = Progress(
            TextColumn("{task.description:<26}"),
            BarColumn(bar_width=24),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[note]}"),
            console=self.console,
        )
        self._below: RenderableType = ""
        self._live = Live(get_renderable=self._shown, console=self.console, refresh_per_second=4)
        self._tasks: dict[str, TaskID] = {}
        self._started: dict[str, tuple[float, int]] = {}
        self._said: dict[str, float] = {}

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.console.is_terminal:
            self._below = ""  # what stays was printed as lines
            self._live.stop()

    def _shown(self) -> RenderableType:
        return Group(self._progress, self._below) if self._below else self._progress

    def below(self, table: RenderableType) -> None:
        """Keep a table below the moving lines, on a terminal."""
        self._below = table

    def line(self, text: str) -> None:
        """One line that stays."""
        self.console.print(text, markup=False)

    def counter(self, stage: str) -> Callable[[int, int], None]:
        """A `progress(done, total)` function for a stage."""
        return lambda done, total: self.update(stage, done, total)

    def train(self, step: int, steps: int, values: Mapping[str, float]) -> None:
        """A point of the training curve."""
        parts = [f"loss {values['loss']:.3f}"] if "loss" in values else []
        parts += [f"lr {values['learning_rate']:.2e}"] if "learning_rate" in values else []
        speeds = {
            "examples/s": values.get("examples_per_second"),
            "tokens/s": values.get("tokens_per_second"),
        }
        parts += [
            f"{speed:,.{int(unit == 'examples/s')}f} {unit}"
            for unit, speed in speeds.items()
            if speed is not None
        ]
        self.update("training", step, steps, "  ".join(parts), every=0)

    def update(
        self, stage: str, done: int, total: int, note: str = "", every: float = PLAIN_SECONDS
    ) -> None:
        """How far a stage is; `every` is the least time between two plain lines."""
        now = time.monotonic()
        first, already = self._started.setdefault(stage, (now, done))
        if self.console.is_terminal:
            task = self._tasks.get(stage)
            if task is None:
                task = self._tasks[stage] = self._progress.add_task(stage, total=total, note=note)
            self._progress.update(task, completed=done, total=total, note=note)
            return
        if done < total and now - self._said.get(stage, first) < every:
            return
        self._said[stage] = now
        left = (
            f"  {_clock((now - first) / (done - already) * (total - done))} left"
            if already < done < total
            else ""
        )
        self.console.print(
            f"{stage}: {done}/{total}{left}{'  ' + note if note else ''}", markup=False
        )


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def percent(share: float, interval: Any = None, n: int = 1) -> str:
    """A share of `n` as per cent, with its interval where given; nothing can be said of a share of none."""
    if n == 0:
        return "not scored"
    text = f"{100 * share:.1f} %"
    return (
        text if interval is None else f"{text} [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]"
    )
