"""The whole path in one command: a real 135M-parameter model learns SQL on two CPU cores and is measured before and after.

    make demo          (or: python -m jobs.demo)

Everything can be changed: `python -m jobs.demo --num_epochs 2 --lora.r 32`.
"""

import json
import sys
from importlib import resources
from pathlib import Path

from ray_sql import cli
from ray_sql.config import Config


def demo(config: Config) -> None:
    """Train, measure, and leave the few numbers that matter in `summary.json`."""
    from ray_sql import finetune

    if config.dry_run:
        return finetune.dry_run(config)
    metrics = finetune.run(config)
    models = [name for name in ("base", "tuned") if name in metrics]
    brief = {
        model: {
            s: {k: v[k] for k in ("execution_accuracy", "interval", "n")}
            for s, v in metrics[model].items()
        }
        for model in models
    }
    Path(config.run_dir, "summary.json").write_text(
        json.dumps({**brief, "seconds": metrics["seconds"]}, indent=2) + "\n"
    )
    return None


if __name__ == "__main__":
    cli.main(
        demo,
        Config,
        ["--config", str(resources.files("jobs") / "configs" / "demo.yaml"), *sys.argv[1:]],
    )
