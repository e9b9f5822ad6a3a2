"""The whole line for one task or both: sweep, measure the best adapter on questions no trial saw, register it, publish it.

    python -m jobs.pipeline --config jobs/configs/pipeline.yaml
    ray job submit --working-dir . -- python -m jobs.pipeline --config jobs/configs/pipeline.yaml

Takes the settings of jobs.tune. What an earlier attempt completed is passed over and what it began goes on, so that the same command
is given again after a crash, with more trials, or with a token that was missing (without `--overwrite`, which begins anew).
`--dry_run` shows the plan of every task.
"""

from ray_sql import cli

if __name__ == "__main__":
    cli.main("pipeline")
