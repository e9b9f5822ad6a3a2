"""The whole path in one command: a real 135M-parameter model learns SQL on two CPU cores and is measured before and after.

    make demo          (or: python -m jobs.demo)

Everything can be changed: `python -m jobs.demo --num_epochs 2 --lora.r 32`.
"""

from ray_sql import cli

if __name__ == "__main__":
    cli.main("demo")
