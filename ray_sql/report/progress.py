"""Events of workers, shown on the display and kept in MLflow and TensorBoard."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from ray_sql import cluster, tracking
from ray_sql.cluster.events import (
    AnswersCounted,
    CheckpointSaved,
    Event,
    NodeUsed,
    Note,
    Resumed,
    StageEnded,
    StepEnded,
    TrainPoint,
    UnknownEvent,
)
from ray_sql.data.shown import ORACLE
from ray_sql.display import Display, percent
from ray_sql.report import commands
from ray_sql.store.run_folder import RunFolder
from ray_sql.tasks import TASKS

log = logging.getLogger(__name__)
AWAITED = {
    "Ray": "workers",
    "workers": "imports of the training stack",
    "imports of the training stack": "model",
    "model": "a try of shared rows",
    "shared rows tried": "first step",
}
"""A stage of the start that has ended, and what a run waits for then."""


class Progress:
    """Shows events on the display and keeps them in MLflow and TensorBoard.

    MLflow has each step once, whatever is repeated.
    """

    def __init__(
        self,
        folder: RunFolder,
        record: tracking.Run,
        display: Display,
        startup: StartupClock | None = None,
    ) -> None:
        self._folder, self._record, self._display = folder, record, display
        self._startup = startup
        self._writer: Any = None
        self._gaps = False
        self._newest = -1
        self.on_checkpoint: Callable[[int], None] | None = None

    def __call__(self, event: Event) -> None:
        """Record an event. Raises `UnknownEvent` if it is of no known type."""
        match event:
            case Note(text):
                self._display.line(text)
            case StageEnded(stage, at):
                if self._startup:
                    self._startup.mark(stage, at)
                    if stage == "Ray":
                        self._say_where()
                self._display.starting(AWAITED.get(stage, f"what follows {stage}"))
            case AnswersCounted(model, done, total):
                self._display.update(f"answering with {model}", done, total)
            case Resumed(step, points, kept):
                if self._newest < 0:
                    self._display.line(f"training goes on after step {step}, from its checkpoint")
                for logged_step, values in points:
                    self._record.log(logged_step, tracking.named(values))
                self._keep(kept)
                self._went_back_to(step, f"go on from step {step}")
            case TrainPoint(step, steps, values):
                self._first_step()
                self._went_back_to(step, "begin again: there was no checkpoint yet")
                self._display.train(step, steps, values)
                self._log(step, values)
            case StepEnded(step, steps):
                self._display.step(step, steps)
            case NodeUsed(step, values):
                self._log(step, values)
            case CheckpointSaved(step, values, kept=kept):
                self._newest = max(self._newest, step)
                self._display.line(f"step {step}: checkpoint saved{validation_scores(values)}")
                if self.on_checkpoint:
                    self.on_checkpoint(step)
                self._log(step, values)
                self._keep(kept)
            case _:
                raise UnknownEvent(event)

    def _went_back_to(self, step: int, restart: str) -> None:
        """Note the newest step; say that the workers were restarted if it is not a new one."""
        if step <= self._newest:
            self._display.line(f"the workers were restarted and {restart}")
        self._newest = step

    def _log(self, step: int, values: Mapping[str, float]) -> None:
        named = tracking.named(values)
        self._record.log(step, named)
        self._tensorboard(step, named)

    def _say_where(self) -> None:
        """Say where the run can be watched, once Ray is there."""
        line = commands.watch(cluster.dashboard(), self._record.run_id, self._record.uri)
        if line:
            self._display.line(line)

    def _keep(self, steps: Sequence[int]) -> None:
        self._record.checkpoints({step: self._folder.checkpoint(step).uri for step in steps})

    def _first_step(self) -> None:
        """Say once how long the start took. Marks of restarted workers belong to no start."""
        if self._startup:
            self._startup.mark("first step")
            self._display.starting("")
            self._display.line(self._startup.line())
            self._startup = None

    def _tensorboard(self, step: int, values: Mapping[str, float]) -> None:
        if not self._folder.is_local:
            return  # TensorBoard writes local files only; MLflow has the same points
        try:
            if self._writer is None:
                from torch.utils.tensorboard import SummaryWriter

                self._writer = SummaryWriter(self._folder.tensorboard)
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)
        except OSError as error:  # a writer that failed once fails for good
            self._writer = None
            if not self._gaps:
                log.warning("TensorBoard's logs lack some points (%s); MLflow has them", error)
            self._gaps = True

    def close(self) -> None:
        """Write out what TensorBoard still holds."""
        if self._writer is not None:
            with suppress(OSError):  # as above
                self._writer.close()


def validation_scores(values: Mapping[str, float]) -> str:
    """Return a checkpoint's validation score as a clause that begins with a comma."""
    for split in ("validation", f"validation{ORACLE}"):
        for name in (task.metric for task in TASKS.values()):
            if f"{split}/{name}" in values:
                share, n = values[f"{split}/{name}"], values["validation/n"]
                return f", {split} {name} {percent(share)} of {n:.0f}"
    return (
        f", validation loss {values['validation/loss']:.3f}" if "validation/loss" in values else ""
    )


class StartupClock:
    """Clock of the stages between the start of this process and the first step."""

    def __init__(self) -> None:
        self._marks = [("", process_started())]

    def mark(self, stage: str, at: float | None = None) -> None:
        """Record that a stage ended at `at` (seconds since the epoch), by default now."""
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
    """Return the start of this process in seconds since the epoch."""
    import psutil

    return float(psutil.Process(os.getpid()).create_time())
