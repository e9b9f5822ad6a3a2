"""Write the model card: text for people, metadata for the Hub, and code that uses the model.

Every number comes from `metrics.json`, every setting from `config.json` and the contract. The page
is `card.jinja`. The code asks in the words of the contract with nothing but transformers and peft,
so that the prompt is the one that was trained. huggingface_hub's `ModelCard.from_template` is not
used: it prints nothing for a name that a template misspells, where this page raises.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

from ray_sql.config import absolute
from ray_sql.config.sections import AnswersSection
from ray_sql.data import counted
from ray_sql.data.shown import ORACLE
from ray_sql.database import Column, ForeignKey, Schema, Table, render
from ray_sql.publish.bundle import HUB_NAME, Bundle
from ray_sql.publish.hub import License
from ray_sql.report.scores import Scores, notes, one_line, prose, score_lines
from ray_sql.tasks import TASKS, Task

SAMPLE = Schema(
    "shop",
    (
        Table(
            "customer",
            (Column("id", "INTEGER"), Column("name", "TEXT"), Column("city", "TEXT")),
            ("id",),
        ),
        Table(
            "sale",
            (Column("customer_id", "INTEGER"), Column("day", "TEXT"), Column("amount", "INTEGER")),
            foreign_keys=(ForeignKey(("customer_id",), "customer", ("id",)),),
        ),
    ),
)
QUESTION = "How many customers live in Lisbon?"
COLUMNS = {"base": "base model", "tuned": "with this adapter", "merged": "this merged model"}
"""Names of the models of metrics.json in the table of results."""


def card(
    bundle: Bundle, repo_id: str, license: License, merged: Mapping[str, Any] | None = None
) -> str:
    """Return the README.md of an adapter, or of the merged model whose metrics are `merged`."""
    from jinja2 import Environment, StrictUndefined

    template = (resources.files("ray_sql") / "publish" / "templates" / "card.jinja").read_text(
        encoding="utf-8"
    )
    environment = Environment(
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=escaped,
    )
    environment.filters |= {"code": code, "python": python, "as_is": AsIs}
    metrics, config = bundle.metrics, bundle.config
    task = TASKS[config.task_type]
    models: dict[str, Mapping[str, Any]] = {
        name: metrics[name] for name in ("base", "tuned") if name in metrics
    }
    if merged is not None:
        models["merged"] = merged["merged"]
    measured_on = {
        name for scores in metrics["tuned"].values() for name in scores.get("by_database", {})
    }
    body = environment.from_string(template).render(
        bundle=bundle,
        config=config,
        contract=bundle.contract,
        metrics=metrics,
        repo_id=repo_id,
        license=license.get("license_name", license.get("license")),
        merged=merged,
        task=task,
        answers=_answers(config.evaluate),
        linker=_linker(bundle),
        overlap=_overlap(metrics, begun_elsewhere="/" in (bundle.folder.read_start() or "")),
        semantics=next((scores.get("semantics") for scores in metrics["tuned"].values()), None),
        head=["split", "score", "n", *(COLUMNS[name] for name in models)],
        rows=table(models, task),
        notes=notes({"tuned": models["tuned"]}, "tuned"),
        schema=render(SAMPLE, config.prompt.serializer),
        question=QUESTION,
        adapter_repo=repo_id.removesuffix("-merged") if merged is not None else repo_id,
        databases=counted(len(measured_on), "database"),
        questions=sum(scores["n"] for scores in metrics["tuned"].values()),
        versions=bundle.contract["packages"],
    )
    return f"---\n{metadata(bundle, repo_id, license, merged)}\n---\n\n{body}"


def _answers(settings: AnswersSection) -> str:
    """Say in half a sentence how the scored answers were found and chosen."""
    beams = f"{settings.num_beams} beams"
    options = beams if settings.num_beams > 1 else f"the greedy one and {settings.samples} samples"
    one = f"Answers are {f'searched with {beams}' if settings.num_beams > 1 else 'greedy'}"
    told = {
        "greedy": one,
        "repaired": f"{one}, and names that the schema lacks are mended",
        "constrained": f"{one}, and hold names of the schema only",
        "first_executable": f"Each answer is the first that runs, of {options}",
        "vote": f"Each answer is chosen by vote, of {options}",
        "weighted_vote": f"Each answer is chosen by a weighted vote, of {options}",
    }
    return told[settings.way]


def _linker(bundle: Bundle) -> str | None:
    """Name whose links the scored prompts needed; None where they needed no model's."""
    if bundle.metrics.get("links") != "predicted":
        return None
    return bundle.config.prompt.asked_links.rstrip("/").rpartition("/")[2]


def _overlap(metrics: Mapping[str, Any], begun_elsewhere: bool) -> list[str]:
    """Return sentences on scored questions that were trained on; none where nobody counted."""
    earlier = "Training began from an earlier adapter, whose data are not recorded here."
    if "also_trained" not in metrics:  # a run of an earlier version
        return [earlier] * begun_elsewhere
    counts: dict[str, int] = {}
    for split, scores in metrics["tuned"].items():
        known = metrics["also_trained"].get(split.removesuffix(ORACLE), scores["n"])
        if known:
            counts[split] = known
    told = [
        f"{n:,} questions of `{code(split)}` were trained on, too." for split, n in counts.items()
    ]
    if begun_elsewhere:
        return [*told, earlier]
    return told or ["None of these questions was trained on."]


def table(models: Mapping[str, Scores], task: Task) -> list[list[str]]:
    """Return one row per split and score, with one column per model."""
    return [
        [
            prose(line.split),
            f"**{line.label}**" if line.kind == "main" else line.label,
            line.count,
            *line.cells,
        ]
        for line in score_lines(models, task)
        if line.kind != "level"
    ]


class AsIs(str):
    """A text of our own, or one that is escaped already."""


def escaped(value: Any) -> str:
    """Return a value for the card's text, in which no sign is Markdown's or HTML's."""
    return value if isinstance(value, AsIs) else prose(str(value))


def code(value: Any) -> AsIs:
    """Return a value for a span of code, where nothing can be escaped."""
    return AsIs(one_line(str(value)).replace("`", "'").replace("|", "/"))


def python(value: Any) -> AsIs:
    """Return a value as a literal of Python, in which no tick ends the block of code."""
    return AsIs(json.dumps(str(value)).replace("`", r"\u0060"))


def metadata(
    bundle: Bundle, repo_id: str, license: License, merged: Mapping[str, Any] | None = None
) -> str:
    """Return the card's metadata as YAML, `model-index` included, validated by huggingface_hub."""
    from huggingface_hub import ModelCardData

    config, dataset = bundle.config, str(bundle.metrics["dataset_id"])
    scored: Mapping[str, Any] = merged["merged"] if merged is not None else bundle.metrics["tuned"]
    data = ModelCardData(
        model_name=repo_id.rsplit("/", 1)[-1],
        base_model=bundle.base_model,
        base_model_relation="finetune" if merged is not None else "adapter",
        library_name="transformers" if merged is not None else "peft",
        pipeline_tag="text-generation",
        **license,
        datasets=[dataset] if on_hub(dataset) else None,
        tags=[TASKS[config.task_type].hub_tag, "lora", "ray_sql"],
        eval_results=[
            result for split, scores in scored.items() for result in _results(bundle, split, scores)
        ],
    )
    return str(data.to_yaml())


def on_hub(dataset: str) -> bool:
    """Tell whether a dataset's id names one on the Hub. `data/spider` may be a folder here."""
    return "/" in dataset and bool(HUB_NAME.fullmatch(dataset)) and not absolute(dataset).exists()


def _results(bundle: Bundle, split: str, scores: Mapping[str, Any]) -> Sequence[Any]:
    from huggingface_hub import EvalResult

    task = TASKS[bundle.config.task_type]
    if not scores["n"]:
        return []
    facts: dict[str, Any] = {
        "n": scores["n"],
        "interval_95": [round(end, 4) for end in scores["interval"]],
    }
    facts["answers"] = bundle.config.evaluate.way
    if linker := _linker(bundle):
        facts["links"] = linker
    if "semantics" in scores:
        facts["semantics"] = scores["semantics"]
    return [
        EvalResult(
            task_type="text-generation",
            task_name=task.hub_label,
            dataset_type=str(bundle.metrics["dataset_id"]),
            dataset_name=str(bundle.metrics["dataset_id"]),
            dataset_split=split,
            dataset_revision=str(bundle.metrics["data_fingerprint"]),
            metric_type=task.metric,
            metric_name=f"{task.label}{task.rule(scores)}",
            metric_value=round(scores[task.metric], 4),
            metric_args=facts,
        )
    ]
