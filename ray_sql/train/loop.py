"""A worker's training run."""

from __future__ import annotations

import platform
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray_sql import cluster, generate, models, rows
from ray_sql.config import Config
from ray_sql.errors import ConfigError, ModelError
from ray_sql.store import storage
from ray_sql.train.callbacks import Reporter
from ray_sql.train.preemption import Notice
from ray_sql.train.resume import owed, resume
from ray_sql.train.validation import Validation

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def train_loop_per_worker(plan: dict[str, Any]) -> dict[str, Any]:
    """One worker's training run; returns its `trainer.Outcome` as a dict."""
    import ray.train

    entered = time.time()
    from ray_sql.train import (
        trainer,  # here: it loads the whole training stack, which the driver can do without
    )

    config = Config(**plan["config"])
    context = ray.train.get_context()

    def mark(stage: str, at: float | None = None) -> None:
        if context.get_world_rank() == 0:
            plan["emit"](cluster.mark(stage, at))

    mark("workers", entered)
    if config.elastic and context.get_world_rank() == 0:
        bounds = f"{config.fewest_workers} to {config.workers}"
        plan["emit"](cluster.note(f"training with {context.get_world_size()} of {bounds} workers"))
    mark("imports of the training stack")
    device = cluster.claim_device(config)
    base, tokenizer = generate.agreed(
        lambda: models.load_here(plan["model_folder"], config, device)
    )
    mark("model")
    with tempfile.TemporaryDirectory(prefix="ray_sql-") as scratch:
        local = Path(scratch)
        data = generate.agreed(lambda: rows.read(_inputs(config, local / "rows.parquet")))
        resume_from, done = resume(config, plan["start_from"], local, plan["emit"])
        unmeasured = done is not None and owed(done, config, len(data))
        step, steps = done.step if done else 0, config.steps(len(data))
        notice = Notice(plan["stopping"])
        if (
            step >= steps and not unmeasured
        ) or notice.told_to_stop():  # else only what follows training was cut off
            return asdict(trainer.Outcome(step, steps, None))
        together = _together(base, data, config, plan["halvings"], plan["emit"])
        if context.get_world_rank() == 0:
            plan["emit"]({"kind": "rows", "together": together})
        judge = Validation(config, tokenizer, together, plan["halvings"], local)
        mark("shared rows tried")
        reporter = Reporter(
            config, judge, notice, plan["emit"], data, context.get_world_rank(), plan["driver"]
        )
        outcome = trainer.train(
            base,
            tokenizer,
            data,
            config,
            together=together,
            scratch=local,
            resume_from=resume_from,
            on_log=reporter.on_log,
            on_save=reporter.on_save,
            halvings=plan["halvings"],
            on_step=notice,
            on_begin=reporter.measure if unmeasured else None,
            on_note=reporter.on_note,
        )
    return asdict(outcome)


def _inputs(config: Config, target: Path) -> Path:
    """The rows that the driver has put into the run's folder."""
    try:
        return storage.fetch_file(f"{config.run_dir}/{rows.FILE}", target)
    except FileNotFoundError:
        raise ConfigError(
            f"{config.run_dir} is not on {platform.node()}, where a worker runs: give --scaling.storage_path a folder that all nodes "
            "share, or an s3:// or gs:// URI"
        ) from None


def _together(
    base: PreTrainedModel,
    data: Sequence[rows.Row],
    config: Config,
    halvings: int,
    emit: cluster.OnPoint,
) -> int:
    """How many questions share a row: as the settings say, where this model allows it."""
    import ray.train

    from ray_sql.rows.probe import why_not_share

    wanted = rows.together(config)
    if wanted == 1:
        return 1
    reason = why_not_share(
        base, max(len(row.input_ids) for row in data), rows.longest_row(data, config, halvings)
    )
    reason = next(
        (each for each in generate.gather_all(reason) if each), None
    )  # all ranks must lay steps out alike
    if reason is None:
        return wanted
    if config.rows.examples_per_row != "auto":
        raise ModelError(
            f"--rows.examples_per_row {wanted}: {config.model_name} cannot share rows: {reason}; set it to 1 or auto"
        )
    if ray.train.get_context().get_world_rank() == 0:
        emit(cluster.note(f"one question a row: {reason}"))
    return 1
