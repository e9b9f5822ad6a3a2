"""Progress of a job: one moving line per stage on a terminal, plain lines in a log or `ray job`."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Characters that a terminal obeys, and halves of characters, which it cannot show."""
PLAIN_SECONDS = 10.0
"""Least seconds between two lines of a stage where there is no terminal."""


class Display:
    """Progress of training and of counted stages, with the time that is left."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(soft_wrap=True, highlight=False)
        self._progress = Progress(
            TextColumn("{task.description:<26}", markup=False),
            BarColumn(bar_width=24),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[note]}", markup=False),
            console=self.console,
        )
        self._below: RenderableType = ""
        self._live = Live(get_renderable=self._render, console=self.console, refresh_per_second=4)
        self._bars: dict[str, TaskID] = {}
        self._started: dict[str, tuple[float, int]] = {}
        self._printed: dict[str, float] = {}

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

    def _render(self) -> RenderableType:
        return Group(self._progress, self._below) if self._below else self._progress

    def below(self, table: RenderableType) -> None:
        """Keep a table below the moving lines, on a terminal."""
        self._below = table

    def line(self, text: str) -> None:
        """Print a line that stays."""
        self.console.print(printable(text), markup=False)

    def counter(self, stage: str) -> Callable[[int, int], None]:
        """Return a `progress(done, total)` function for a stage."""
        return lambda done, total: self.update(stage, done, total)

    def train(self, step: int, steps: int, values: Mapping[str, float]) -> None:
        """Show a point of the training curve."""
        formats = {
            "loss": "loss {:.3f}",
            "learning_rate": "lr {:.2e}",
            "examples_per_second": "{:,.1f} examples/s",
            "tokens_per_second": "{:,.0f} tokens/s",
        }
        parts = [text.format(values[name]) for name, text in formats.items() if name in values]
        self.update("training", step, steps, "  ".join(parts), every=0)

    def update(
        self, stage: str, done: int, total: int, note: str = "", every: float = PLAIN_SECONDS
    ) -> None:
        """Show how far a stage is; `every` is the least seconds between two plain lines."""
        stage, note, now = printable(stage), printable(note), time.monotonic()
        begun, done_before = self._started.setdefault(stage, (now, done))
        if self.console.is_terminal:
            if stage not in self._bars:
                self._bars[stage] = self._progress.add_task(stage, total=total, note=note)
            self._progress.update(self._bars[stage], completed=done, total=total, note=note)
            return
        if done < total and now - self._printed.get(stage, begun) < every:
            return
        self._printed[stage] = now
        parts = [f"{stage}: {done}/{total}"]
        if done_before < done < total:
            left = (now - begun) / (done - done_before) * (total - done)
            parts.append(f"{_clock(left)} left")
        if note:
            parts.append(note)
        self.line("  ".join(parts))


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def printable(text: str) -> str:
    """Return a text with `\\x1b` in place of what would command a terminal, not show on it."""
    return _CONTROL.sub(lambda found: ascii(found[0])[1:-1], text)


def cell(text: str) -> Text:
    """Return a text for a table of rich: whatever is in it is shown as it is."""
    return Text(printable(text).replace("\n", " "))


def percent(share: float, interval: Sequence[float] | None = None, n: int = 1) -> str:
    """Write a share of `n` questions as per cent, with its interval where given."""
    if n == 0:
        return "not scored"
    text = f"{100 * share:.1f} %"
    if interval is not None:
        text += f" [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]"
    return text
