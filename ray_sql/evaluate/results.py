"""Summarise an evaluation by model and split, compare its models, and write its files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ray_sql.config.sections import AnswersSection
from ray_sql.evaluate import scoring
from ray_sql.metrics.judged import Evaluation, grouped, is_right
from ray_sql.metrics.paired import PairedTest, paired_test
from ray_sql.store.run_folder import RunFolder
from ray_sql.tasks import Task


def summarise(
    evaluation: Evaluation, task: Task, settings: AnswersSection
) -> dict[str, dict[str, Any]]:
    """Return scores by model and split, and the paired tests of the tuned model by split.

    `compared` is its test against the base model, `compared_default` of a sweep's champion against
    the default settings.
    """
    summary: dict[str, dict[str, Any]] = {}
    for model, rows in evaluation.items():
        by_split = grouped(rows, "split", [row["split"] for row in rows])
        summary[model] = {
            split: scoring.summarise(part, task, settings) for split, part in by_split.items()
        }
    for key, other in (("compared", "base"), ("compared_default", "default")):
        if other in evaluation and "tuned" in evaluation:
            summary[key] = {
                split: paired(evaluation, other, split).named(other, "tuned")
                for split in summary["tuned"]
            }
    return summary


def paired(evaluation: Evaluation, other: str, split: str | None = None) -> PairedTest:
    """Compare the model `other` (a) with the tuned one (b), on a split or on all questions.

    The rows of all models are in the same order.
    """
    return paired_test(
        (is_right(row), is_right(tuned))
        for row, tuned in zip(evaluation[other], evaluation["tuned"], strict=True)
        if split in (None, tuned["split"])
        and "gold_error" not in (row["verdict"], tuned["verdict"])
    )


def write(folder: RunFolder, evaluation: Evaluation, metrics: Mapping[str, Any]) -> None:
    """Write the predictions of each model, then `metrics.json`."""
    for model, rows in evaluation.items():
        folder.write_predictions(model, rows, alone=len(evaluation) == 1)
    folder.write_metrics(metrics)
