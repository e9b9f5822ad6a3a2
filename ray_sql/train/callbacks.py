"""What a worker does at a log and at a save."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray_sql import rows
from ray_sql.cluster.events import CheckpointSaved, OnEvent, TrainPoint
from ray_sql.cluster.ranks import gather_all
from ray_sql.config import Config
from ray_sql.errors import RaySqlError, TrainingError
from ray_sql.store import checkpoints, storage
from ray_sql.store.run_folder import CONTRACT, RunFolder
from ray_sql.train.preemption import PreemptionWatch
from ray_sql.train.resume import LOGGED, check_owned
from ray_sql.train.validation import Validation

if TYPE_CHECKING:
    from transformers import PreTrainedModel

GAUGES = {
    "loss": "Training loss",
    "examples_per_second": "Examples trained on, all workers together",
}
"""Points that Ray shows too, as `ray_sql_<name>`: Ray puts `ray_` before every metric."""


class Reporter:
    """What happens at a log and at a save: points to the driver, validation, the checkpoint to storage."""

    def __init__(
        self,
        config: Config,
        judge: Validation,
        notice: PreemptionWatch,
        emit: OnEvent,
        data: Sequence[rows.TokenizedExample],
        rank: int,
        driver: str | None,
    ) -> None:
        self._config, self._judge, self._notice, self._emit, self._rank = (
            config,
            judge,
            notice,
            emit,
            rank,
        )
        self._folder = RunFolder(config.run_dir)
        self._examples, self._driver = len(data), driver
        self._tokens = sum(len(row.input_ids) for row in data) / len(data)
        self._last: tuple[int, float] | None = None
        self._gauges = _gauges(config) if rank == 0 else {}

    def on_log(self, step: int, steps: int, values: dict[str, float]) -> None:
        now = time.monotonic()
        kept: dict[str, float] = {
            name: value
            for name, value in values.items()
            if name in LOGGED or name.startswith(("time/", "memory/", "gpu/"))
        }
        kept["epoch"] = step / self._config.batching.steps_per_epoch(self._examples)
        if self._last is not None and now > self._last[1]:
            per_second = (
                (step - self._last[0])
                / (now - self._last[1])
                * self._config.batching.global_batch_size
            )
            # a schema that questions share counts for each of them, so that speeds with and without sharing compare
            kept |= {
                "examples_per_second": per_second,
                "tokens_per_second": per_second * self._tokens,
            }
        self._last = (step, now)
        self._emit(TrainPoint(step, steps, kept))
        for name, gauge in self._gauges.items():
            if name in kept:
                gauge.set(kept[name])

    def on_save(self, step: int, folder: Path, model: PreTrainedModel) -> bool:
        import ray.train

        started = time.monotonic()
        self._together(
            lambda: self._save(step, folder)
        )  # first: it must be complete before anything that takes long
        go_on = self.measure(step, model)
        ray.train.report({"step": step})  # what Ray's dashboard shows of the run
        if self._last is not None:  # time spent here is not training time
            self._last = (self._last[0], self._last[1] + time.monotonic() - started)
        return go_on and not self._notice.stops

    def measure(self, step: int, model: PreTrainedModel) -> bool:
        """Add to this step's checkpoint what it is measured at, if it is to be and there is time, and say that it is there; False on
        all ranks if training should stop."""
        return self._together(lambda: self._measure(step, model))

    def _together(self, part: Callable[[], bool]) -> bool:
        """Whether all ranks' parts are for going on. A rank that leaves alone would let the others wait for it forever."""
        problem: RaySqlError | None = None
        go_on = True
        try:
            go_on = part()
        except RaySqlError as error:
            problem = error
        said = gather_all((problem, go_on))
        if problems := [each for each, _ in said if each]:
            raise (
                problems[0]
                if isinstance(problems[0], TrainingError)
                else TrainingError(str(problems[0]))
            )
        return all(each for _, each in said)

    def _save(self, step: int, folder: Path) -> bool:
        if self._rank == 0:
            check_owned(self._folder, self._driver)
            storage.fetch_file(self._folder.place(CONTRACT), folder / CONTRACT)
            checkpoints.save(folder, self._folder, step, {})
        return True

    def _measure(self, step: int, model: PreTrainedModel) -> bool:
        """Whether to go on after this checkpoint, as far as this rank knows."""
        wanted = self._config.measured(step, self._examples) and not self._notice.stops
        judged = self._judge(model) if wanted else None
        if self._rank != 0:
            return True
        if judged:
            checkpoints.score(self._folder.checkpoint(step).uri, judged)
        scores = judged or {"objective": None, "tie_break": None, "metrics": {}}
        checkpoints.prune(self._folder)
        saved = CheckpointSaved(step, scores["metrics"], scores["objective"], scores["tie_break"])
        return self._emit(saved) is not False


def _gauges(config: Config) -> dict[str, Any]:
    """Metrics of Ray by our names, for its dashboard and Prometheus; none where training runs without Ray."""
    import ray
    from ray.util.metrics import Gauge

    if not ray.is_initialized():
        return {}
    made = {name: Gauge(f"sql_{name}", text, tag_keys=("run",)) for name, text in GAUGES.items()}
    for gauge in made.values():
        gauge.set_default_tags({"run": config.output_name})
    return made
