"""The driver's side: start workers, halve passes where memory is full, take the best adapter."""

from __future__ import annotations

import gc
import logging
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ray_sql import cluster, models
from ray_sql.cluster.events import DriverLink, Note, RowsChosen, TrainJob, TrainOutcome
from ray_sql.config import Batching, Config
from ray_sql.config.sections import ScalingSection
from ray_sql.errors import OutOfMemory, TrainingError, last_line, out_of_memory
from ray_sql.store import checkpoints, storage
from ray_sql.store.checkpoints import Checkpoint
from ray_sql.store.run_folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS, RunFolder
from ray_sql.train.resume import claim_run, rewind, set_aside_damaged, starting_point

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FitResult:
    """A finished training run: its last step and its best checkpoint, whose adapter was kept."""

    steps: int
    best: Checkpoint
    seconds: float


def train_loop_per_worker(job: TrainJob, driver: DriverLink) -> TrainOutcome:
    """Train on this worker; all ranks return the same outcome."""
    entered = time.time()
    models.quiet()  # before the training stack imports bitsandbytes, which writes a note
    models.import_bitsandbytes()
    # here: it loads the whole training stack, which the driver can do without
    from ray_sql.train import loop

    return loop.train(job, driver, entered)


def fit(
    config: Config, model_folder: str, on_event: cluster.OnEvent, decides: bool = False
) -> FitResult:
    """Train on the inputs in the run's folder, going on from its newest checkpoint if any.

    Where `on_event` `decides`, its answer to a saved checkpoint counts: False ends training there.
    A run that is out of memory goes on from its last checkpoint. Each time, half as many examples
    are in a forward pass, in twice as many passes, until one is left.

    Raises `TrainingError` where the loss diverges or workers cannot be kept alive, and `TakenOver`
    where the same command was given again meanwhile. Raises `ModelError` for a wrong checkpoint.
    """
    started = time.monotonic()
    folder = RunFolder(config.run_dir)
    contract = folder.read_contract() or {}
    start_from = starting_point(config.prev_checkpoint, folder, contract, config.lora)
    # claimed before anything is rewound: the workers of another driver would save it again
    driver = claim_run(folder)
    if start_from:
        rewind(folder, start_from)

    def note(text: str) -> None:
        on_event(Note(text))

    job = TrainJob(config.for_workers(), model_folder, start_from, driver)
    try:
        outcome = _fit_into_memory(
            job, config.batching, config.scaling, folder, on_event, decides=decides
        )
    except (KeyboardInterrupt, SystemExit):
        note(_stopped(checkpoints.complete(folder), config.overwrite))
        raise
    if outcome.failure:
        raise TrainingError(outcome.failure)
    return FitResult(outcome.step, keep_best(folder, note), time.monotonic() - started)


def _stopped(saved: Sequence[Checkpoint], overwrite: bool) -> str:
    """Return what a run that was stopped has saved, and the command that goes on."""
    if not saved:
        return "stopped; no checkpoint yet: the same command begins again"
    command = "the same command without --overwrite" if overwrite else "the same command"
    return f"stopped; {saved[-1].name} is saved: {command} goes on from there"


def _fit_into_memory(
    job: TrainJob,
    batching: Batching,
    scaling: ScalingSection,
    folder: RunFolder,
    on_event: cluster.OnEvent,
    *,
    decides: bool,
) -> TrainOutcome:
    """Run the workers, with forward passes halved until there is memory for them."""
    batching = replace(batching, microbatch_halvings=folder.read_halvings())

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
                replace(job, microbatch_halvings=batching.microbatch_halvings),
                scaling,
                str(folder),
                receive,
                decides=decides,
                resizes=True,
            )
        except Exception as error:  # torch's own from this process, ours from workers
            if not out_of_memory(error):
                raise
            before = batching.examples_per_pass
            if before == 1:
                reason = f"{last_line(error)}; {cluster.MORE_MEMORY}"
                if isinstance(error, OutOfMemory):
                    reason = str(error)
                text = f"out of memory with one example in a forward pass: {reason}"
                raise OutOfMemory(text) from error
        batching = replace(batching, microbatch_halvings=batching.microbatch_halvings + 1)
        folder.write_halvings(batching.microbatch_halvings)
        on_event(
            Note(
                "out of memory: on from the last checkpoint with up to "
                f"{batching.examples_per_pass} examples in a forward pass, not {before}, and more "
                "passes in a step"
            )
        )
        free_memory()


def free_memory() -> None:
    """Give back the memory that a failed attempt held in this process."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def keep_best(folder: RunFolder, note: Callable[[str], object] = log.warning) -> Checkpoint:
    """Copy the best undamaged checkpoint's adapter to `adapter/`; return that checkpoint."""
    while (best := checkpoints.best(checkpoints.complete(folder))) is not None:
        with tempfile.TemporaryDirectory() as scratch:
            local = storage.fetch(best.uri, Path(scratch) / "best")
            damaged = checkpoints.damaged(local)
            if damaged:
                set_aside_damaged(best.uri, damaged, note)
                continue
            for file in local.iterdir():
                if file.name not in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
                    file.unlink()
            folder.write_adapter(local)
        return best
    raise TrainingError(f"{folder}: training ended without a complete checkpoint")
