"""Take one task or both from questions to a report: the door of `ray-sql pipeline`.

Each task is swept, or trained once. Complete parts are passed over, and what began goes on. Where
both tasks are given, the linker comes first, and the generator is asked with its links.
"""

from __future__ import annotations

from typing import Any

from ray_sql import cluster, finetune
from ray_sql.config import Config, PipelineConfig
from ray_sql.store.run_folder import STAGES, RunFolder
from ray_sql.tune import sweep, two_stages


def run(config: PipelineConfig) -> dict[str, dict[str, Any]]:
    """Train, measure and publish; returns the metrics by task, and of `two_stages`."""
    studies = config.studies()
    if config.sweep:
        sweep.check(studies)
    if len(studies) == 2:  # where the report will be
        RunFolder(config.run_dir).require_ours(STAGES)
    metrics: dict[str, dict[str, Any]] = {}
    done: list[Config] = []
    try:
        for study in studies:
            if done and config.measures_noise:
                study = two_stages.with_measured_noise(study, done[0])
            metrics[study.task_type] = _train(study, config)
            done.append(study)
        if len(done) == 2:
            metrics["two_stages"] = two_stages.report(config, *done)
    finally:
        cluster.leave_ray()
    if config.publish and config.sweep:  # a run publishes itself
        sweep.publish_all(done, metrics)
    return metrics


def dry_run(config: PipelineConfig) -> None:
    """Show an example and the plan of every task."""
    if config.sweep:
        sweep.dry_run(config)
        return
    for study in config.studies():
        finetune.dry_run(study)


def _train(study: Config, config: PipelineConfig) -> dict[str, Any]:
    if config.sweep:
        return sweep.run_study(study, resume=not config.overwrite)
    return finetune.run(study)
