"""Ask a run's questions of its adapter over the base, and of the model that merges both.

    python -m benchmarks.merged_answers --output_name demo       (--bfloat16: as it is published)

The merged model is written as `ray-sql publish --hub.merge` does, into a folder that is removed
afterwards. Both answer the same questions on this machine, computed together in the same way. In
float32 nothing but the order of sums is between them, so the answers must be equal. In bfloat16 the
merged weights are rounded, and so is every product. `by_loader` counts the answers of transformers'
`generate` that begin as ours do. Loaders open the adapter's folder over the base, which is in the
4 bits of the run, and the merged one. On CPUs with AVX512-BF16, bitsandbytes rounds
the scales of these weights, unless a layer stands in training mode: `exact` counts that, too. The
last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, pipeline

from ray_sql import data, models, tracking
from ray_sql.config import Config, ServeConfig, load
from ray_sql.display import Display
from ray_sql.evaluate.linker import asked_links
from ray_sql.evaluate.models import evaluate_models, scored_questions
from ray_sql.generate import Question
from ray_sql.metrics.judged import is_right
from ray_sql.publish import merge
from ray_sql.report.progress import Progress
from ray_sql.serve.recipe import find
from ray_sql.store.run_folder import RunFolder
from ray_sql.tasks import TASKS


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output_name", default="demo", help="a finished run")
    parser.add_argument("--output_dir", default="out")
    parser.add_argument("--questions", type=int, default=50)
    parser.add_argument("--loaded", type=int, default=20, help="questions of each loader")
    parser.add_argument("--bfloat16", action="store_true", help="merge and compute in bfloat16")
    given = parser.parse_args(argv)
    run = Path(given.output_dir).absolute() / given.output_name
    dtype = "bfloat16" if given.bfloat16 else "float32"
    with tempfile.TemporaryDirectory(prefix="ray_sql-") as scratch, Display() as display:
        copy = Path(scratch) / run.name
        shutil.copytree(run, copy, ignore=shutil.ignore_patterns("checkpoint-*", "merged"))
        found = find(load(ServeConfig, [], output_name=run.name, output_dir=scratch))
        config = found.config.changed(
            {"hub.merged_dtype": dtype, "train.bf16": given.bfloat16, "evaluate.max_num_seqs": 32}
            | {"evaluate.baseline": False}
        )
        folder = RunFolder(str(copy))
        merge.merged(config, folder, display)
        base, _ = models.resolve(config.model_name, config.cache, None, None)
        corpus = data.load_split(config, config.split)
        links = asked_links(config, corpus, display)
        tokenizer = models.load_tokenizer(base)
        asked = scored_questions(corpus, tokenizer, config, links)
        asked = random.Random(14).sample(asked, k=min(given.questions, len(asked)))
        schemas = corpus.judged_schemas(TASKS[config.task_type])
        progress = Progress(folder, tracking.null_run(), display)
        plain = config.changed({"quantization.load_in_4bit": False})
        whole = folder.place("merged")
        by = {
            "adapter": evaluate_models(
                config, asked, schemas, base, folder.adapter.uri, display, progress
            )["tuned"],
            "merged": evaluate_models(plain, asked, schemas, whole, None, display, progress)[
                "base"
            ],
        }
        told = [row["raw"].strip() for row in by["adapter"]][: given.loaded]
        by_loader = dict(
            begins(config, folder.adapter.uri, whole, asked[: given.loaded], tokenizer, told)
        )
    answers = {name: [row["predicted"] for row in rows] for name, rows in by.items()}
    report = {
        "n": len(asked),
        "dtype": dtype,
        "same": sum(map(str.__eq__, answers["adapter"], answers["merged"])),
        **{f"right_{name}": sum(map(is_right, rows)) for name, rows in by.items()},
        "loaded_n": len(told),
        "by_loader": by_loader,
    }
    print(json.dumps(report))


def begins(
    config: Config,
    adapter: str,
    merged: str,
    asked: Sequence[Question],
    tokenizer: Any,
    told: Sequence[str],
) -> Iterator[tuple[str, int]]:
    """Yield how many answers of each loader begin as they should."""
    for name, model in loaded(config, adapter, merged):
        layers = [layer for layer in model.modules() if isinstance(layer, Linear4bit)]
        # once a layer has been used in evaluation mode, its scales stay rounded
        for mode, exact in ((", exact", True), ("", False)) if layers else (("", False),):
            for layer in layers:
                layer.train(exact)
            yield name + mode, sum(map(str.startswith, generated(model, asked, tokenizer), told))


def loaded(config: Config, adapter: str, merged: str) -> Iterator[tuple[str, Any]]:
    """Yield the model as people load it: from the adapter's folder, and from the merged one."""
    dtype = torch.bfloat16 if config.train.bf16 else torch.float32
    given: dict[str, Any] = {"dtype": dtype}
    if config.quantization.load_in_4bit:
        given["quantization_config"] = BitsAndBytesConfig(
            **config.quantization.model_dump(), bnb_4bit_compute_dtype=dtype
        )
    yield "adapter, AutoPeft", AutoPeftModelForCausalLM.from_pretrained(adapter, **given)
    yield "adapter, AutoModel", AutoModelForCausalLM.from_pretrained(adapter, **given)
    piped = pipeline("text-generation", model=adapter, model_kwargs=given)
    yield "adapter, pipeline", piped.model
    yield "merged, AutoModel", AutoModelForCausalLM.from_pretrained(merged, dtype=dtype)
    yield "merged, pipeline", pipeline("text-generation", model=merged, dtype=dtype).model


def generated(model: Any, questions: Sequence[Question], tokenizer: Any) -> list[str]:
    """Return transformers' own greedy answers, one question after the other."""
    texts = []
    for question in questions:
        tokens = torch.tensor([question.input_ids])
        with torch.no_grad():
            output = model.generate(
                input_ids=tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=96,
                do_sample=False,
            )
        text = tokenizer.decode(output[0, tokens.shape[1] :], skip_special_tokens=True)
        texts.append(text.strip())
    return texts


if __name__ == "__main__":
    main()
