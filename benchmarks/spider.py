"""Fine-tune SmolLM2-135M on a part of real Spider, and measure it on dev's unseen databases.

    RAY_SQL_SHARED=… python -m benchmarks.spider --task_type sql
    RAY_SQL_SHARED=… python -m benchmarks.spider --task_type schema

A run takes 15 to 25 minutes on 2 cores; with --quick it has a few examples. RAY_SQL_SHARED names a
folder with Spider in data/spider. It runs `jobs/configs/spider-<task>.yaml` with the changes in
`CUT`, through the function that `jobs.finetune` calls. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from ray_sql import finetune
from ray_sql.config import Config, load
from ray_sql.tasks import TASKS

CONFIGS = Path(__file__).parent.parent / "jobs" / "configs"

CUT: dict[str, Any] = {
    "model_name": "demo",
    "prompt.serializer": "compact",
    "rows.max_length": 768,
    "rows.too_long": "drop",
    "rows.examples_per_row": 8,  # time is short here
    "lora.r": 16,
    "lora.lora_alpha": 32,
    "lora.lora_dropout": 0.0,  # on a CPU its random numbers cost time
    "learning_rate": 5e-4,
    "save_steps": 1000,  # once, at the end
    "train.logging_steps": 10,
    "evaluate.select_examples": 0,
    "evaluate.max_new_tokens": 96,
    "overwrite": True,
}
FULL = {"data.limit": 2000, "evaluate.limit": 240}
QUICK = {"data.limit": 24, "evaluate.limit": 16}


def main(argv: list[str] | None = None) -> None:
    """Train, measure, and print what RESULTS.md quotes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task_type", choices=["sql", "schema"], default="sql")
    parser.add_argument(
        "--quick", action="store_true", help="a few examples only, to see that it works"
    )
    parser.add_argument("--output_dir", default="out")
    arguments = parser.parse_args(argv)
    shared = os.environ.get("RAY_SQL_SHARED")
    if not shared:
        parser.error("RAY_SQL_SHARED is not set: it names a folder with Spider in data/spider")
    changes = CUT | (QUICK if arguments.quick else FULL)
    name = f"spider-{arguments.task_type}-{'quick' if arguments.quick else 'cut'}"
    config = load(
        Config,
        ["--config", str(CONFIGS / f"spider-{arguments.task_type}.yaml")],
        **changes,
        dataset_id=f"{shared}/data/spider",
        output_name=name,
        output_dir=arguments.output_dir,
    )
    metrics = finetune.run(config)
    key = TASKS[arguments.task_type].metric
    keep = (
        key,
        "interval",
        "n",
        "valid_sql",
        "exact_match",
        "table_f1",
        "column_f1",
        "unparsable",
        "gold_errors",
    )
    result: dict[str, dict[str, Any]] = {"base": {}, "tuned": {}}
    for model, splits in result.items():
        for split, scores in metrics[model].items():
            splits[split] = {name: scores[name] for name in keep if name in scores}
    print(
        json.dumps(
            {
                **result,
                "compared": metrics["compared"],
                "steps": metrics["steps"],
                "seconds": metrics["seconds"],
            }
        )
    )


if __name__ == "__main__":
    main()
