"""Measure each saving of a training step: undo one at a time, in one interleaved run.

    RAY_SQL_SHARED=… python -m benchmarks.ablation     (--quick: two rounds of four variants)

Examples, model and adapter are those of `benchmarks.training_speed`. A round is one optimizer step
over 8 questions on one database with every variant, in an order drawn anew. A ratio above 1 says
how much longer the step takes without the saving, or with an addition ("with"). The last line is
one JSON object.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.training_speed import STEP, draw_rounds, our_step, settings, spread
from ray_sql import cluster, models
from ray_sql.config import Config
from ray_sql.models import packed_attention
from ray_sql.rows import IGNORED, TokenizedExample
from ray_sql.rows.batch import model_inputs
from ray_sql.train import trainer

AS_IT_IS = "as it is"


def nothing(_: Any) -> None:
    """Leave a model as it is."""


@dataclass(frozen=True)
class Variant:
    """A step with one saving undone."""

    name: str
    changes: dict[str, Any] = field(default_factory=dict)
    to_base: Callable[[Any], None] = nothing
    to_model: Callable[[Any], None] = nothing
    during: Callable[[], AbstractContextManager[None]] = nullcontext
    together: int = STEP


def expanded_at_every_call(base: Any) -> None:
    """Bring back bitsandbytes' own forward."""
    for module in base.modules():
        if type(module).__name__ == "Linear4bit":
            del module.forward


def of_peft(model: Any) -> None:
    """Bring back PEFT's forward of a layer and its adapter."""
    for module in model.modules():
        if hasattr(module, "lora_A") and "forward" in vars(module):
            del module.forward


def of_torch(model: Any) -> None:
    """Bring back torch's dropout."""
    for module in model.modules():
        if hasattr(module, "lora_A"):
            module.lora_dropout["default"] = torch.nn.Dropout(settings().lora.lora_dropout)


def computed_again(model: Any) -> None:
    """Compute every layer's activations again in the backward pass."""
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def layers_compiled(model: Any) -> None:
    """Compile every layer with torch.compile, for rows of any length."""
    for layer in model.get_base_model().model.layers:
        layer.compile(dynamic=True)


@contextmanager
def every_logit() -> Iterator[None]:
    """Compute the vocabulary's scores at every token."""

    def loss(model: Any, batch: Any, inner_model: Any) -> torch.Tensor:
        targets = torch.nn.functional.pad(batch.labels[:, 1:], (0, 1), value=IGNORED)
        logits = model(**model_inputs(batch, inner_model), use_cache=False).logits.float()
        return torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum"
        )

    kept, trainer.completion_loss = trainer.completion_loss, loss
    try:
        yield
    finally:
        trainer.completion_loss = kept


@contextmanager
def memory_given_back() -> Iterator[None]:
    """Set glibc's thresholds as they are once a program has freed something large."""
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD
    mallopt(-1, 64 << 20)  # M_TRIM_THRESHOLD
    try:
        yield
    finally:
        cluster.keep_freed_memory()


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one of the machine's cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


VARIANTS = (
    Variant(AS_IT_IS),
    Variant("schema computed for every question", together=1),
    Variant("SDPA with a mask, not by parts", to_model=packed_attention.use_mask),
    Variant("logits at every token", during=every_logit),
    Variant(
        "4-bit weights expanded at every call, and PEFT's forward", to_base=expanded_at_every_call
    ),
    Variant("PEFT's forward of a layer and its adapter", to_model=of_peft),
    Variant("torch's dropout", to_model=of_torch),
    Variant("float32", changes={"train.bf16": False}),
    Variant("freed memory given back", during=memory_given_back),
    Variant("one thread", during=one_thread),
    Variant("with gradient checkpointing", to_model=computed_again),
    Variant("with torch.compile of the layers", to_model=layers_compiled),
)


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=8, help="rounds that count")
    parser.add_argument(
        "--only", nargs="+", help="words of the variants wanted, besides the step as it is"
    )
    parser.add_argument("--quick", action="store_true", help="two rounds of four variants")
    arguments = parser.parse_args(argv)
    variants = [
        v
        for v in VARIANTS
        if not arguments.only or v.name == AS_IT_IS or any(w in v.name for w in arguments.only)
    ]
    if arguments.quick:
        variants, arguments.rounds = variants[:4], 2
    config = settings()
    folder, _ = models.resolve(config.model_name, config.cache, config.read_token)
    cluster.keep_freed_memory()
    with tempfile.TemporaryDirectory() as scratch:
        examples = [drawn[:STEP] for drawn in draw_rounds(config, folder, arguments.rounds + 2)]
        steps = {
            v.name: step_of(v, config.changed(v.changes), folder, examples[0], Path(scratch))
            for v in variants
        }
        seconds = run(steps, examples)
    ratios = {name: spread(seconds, name, AS_IT_IS) for name in seconds}
    print("| the step | seconds, median | against the step as it is |\n|---|---|---|")
    for name, (low, middle, high) in ratios.items():
        print(f"| {name} | {median(seconds[name]):.2f} | {middle:.2f}x ({low:.2f} to {high:.2f}) |")
    print(
        json.dumps(
            {
                "rounds": arguments.rounds,
                "ratios": {name: round(each[1], 3) for name, each in ratios.items()},
            }
        )
    )


def step_of(
    variant: Variant,
    config: Config,
    folder: str,
    examples: Sequence[TokenizedExample],
    scratch: Path,
) -> Callable[[Sequence[TokenizedExample]], None]:
    """Return a variant's optimizer step, over a model of its own."""
    base = models.load_base(folder, config.quantization, config.train.bf16)
    variant.to_base(base)
    batching = replace(config.batching, examples_per_row=STEP)
    built = trainer.build(base, models.load_tokenizer(folder), examples, config, batching, scratch)
    variant.to_model(built.model)
    return partial(_within, variant.during, our_step(built, config, variant.together))


def _within(
    during: Callable[[], AbstractContextManager[None]],
    step: Callable[..., None],
    examples: Sequence[TokenizedExample],
) -> None:
    with during():
        step(examples)


def run(
    steps: dict[str, Callable[..., None]], rounds: Sequence[Sequence[TokenizedExample]]
) -> dict[str, list[float]]:
    """Return the seconds of every variant's step in every round, after two that warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    draw = random.Random(1)
    for number, examples in enumerate(rounds, start=-1):
        for name in draw.sample(list(steps), len(steps)):
            started = time.perf_counter()
            steps[name](examples)
            took = time.perf_counter() - started
            if number > 0:
                seconds[name].append(took)
            elif took > 20:
                print(f"{name}: {took:.0f} s to warm up", file=sys.stderr)
        said = "  ".join(f"{name} {each[-1]:.2f}" for name, each in seconds.items() if each)
        print(f"round {number} of {len(rounds) - 2}, seconds: {said}", file=sys.stderr)
    return seconds


if __name__ == "__main__":
    main()
