"""Before a GPU is rented: resolve the settings, read the data, estimate memory, reach every store, verify the tokens.

    python -m jobs.check --config jobs/configs/spider-sql.yaml

Takes the settings of jobs.finetune, jobs.tune and jobs.pipeline. One line per check: `ok`, or what to do; exit code 2 if any fails.
"""

from ray_sql import cli
from ray_sql.config import CheckConfig


def check(config: CheckConfig) -> None:
    """Run every check, the cheap ones first, for every task."""
    from ray_sql import check

    check.run(config)


if __name__ == "__main__":
    cli.main(check, CheckConfig)
