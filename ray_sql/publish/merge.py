"""Merge the adapter into its base, for servers that know no adapters.

An adapter that was trained over 4-bit weights is added to these, expanded. Added to the weights
that they were made from, it is another model. In bfloat16 the sum is rounded, so it answers the
run's own questions again. It is refused if it answers significantly fewer than the adapter did.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ray_sql import data, models, tracking
from ray_sql.config import Config
from ray_sql.display import Display
from ray_sql.errors import DamagedFile, ModelError
from ray_sql.evaluate import results
from ray_sql.evaluate.linker import asked_links
from ray_sql.evaluate.models import adapter_digest, evaluate_models, scored_questions
from ray_sql.metrics.judged import is_right
from ray_sql.metrics.paired import PairedTest, paired_test
from ray_sql.report.progress import Progress
from ray_sql.store import storage
from ray_sql.store.run_folder import CONTRACT, METRICS, RunFolder
from ray_sql.store.shapes import MergedMetrics
from ray_sql.tasks import TASKS


def merged(config: Config, run: RunFolder, display: Display) -> dict[str, Any]:
    """Write and score the merged model. Return its `metrics.json`.

    The file holds scores by split and the paired test against the adapter. A merged model of the
    same adapter is used again. Raises `ModelError` if it answers significantly fewer questions.
    """
    if config.hub.merged_dtype == "float32":
        config = config.changed({"train.bf16": False})
    made_of = _made_of(run, config.quantization.load_in_4bit, config.hub.merged_dtype)
    saved = _earlier(run)
    if saved.get("adapter") != made_of:
        with tempfile.TemporaryDirectory(
            prefix="ray_sql-", dir=_scratch_dir(config.cache)
        ) as scratch:
            folder = Path(scratch) / run.merged.name
            _write(config, run, folder)
            saved = {"adapter": made_of, **_measure(config, run, folder, display)}
            (folder / METRICS).write_text(json.dumps(saved, indent=2) + "\n")
            storage.put(folder, run.merged.uri)
    test = saved["compared"]
    display.line(
        f"merged    {run.merged}: it alone is right on {test['only_merged']} questions, the "
        f"adapter alone on {test['only_adapter']} (McNemar p = {test['mcnemar_p']:.2g})"
    )
    if PairedTest(test["only_adapter"], test["only_merged"]).a_is_better:
        raise ModelError(
            f"{run.merged}: merged, the model is worse than with its adapter (McNemar p = "
            f"{test['mcnemar_p']:.2g}), so it is not published; use the adapter"
        )
    return saved


def _made_of(run: RunFolder, in_4bit: bool, dtype: str) -> str:
    """Return the adapter's digest, the weights it is added to, and the type of the sum.

    A merged model that was made of something else is made again.
    """
    weights = "4-bit" if in_4bit else "whole"
    return f"{adapter_digest(run.adapter.uri)} over {weights} weights in {dtype}"


def _earlier(run: RunFolder) -> dict[str, Any]:
    """Return the metrics of an earlier merged model; empty if there is none, or a damaged one."""
    try:
        return run.merged.read_metrics(MergedMetrics) or {}
    except DamagedFile:
        return {}


def _scratch_dir(cache: Path) -> Path:
    """Return a folder with room for a model: the cache, where base models lie too."""
    cache.mkdir(parents=True, exist_ok=True)
    return cache


def _write(config: Config, run: RunFolder, folder: Path) -> None:
    """Write the merged model with its tokenizer, as a Hugging Face folder."""
    import torch  # loading it takes seconds, which a driver with nothing to merge does without

    revision = models.revision_of(run.read_contract(), config.model_name)
    place, _ = models.resolve(config.model_name, config.cache, config.read_token, revision)
    base = models.load_base(place, config.quantization, config.train.bf16)
    if config.quantization.load_in_4bit:
        base = base.dequantize()
    with tempfile.TemporaryDirectory(prefix="ray_sql-") as scratch:
        adapter = storage.fetch(run.adapter.uri, Path(scratch))
        # LoRA's weights are not rounded, as for generation: their product is, when it is added
        model = models.load_adapter(base, adapter, place=run.adapter.uri, exact=True)
        whole = model.merge_and_unload().to(getattr(torch, config.hub.merged_dtype))
        whole.save_pretrained(folder)
    models.load_tokenizer(place).save_pretrained(folder)
    storage.fetch_file(run.place(CONTRACT), folder / CONTRACT)


def _measure(config: Config, run: RunFolder, folder: Path, display: Display) -> dict[str, Any]:
    """Score the merged model on the run's questions, and compare it with the adapter's answers."""
    plain = config.changed({"quantization.load_in_4bit": False})
    corpus = data.load_split(plain, plain.split)
    links = asked_links(plain, corpus, display)
    questions = scored_questions(corpus, models.load_tokenizer(str(folder)), plain, links)
    rows = evaluate_models(
        plain,
        questions,
        corpus.judged_schemas(TASKS[plain.task_type]),
        str(folder),
        None,
        display,
        Progress(run.merged, tracking.null_run(), display),
        called={"base": "the merged model"},
    )["base"]
    before, after = _right(run.read_predictions()), _right(rows)
    pairs = [(before[key], right) for key, right in after.items() if key in before]
    compared = {"n": len(pairs), **paired_test(pairs).named("adapter", "merged")}
    return {
        **results.summarise({"merged": rows}, TASKS[plain.task_type], plain.evaluate),
        "compared": compared,
    }


def _right(rows: Sequence[Mapping[str, Any]]) -> Mapping[tuple[str, str], bool]:
    """Return whether each answer is right, by split and id, without questions whose gold fails."""
    return {
        (row["split"], row["id"]): is_right(row) for row in rows if row["verdict"] != "gold_error"
    }
