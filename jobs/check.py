"""Check settings, data, machines, stores and tokens before a GPU is rented.

    python -m jobs.check --config jobs/configs/spider-sql.yaml

Takes the settings of jobs.finetune, jobs.tune and jobs.pipeline. Prints one line per check: `ok`,
or what to do. Ends with exit code 2 if any check fails. With `--replay` it checks nothing, and
sends MLflow the records that an ended run kept while no server answered.
"""

from ray_sql.__main__ import main

if __name__ == "__main__":
    main("check")
