"""Write and record what came of a run: metrics, predictions, figures, report, MLflow."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ray_sql import data, tracking
from ray_sql.config import Config, mask_password
from ray_sql.config.sections import LoraSection
from ray_sql.evaluate.results import summarise, write
from ray_sql.evaluate.scoring import headline, legal
from ray_sql.finetune.prepare import Prepared
from ray_sql.finetune.session import spool
from ray_sql.metrics.judged import Evaluation, JudgedRow, is_right
from ray_sql.report import description, figures, html
from ray_sql.report.description import code
from ray_sql.report.scores import verdict
from ray_sql.store.run_folder import RunFolder
from ray_sql.tasks import TASKS, Task

TABLE_COLUMNS = (
    *("verdict", "question", "gold", "predicted", "error"),
    *("db_id", "hardness", "split", "chosen_by"),
)
"""Columns of the tables of questions in MLflow, whose UI shows the first ones without scrolling.

Candidates and the rest are in `predictions.jsonl`, which lies beside them.
"""


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
        "longest_trained": min(prepared.audit.longest, prepared.audit.max_length),
        "also_trained": data.repeated(prepared.corpus),
        "weights_sha256": (folder.adapter.read_contract() or {}).get("weights_sha256"),
        "mlflow_run_id": record.run_id,
        "tracking_uri": mask_password(record.uri),
        **facts,
        **summarise(evaluation, TASKS[config.task_type], config.evaluate),
    }
    write(folder, evaluation, metrics)
    drawn = figures.figures(metrics, evaluation)
    html.write(folder, config.output_name, metrics, evaluation, drawn)
    trained = training_sentences(prepared, config.lora, config.learning_rate, metrics)
    _log_scores(record, folder, evaluation, metrics, trained)
    for file, figure in drawn.items():
        record.figure(figure, f"figures/{file}")
    made_with = {
        "model_name": config.model_name,
        "lora.r": str(config.lora.r),
        "learning_rate": str(config.learning_rate),
        "steps": str(metrics["best_step"]),
    }
    tags = {
        "task_type": config.task_type,
        "weights_sha256": metrics["weights_sha256"] or "",
        **_score_tags(metrics, "tuned", TASKS[config.task_type]),
    }
    model = tracking.LoggedModel(artifact, made_with, tags, next(iter(config.split), ""))
    _log_files(record, folder, spool(config), model)
    folder.mark_finished()
    return metrics


def _log_scores(
    record: tracking.Run,
    folder: RunFolder,
    evaluation: Evaluation,
    metrics: Mapping[str, Any],
    trained: Sequence[str],
) -> None:
    """Log scores, description and the tables of questions, in place of those of an earlier time.

    A study may be given more trials, and then has another winner. MLflow shows the scores of the
    highest step.
    """
    step = metrics["sweep"]["trials"] if "sweep" in metrics else metrics.get("steps", 0)
    task, models = TASKS[metrics["task_type"]], list(evaluation)
    record.log(step, final_scores(metrics, models, task), replace=True)
    record.tag(_score_tags(metrics, models[-1], task))
    text = description.page(folder, metrics, models, trained, tracking.THIS_RUN)
    record.describe(text, task.metric if metrics[models[-1]] else None)
    for model in models:  # one each: the UI reads a whole table, and compares those of one name
        file = "predictions.json" if model == models[-1] else f"{model}_predictions.json"
        record.table(_table(evaluation[model]), file)
    record.questions(task.metric, map(_scored, evaluation[models[-1]]))


def _table(judged: Sequence[JudgedRow]) -> list[dict[str, Any]]:
    """Return judged rows as a table of those columns that any of them has."""
    columns = [name for name in TABLE_COLUMNS if any(name in row for row in judged)]
    return [{column: row.get(column) for column in columns} for row in judged]


def _scored(row: JudgedRow) -> tracking.ScoredQuestion:
    """Return a judged row as MLflow's page of questions shows it."""
    return tracking.ScoredQuestion(
        {"question": row["question"], "database": row["db_id"]},
        row["predicted"],
        row["gold"],
        None if row["verdict"] == "gold_error" else is_right(row),
        row["error"] or "",
        {"split": row["split"], "hardness": row["hardness"]},
    )


def final_scores(metrics: Mapping[str, Any], models: Sequence[str], task: Task) -> dict[str, float]:
    """Return the scores of `metrics.json` that MLflow keeps, the main one first.

    The last of the models is the tuned one. Of the others, and of splits after the first, only the
    main score is kept.
    """
    scores: dict[str, float] = {}
    *others, tuned = models
    for place, (split, summary) in enumerate(metrics[tuned].items()):
        group = legal(split) if place else ""
        followed = headline(summary, task)
        kept = followed if not place else {task.metric: followed[task.metric]}
        scores |= {tracking.final(name, group): value for name, value in kept.items()}
        scores |= {
            tracking.final(task.metric, group, model): metrics[model][split][task.metric]
            for model in others
        }
    if metrics.get("objective") is not None:
        scores[tracking.VALIDATED] = metrics["objective"]
    return scores


def _score_tags(metrics: Mapping[str, Any], model: str, task: Task) -> dict[str, str]:
    """Return how many questions were answered rightly, and how that compares with the base."""
    counts = [
        f"{round(scores[task.metric] * scores['n'])}/{scores['n']} {split}"
        + (f", {scores['gold_errors']} not counted" if scores["gold_errors"] else "")
        for split, scores in metrics[model].items()
    ]
    told = {tracking.SCORED: "; ".join(counts)}
    for split in list(metrics[model])[:1]:
        if words := verdict(metrics, split):
            tuned, base = (metrics[one][split][task.metric] for one in (model, "base"))
            told[tracking.GAIN] = f"{100 * (tuned - base):+.1f} points: {words}"
    return {name: text for name, text in told.items() if text}


def training_sentences(
    prepared: Prepared, lora: LoraSection, learning_rate: float, metrics: Mapping[str, Any]
) -> list[str]:
    """Return sentences on what was trained on what; a sweep's winner has its own values."""
    config, audit = prepared.config, prepared.audit
    batch = config.batching.global_batch_size
    bits = "4-bit " if config.quantization.load_in_4bit else ""
    validated = metrics.get("objective") is not None
    chosen = f", the best of {metrics['steps']:,} on validation" * validated
    return [
        f"LoRA of rank {lora.r} on the {bits}base {code(config.model_name)},",
        f"learning rate {learning_rate:g}, {metrics['best_step']:,} steps of {batch} examples",
        f"each{chosen}. Trained on {audit.rows:,} questions on {_databases(prepared)} of",
        f"{code(config.dataset_id)} (fingerprint {prepared.corpus.fingerprint()}).",
    ]


def _databases(prepared: Prepared) -> str:
    """Count the databases that were trained on; nobody knows those of examples too long."""
    left_out = {row.id for row in prepared.left_out if row.split == "train"}
    train = prepared.corpus.splits["train"]
    known = {example.db_id for example in train if example.id not in left_out}
    return "at most " * bool(prepared.audit.dropped) + data.counted(len(known), "database")


def _log_files(
    record: tracking.Run, folder: RunFolder, spool: Path, model: tracking.LoggedModel
) -> None:
    """Log the run's files, its adapter as a model; those in a remote store are copied for it."""
    copies = spool.with_suffix("") / "run"
    for path in folder.artifacts(copies):
        if path.is_dir():
            record.model(path, model)
        else:
            record.artifact(path)
    if not folder.is_local and not spool.exists():  # else they are still to be sent
        shutil.rmtree(copies)
