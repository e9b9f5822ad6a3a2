"""Sweep, measure the best adapter on questions no trial saw, register it and publish it.

    python -m jobs.pipeline --config jobs/configs/pipeline.yaml
    ray job submit --working-dir . -- python -m jobs.pipeline --config jobs/configs/pipeline.yaml

Takes the settings of jobs.tune, for one task or both; `--no-sweep` trains each once. For both, the
SQL of the generator is measured over full schemas, the linker's links and gold ones.

Give the same command again after a crash, with more trials, or with a token that was missing: it
passes over what is complete and goes on with the rest. `--overwrite` begins anew. `--dry_run` shows
the plan of every task.
"""

from ray_sql.__main__ import main

if __name__ == "__main__":
    main("pipeline")
