"""Gather the answers and scores of runs into one folder, and push it to the Hub as a dataset.

    python -m jobs.results out/spider-sql out/spider-oracle --output_name study
    python -m jobs.results out/spider-sql --output_name study --publish --hub.repo_id me/study

Each run or evaluation gets a folder with predictions.jsonl, metrics.json and config.json. The
README has their scores, and the commands that score the answers again.
"""

from ray_sql.__main__ import main

if __name__ == "__main__":
    main("results")
