"""Before a GPU is rented: resolve the settings, read the data, ask every node, estimate memory, reach every store, verify the tokens.

    python -m jobs.check --config jobs/configs/spider-sql.yaml

Takes the settings of jobs.finetune, jobs.tune and jobs.pipeline. One line per check: `ok`, or what to do; exit code 2 if any fails.
With `--replay` it checks nothing, and sends MLflow what a run that has ended kept while no server answered.
"""

from ray_sql import cli

if __name__ == "__main__":
    cli.main("check")
