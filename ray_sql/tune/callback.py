"""The driver's side of a sweep: trials' states in the study's file, MLflow runs, the live table."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

from ray.tune import Callback
from rich.table import Table

from ray_sql import tracking
from ray_sql.cluster.events import (
    CheckpointSaved,
    Event,
    NodeUsed,
    Note,
    Resumed,
    RowsChosen,
    StageEnded,
    StepEnded,
    TrainPoint,
    TrialEvent,
    UnknownEvent,
)
from ray_sql.display import Display, cell
from ray_sql.tune.objective import Objective
from ray_sql.tune.space import Space, shown, shown_point
from ray_sql.tune.study import (
    SETTLED,
    State,
    StepScore,
    Study,
    TrialRecord,
    read_scores,
    trial_name,
)

log = logging.getLogger(__name__)

STYLES = {
    "running": "cyan",
    "finished": "green",
    "stopped": "yellow",
    "failed": "red",
    "waiting": "",
}


class SweepCallback(Callback):  # type: ignore[misc]  # ray is not followed by mypy
    """Ray Tune's callback, and the receiver of all trials' events.

    `begin_run` gives a trial its MLflow run. `unit` is what time is counted in, and how many of it
    a trial takes: ("GPU", 2).
    """

    def __init__(
        self,
        study: Study,
        space: Space,
        objective: Objective,
        steps: int,
        unit: tuple[str, float],
        begin_run: Callable[[TrialRecord], tracking.Run],
        display: Display,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self._study, self._space, self._objective = study, space, objective
        self._steps, self._unit = steps, unit
        self._begin_run, self._display = begin_run, display
        self._runs: dict[int, tracking.Run] = {}
        self._lap_started: dict[int, float] = {}
        self._newest_steps: dict[int, int] = {}
        """Steps that running trials have come to, evaluated or not."""
        self._validated: dict[int, float] = {}
        """The best objective of trials so far."""
        self._show()

    def __getstate__(self) -> dict[str, Any]:
        """Give Tune nothing to write down: a resumed sweep reads the study's file."""
        return {}

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial starts, goes on, or is only reported again."""
        number = trial.config["trial"]
        known = self._study.trials[number]
        if known.state in SETTLED:
            return
        seconds = known.seconds + self._lap(number)  # starts the clock
        if number not in self._runs:  # it may have begun no MLflow run yet, should MLflow be away
            self._runs[number] = self._begin_run(known)
            for score in read_scores(self._study.trial_folder(number)):
                # an earlier attempt may have been killed before it said this
                self._log(number, score.step, score.metrics, score.objective)
        run_id = self._runs[number].run_id or known.mlflow_run_id
        self._study.change(number, state="running", seconds=seconds, mlflow_run_id=run_id)
        self._progress(f"{known.name}: {shown_point(known.point)}")
        self._show()

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial's process died and is started again, when there is room."""
        number = trial.config["trial"]
        self._study.change(number, seconds=self._study.trials[number].seconds + self._lap(number))
        self._lap_started.pop(number, None)
        name = trial_name(number)
        self._display.line(f"{name}: its process died; it goes on from its last checkpoint")

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """A score arrived."""
        number = trial.config["trial"]
        known = self._study.trials[number]
        step, failure = result["step"], result["failure"]
        if known.state in SETTLED or (step <= known.steps and not failure):
            self._show()
            return
        best = StepScore(**result["best"]) if result["best"] else None
        seconds = known.seconds + self._lap(number)
        self._study.change(number, best=best, steps=step, seconds=seconds)
        if result["objective"] is not None and not failure:
            value = self._objective.text(result["objective"])
            self._progress(f"{known.name}: step {step} of {self._steps}: {value}, {self._leader()}")
        self._show()

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial came to its end, was stopped, or said why it cannot go on."""
        number = trial.config["trial"]
        failure = (trial.last_result or {}).get("failure")
        if failure:
            self._settle(number, "failed", str(failure))
        elif self._study.trials[number].steps >= self._steps:
            self._settle(number, "finished")
        else:
            self._settle(number, "stopped")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial's process died more often than `scaling.max_failures` allows."""
        error = str(trial.get_pickled_error() or "its process died")
        lines = [line.strip() for line in error.splitlines() if line.strip()]
        self._settle(trial.config["trial"], "failed", lines[-1][:500])

    def on_event(self, event: Event) -> None:
        """Record an event of a trial's workers; called in the channel's thread."""
        if not isinstance(event, TrialEvent):
            raise UnknownEvent(event)
        number = event.trial
        match event.event:
            case Note(text):
                self._display.line(f"{trial_name(number)}: {text}")
            case StepEnded(step, _):
                self._newest_steps[number] = step
                self._show()
            case TrainPoint(step, _, values):
                self._newest_steps[number] = step
                self._show()
                self._log(number, step, values)
            case NodeUsed(step, values):
                self._log(number, step, values)
            case CheckpointSaved(step, values, objective):
                self._log(number, step, values, objective)
            case Resumed(_, points, _):
                for step, values in points:
                    self._log(number, step, values)
            case StageEnded() | RowsChosen():
                pass  # a sweep shows no trial's start
            case _:
                raise UnknownEvent(event)

    def end(self, status: tracking.Status) -> None:
        """End the runs of trials that were cut off, and send what waits of the others."""
        for number, run in self._runs.items():
            if self._study.trials[number].state in SETTLED:
                run.replay()
            else:
                run.end(status)

    def table(self) -> Table:
        """Return all trials, the best marked, with what they used."""
        axes = [axis.name for axis in self._space.axes]
        title = f"{self._leader()}; {self.hours():.2f} {self._unit[0]}-hours used"
        table = Table(title=cell(title), title_justify="left")
        for column in ("trial", *axes, "step", self._objective.label, "state"):
            side = "left" if column in ("trial", "state") else "right"
            table.add_column(column, justify=side, overflow="fold")  # type: ignore[arg-type]
        for trial in self._study.trials:
            table.add_row(*map(cell, self._cells(trial, axes)), style=STYLES[trial.state])
        return table

    def hours(self) -> float:
        """Return the GPU-hours (CPU-hours without a GPU) of all attempts, up to now."""
        now = self._clock()
        running = sum(now - started for started in list(self._lap_started.values()))
        seconds = sum(trial.seconds for trial in self._study.trials) + running
        return seconds * self._unit[1] / 3600

    def _cells(self, trial: TrialRecord, axes: list[str]) -> list[str]:
        best = self._study.best()
        is_best = best is not None and best.number == trial.number
        star = "★ " if is_best else ""
        note = " (the settings)" if trial.number == 0 else ""
        values = [shown(trial.point[axis]) for axis in axes]
        score = self._objective.text(trial.best.objective) if trial.best else ""
        reason = f": {trial.reason[:60]}" if trial.reason else ""
        steps = str(self._step(trial))
        return [f"{star}{trial.name}{note}", *values, steps, score, f"{trial.state}{reason}"]

    def _log(
        self, number: int, step: int, values: Mapping[str, float], objective: float | None = None
    ) -> None:
        if number in self._runs:
            named = tracking.named(values)
            if objective is not None:
                best = max(objective, self._validated.get(number, objective))
                named[tracking.VALIDATED] = self._validated[number] = best
            self._runs[number].log(step, named)

    def _step(self, trial: TrialRecord) -> int:
        """Return the steps trained so far; a trial that goes on repeats some."""
        return max(trial.steps, self._newest_steps.get(trial.number, 0))

    def _settle(self, number: int, state: State, reason: str | None = None) -> None:
        known = self._study.trials[number]
        if known.state in SETTLED:
            return
        seconds = known.seconds + self._lap(number)
        self._lap_started.pop(number, None)
        run = self._runs.get(number)
        if run:  # events of its last steps may still be on their way to it
            self._end_run(run, known, state, reason)
        run_id = (run.run_id if run else None) or known.mlflow_run_id
        self._study.change(
            number,
            state=state,
            reason=reason,
            steps=self._step(known),
            seconds=seconds,
            mlflow_run_id=run_id,
        )
        if reason:
            self._display.line(f"{known.name}: {state}: {reason}")
        else:
            self._progress(f"{known.name}: {state}")
        self._show()

    def _end_run(
        self, run: tracking.Run, trial: TrialRecord, state: State, reason: str | None
    ) -> None:
        text = f"{shown_point(trial.point)}: {state}"
        if trial.best:
            run.tag({"best_step": str(trial.best.step)})
            best = self._objective.text(trial.best.objective)
            text = f"**{self._objective.label} {best}** on validation, at step {trial.best.step}, "
            text += f"with {shown_point(trial.point)}: {state}"
        run.describe(f"{text}, after {trial.steps} of {self._steps} steps", None)
        run.tag({"state": state})
        if reason:
            run.tag({"failure": reason[:500]})
        run.end("FAILED" if state == "failed" else "FINISHED")

    def _lap(self, number: int) -> float:
        """Return the seconds of a trial since the last lap, and start the next."""
        now = self._clock()
        started = self._lap_started.get(number, now)
        self._lap_started[number] = now
        return now - started

    def _leader(self) -> str:
        best = self._study.best()
        if not best or not best.best:
            return "none measured yet"
        return f"best {self._objective.text(best.best.objective)}, {best.name}"

    def _progress(self, text: str) -> None:
        """Write a line where there is no terminal; on a terminal the table shows it."""
        if not self._display.console.is_terminal:
            self._display.line(text)

    def _show(self) -> None:
        self._display.below(self.table())
