r"""Score a file of predictions by executing them, or ask a model and score its answers.

    python -m jobs.evaluate --predictions_file F --dataset_id path/to/spider --split dev \
        --evaluate.semantics spider --output_name scores
    python -m jobs.evaluate --config out/demo/adapter/ray_sql_config.json \
        --adapter out/demo/adapter --split unseen --output_name again

Writes `out/<output_name>/metrics.json`, `predictions.jsonl` and `report.html`. jobs.compare
compares two such files.
"""

from ray_sql.__main__ import main

if __name__ == "__main__":
    main("evaluate")
