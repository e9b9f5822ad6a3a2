"""Score predictions by executing them, ask a model (and its adapter) and score the answers, or compare two scored files.

    python -m jobs.evaluate --predictions_file F --dataset_id path/to/spider --split dev --evaluate.semantics spider --output_name scores
    python -m jobs.evaluate --config out/demo/adapter/config.json --adapter out/demo/adapter --split unseen --output_name again
    python -m jobs.evaluate --compare out/demo/base_predictions.jsonl out/demo/predictions.jsonl --output_name base-tuned

Writes `out/<output_name>/metrics.json`, `predictions.jsonl` and `report.html`; a comparison `compare.json` and `compare.txt`.
"""

from ray_sql import cli

if __name__ == "__main__":
    cli.main("evaluate")
