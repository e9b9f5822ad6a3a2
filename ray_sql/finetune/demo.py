"""The demo: a run, and the few numbers that matter in `summary.json`."""

from __future__ import annotations

from typing import Any

from ray_sql.config import Config
from ray_sql.finetune.finetune import run as finetune
from ray_sql.store.run_folder import RunFolder

SHOWN = ("execution_accuracy", "interval", "n")


def run(config: Config) -> dict[str, Any]:
    """Train and measure as `config` says, and write `summary.json` into the run's folder."""
    metrics = finetune(config)
    summary: dict[str, Any] = {}
    for model in ("base", "tuned"):
        if model in metrics:
            splits = metrics[model].items()
            summary[model] = {split: {key: s[key] for key in SHOWN} for split, s in splits}
    summary["seconds"] = metrics["seconds"]
    RunFolder(config.run_dir).write_summary(summary)
    return metrics
