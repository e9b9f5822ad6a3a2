"""A worker's training run. It loads the whole training stack: the driver does not import it."""

from __future__ import annotations

import platform
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

from transformers import PreTrainedModel

from ray_sql import cluster, generate, rows
from ray_sql.cluster.events import (
    DriverLink,
    Event,
    Note,
    RowsChosen,
    StageEnded,
    TrainJob,
    TrainOutcome,
)
from ray_sql.cluster.ranks import agreed, gather_all, rank, world_size
from ray_sql.config import Batching, Config
from ray_sql.errors import ConfigError, ModelError
from ray_sql.rows.probe import why_not_share
from ray_sql.store import storage
from ray_sql.store.run_folder import RunFolder
from ray_sql.train import trainer
from ray_sql.train.callbacks import Reporter
from ray_sql.train.node_use import NodeWatch
from ray_sql.train.preemption import PreemptionWatch
from ray_sql.train.resume import needs_validation, resume
from ray_sql.train.validation import Validation, read_held_out


def train(job: TrainJob, driver: DriverLink, entered: float) -> TrainOutcome:
    """Train on this worker, whose process began the job at `entered` (seconds since the epoch)."""
    config = Config(**job.settings)
    folder = RunFolder(config.run_dir)

    def tell(event: Event) -> None:
        if rank() == 0:
            driver.emit(event)

    tell(StageEnded("workers", entered))
    if config.scaling.elastic:
        bounds = f"{config.scaling.min_workers} to {config.scaling.max_workers}"
        tell(Note(f"training with {world_size()} of {bounds} workers"))
    tell(StageEnded("imports of the training stack"))
    device = cluster.claim_device(config.scaling)
    base, tokenizer = generate.load_model(job.model_folder, config, device)
    if rank() == 0:
        folder.write_compute_type(str(base.dtype).removeprefix("torch."))
    tell(StageEnded("model"))
    with tempfile.TemporaryDirectory(prefix="ray_sql-") as temporary:
        scratch = Path(temporary)
        examples = agreed(lambda: rows.read(_fetch_rows(folder, scratch / "rows.parquet")))
        is_eval_step = partial(config.is_eval_step, examples=len(examples))
        resume_from, last = resume(folder, job.start_from, scratch, driver.emit)
        unvalidated = last is not None and needs_validation(last, folder, is_eval_step)
        step = last.step if last else 0
        steps = config.batching.steps(len(examples))
        watch = PreemptionWatch(driver.stopping, is_free=driver.in_process)
        # a run at its last step was cut off in what follows training
        if (step >= steps and not unvalidated) or watch.told_to_stop():
            return TrainOutcome(step, steps, None)
        batching = config.batching_of(example.db_id for example in examples)
        batching = replace(batching, microbatch_halvings=job.microbatch_halvings)
        held_out = agreed(lambda: read_held_out(folder, scratch))
        longest = max(len(example.input_ids) for example in (*examples, *held_out))
        row = rows.longest_row(examples, batching)
        reason = _why_not_share(base, longest, row, batching, config.cache)
        if reason is not None:
            if config.rows.examples_per_row != "auto":
                raise ModelError(
                    f"--rows.examples_per_row {batching.examples_per_row}: {config.model_name} "
                    f"cannot share rows: {reason}; set it to 1 or auto"
                )
            tell(Note(f"one question a row: {reason}"))
            batching = replace(batching, examples_per_row=1)
        tell(RowsChosen(batching.examples_per_row))
        validation = Validation(config, tokenizer, batching, held_out, scratch)
        tell(StageEnded("shared rows tried"))
        reporter = Reporter(
            folder,
            job.driver,
            driver.emit,
            validation,
            watch,
            NodeWatch(config.tracking.system_metrics),
            is_eval_step,
            batching,
            examples,
            run_name=folder.full_name,
        )
        hooks = trainer.TrainerHooks(
            on_log=reporter.on_log,
            on_save=reporter.on_save,
            on_step=reporter.on_step,
            on_begin=reporter.evaluate_checkpoint if unvalidated else None,
        )
        return trainer.train(
            base, tokenizer, examples, config, batching, hooks, scratch, resume_from
        )


def _fetch_rows(folder: RunFolder, target: Path) -> Path:
    """Fetch the rows that the driver has put into the run's folder."""
    try:
        return storage.fetch_file(folder.rows, target)
    except FileNotFoundError:
        raise ConfigError(
            f"{folder} is not on {platform.node()}, where a worker runs: give "
            "--scaling.storage_path a folder that all nodes share, or an s3:// or gs:// URI"
        ) from None


def _why_not_share(
    base: PreTrainedModel, longest: int, row: int, batching: Batching, cache: Path
) -> str | None:
    """Return a reason why this model's rows hold one question; None where they may hold more.

    All ranks return the same, for they must lay steps out alike. Examples have up to `longest`
    tokens, and rows up to `row`.
    """
    if batching.examples_per_row == 1:
        return None
    reasons = gather_all(why_not_share(base, longest, row, cache))
    return next((reason for reason in reasons if reason), None)
