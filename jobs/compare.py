"""Compare two files of judged predictions question by question.

    python -m jobs.compare --files out/demo/base_predictions.jsonl out/demo/predictions.jsonl
    ray-sql compare out/demo/base_predictions.jsonl out/demo/predictions.jsonl

Says whether one model is better. Writes `out/comparison/compare.json`, and `compare.txt` with the
questions on which they differ. `--output_name` names another folder. Nothing is asked or executed.
"""

from ray_sql.__main__ import main

if __name__ == "__main__":
    main("compare")
