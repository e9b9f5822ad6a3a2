"""Sweep learning rate and LoRA rank (or any other settings of training) by the SQL that trials write, and measure the best adapter.

    python -m jobs.tune --config jobs/configs/demo-sweep.yaml
    python -m jobs.tune --config jobs/configs/spider-sql.yaml --task_type sql,schema --output_name spider-sweep --tune.num_samples 24

Takes the settings of jobs.finetune and those of `tune` (docs/sweeps.md). A sweep that was cut off goes on with `--resume`.
"""

from ray_sql import cli
from ray_sql.config import SweepConfig


def tune(config: SweepConfig) -> None:
    """Run the sweep, or only show the plan."""
    from ray_sql import tune

    (tune.dry_run if config.dry_run else tune.run)(config)


if __name__ == "__main__":
    cli.main(tune, SweepConfig)
