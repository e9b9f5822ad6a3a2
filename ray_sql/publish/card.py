"""The model card: what the run's files say, as text for people and as metadata for the Hub, and code that uses the model.

Every number comes from `metrics.json`, every setting from `config.json` and the contract; the page is `card.jinja`. The code asks in the
words of the contract with nothing but transformers and peft, so that the prompt is the one that was trained.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

from ray_sql.config import absolute
from ray_sql.database import Column, ForeignKey, Schema, Table, render
from ray_sql.display import percent
from ray_sql.publish.bundle import HUB_NAME, Bundle
from ray_sql.publish.hub import License
from ray_sql.report import html

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
MAIN = {
    "sql": ("execution_accuracy", "execution accuracy"),
    "schema": ("strict_recall", "strict recall"),
}
"""The score that a task is judged by: its key in metrics.json, and what people call it."""
OTHERS = {
    "sql": html.SECONDARY,
    "schema": {"exact_match": "exact match", "table_f1": "table F1", "column_f1": "column F1"},
}
"""The scores beside it, where they were measured."""

COLUMNS = {"base": "base model", "tuned": "with this adapter", "merged": "this merged model"}
"""What the table of results calls a model of metrics.json."""


def card(
    bundle: Bundle, repo_id: str, license: License, merged: Mapping[str, Any] | None = None
) -> str:
    """README.md of the repository: the adapter's, or with `merged` (what `merge.merged` returned) that model's."""
    from jinja2 import Environment, StrictUndefined

    template = (resources.files("ray_sql") / "publish" / "templates" / "card.jinja").read_text(
        encoding="utf-8"
    )
    environment = Environment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    metrics, config = bundle.metrics, bundle.config
    models: dict[str, Mapping[str, Any]] = {
        name: metrics[name] for name in ("base", "tuned") if name in metrics
    }
    if merged is not None:
        models["merged"] = merged["merged"]
    body = environment.from_string(template).render(
        bundle=bundle,
        config=config,
        contract=bundle.contract,
        metrics=metrics,
        repo_id=repo_id,
        license=license.get("license_name", license.get("license")),
        merged=merged,
        main=MAIN[config.task_type][1],
        semantics=next(iter(metrics["tuned"].values())).get("semantics"),
        head=["split", "score", "n", *(COLUMNS[name] for name in models)],
        rows=table(models, config.task_type),
        schema=render(SAMPLE, config.prompt.serializer),
        question=QUESTION,
        questions=sum(scores["n"] for scores in metrics["tuned"].values()),
        versions=bundle.contract["packages"],
    )
    return f"---\n{metadata(bundle, repo_id, license, merged)}\n---\n\n{body}"


def table(models: Mapping[str, Mapping[str, Any]], task: str) -> list[list[str]]:
    """One row a split and score, one column a model, with 95 % intervals where they were computed."""
    main, label = MAIN[task]
    rows = []
    for split in next(iter(models.values())):
        scores = [model[split] for model in models.values()]
        cells = [percent(one[main], one["interval"], one["n"]) for one in scores]
        rows.append([split, f"**{label}**", f"{scores[-1]['n']:,}", *cells])
        for key, name in OTHERS[task].items():
            n = scores[-1].get(f"{key}_n", scores[-1]["n"])
            cells = [
                percent(one[key], one.get(f"{key}_interval"), n) if key in one else "–"
                for one in scores
            ]
            if set(cells) != {"–"}:
                rows.append([split, name, f"{n:,}", *cells])
    return rows


def metadata(
    bundle: Bundle, repo_id: str, license: License, merged: Mapping[str, Any] | None = None
) -> str:
    """The card's metadata as YAML, `model-index` included, in the Hub's words; built and so validated by huggingface_hub."""
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
        tags=["text-to-sql" if config.task_type == "sql" else "schema-linking", "lora", "ray_sql"],
        eval_results=[
            result for split, scores in scored.items() for result in _results(bundle, split, scores)
        ],
    )
    return str(data.to_yaml())


def on_hub(dataset: str) -> bool:
    """Whether a dataset's id is one of the Hub; `data/spider` is a folder where there is one."""
    return "/" in dataset and bool(HUB_NAME.fullmatch(dataset)) and not absolute(dataset).exists()


def _results(bundle: Bundle, split: str, scores: Mapping[str, Any]) -> Sequence[Any]:
    from huggingface_hub import EvalResult

    task = bundle.config.task_type
    key, label = MAIN[task]
    if not scores["n"]:
        return []
    facts = {"n": scores["n"], "interval_95": [round(end, 4) for end in scores["interval"]]}
    facts |= {"semantics": scores["semantics"]} if task == "sql" else {}
    rule = f" ({scores['semantics']})" if task == "sql" else ""
    return [
        EvalResult(
            task_type="text-generation",
            task_name="text to SQL" if task == "sql" else "schema linking",
            dataset_type=str(bundle.metrics["dataset_id"]),
            dataset_name=str(bundle.metrics["dataset_id"]),
            dataset_split=split,
            dataset_revision=str(bundle.metrics["data_fingerprint"]),
            metric_type=key,
            metric_name=f"{label}{rule}",
            metric_value=round(scores[key], 4),
            metric_args=facts,
        )
    ]
