"""One trial, in a process of its own: `train.fit` at a point, with Tune's decision at every score.

The trainable is a class, not a function. Tune stops a function by ending its process in the middle
of `fit`. Over Ray Train the workers' placement group then stays until a detached actor finds out
through the State API. The next trial waits meanwhile; it waited for minutes when it was tried.

Here training waits at every score for the decision. It ends in order where it is to stop, and has
kept its best checkpoint by then. With `scaling.num_workers` 0 a trial trains in its own process;
else that process only drives Ray Train's workers.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ray.tune import Trainable

from ray_sql import train
from ray_sql.cluster.channel import Sender
from ray_sql.cluster.events import CheckpointSaved, Event, TrialEvent
from ray_sql.config import Config
from ray_sql.errors import RaySqlError
from ray_sql.store.run_folder import RunFolder
from ray_sql.tune.study import WORST, StepScore, read_scores, trial_settings, write_scores

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrialJob:
    """The job of every trial of a study. `steps` are the optimizer steps of a whole trial."""

    settings: Mapping[str, Any]
    model_folder: str
    steps: int
    sender: Sender


@dataclass(frozen=True)
class Ended:
    """Training came to its end; `failure` says why if it failed."""

    failure: str | None = None


class TrialTrainable(Trainable):  # type: ignore[misc]  # ray is not followed by mypy
    """A trial as Tune runs it. A step's result is a score; a failed trial's last has `failure`."""

    def setup(self, config: dict[str, Any], job: TrialJob | None = None) -> None:
        """Read what an earlier attempt left. Training starts once that has been reported again."""
        assert job is not None
        self._number, self._job, self._settled = config["trial"], job, config["settled"]
        study = Config(**job.settings)
        self._study_folder = RunFolder(study.run_dir)
        self._config = trial_settings(study, config["changes"], self._number)
        self._folder = RunFolder(self._config.run_dir)
        self._scores = read_scores(self._folder)
        self._unreported = list(self._scores)
        self._outbox: queue.Queue[StepScore | Ended] = queue.Queue()
        self._decisions: queue.Queue[bool] = queue.Queue()
        self._awaits_decision = self._stopping = False
        self._thread: threading.Thread | None = None

    def step(self) -> dict[str, Any]:
        """Return the next score; the last one is `done`."""
        if self._unreported:
            return self._result(self._unreported.pop(0))
        if self._settled:  # the search is told again what it was told then
            return self._final_result(failed=self._settled == "failed")
        if self._thread is None:
            self._thread = threading.Thread(target=self._train, name="ray_sql-trial", daemon=True)
            self._thread.start()
        if self._awaits_decision:
            self._decide(True)
        match self._outbox.get():
            case StepScore() as score:
                self._awaits_decision = True
                return self._result(score)
            case Ended(None):
                return self._final_result(failed=False)
            case Ended(failure):
                return self._final_result(failed=True) | {"failure": failure}

    def cleanup(self) -> None:
        """Stop training in order, and wait until its workers have given back what they held."""
        self._stopping = True
        if self._thread is not None:
            self._decide(False)
            self._thread.join()

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Become another trial, and keep what was imported."""
        self.cleanup()
        train.free_memory()
        self.setup(new_config)
        return True

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Save nothing: a trial's folder is its checkpoint."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Load nothing: `setup` reads the folder."""

    def _decide(self, go_on: bool) -> None:
        self._awaits_decision = False
        self._decisions.put(go_on)

    def _result(self, upto: StepScore | None = None) -> dict[str, Any]:
        """Return all that Tune and the driver need: Tune keeps a trial's last result only."""
        scores = [s for s in self._scores if upto is None or s.step <= upto.step]
        best = max(scores, key=lambda score: score.rank, default=None)
        return {
            "step": scores[-1].step if scores else 0,
            "score": best.score if best else WORST,
            "best": asdict(best) if best else None,
            "objective": scores[-1].objective if scores else None,
            "failure": None,
        }

    def _final_result(self, failed: bool) -> dict[str, Any]:
        result = self._result() | {"done": True}
        return result | {"score": WORST} if failed else result

    def _train(self) -> None:
        try:
            # each time: what an earlier attempt copied names databases where the study lay then
            self._folder.copy_inputs(self._study_folder)
            self._folder.write_settings(self._config.public())
            train.fit(self._config, self._job.model_folder, self._on_event, decides=True)
        except Exception as error:  # of any kind: it ends this trial, and the sweep records it
            if not isinstance(error, RaySqlError):
                log.exception("trial %s failed", self._number)
            self._outbox.put(Ended(" ".join(str(error).split()) or type(error).__name__))
        else:
            self._outbox.put(Ended())

    def _on_event(self, event: Event) -> bool | None:
        self._job.sender(TrialEvent(self._number, event))
        if not isinstance(event, CheckpointSaved) or event.objective is None:
            return not self._stopping
        score = StepScore(event.step, event.objective, event.tie_break, dict(event.values))
        self._scores.append(score)
        write_scores(self._folder, self._scores)
        if self._stopping:
            return False
        if score.step >= self._job.steps:
            return None  # nothing to decide: it is reported once the adapter is in its folder
        self._outbox.put(score)
        return self._decisions.get()
