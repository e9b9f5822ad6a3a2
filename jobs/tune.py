"""Sweep learning rate and LoRA rank (or any other settings of training) by the SQL that trials write, and measure the best adapter.

    python -m jobs.tune --config jobs/configs/demo-sweep.yaml
    python -m jobs.tune --config jobs/configs/spider-sql.yaml --task_type sql,schema --output_name spider-sweep --tune.num_samples 24

Takes the settings of jobs.finetune and those of `tune` (docs/sweeps.md). A sweep that was cut off goes on with `--resume`.
"""

from ray_sql import cli

if __name__ == "__main__":
    cli.main("tune")
