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
from ray_sql.store import storage
from ray_sql.store.run_folder import RunFolder

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Rows = Sequence[Mapping[str, Any]]

LINKING = {
    "exact match": ["exact_match"],
    "table F1 (micro / macro)": ["table_f1", "table_f1_macro"],
    "column F1 (micro / macro)": ["column_f1", "column_f1_macro"],
    "unparsable": ["unparsable"],
}
"""Scores of task schema beside strict recall: what the page calls them, and their keys."""


SECONDARY = {
    "valid_sql": "valid SQL",
    "exact_set_match": "exact set match",
    "soft_f1": "soft F1",
    "r_ves": "R-VES (if the machine was idle)",
}
"""Scores of task sql beside execution accuracy, and what pages and tables call them."""


def write(
    folder: RunFolder,
    title: str,
    metrics: Mapping[str, Any],
    measured: Mapping[str, Rows],
    figures: Mapping[str, Figure],
) -> None:
    """Write `report.html` into the run's folder."""
    storage.write_text(folder.report, page(title, metrics, measured, figures))


def page(
    title: str,
    metrics: Mapping[str, Any],
    measured: Mapping[str, Rows],
    figures: Mapping[str, Figure],
) -> str:
    """The report as HTML; `metrics` is what `metrics.json` holds, `measured` the judged rows of each model, in one order."""
    header, cells = summary(metrics, measured)
    questions = list(zip(*measured.values(), strict=True))
    return render(
        "report.jinja",
        title,
        facts(metrics, list(measured)),
        figures,
        header=header,
        cells=cells,
        compared=metrics.get("compared", {}),
        compared_default=metrics.get("compared_default", {}),
        models=list(measured),
        questions=questions,
        choices=[
            *_choices(questions),
            *(
                (f"verdict-{name}", f"{name}: verdict", _known(rows, "verdict"))
                for name, rows in measured.items()
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
    metrics: Mapping[str, Any], measured: Mapping[str, Rows]
) -> tuple[list[str], list[list[str]]]:
    """The head and the rows of the table of scores: one row a split and model."""
    models = list(measured)
    main = "execution_accuracy" if metrics["task_type"] == "sql" else "strict_recall"
    rest = LINKING if main == "strict_recall" else _secondary(metrics, models)
    head = [
        "split",
        "model",
        "n",
        main.replace("_", " "),
        "95 % interval",
        "clustered (databases)",
        *rest,
        "gold fails",
    ]
    rows = [
        [
            split,
            name,
            f"{scores['n']:,}",
            percent(scores[main], n=scores["n"]),
            _range(scores.get("interval")),
            _range(scores.get("clustered_interval"), f" ({_databases(measured[name], split)})"),
            *(" / ".join(_percent(scores, key) for key in keys) for keys in rest.values()),
            str(scores["gold_errors"]),
        ]
        for split in metrics[models[-1]]
        for name, scores in ((name, metrics[name][split]) for name in models)
    ]
    return head, rows


def _secondary(metrics: Mapping[str, Any], models: Sequence[str]) -> dict[str, list[str]]:
    """The scores of task sql beside execution accuracy that any model and split has."""
    scores = [one for name in models for one in metrics[name].values()]
    return {label: [key] for key, label in SECONDARY.items() if any(key in one for one in scores)}


def _percent(scores: Mapping[str, Any], key: str) -> str:
    return (
        percent(scores[key], scores.get(f"{key}_interval"), scores["n"]) if key in scores else "–"
    )


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
