r"""Fine-tune a small model for text-to-SQL or schema linking, and measure it by executing its SQL.

    python -m jobs.finetune --model_name Qwen/Qwen2.5-0.5B-Instruct --output_name qwen-sql \
        --task_type sql --dataset_id path/to/spider
    ray job submit --working-dir . -- python -m jobs.finetune --config jobs/configs/spider-sql.yaml

`--help` and docs/settings.md list every setting. `--dry_run` shows one example and the plan.
"""

from ray_sql.__main__ import main

if __name__ == "__main__":
    main("finetune")
