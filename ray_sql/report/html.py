"""`report.html`: scores, figures and every question of a run in one file that needs nothing else, to read, mail or keep.

The page is `report.jinja`; every text from a dataset or a model is escaped. Its filters are in its address after `#`, so that a
view of it can be bookmarked.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import TYPE_CHECKING, Any

from ray_sql.display import percent
from ray_sql.report.scores import paired_lines, secondary_scores, share_text
from ray_sql.store import storage
from ray_sql.store.run_folder import RunFolder
from ray_sql.tasks import TASKS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Rows = Sequence[Mapping[str, Any]]


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
    """The report as HTML; `metrics` is what `metrics.json` holds, `evaluation` the judged rows of each model, in one order."""
    header, cells = summary(metrics, evaluation)
    questions = list(zip(*evaluation.values(), strict=True))
    return render(
        "report.jinja",
        title,
        facts(metrics, list(evaluation)),
        figures,
        header=header,
        cells=cells,
        comparisons=paired_lines(metrics),
        models=list(evaluation),
        questions=questions,
        choices=[
            *_choices(questions),
            *(
                (f"verdict-{name}", f"{name}: verdict", _known(rows, "verdict"))
                for name, rows in evaluation.items()
            ),
        ],
    )


def render(
    template: str,
    title: str,
    facts: Mapping[str, str],
    figures: Mapping[str, Figure],
    **values: Any,
) -> str:
    """A page that needs nothing else, from one of the package's templates; every value is escaped."""
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
    """What was measured, how, and where its record is."""
    scores: Mapping[str, Any] = next(iter(metrics[models[-1]].values()), {})
    steps = f"{metrics['best_step']} of {metrics['steps']}" if "best_step" in metrics else None
    known = {
        "task": metrics["task_type"],
        "data": metrics["dataset_id"],
        "base model": metrics.get("model_name"),
        "semantics": scores.get("semantics"),
        "best step": steps,
        "MLflow run": metrics.get("mlflow_run_id"),
    }
    return {name: str(value) for name, value in known.items() if value}


def summary(
    metrics: Mapping[str, Any], evaluation: Mapping[str, Rows]
) -> tuple[list[str], list[list[str]]]:
    """Return the head and the rows of the table of scores: one row per split and model."""
    task, models = TASKS[metrics["task_type"]], list(evaluation)
    keys = secondary_scores([scores for name in models for scores in metrics[name].values()], task)
    # a score that counts names over all questions has a twin: the mean over questions
    pairs = {key: f"{key}_macro" for key in keys if key.endswith("_f1") and not task.executes_sql}
    head = [
        *("split", "model", "n", task.label, "95 % interval", "clustered (databases)"),
        *(task.secondary[key] + " (micro / macro)" * (key in pairs) for key in keys),
        "gold fails",
    ]
    rows = []
    for split in metrics[models[-1]]:
        for name in models:
            scores = metrics[name][split]
            databases = _databases(evaluation[name], split)
            rows.append(
                [
                    *(split, name, f"{scores['n']:,}"),
                    percent(scores[task.metric], n=scores["n"]),
                    _range(scores.get("interval")),
                    _range(scores.get("clustered_interval"), f" ({databases})"),
                    *(_cell(scores, key, pairs.get(key)) for key in keys),
                    str(scores["gold_errors"]),
                ]
            )
    return head, rows


def _cell(scores: Mapping[str, Any], key: str, macro: str | None) -> str:
    return " / ".join(share_text(scores, name) for name in (key, macro) if name)


def _range(interval: Sequence[float] | None, of: str = "") -> str:
    return "–" if interval is None else f"{100 * interval[0]:.1f} – {100 * interval[1]:.1f} %{of}"


def _databases(rows: Rows, split: str) -> int:
    return len(
        {row["db_id"] for row in rows if row["split"] == split and row["verdict"] != "gold_error"}
    )


def _choices(questions: Sequence[Sequence[Mapping[str, Any]]]) -> list[tuple[str, str, list[str]]]:
    """(key, label, values) of what every model's row of a question shares."""
    rows = [question[-1] for question in questions]
    fields = {"split": "split", "db_id": "database", "hardness": "hardness"}
    return [(key, label, values) for key, label in fields.items() if (values := _known(rows, key))]


def _known(rows: Rows, key: str) -> list[str]:
    return list(dict.fromkeys(str(row[key]) for row in rows if row.get(key)))


def _image(figure: Figure) -> str:
    """A figure as the address of an image inside the page: vectors, the same bytes for the same figure."""
    import matplotlib

    stream = BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "ray_sql"}):
        figure.savefig(stream, format="svg", metadata={"Date": None})
    return f"data:image/svg+xml;base64,{base64.b64encode(stream.getvalue()).decode()}"
