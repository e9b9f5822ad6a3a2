"""The sweep as its driver sees it: each trial's state in the study's file, its MLflow run, and the live table."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

from ray.tune import Callback
from rich.table import Table

from ray_sql import cluster, tracking
from ray_sql.cluster.events import (
    CheckpointSaved,
    Note,
    Resumed,
    StageEnded,
    TrainPoint,
    TrialEvent,
    UnknownEvent,
)
from ray_sql.display import Display
from ray_sql.tune.objective import Objective
from ray_sql.tune.space import Space, shown
from ray_sql.tune.study import SETTLED, Measure, Study, Trial, measured, name

log = logging.getLogger(__name__)

STATES = {
    "running": "cyan",
    "finished": "green",
    "stopped": "yellow",
    "failed": "red",
    "waiting": "",
}


class Watch(Callback):  # type: ignore[misc]  # ray is not followed by mypy
    """Ray Tune's callback and the receiver of all trials' events; `begin` gives a trial its MLflow run."""

    def __init__(
        self,
        study: Study,
        space: Space,
        steps: int,
        unit: tuple[str, float],
        begin: Callable[[Trial], tracking.Run],
        display: Display,
    ) -> None:
        self._study, self._space, self._steps, self._unit = study, space, steps, unit
        self._begin, self._display = begin, display
        self._objective = Objective.of(space.config)
        self._runs: dict[int, tracking.Run] = {}
        self._clocks: dict[int, float] = {}
        self._at: dict[int, int] = {}
        """Steps that running trials have come to, measured or not."""
        self._show()

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune writes down what it is given, and what a resumed sweep needs is in the study's file."""
        return {}

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial starts, goes on, or is only reported again."""
        number = trial.config["trial"]
        if self._study.trials[number].state in SETTLED:
            return
        seconds = self._study.trials[number].seconds + self._lap(number)  # starts the clock
        if number not in self._runs:  # it may have begun no MLflow run yet, should MLflow be away
            self._runs[number] = self._begin(self._study.trials[number])
            for one in measured(
                self._study.folder(number)
            ):  # what an earlier attempt could not say any more
                self._runs[number].log(one.step, {**one.metrics, "objective": one.objective})
        run_id = self._runs[number].run_id or self._study.trials[number].mlflow_run_id
        self._study.change(number, state="running", seconds=seconds, mlflow_run_id=run_id)
        self._say(f"{name(number)}: {self._point(number)}")
        self._show()

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial's process died and is started again, when there is room."""
        number = trial.config["trial"]
        self._study.change(number, seconds=self._study.trials[number].seconds + self._lap(number))
        self._clocks.pop(number, None)
        self._note(f"{name(number)}: its process died; it goes on from its last checkpoint")

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """A measure arrived."""
        number = trial.config["trial"]
        known = self._study.trials[number]
        if known.state in SETTLED or (result["step"] <= known.steps and not result["failure"]):
            self._show()
            return
        best = Measure(**result["best"]) if result["best"] else None
        self._study.change(
            number, best=best, steps=result["step"], seconds=known.seconds + self._lap(number)
        )
        if result["objective"] is not None and not result["failure"]:
            self._say(
                f"{name(number)}: step {result['step']} of {self._steps}: {self._objective.text(result['objective'])}, {self._leader()}"
            )
        self._show()

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial came to its end, was stopped, or said why it cannot go on."""
        result = trial.last_result or {}
        number = trial.config["trial"]
        if result.get("failure"):
            self._settle(number, "failed", str(result["failure"]))
        else:
            self._settle(
                number, "finished" if self._study.trials[number].steps >= self._steps else "stopped"
            )

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial's process died more often than `scaling.max_failures` allows."""
        lines = [
            line.strip()
            for line in str(trial.get_pickled_error() or "its process died").splitlines()
            if line.strip()
        ]
        self._settle(trial.config["trial"], "failed", lines[-1][:500])

    def on_event(self, trial_event: cluster.Event) -> None:
        """Record an event of a trial's workers; called in the channel's thread."""
        if not isinstance(trial_event, TrialEvent):
            raise UnknownEvent(trial_event)
        number = trial_event.trial
        match trial_event.event:
            case Note(text):
                self._note(f"{name(number)}: {text}")
            case TrainPoint(step, _, values):
                self._at[number] = step
                self._show()
                self._log(number, step, values)
            case CheckpointSaved(step, values, objective):
                self._log(number, step, values, objective)
            case Resumed(_, points):
                for step, values in points:
                    self._log(number, step, values)
            case StageEnded():
                pass
            case event:
                raise UnknownEvent(event)

    def _log(
        self, number: int, step: int, values: Mapping[str, float], objective: float | None = None
    ) -> None:
        if number not in self._runs:
            return
        named = tracking.named(values)
        if objective is not None:
            named["objective"] = objective
        self._runs[number].log(step, named)

    def end(self, status: tracking.Status) -> None:
        """End the runs of trials that were cut off, and send what is still to be sent of the others."""
        for number, run in self._runs.items():
            if self._study.trials[number].state not in SETTLED:
                run.end(status)
            else:
                run.replay()

    def table(self) -> Table:
        """All trials, the best marked, with what they used."""
        axes = [axis.name for axis in self._space.axes]
        table = Table(
            title=f"{self._leader()}; {self.hours():.2f} {self._unit[0]}-hours used",
            title_justify="left",
        )
        for column in ("trial", *axes, "step", self._objective.label, "state"):
            table.add_column(
                column, justify="left" if column in ("trial", "state") else "right", overflow="fold"
            )
        best = self._study.best()
        for trial in self._study.trials:
            marks = ("★ " if best and trial.number == best.number else "") + name(trial.number)
            note = " (the settings)" if trial.number == 0 else ""
            values = [shown(trial.point[axis]) for axis in axes]
            score = self._objective.text(trial.best.objective) if trial.best else ""
            state = trial.state + (f": {trial.reason[:60]}" if trial.reason else "")
            table.add_row(
                marks + note,
                *values,
                str(self._step(trial)),
                score,
                state,
                style=STATES[trial.state],
            )
        return table

    def hours(self) -> float:
        """GPU-hours (CPU-hours where there is no GPU) of all attempts, up to now."""
        now = time.monotonic()
        running = sum(now - started for started in list(self._clocks.values()))
        return (sum(trial.seconds for trial in self._study.trials) + running) * self._unit[1] / 3600

    def _step(self, trial: Trial) -> int:
        """Steps trained so far; a trial that goes on from a checkpoint repeats what it did after it."""
        return max(trial.steps, self._at.get(trial.number, 0))

    def _settle(self, number: int, state: str, reason: str | None = None) -> None:
        known = self._study.trials[number]
        if known.state in SETTLED:
            return
        seconds = known.seconds + self._lap(number)
        self._clocks.pop(number, None)
        if run := self._runs.get(
            number
        ):  # points of its last steps may still be on their way to it
            if known.best:
                run.log(
                    known.steps,
                    {"best_objective": known.best.objective, "best_step": float(known.best.step)},
                )
            run.tag({"state": state} | ({"failure": reason[:500]} if reason else {}))
            run.end("FAILED" if state == "failed" else "FINISHED")
        run_id = (run.run_id if run else None) or known.mlflow_run_id
        self._study.change(
            number,
            state=state,
            reason=reason,
            steps=self._step(known),
            seconds=seconds,
            mlflow_run_id=run_id,
        )
        (self._note if reason else self._say)(
            f"{name(number)}: {state}{f': {reason}' if reason else ''}"
        )
        self._show()

    def _lap(self, number: int) -> float:
        """Seconds of a trial that are not in the study yet."""
        now = time.monotonic()
        started = self._clocks.get(number, now)
        self._clocks[number] = now
        return now - started

    def _point(self, number: int) -> str:
        return ", ".join(
            f"{axis} {shown(value)}" for axis, value in self._study.trials[number].point.items()
        )

    def _leader(self) -> str:
        best = self._study.best()
        return (
            f"best {self._objective.text(best.best.objective)}, {name(best.number)}"
            if best and best.best
            else "none measured yet"
        )

    def _note(self, text: str) -> None:
        """What must not be lost, on a terminal as in a log: the table does not hold it, or cuts it."""
        self._display.line(text)

    def _say(self, text: str) -> None:
        """What the table shows on a terminal."""
        if not self._display.console.is_terminal:
            self._display.line(text)

    def _show(self) -> None:
        self._display.below(self.table())
