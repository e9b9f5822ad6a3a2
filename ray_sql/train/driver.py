"""The driver's side: workers started on what lies in the run's folder, again with smaller passes where memory is full, and the best
checkpoint's adapter taken."""

from __future__ import annotations

import gc
import logging
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from ray_sql import cluster
from ray_sql.cluster.events import Note, RowsChosen, TrainJob, TrainOutcome
from ray_sql.config import Config
from ray_sql.errors import OutOfMemory, TrainingError, last_line, out_of_memory
from ray_sql.store import checkpoints, storage
from ray_sql.store.checkpoints import Checkpoint
from ray_sql.store.run_folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS, RunFolder
from ray_sql.train.loop import train_loop_per_worker
from ray_sql.train.resume import claim_run, rewind, set_aside_damaged, starting_point

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FitResult:
    """A finished training run: its last step and its best checkpoint, whose adapter lies in `<run_dir>/adapter`."""

    steps: int
    best: Checkpoint
    seconds: float


def fit(
    config: Config, model_folder: str, on_event: cluster.OnEvent, decides: bool = False
) -> FitResult:
    """Train on the inputs in `config.run_dir`, going on from its newest checkpoint if there is one.

    Where `on_event` `decides`, it is asked at every checkpoint, and False ends training there. A run that is out of memory goes on from
    its last checkpoint with half as many examples in a forward pass, and twice as many passes, as often as they can be halved. Raises
    `TrainingError` where the loss diverges or the workers cannot be kept alive, `TakenOver` where the same command was given again
    meanwhile, `ModelError` for a wrong checkpoint.
    """
    started = time.monotonic()
    folder = RunFolder(config.run_dir)
    start_from = starting_point(config, folder.read_contract() or {})
    driver = claim_run(
        folder
    )  # before anything is rewound, which the workers of another one would save again
    if start_from:
        rewind(config, start_from)
    job = TrainJob(config.for_workers(), model_folder, start_from, driver)

    def say(text: str) -> None:
        on_event(Note(text))

    try:
        outcome = _fit_into_memory(job, config, on_event, decides)
    except (KeyboardInterrupt, SystemExit):
        done = checkpoints.complete(folder)
        kept = (
            f"{done[-1].name} is saved: the same command goes on from there"
            if done
            else "no checkpoint yet"
        )
        say(f"stopped; {kept}")
        raise
    if outcome.failure:
        raise TrainingError(outcome.failure)
    return FitResult(outcome.step, keep_best(folder, say), time.monotonic() - started)


def _fit_into_memory(
    job: TrainJob, config: Config, on_event: cluster.OnEvent, decides: bool
) -> TrainOutcome:
    """What rank 0 returned, after as many halvings of the forward passes as it takes to find memory for them."""
    folder = RunFolder(config.run_dir)
    halvings = folder.read_halvings()
    batching = replace(config.batching, microbatch_halvings=halvings)

    def receive(event: cluster.Event) -> bool | None:
        nonlocal batching
        if not isinstance(event, RowsChosen):
            return on_event(event)
        batching = replace(batching, examples_per_row=event.examples_per_row)
        return None

    while True:
        try:
            return cluster.run_workers(
                train_loop_per_worker,
                replace(job, microbatch_halvings=halvings),
                config.scaling,
                config.run_dir,
                receive,
                decides=decides,
                resizes=True,
            )
        except Exception as error:  # in this process it is torch's own, from workers ours
            before = batching.examples_per_pass
            if not out_of_memory(error):
                raise
            if before == 1:
                why = (
                    str(error)
                    if isinstance(error, OutOfMemory)
                    else f"{last_line(error)}; {cluster.MORE_MEMORY}"
                )
                raise OutOfMemory(
                    f"out of memory with one example in a forward pass: {why}"
                ) from error
        halvings += 1
        folder.write_halvings(halvings)
        batching = replace(batching, microbatch_halvings=halvings)
        now = batching.examples_per_pass
        said = f"on from the last checkpoint with up to {now} examples in a forward pass, not {before}, and more passes in a step"
        on_event(Note(f"out of memory: {said}"))
        free_memory()


def free_memory() -> None:
    """Give back what a failed attempt held in this process."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def keep_best(run: RunFolder, say: Callable[[str], object] = log.warning) -> Checkpoint:
    """Copy the adapter of a run's best checkpoint that is not damaged to `<run_dir>/adapter`; returns that checkpoint."""
    while (best := checkpoints.best(checkpoints.complete(run))) is not None:
        with tempfile.TemporaryDirectory() as scratch:
            folder = storage.fetch(best.uri, Path(scratch) / "best")
            if wrong := checkpoints.damaged(folder):
                set_aside_damaged(best.uri, wrong, say)
                continue
            for file in folder.iterdir():
                if file.name not in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
                    file.unlink()
            run.write_adapter(folder)
        return best
    raise TrainingError(f"{run}: training ended without a complete checkpoint")
