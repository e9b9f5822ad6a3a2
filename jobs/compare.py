"""Compare two files of judged predictions question by question: which model is better, and where they differ.

    python -m jobs.compare --files out/demo/base_predictions.jsonl out/demo/predictions.jsonl --output_name base-tuned
    ray-sql compare out/demo/base_predictions.jsonl out/demo/predictions.jsonl

Writes `out/<output_name>/compare.json` and `compare.txt`. Nothing is asked or executed.
"""

from ray_sql import cli

if __name__ == "__main__":
    cli.main("compare")
