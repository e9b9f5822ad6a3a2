"""Train a real 135M-parameter model on two CPU cores, and measure it before and after.

    make demo          (or: python -m jobs.demo)

Every setting can be changed: `python -m jobs.demo --num_epochs 2 --lora.r 32`.
"""

from ray_sql.__main__ import main

if __name__ == "__main__":
    main("demo")
