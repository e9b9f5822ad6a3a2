"""One trial, in a process of its own: `train.fit` at a point, its measures to Ray Tune, and Tune's decision back to the training loop.

A class trainable, not a function: with a function, Tune stops a trial by ending its process in the middle of `fit`, and over Ray Train
the workers' placement group then stays until a detached actor finds out through the State API (it did not within minutes here, so that
the next trial waited). Here training waits at every measurement for the decision, ends in order where it is to stop, and has kept its best
checkpoint by then. With `scaling.num_workers` 0 it trains in this process, else this process only drives Ray Train's workers.
"""

from __future__ import annotations

import logging
import queue
import threading
from dataclasses import asdict
from typing import Any

from ray.tune import Trainable

from ray_sql import cluster, train
from ray_sql.cluster.events import CheckpointSaved, TrialEvent
from ray_sql.config import Config
from ray_sql.errors import RaySqlError
from ray_sql.store.run_folder import RunFolder
from ray_sql.tune.study import WORST, Measure, measured, record, settings

log = logging.getLogger(__name__)


class Trial(Trainable):  # type: ignore[misc]  # ray is not followed by mypy
    """What Tune runs. The result of a step is a measure; a trial that cannot go on has a last one with `failure`."""

    def setup(self, config: dict[str, Any], plan: dict[str, Any] | None = None) -> None:
        """Read what an earlier attempt left; training starts when that has been reported again."""
        assert plan is not None
        self._number, self._plan, self._settled = config["trial"], plan, config["settled"]
        self._settings = settings(Config(**plan["config"]), config["changes"], self._number)
        self._folder = RunFolder(self._settings.run_dir)
        self._fresh = not self._folder.has_settings()
        self._measures = [] if self._fresh else measured(self._folder)
        self._left = list(self._measures)
        self._said: queue.Queue[tuple[str, Any]] = queue.Queue()
        self._decisions: queue.Queue[bool] = queue.Queue()
        self._waits = self._stopping = False
        self._thread: threading.Thread | None = None

    def step(self) -> dict[str, Any]:
        """The next measure; the last of them `done`."""
        if self._left:
            return self._result(self._left.pop(0))
        if self._settled:  # the search is told what it was told then
            return {
                **self._result(),
                **({"score": WORST} if self._settled == "failed" else {}),
                "done": True,
            }
        if self._thread is None:
            self._thread = threading.Thread(target=self._train, name="ray_sql-trial", daemon=True)
            self._thread.start()
        if self._waits:
            self._decide(True)
        kind, value = self._said.get()
        if kind == "measure":
            self._waits = True
            return self._result(value)
        failure = {"failure": value} if kind == "failed" else {}
        return {**self._result(), **failure, **({"score": WORST} if failure else {}), "done": True}

    def cleanup(self) -> None:
        """Stop training in order, and wait until its workers have given back what they held."""
        self._stopping = True
        if self._thread is not None:
            self._decide(False)
            self._thread.join()

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Go on as another trial: what was imported stays."""
        self.cleanup()
        train.free_memory()
        self.setup(new_config)
        return True

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Nothing: a trial's folder is its checkpoint."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Nothing: `setup` finds what there is."""

    def _decide(self, go_on: bool) -> None:
        self._waits = False
        self._decisions.put(go_on)

    def _result(self, new: Measure | None = None) -> dict[str, Any]:
        """Everything Tune and the driver need, every time: what Tune keeps of a trial is its last result."""
        seen = [one for one in self._measures if new is None or one.step <= new.step]
        best = max(seen, key=lambda one: one.rank, default=None)
        last = seen[-1] if seen else None
        return {
            "step": last.step if last else 0,
            "score": best.score if best else WORST,
            "best": asdict(best) if best else None,
            "objective": last.objective if last else None,
            "failure": None,
        }

    def _train(self) -> None:
        try:
            if self._fresh:
                self._folder.copy_inputs(RunFolder(self._plan["inputs"]))
                self._folder.write_settings(self._settings.public())
            train.fit(self._settings, self._plan["model_folder"], self._on_event, decides=True)
        except (
            Exception
        ) as error:  # of whatever kind: it ends this trial and not the sweep, which records it
            if not isinstance(error, RaySqlError):
                log.exception("trial %s failed", self._number)
            self._said.put(("failed", " ".join(str(error).split()) or type(error).__name__))
        else:
            self._said.put(("ended", None))

    def _on_event(self, event: cluster.Event) -> bool | None:
        self._plan["sender"](TrialEvent(self._number, event))
        if not isinstance(event, CheckpointSaved) or event.objective is None:
            return not self._stopping
        measure = Measure(event.step, event.objective, event.tie_break, dict(event.values))
        self._measures.append(measure)
        record(self._folder, self._measures)
        if self._stopping:
            return False
        if measure.step >= self._plan["steps"]:
            return None  # there is nothing to decide; it is reported when the run is complete, adapter and all
        self._said.put(("measure", measure))
        return self._decisions.get()
