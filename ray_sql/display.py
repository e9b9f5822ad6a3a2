"""Progress of a job: one moving line per stage on a terminal, plain lines in a log or `ray job`."""

from __future__ import annotations

import logging
import math
import os
import re
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskID,
    TextColumn,
)
from rich.spinner import Spinner
from rich.text import Text

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Characters that a terminal obeys, and halves of characters, which it cannot show."""
PLAIN_SECONDS, MOST_PLAIN_SECONDS = 5.0, 60.0
"""Least seconds between two lines of a stage where there is no terminal, and of one of hours."""
PART_OF_A_STAGE = 60
"""A line comes no sooner than after this part of the time that its stage has taken."""
LOG_WIDTH = 160
"""Columns of a table where there is no terminal: cells of a wide sweep are not broken in two."""
STEP_SECONDS = 3.0
"""Seconds after which a step without values is worth a line where there is no terminal."""
WAIT_SECONDS = 2.0
"""Seconds after which a wait is worth a word."""
LOOK_SECONDS = 0.5
"""Seconds between two looks at whether a wait is to be told where there is no terminal."""
ESTIMATE_SECONDS, ESTIMATE_UNITS = 2.0, 2
"""The least that a stage must have taken and done before its end is estimated."""


class Pace:
    """Estimates the end of a stage from when its first unit, which starts things up, was done."""

    def __init__(self, done: int, now: float) -> None:
        self._first, self._begun = done, now
        self._newest = done
        self._ends: float | None = None

    def update(self, done: int, total: int, now: float) -> None:
        """Estimate the end anew, once enough is done to tell."""
        if done < self._newest:  # workers were restarted, and repeat some
            self._first, self._begun, self._ends = done, now, None
        self._newest = done
        counted, took = done - self._first, now - self._begun
        if counted >= ESTIMATE_UNITS and took >= ESTIMATE_SECONDS:
            self._ends = now + took / counted * (total - done)

    def least_gap(self, now: float) -> float:
        """Return the least seconds between two plain lines: more, the longer it takes."""
        return min(MOST_PLAIN_SECONDS, (now - self._begun) / PART_OF_A_STAGE)

    def left(self, now: float) -> str:
        """Return the time that is left in words; empty where nobody can tell."""
        if self._ends is None or self._ends <= now:
            return ""
        return f"{duration(self._ends - now)} left"


class _TimeLeft(ProgressColumn):
    """The time that is left of a stage. Rich's own forgets steps of more than 30 seconds."""

    def render(self, task: Task) -> Text:
        pace: Pace = task.fields["pace"]
        return Text(pace.left(time.monotonic()), style="progress.remaining")


class _Wait:
    """A wait for something of which nobody knows how long it takes, as a line that moves."""

    def __init__(self, what: str, earlier: _Wait | None = None) -> None:
        self.what, self.since = what, time.monotonic()
        self.told: float = earlier.told if earlier else self.since
        self._spinner = Spinner("dots", style="dim")

    def __str__(self) -> str:
        seconds = time.monotonic() - self.since
        return f"starting: {self.what}" + (f", {seconds:.0f} s" if seconds >= WAIT_SECONDS else "")

    def __rich__(self) -> RenderableType:
        self._spinner.update(text=Text(str(self), style="dim"))
        return self._spinner

    def is_due(self, now: float) -> bool:
        """Tell whether it is time for a plain line, and note that there was one."""
        gap = max(PLAIN_SECONDS, min(MOST_PLAIN_SECONDS, (now - self.since) / PART_OF_A_STAGE))
        is_first = self.told <= self.since and now - self.since >= WAIT_SECONDS
        if now + LOOK_SECONDS - self.told < gap and not is_first:  # the next look would be late
            return False
        self.told = now
        return True


def _console(stderr: bool = False) -> Console:
    """Return a console on a stream of this process; in a notebook one that writes as into a log.

    There rich would make a block of HTML of every line.
    """
    console = Console(stderr=stderr, soft_wrap=True, highlight=False)
    if not console.is_jupyter:
        return console
    return Console(
        stderr=stderr, soft_wrap=True, highlight=False, force_jupyter=False, force_terminal=False
    )


def _silence_advice() -> None:
    """Silence tqdm and Ray, which ask for `ipywidgets` in a notebook: our lines need none."""
    warnings.filterwarnings("ignore", message="IProgress not found")
    logging.getLogger("ray.widgets.util").setLevel(logging.WARNING)


@contextmanager
def loading(what: str) -> Iterator[None]:
    """Say on stderr what a job waits for before its own display is there.

    It is a line that moves on a terminal and goes with the wait, and one that stays in a log.
    """
    console, wait = _console(stderr=True), _Wait(what)
    if not console.is_terminal:
        console.print(str(wait), markup=False)
        yield
        return
    # no stream is replaced, for what is loaded meanwhile keeps the one that it finds
    moving = Live(
        wait, console=console, transient=True, redirect_stdout=False, redirect_stderr=False
    )
    with moving:
        yield


class Display:
    """Progress of training and of counted stages, with the time that is left."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or _console()
        _silence_advice()
        if console is None and not self.console.is_terminal and "COLUMNS" not in os.environ:
            self.console.width = LOG_WIDTH
        self._progress = Progress(
            SpinnerColumn(finished_text=" "),
            TextColumn("{task.description:<26}", markup=False),
            BarColumn(bar_width=24),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            _TimeLeft(),
            TextColumn("{task.fields[note]}", markup=False),
            console=self.console,
        )
        self._below: RenderableType = ""
        self._live = Live(get_renderable=self._render, console=self.console, refresh_per_second=4)
        self._bars: dict[str, TaskID] = {}
        self._paces: dict[str, Pace] = {}
        self._notes: dict[str, str] = {}
        self._printed: dict[str, float] = {}
        self._wait: _Wait | None = None
        self._ended = threading.Event()

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self._live.start()
        else:
            threading.Thread(target=self._tell_waits, daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()
        if self.console.is_terminal:
            self._below = ""  # what stays was printed as lines
            # a bar that stands still would stay below the last line
            self._live.transient = kind is not None
            self._live.stop()

    def _render(self) -> RenderableType:
        bars = [self._progress] if self._progress.tasks else []  # an empty table has a line, too
        return Group(*bars, self._below)

    def below(self, table: RenderableType) -> None:
        """Keep a table below the moving lines, on a terminal."""
        self._below = table

    def starting(self, what: str) -> None:
        """Say what a run waits for until `starting("")` or the next progress.

        It stands with its seconds below the moving lines, or is told as a line every few seconds.
        """
        earlier = self._wait
        self._wait = _Wait(printable(what), earlier) if what else None
        if self._wait is not None:
            self._below = self._wait
        elif self._below is earlier:
            self._below = ""
        if self._wait is not earlier:
            self._redraw()

    def _redraw(self) -> None:
        """Draw the moving lines as they are now: a line would be printed above those drawn last."""
        if self._live.is_started:
            self._live.refresh()

    def _tell_waits(self) -> None:
        """Write a line now and then while something is waited for, where there is no terminal."""
        while not self._ended.wait(LOOK_SECONDS):
            wait = self._wait
            if wait is not None and wait.is_due(time.monotonic()):
                self.line(str(wait))

    def end(self, stage: str) -> None:
        """Take a stage's bar from the terminal: what follows is what counts."""
        if stage in self._bars:
            self._progress.remove_task(self._bars.pop(stage))
            self._redraw()

    def settle(self) -> None:
        """Leave all bars as lines: what follows stands below them."""
        if self._bars:
            self.console.print(self._progress)
        for stage in [*self._bars]:
            self.end(stage)

    def line(self, text: str) -> None:
        """Print a line that stays."""
        self.console.print(printable(text), markup=False)

    def lines(self, made: Iterable[str]) -> None:
        """End the wait for lines that take time, and print them; before an error, those made."""
        ready: list[str] = []
        try:
            ready.extend(made)
        finally:
            self.starting("")
            for text in ready:
                self.line(text)

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

    def step(self, step: int, steps: int) -> None:
        """Show that training has come to a step, of which no values are known."""
        self.update("training", step, steps, None, every=STEP_SECONDS)

    def update(
        self, stage: str, done: int, total: int, note: str | None = "", every: float = PLAIN_SECONDS
    ) -> None:
        """Show how far a stage is; `every` is the least seconds between two plain lines.

        On a terminal a note of None leaves the last one as it is.
        """
        stage, now = printable(stage), time.monotonic()
        self.starting("")
        note = None if note is None else printable(note)
        pace = self._paces.setdefault(stage, Pace(done, now))
        pace.update(done, total, now)
        if self.console.is_terminal:
            self._move_bar(stage, done, total, note)
            return
        last = self._printed.setdefault(stage, now)
        if done < total and every and now - last < max(every, pace.least_gap(now)):
            return
        self._printed[stage] = now
        parts = [f"{stage}: {done}/{total}", pace.left(now), note or ""]
        self.line("  ".join(part for part in parts if part))

    def _move_bar(self, stage: str, done: int, total: int, note: str | None) -> None:
        if stage not in self._bars:
            self._bars[stage] = self._progress.add_task(
                stage, total=total, note="", pace=self._paces[stage]
            )
        if note is not None:
            self._notes[stage] = note
        shown = self._notes.get(stage, "")
        self._progress.update(self._bars[stage], completed=done, total=total, note=shown)


def duration(seconds: float) -> str:
    """Write a time as people say it: `40 s`, `12 min`, `3 h 20 min`."""
    if seconds < 60:
        return f"{math.ceil(seconds)} s"
    minutes = math.ceil(seconds / 60)
    hours, rest = divmod(minutes, 60)
    return f"{hours} h {rest} min" if hours else f"{minutes} min"


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
