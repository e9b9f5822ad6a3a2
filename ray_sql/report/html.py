"""Write `report.html`: scores, figures and every question in one file that needs nothing else.

The template is `report.jinja`. Every text from a dataset or a model is escaped. Filters stand in
the page's address after `#`, so that a view can be bookmarked.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import TYPE_CHECKING, Any

from ray_sql.display import percent
from ray_sql.report.scores import counted, notes, paired_lines, secondary_scores, share_text
from ray_sql.store import storage
from ray_sql.store.run_folder import RunFolder
from ray_sql.tasks import TASKS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Rows = Sequence[Mapping[str, Any]]

LINKS = {"gold": "the gold SQL's: an oracle", "predicted": "a linker's"}
"""Whose links made schemas smaller, by their kind in `metrics.json`."""


def write(
    folder: RunFolder,
    title: str,
    metrics: Mapping[str, Any],
    evaluation: Mapping[str, Rows],
    figures: Mapping[str, Figure],
) -> None:
    """Write `report.html` into the run's folder."""
    storage.write_text(folder.report, page(title, metrics, evaluation, figures))


def page(
    title: str,
    metrics: Mapping[str, Any],
    evaluation: Mapping[str, Rows],
    figures: Mapping[str, Figure],
) -> str:
    """Return the report as HTML.

    `metrics` is the content of `metrics.json`. The rows of all models are in the same order.
    """
    header, cells = summary(metrics, evaluation)
    return render(
        "report.jinja",
        title,
        facts(metrics, list(evaluation)),
        figures,
        header=header,
        cells=cells,
        comparisons=[*notes(metrics, list(evaluation)[-1]), *paired_lines(metrics)],
        models=list(evaluation),
        questions=list(zip(*evaluation.values(), strict=True)),
        choices=_filters(evaluation),
    )


def render(
    template: str,
    title: str,
    facts: Mapping[str, str],
    figures: Mapping[str, Figure],
    **values: Any,
) -> str:
    """Return a page from one of the package's templates; every value is escaped."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    loader = PackageLoader("ray_sql", "report/templates")
    environment = Environment(
        loader=loader,
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    images = {
        name.removesuffix(".png").replace("_", " "): _image(figure)
        for name, figure in figures.items()
    }
    return environment.get_template(template).render(
        title=title, facts=facts, figures=images, **values
    )


def facts(metrics: Mapping[str, Any], models: Sequence[str]) -> dict[str, str]:
    """Return task, data, model, rule and MLflow run, as far as they are known."""
    scores: Mapping[str, Any] = next(iter(metrics[models[-1]].values()), {})
    steps = f"{metrics['best_step']} of {metrics['steps']}" if "best_step" in metrics else None
    known = {
        "task": metrics["task_type"],
        "data": metrics["dataset_id"],
        "base model": metrics.get("model_name"),
        "semantics": scores.get("semantics"),
        "links": LINKS.get(metrics.get("links", "none")),
        "best step": steps,
        "MLflow run": metrics.get("mlflow_run_id"),
    }
    return {name: str(value) for name, value in known.items() if value}


def summary(
    metrics: Mapping[str, Any], evaluation: Mapping[str, Rows]
) -> tuple[list[str], list[list[str]]]:
    """Return the head and the rows of the table of scores: one row per split and model."""
    task, models = TASKS[metrics["task_type"]], list(evaluation)
    summaries = [scores for name in models for scores in metrics[name].values()]
    keys = secondary_scores(summaries, task)
    labels = dict(task.secondary)
    for key in keys:
        if any(f"{key}_macro" in scores for scores in summaries):
            labels[key] += " (micro / macro)"
    head = [
        *("split", "model", "n", task.label, "95 % interval", "clustered (databases)"),
        *(labels[key] for key in keys),
        "gold fails",
    ]
    rows = []
    for split in metrics[models[-1]]:
        for name in models:
            scores = metrics[name][split]
            databases = _databases(evaluation[name], split)
            rows.append(
                [
                    *(split, name, counted(scores["n"], scores["gold_errors"])),
                    percent(scores[task.metric], n=scores["n"]),
                    _range(scores.get("interval")),
                    _range(scores.get("clustered_interval"), f" ({databases})"),
                    *(_cell(scores, key) for key in keys),
                    str(scores["gold_errors"]),
                ]
            )
    return head, rows


def _cell(scores: Mapping[str, Any], key: str) -> str:
    """Write a score; with its mean over questions behind it, where it counts over all of them."""
    macro = f"{key}_macro"
    text, n = share_text(scores, key), scores.get(f"{key}_n", scores["n"])
    if key in scores and n != scores["n"]:
        text += f" (n = {n:,})"
    return f"{text} / {share_text(scores, macro)}" if macro in scores else text


def _range(interval: Sequence[float] | None, suffix: str = "") -> str:
    if interval is None:
        return "–"
    return f"{100 * interval[0]:.1f} – {100 * interval[1]:.1f} %{suffix}"


def _databases(rows: Rows, split: str) -> int:
    return len(
        {row["db_id"] for row in rows if row["split"] == split and row["verdict"] != "gold_error"}
    )


def _filters(evaluation: Mapping[str, Rows]) -> list[tuple[str, str, list[str]]]:
    """Return (key, label, values) of each filter that has values to choose from."""
    last = list(evaluation.values())[-1]
    fields = {"split": "split", "db_id": "database", "hardness": "hardness"}
    filters = [(key, label, _values(last, key)) for key, label in fields.items()]
    filters += [
        (f"verdict-{name}", f"{name}: verdict", _values(rows, "verdict"))
        for name, rows in evaluation.items()
    ]
    return [(key, label, values) for key, label, values in filters if values]


def _values(rows: Rows, key: str) -> list[str]:
    return list(dict.fromkeys(str(row[key]) for row in rows if row.get(key)))


def _image(figure: Figure) -> str:
    """Return a figure as a data URI: vectors, the same bytes for the same figure."""
    import matplotlib

    stream = BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "ray_sql"}):
        figure.savefig(stream, format="svg", metadata={"Date": None})
    return f"data:image/svg+xml;base64,{base64.b64encode(stream.getvalue()).decode()}"
