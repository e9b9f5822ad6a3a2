"""The result of a run or an evaluation on the terminal: its scores, and where its files are."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby
from typing import Any

from rich.table import Table

from ray_sql.display import Display, cell
from ray_sql.report import commands
from ray_sql.report.scores import notes, paired_lines, score_lines
from ray_sql.store.run_folder import RunFolder
from ray_sql.tasks import TASKS

MODELS = ("base", "default", "tuned", "file")
"""Models of `metrics.json`, in the order of the table's columns."""


def show(folder: RunFolder, title: str, metrics: Mapping[str, Any], display: Display) -> None:
    """Print the scores of `metrics.json` and the places of the run's files."""
    display.settle()
    display.console.print(_table(title, metrics))
    if not any(metrics[name] for name in MODELS if name in metrics):
        display.line("nothing was scored: the splits to score have no questions (--split, --data)")
    model = [name for name in MODELS if name in metrics][-1]
    for line in [*notes(metrics, model), *paired_lines(metrics)]:
        display.line(line)
    if "training_seconds" in metrics:
        whole, part = "", "training"
        if "sweep" in metrics:
            whole, part = " for all trials, one by one", "the best one"
        display.line(
            f"time         {metrics['seconds']:.0f} s{whole}, of them {part} "
            f"{metrics['training_seconds']:.0f} s"
        )
        display.line(f"adapter      {folder.adapter.uri}")
    display.line(f"predictions  {folder.predictions()}")
    display.line(f"report       {folder.report}")
    if metrics.get("mlflow_run_id"):
        display.line(f"MLflow run   {metrics['mlflow_run_id']}")
    if "training_seconds" not in metrics:
        return
    display.line(f"look         {commands.look(metrics) or folder.report}")
    display.line(f"ask          {commands.ask(folder, metrics)}")
    display.line(f"publish      {commands.publish(folder)}")


def _table(title: str, metrics: Mapping[str, Any]) -> Table:
    task = TASKS[metrics["task_type"]]
    models = {name: metrics[name] for name in MODELS if name in metrics}
    last = list(models.values())[-1]
    scores: Mapping[str, Any] = next(iter(last.values()), {})  # none where nothing was asked
    semantics = scores.get("semantics")
    rule = f", {semantics} semantics" if semantics else ""
    heading = cell(f"{title}: {task.label}{rule} [95 % interval]")
    table = Table(title=heading, title_justify="left")
    for column in ("split", ""):
        table.add_column(column)
    for column in ("n", *models):
        table.add_column(column, justify="right")
    for split, lines in groupby(score_lines(models, task), lambda line: line.split):
        for line in lines:
            names = {
                "main": (split, line.label, line.count),
                "level": ("", f"  {line.label}", str(line.n)),
                "secondary": ("", line.label, str(line.n)),
            }
            table.add_row(*map(cell, (*names[line.kind], *line.cells)))
        table.add_section()
    return table
