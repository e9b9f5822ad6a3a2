"""A worker's actions at a log and at a save."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ray_sql.cluster.events import CheckpointSaved, NodeUsed, OnEvent, StepEnded, TrainPoint
from ray_sql.cluster.ranks import gather_all, rank
from ray_sql.config import Batching
from ray_sql.errors import RaySqlError, TrainingError
from ray_sql.rows import TokenizedExample
from ray_sql.store import checkpoints, storage
from ray_sql.store.run_folder import CONTRACT, RunFolder
from ray_sql.train.gauges import Gauges
from ray_sql.train.node_use import NodeWatch
from ray_sql.train.preemption import PreemptionWatch
from ray_sql.train.resume import LOGGED, check_owned

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ray_sql.train.validation import Validation

STEP_SECONDS = 1.0
"""Least seconds between two messages on how far training is."""


class Reporter:
    """Sends logged values to the driver; at a save, stores the checkpoint and evaluates it."""

    def __init__(
        self,
        folder: RunFolder,
        driver: str | None,
        emit: OnEvent,
        validation: Validation,
        watch: PreemptionWatch,
        node: NodeWatch,
        is_eval_step: Callable[[int], bool],
        batching: Batching,
        examples: Sequence[TokenizedExample],
        run_name: str,
    ) -> None:
        self._folder, self._driver, self._emit = folder, driver, emit
        self._validation, self._watch, self._is_eval_step = validation, watch, is_eval_step
        self._node = node
        self._step_examples = batching.global_batch_size
        self._epoch_steps = batching.steps_per_epoch(len(examples))
        self._mean_tokens = sum(len(example.input_ids) for example in examples) / len(examples)
        self._steps = batching.steps(len(examples))
        self._told = time.monotonic()
        self._last: tuple[int, float] | None = None
        self._rank = rank()
        self._gauges = Gauges(run_name) if self._rank == 0 else None

    def on_log(self, step: int, steps: int, values: dict[str, float]) -> None:
        """Send a step's values to the driver, with the speed since the last ones."""
        now = time.monotonic()
        point: dict[str, float] = {
            name: value
            for name, value in values.items()
            if name in LOGGED or name.startswith(("time/", "system/"))
        }
        point["epoch"] = step / self._epoch_steps
        if self._last is not None and now > self._last[1]:
            last_step, last_time = self._last
            per_second = (step - last_step) / (now - last_time) * self._step_examples
            point["examples_per_second"] = per_second
            # a shared schema counts for each question, so that speeds with and without sharing
            # can be compared
            point["tokens_per_second"] = per_second * self._mean_tokens
        self._last, self._told = (step, now), now
        self._emit(TrainPoint(step, steps, point))
        if self._gauges:
            self._gauges.point(step, steps, point)

    def on_step(self, step: int) -> bool:
        """Tell the driver how far training is; return on all ranks whether to save here."""
        now = time.monotonic()
        if self._rank == 0 and now - self._told >= STEP_SECONDS:
            self._told = now
            self._emit(StepEnded(step, self._steps))
            if self._gauges:
                self._gauges.point(step, self._steps, {})
        # MLflow's comparison opens on what was logged first, which should be the loss
        if step > 1 and (use := self._node.read()):
            self._emit(NodeUsed(step, use))
        return self._watch(step)

    def on_save(self, step: int, local: Path, model: PreTrainedModel) -> bool:
        """Store and evaluate a checkpoint; return False on all ranks if training should stop."""
        import ray.train

        started = time.monotonic()
        # stored first: it must be complete before anything that takes long
        self._on_all_ranks(lambda: self._store(step, local))
        go_on = self.evaluate_checkpoint(step, model)
        ray.train.report({"step": step})  # Ray's dashboard shows this of the run
        if self._last is not None:  # time spent here is not training time
            self._last = (self._last[0], self._last[1] + time.monotonic() - started)
        return go_on and not self._watch.stops

    def evaluate_checkpoint(self, step: int, model: PreTrainedModel) -> bool:
        """Evaluate this step's checkpoint if it is due and there is time, and say that it is there.

        Returns False on all ranks if training should stop.
        """
        return self._on_all_ranks(lambda: self._evaluate(step, model))

    def _on_all_ranks(self, part: Callable[[], bool]) -> bool:
        """Return whether all ranks' parts are for going on; raise on all where one fails.

        A rank that left alone would let the others wait for it for ever.
        """
        problem: RaySqlError | None = None
        go_on = True
        try:
            go_on = part()
        except RaySqlError as error:
            problem = error
        results = gather_all((problem, go_on))
        for error_of_rank, _ in results:
            if isinstance(error_of_rank, TrainingError):
                raise error_of_rank
            if error_of_rank:
                raise TrainingError(str(error_of_rank))
        return all(rank_goes_on for _, rank_goes_on in results)

    def _store(self, step: int, local: Path) -> bool:
        if self._rank == 0:
            check_owned(self._folder, self._driver)
            storage.fetch_file(self._folder.place(CONTRACT), local / CONTRACT)
            checkpoints.save(local, self._folder, step, {})
        return True

    def _evaluate(self, step: int, model: PreTrainedModel) -> bool:
        """Return whether to go on after this checkpoint, as far as this rank knows."""
        scores = None
        if self._is_eval_step(step) and not self._watch.stops:
            scores = self._validation(model)
        if self._rank != 0:
            return True
        saved = CheckpointSaved(step)
        if scores:
            checkpoints.score(self._folder.checkpoint(step).uri, scores)
            if self._gauges:
                self._gauges.validated(scores["metrics"])
            saved = CheckpointSaved(
                step, scores["metrics"], scores["objective"], scores["tie_break"]
            )
        saved = replace(saved, kept=checkpoints.prune(self._folder))
        return self._emit(saved) is not False
