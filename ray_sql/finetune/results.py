"""Write and record what came of a run: metrics, predictions, figures, report, MLflow."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ray_sql import tracking
from ray_sql.config import Config, mask_password
from ray_sql.evaluate.results import summarise, write
from ray_sql.evaluate.scoring import mlflow_metrics
from ray_sql.finetune.prepare import Prepared
from ray_sql.finetune.session import spool
from ray_sql.metrics.judged import Evaluation
from ray_sql.report import figures, html
from ray_sql.report.scores import markdown, notes, paired_lines
from ray_sql.store.run_folder import RunFolder
from ray_sql.tasks import TASKS

TABLE_COLUMNS = (
    *("verdict", "question", "gold", "predicted", "error", "db_id", "hardness", "split", "model"),
    *("chosen_by", "candidates"),
)
"""Columns of the table of questions in MLflow, whose UI shows the first ones without scrolling."""


def conclude(
    config: Config,
    prepared: Prepared,
    evaluation: Evaluation,
    record: tracking.Run,
    facts: Mapping[str, Any],
    artifact: str = "adapter",
) -> dict[str, Any]:
    """Write and record the scores of a run whose adapter lies in its folder.

    `facts` say how the adapter was made, `artifact` is its name in MLflow. Returns the content of
    `metrics.json`.
    """
    folder = RunFolder(config.run_dir)
    metrics = {
        "task_type": config.task_type,
        "model_name": config.model_name,
        "dataset_id": config.dataset_id,
        "links": config.prompt.links_kind,
        "data_fingerprint": prepared.corpus.fingerprint(),
        "identity": config.identity(),
        "weights_sha256": (folder.adapter.read_contract() or {}).get("weights_sha256"),
        "mlflow_run_id": record.run_id,
        "tracking_uri": mask_password(record.uri),
        **facts,
        **summarise(evaluation, TASKS[config.task_type], config.evaluate),
    }
    write(folder, evaluation, metrics)
    drawn = figures.figures(metrics, evaluation)
    html.write(folder, config.output_name, metrics, evaluation, drawn)
    _log_scores(record, evaluation, metrics)
    for file, figure in drawn.items():
        record.figure(figure, f"figures/{file}")
    _log_files(record, folder, spool(config), artifact)
    folder.mark_finished()
    return metrics


def _log_scores(record: tracking.Run, evaluation: Evaluation, metrics: Mapping[str, Any]) -> None:
    """Log scores and the table of questions, in place of those of an earlier time.

    A study may be given more trials, and then has another winner. MLflow shows the scores of the
    highest step.
    """
    step = metrics["sweep"]["trials"] if "sweep" in metrics else metrics.get("steps", 0)
    # the UI lists metrics and rows as they came: the tuned model is looked for first
    models = list(reversed(evaluation))
    for model in models:
        for split, summary in metrics[model].items():
            record.log(step, mlflow_metrics(summary, f"{model}/{split}"), replace=True)
    rows = [{"model": model, **row} for model in models for row in evaluation[model]]
    task, splits = TASKS[metrics["task_type"]], list(metrics[models[0]])
    scores = markdown({name: metrics[name] for name in evaluation}, task)
    text = "\n\n".join([scores, *notes(metrics, models[0]), *paired_lines(metrics)])
    record.describe(text, f"{models[0]}/{splits[0]}/{task.metric}" if splits else None)
    columns = [name for name in TABLE_COLUMNS if any(name in row for row in rows)]
    table = [{column: row.get(column) for column in columns} for row in rows]
    record.table(table, "predictions.json")


def _log_files(record: tracking.Run, folder: RunFolder, spool: Path, artifact: str) -> None:
    """Log the run's files; those in a remote store are copied here for it."""
    copies = spool.with_suffix("") / "run"
    for path in folder.artifacts(copies):
        record.artifact(path, artifact if path.is_dir() else "")
    if not folder.is_local and not spool.exists():  # else they are still to be sent
        shutil.rmtree(copies)
