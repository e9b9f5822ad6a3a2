"""The demo: a run, and the few numbers that matter in `summary.json`."""

from __future__ import annotations

import json
from typing import Any

from ray_sql.config import Config
from ray_sql.finetune.finetune import run as finetune
from ray_sql.store import storage

SHOWN = ("execution_accuracy", "interval", "n")


def run(config: Config) -> dict[str, Any]:
    """Train and measure as `config` says, and write `summary.json` into the run's folder."""
    metrics = finetune(config)
    summary: dict[str, Any] = {"seconds": metrics["seconds"]}
    for model in ("base", "tuned"):
        if model in metrics:
            splits = metrics[model].items()
            summary[model] = {split: {key: s[key] for key in SHOWN} for split, s in splits}
    storage.write_text(f"{config.run_dir}/summary.json", json.dumps(summary, indent=2) + "\n")
    return metrics
