"""Score predictions by executing them, or ask a model (and its adapter) and score the answers.

    python -m jobs.evaluate --predictions_file F --dataset_id path/to/spider --split dev --evaluate.semantics spider --output_name scores
    python -m jobs.evaluate --config out/demo/adapter/config.json --adapter out/demo/adapter --split unseen --output_name again

Writes `out/<output_name>/metrics.json` and `predictions.jsonl`.
"""

from ray_sql import cli
from ray_sql.config import EvaluateConfig


def evaluate(config: EvaluateConfig) -> None:
    """Score what the settings name."""
    from ray_sql import finetune

    finetune.evaluate(config)


if __name__ == "__main__":
    cli.main(evaluate, EvaluateConfig)
