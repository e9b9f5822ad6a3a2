r"""Sweep learning rate and LoRA rank, or other settings, by the SQL that trials write.

    python -m jobs.tune --config jobs/configs/demo-sweep.yaml
    python -m jobs.tune --config jobs/configs/spider-sql.yaml --task_type sql,schema \
        --output_name spider-sweep --tune.num_samples 24

Measures the best adapter. Takes the settings of jobs.finetune and those of `tune` (docs/sweeps.md).
`--resume` goes on with a sweep that was cut off.
"""

from ray_sql.__main__ import main

if __name__ == "__main__":
    main("tune")
