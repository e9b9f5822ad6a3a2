"""A worker's training run."""

from __future__ import annotations

import platform
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ray_sql import cluster, models, rows
from ray_sql.cluster.events import (
    DriverLink,
    Event,
    Note,
    OnEvent,
    RowsChosen,
    StageEnded,
    TrainJob,
    TrainOutcome,
)
from ray_sql.cluster.ranks import agreed, gather_all
from ray_sql.config import Batching, Config
from ray_sql.errors import ConfigError, ModelError
from ray_sql.store import storage
from ray_sql.store.run_folder import RunFolder
from ray_sql.train.callbacks import Reporter
from ray_sql.train.preemption import PreemptionWatch
from ray_sql.train.resume import needs_validation, resume
from ray_sql.train.validation import Validation

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def train_loop_per_worker(job: TrainJob, driver: DriverLink) -> TrainOutcome:
    """Train on this worker; all ranks return the same outcome."""
    import ray.train

    entered = time.time()
    models.quiet()  # before the training stack imports bitsandbytes, which writes a note
    from ray_sql.train import (
        trainer,  # here: it loads the whole training stack, which the driver can do without
    )

    config = Config(**job.settings)
    context = ray.train.get_context()

    def tell(event: Event) -> None:
        if context.get_world_rank() == 0:
            driver.emit(event)

    tell(StageEnded("workers", entered))
    if config.scaling.elastic:
        bounds = f"{config.scaling.min_workers} to {config.scaling.max_workers}"
        tell(Note(f"training with {context.get_world_size()} of {bounds} workers"))
    tell(StageEnded("imports of the training stack"))
    device = cluster.claim_device(config.scaling)
    base, tokenizer = agreed(lambda: models.load_on_node(job.model_folder, config, device))
    tell(StageEnded("model"))
    with tempfile.TemporaryDirectory(prefix="ray_sql-") as scratch:
        local = Path(scratch)
        data = agreed(lambda: rows.read(_inputs(config, local / "rows.parquet")))
        resume_from, done = resume(config, job.start_from, local, driver.emit)
        unmeasured = done is not None and needs_validation(done, config, len(data))
        step, steps = done.step if done else 0, config.batching.steps(len(data))
        notice = PreemptionWatch(driver.stopping)
        if (
            step >= steps and not unmeasured
        ) or notice.told_to_stop():  # else only what follows training was cut off
            return TrainOutcome(step, steps, None)
        batching = _batching(base, data, config, job.microbatch_halvings, driver.emit)
        tell(RowsChosen(batching.examples_per_row))
        judge = Validation(config, tokenizer, batching, local)
        tell(StageEnded("shared rows tried"))
        reporter = Reporter(
            config, judge, notice, driver.emit, data, context.get_world_rank(), job.driver
        )
        hooks = trainer.TrainerHooks(
            on_log=reporter.on_log,
            on_save=reporter.on_save,
            on_step=notice,
            on_begin=reporter.measure if unmeasured else None,
        )
        return trainer.train(base, tokenizer, data, config, batching, hooks, local, resume_from)


def _inputs(config: Config, target: Path) -> Path:
    """The rows that the driver has put into the run's folder."""
    try:
        return storage.fetch_file(RunFolder(config.run_dir).rows, target)
    except FileNotFoundError:
        raise ConfigError(
            f"{config.run_dir} is not on {platform.node()}, where a worker runs: give --scaling.storage_path a folder that all nodes "
            "share, or an s3:// or gs:// URI"
        ) from None


def _batching(
    base: PreTrainedModel,
    data: Sequence[rows.TokenizedExample],
    config: Config,
    halvings: int,
    emit: OnEvent,
) -> Batching:
    """Return how examples become steps, with one question a row where the model allows no more."""
    import ray.train

    from ray_sql.rows.probe import why_not_share

    batching = replace(config.batching, microbatch_halvings=halvings)
    wanted = batching.examples_per_row
    if wanted == 1:
        return batching
    reason = why_not_share(
        base, max(len(row.input_ids) for row in data), rows.longest_row(data, batching)
    )
    reason = next(
        (each for each in gather_all(reason) if each), None
    )  # all ranks must lay steps out alike
    if reason is None:
        return batching
    if config.rows.examples_per_row != "auto":
        raise ModelError(
            f"--rows.examples_per_row {wanted}: {config.model_name} cannot share rows: {reason}; set it to 1 or auto"
        )
    if ray.train.get_context().get_world_rank() == 0:
        emit(Note(f"one question a row: {reason}"))
    return replace(batching, examples_per_row=1)
