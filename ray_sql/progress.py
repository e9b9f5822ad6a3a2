"""What workers say while they train and answer, shown on the display and kept in MLflow and TensorBoard."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from ray_sql import cluster, tracking
from ray_sql.config import Config
from ray_sql.display import Display, percent

log = logging.getLogger(__name__)


class Points:
    """What workers say, passed on to the display, MLflow and TensorBoard; MLflow has each step once, whatever is repeated."""

    def __init__(
        self,
        config: Config,
        record: tracking.Run,
        display: Display,
        timeline: StartupClock | None = None,
    ) -> None:
        self._config, self._record, self._display = config, record, display
        self._timeline = timeline
        self._writer: Any = None
        self._gaps = False
        self._newest = -1
        self.on_checkpoint: Callable[[int], None] | None = None

    def __call__(self, point: cluster.Point) -> None:
        if point["kind"] == "answers":
            self._display.update(f"answering with {point['model']}", point["done"], point["total"])
            return
        if point["kind"] == "mark":
            if self._timeline:
                self._timeline.mark(point["stage"], point["at"])
            return
        if point["kind"] == "note":
            self._display.line(point["text"])
            return
        if point["kind"] == "curve":
            for step, logged in point["points"]:
                self._record.log(step, tracking.named(logged))
            if point["step"] <= self._newest:
                self._display.line(
                    f"the workers were restarted and go on from step {point['step']}"
                )
            self._newest = point["step"]
            return
        values = tracking.named(point["values"])
        if point["kind"] == "train":
            self._first_step()
            if point["step"] <= self._newest:
                self._display.line(
                    "the workers were restarted and begin again: there was no checkpoint yet"
                )
            self._newest = point["step"]
            self._display.train(point["step"], point["steps"], point["values"])
        else:
            self._newest = max(self._newest, point["step"])
            self._display.line(
                f"step {point['step']}: checkpoint saved{validation_scores(point['values'])}"
            )
            if self.on_checkpoint:
                self.on_checkpoint(point["step"])
        self._record.log(point["step"], values)
        self._tensorboard(point["step"], values)

    def _first_step(self) -> None:
        """Say once how long it took to come here; what restarted workers mark later belongs to no start."""
        if self._timeline:
            self._timeline.mark("first step")
            self._display.line(self._timeline.line())
            self._timeline = None

    def _tensorboard(self, step: int, values: Mapping[str, float]) -> None:
        if "://" in self._config.run_dir:
            return  # TensorBoard writes local files only; MLflow has the same points
        try:
            if self._writer is None:
                from torch.utils.tensorboard import SummaryWriter

                self._writer = SummaryWriter(f"{self._config.run_dir}/logs")
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
    """Say how a checkpoint did on the validation questions, as a clause that begins with a comma."""
    for name in ("execution_accuracy", "strict_recall"):
        if f"validation/{name}" in values:
            return f", validation {name} {percent(values[f'validation/{name}'])} of {values['validation/n']:.0f}"
    return (
        f", validation loss {values['validation/loss']:.3f}" if "validation/loss" in values else ""
    )


class StartupClock:
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
