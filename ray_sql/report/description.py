"""The description of a run in MLflow: a short page in Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ray_sql.display import percent
from ray_sql.report import commands
from ray_sql.report.scores import markdown, notes, paired_lines, prose, verdict
from ray_sql.store.run_folder import REPORT, SWEEP_REPORT, RunFolder
from ray_sql.tasks import TASKS, Task

EXTREMES = 3
"""Databases named as the best, and as the worst."""


def page(
    folder: RunFolder,
    metrics: Mapping[str, Any],
    models: Sequence[str],
    trained: Sequence[str],
    run_page: str,
) -> str:
    """Return the page of a run: its score, what was trained on what, commands, and the tables.

    MLflow shows some four lines of it unless one asks for more. `models` are in the order of the
    table's columns, the tuned one last. `trained` are sentences. `run_page` is the address of the
    run in MLflow.
    """
    task, last = TASKS[metrics["task_type"]], models[-1]
    parts = [
        *_headline(metrics, last, task),
        *_winner(metrics, run_page),
        " ".join(trained),
        f"[Report: each question with its answers]({run_page}/artifacts/{REPORT}) · [Table of "
        f"questions]({run_page}/artifacts/predictions.json) · [Charts]({run_page}/model-metrics)",
        "```\n"
        + "\n".join([commands.ask(folder, metrics), commands.serve(folder)])
        + f"\n{commands.publish(folder)}\n```",
        markdown({name: metrics[name] for name in models}, task),
        *map(prose, [*notes(metrics, last), *paired_lines(metrics)]),
        *_databases(metrics[last], task),
    ]
    return "\n\n".join(parts)


def _headline(metrics: Mapping[str, Any], model: str, task: Task) -> Iterator[str]:
    """Yield the sentence that is read where a page shows nothing else."""
    for split, scores in list(metrics[model].items())[:1]:
        share = percent(scores[task.metric], scores["interval"], scores["n"])
        told = [f"**{task.label} {share}** on {scores['n']:,} questions of {code(split)}"]
        base = metrics.get("base", {}).get(split)
        if base:
            told.append(f"base model {percent(base[task.metric], n=base['n'])}")
        told += [words for words in [verdict(metrics, split)] if words]
        yield f"{', '.join(told)}."


def _winner(metrics: Mapping[str, Any], run_page: str) -> Iterator[str]:
    """Yield which trial of a sweep won, and by what."""
    if sweep := metrics.get("sweep"):
        yield f"{sweep['chosen']}. [Trials]({run_page}/artifacts/{SWEEP_REPORT})"


def _databases(splits: Mapping[str, Any], task: Task) -> Iterator[str]:
    """Yield the best and the worst databases of the first split, where there are several."""
    for split, scores in list(splits.items())[:1]:
        known = sorted(
            scores.get("by_database", {}).items(), key=lambda item: (-item[1][task.metric], item[0])
        )
        if len(known) < 2:
            return
        named = [
            f"{code(name)} {percent(each[task.metric])} of {each['n']}" for name, each in known
        ]
        if len(named) <= 2 * EXTREMES:
            yield f"By database of {code(split)}: {', '.join(named)}"
            return
        yield f"Best databases of {code(split)}: {', '.join(named[:EXTREMES])}"
        yield f"Worst: {', '.join(reversed(named[-EXTREMES:]))}"


def code(text: str) -> str:
    """Return a dataset's own word as Markdown shows it, whatever is in it."""
    return "`" + text.replace("`", "'").replace("\n", " ") + "`"
