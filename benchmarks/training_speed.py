"""Measure a training step: plain TRL, TRL's packing, and shared rows, on the same examples.

    RAY_SQL_SHARED=… python -m benchmarks.training_speed   (--quick: two rounds, four variants)

RAY_SQL_SHARED names a folder with Spider in data/spider; without it the demo's data are used. A
round takes 32 examples of one database, drawn at random, and makes one optimizer step with every
variant, in an order drawn anew: over the first 8 of them (the original's global batch), over all
where a row holds more. A ratio is that of two variants' seconds per example in the same round. All
variants train the same LoRA (rank 64, dropout 0.1, all linear layers) over SmolLM2-135M in 4-bit
NF4:

    plain     TRL 1.16 as the original project sets it up: one example a forward pass, every 4-bit
              layer expanded at each call
    packing   TRL's best-fit-decreasing packing to 2048 tokens
    ours N    this project's trainer with up to N questions in a row with their schema; N = 1 shares
              nothing

Peak memory is measured in a process of its own for each variant. The last line is one JSON object.

With --model qwen3.5 or lfm2 the model has the layers of `benchmarks.hybrids`, most of which carry a
state, and is compared with plain TRL only: packing would let one example's state reach the next.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks import make_encoder
from benchmarks.hybrids import HYBRIDS, make_hybrid
from ray_sql import cluster, data, models, rows
from ray_sql.config import Config, load
from ray_sql.rows import TokenizedExample
from ray_sql.rows.batch import Steps
from ray_sql.train import trainer

EXAMPLES = 32
"""Examples of a round, all on one database."""
STEP = 8
"""Of these, how many a variant takes that needs no more: the original project's global batch."""
OURS = (1, 2, 4, 8, 16, 32)
VARIANTS = ("plain", "packing", *(f"ours {n}" for n in OURS))
PACKED_LENGTH = 2048


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=8, help="rounds of 32 examples")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="two rounds of plain, packing, ours 8 and ours 32; no memory",
    )
    parser.add_argument(
        "--only", choices=VARIANTS, help="one round of one variant, to measure its memory"
    )
    parser.add_argument("--model", choices=HYBRIDS, help="a model whose layers carry a state")
    arguments = parser.parse_args(argv)
    if arguments.model:
        compare_hybrid(arguments.model, 2 if arguments.quick else arguments.rounds)
        return
    config = settings()
    folder, _ = models.resolve(config.model_name, config.cache, config.read_token)
    rounds = list(draw_rounds(config, folder, 2 if arguments.quick else arguments.rounds))
    if arguments.only:
        Bench(config, folder, rounds[:1], (arguments.only,)).run()
        print(json.dumps({"peak_gib": own_peak()}))
        return
    variants = ("plain", "packing", "ours 8", "ours 32") if arguments.quick else VARIANTS
    peak = matmul_peak()
    bench = Bench(config, folder, rounds, variants)
    seconds = bench.run()
    memory = {} if arguments.quick else {variant: peak_memory(variant) for variant in variants}
    report(bench, seconds, memory, peak)
    for variant in ("ours 8", "ours 32"):
        print(f"\n{profile(bench, variant)}")
    alone = sum(products_seconds(bench.ours.model, examples) / EXAMPLES for examples in rounds)
    print(
        "\nthe products of ours 32 alone, each shape by itself, take "
        f"{alone / sum(seconds['ours 32']):.2f} of its time and reach "
        f"{bench.share_of_peak({'ours 32': [alone]}, 'ours 32', peak):.2f} of the peak"
    )
    ratio = {name: spread(seconds, slow, fast)[1] for name, slow, fast in RATIOS}
    print(
        json.dumps(
            {**{name: round(value, 2) for name, value in ratio.items()}}
            | {
                "gradient_relative_error": gradient_error(config, folder, rounds[0][:8]),
                "share_of_peak": round(
                    max(bench.share_of_peak(seconds, v, peak) for v in variants), 3
                ),
                "rounds": len(rounds),
                "threads": torch.get_num_threads(),
                "dtype": str(models.compute_dtype(config.train.bf16)),
                "processor": platform.processor() or platform.machine(),
            }
        )
    )


RATIOS = (
    ("vs_plain", "plain", "ours 8"),
    ("vs_packing", "packing", "ours 8"),
    ("vs_plain_32", "plain", "ours 32"),
)


HYBRID_RATIOS = (
    ("hybrid_vs_plain", "plain", "ours 8"),
    ("hybrid_vs_plain_32", "plain", "ours 32"),
    ("hybrid_unshared_vs_plain", "plain", "ours 1"),
)


def compare_hybrid(model: str, count: int) -> None:
    """Measure a model of `HYBRIDS` over `count` rounds, and print."""
    with tempfile.TemporaryDirectory() as scratch:
        demo = settings()
        source, _ = models.resolve(demo.model_name, demo.cache, demo.read_token)
        folder = make_hybrid(model, source, Path(scratch))
        config = demo.changed({"model_name": folder})
        rounds = list(draw_rounds(config, folder, count))
        bench = Bench(config, folder, rounds, ("plain", "ours 1", "ours 8", "ours 32"))
        seconds = bench.run()
        found: dict[str, Any] = {"model": model}
        for name, slow, fast in HYBRID_RATIOS:
            least, middle, most = spread(seconds, slow, fast)
            found[name] = round(middle, 2)
            print(f"{fast}: {middle:.1f}x ({least:.1f} to {most:.1f}) plain TRL")
        found["gradient_relative_error"] = gradient_error(config, folder, rounds[0][:8])
    found |= {
        "rounds": count,
        "threads": torch.get_num_threads(),
        "dtype": str(models.compute_dtype(config.train.bf16)),
    }
    print(json.dumps(found))


def size(variant: str) -> int:
    """Return the number of examples that a variant takes of a round."""
    return max(STEP, int(variant.split()[1])) if variant.startswith("ours") else STEP


def settings() -> Config:
    """Return the settings of all variants: the original's LoRA, a global batch of a round."""
    shared = os.environ.get("RAY_SQL_SHARED")
    return load(
        Config,
        [],
        model_name="demo",
        output_name="speed",
        task_type="sql",
        dataset_id=f"{shared}/data/spider" if shared else "demo",
        split=["dev"] if shared else ["seen"],
        grad_accum_steps=EXAMPLES,  # the largest step
        scaling={"num_workers": 0},
        tracking={"enabled": False},
    )


def draw_rounds(config: Config, folder: str, count: int) -> Iterator[list[TokenizedExample]]:
    """Yield rounds of `EXAMPLES` tokenised examples on one database.

    A database's chance is its number of examples.
    """
    corpus = data.load(config)
    tokenizer = models.load_tokenizer(folder)
    by_database: dict[str, list[Any]] = defaultdict(list)
    for example in corpus.splits["train"]:
        by_database[example.db_id].append(example)
    large = {name: examples for name, examples in by_database.items() if len(examples) >= EXAMPLES}
    encoder = make_encoder(tokenizer, config, corpus.schemas)
    draw = random.Random(0)
    for name in draw.choices(
        list(large), weights=[len(examples) for examples in large.values()], k=count
    ):
        chosen = draw.sample(large[name], EXAMPLES)
        yield [encoder.encode(example) for example in chosen]


class Bench:
    """Hold the variants' trainers, and the step each makes of a round."""

    def __init__(
        self,
        config: Config,
        folder: str,
        rounds: Sequence[Sequence[TokenizedExample]],
        variants: Sequence[str],
    ) -> None:
        self.config, self.rounds, self.variants = config, rounds, variants
        cluster.keep_freed_memory()
        self._scratch = tempfile.TemporaryDirectory()
        self._tokenizer = models.load_tokenizer(folder)
        self.steps: dict[str, Callable[[Sequence[TokenizedExample]], None]] = {}
        if any(variant.startswith("ours") for variant in variants):
            self.ours = self._our_trainer(folder)
        if "plain" in variants:
            self.steps["plain"] = self._peer(folder, packing=False)
        if "packing" in variants:
            self.steps["packing"] = self._peer(folder, packing=True)
        for variant in variants:
            if variant.startswith("ours"):
                self.steps[variant] = our_step(self.ours, config, int(variant.split()[1]))

    def run(self) -> dict[str, list[float]]:
        """Return the seconds an example of every variant in every round, after a warm-up."""
        seconds: dict[str, list[float]] = {variant: [] for variant in self.variants}
        draw = random.Random(1)
        for number, examples in enumerate([self.rounds[0][:8], *self.rounds]):
            for variant in draw.sample(self.variants, len(self.variants)):
                chosen = examples[: size(variant)]
                started = time.perf_counter()
                self.steps[variant](chosen)
                if number:
                    seconds[variant].append((time.perf_counter() - started) / len(chosen))
            said = "  ".join(
                f"{variant} {each[-1]:.2f}" for variant, each in seconds.items() if each
            )
            print(
                f"round {number} of {len(self.rounds)}, seconds an example: {said}", file=sys.stderr
            )
        return seconds

    def share_of_peak(self, seconds: dict[str, list[float]], variant: str, peak: float) -> float:
        """Return the share of the machine's matrix multiplication speed that a variant reaches.

        Every distinct token counts once.
        """
        work = sum(
            useful_flops(self.ours.model, examples) / len(examples) for examples in self.rounds
        )
        return work / sum(seconds[variant]) / peak

    def _our_trainer(self, folder: str) -> Any:
        base = models.load_base(folder, self.config.quantization, self.config.train.bf16)
        return trainer.build(
            base,
            self._tokenizer,
            self.rounds[0],
            self.config,
            replace(self.config.batching, examples_per_row=STEP),
            Path(self._scratch.name),
        )

    def _peer(self, folder: str, packing: bool) -> Callable[[Sequence[TokenizedExample]], None]:
        """Return one optimizer step of TRL's own trainer over examples."""
        built = plain_trl(
            folder, self._tokenizer, self.rounds[0], self.config, Path(self._scratch.name), packing
        )
        model = built.accelerator.prepare_model(built.model)
        optimizer = torch.optim.AdamW(
            [w for w in built.model.parameters() if w.requires_grad], lr=1e-5, fused=True
        )

        def step(examples: Sequence[TokenizedExample]) -> None:
            made = self._batches(built, _columns(examples), packing)
            items = torch.tensor(sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in made))
            for batch in made:
                built.training_step(model, batch, num_items_in_batch=items)
            optimizer.step()
            optimizer.zero_grad()

        return step

    def _batches(self, built: Any, examples: Any, packing: bool) -> list[dict[str, torch.Tensor]]:
        """Return the trainer's own batches, of one example or one packed row each."""
        from trl import pack_dataset

        if packing:
            examples = pack_dataset(examples, PACKED_LENGTH, "bfd")
        return [built.data_collator([example]) for example in examples]


def plain_trl(
    folder: str,
    tokenizer: Any,
    examples: Sequence[TokenizedExample],
    config: Config,
    scratch: Path,
    packing: bool = False,
) -> Any:
    """Build TRL's own trainer, loss and collator over the same tokens, with a run's settings.

    It has the example-by-example set-up of the original project, on a CPU.
    """
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    from trl import SFTConfig, SFTTrainer

    dtype = models.compute_dtype(config.train.bf16)
    base = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=dtype,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
        ),
    )
    args = SFTConfig(
        output_dir=str(scratch),
        seed=config.seed,
        per_device_train_batch_size=config.train_batch_size,
        gradient_accumulation_steps=config.grad_accum_steps,
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.train.lr_scheduler_type,
        warmup_steps=config.train.warmup_ratio,  # below 1 it is read as a share of all steps
        weight_decay=config.train.weight_decay,
        max_grad_norm=config.train.max_grad_norm,
        max_steps=config.train.max_steps,
        save_strategy="no",
        bf16=dtype == torch.bfloat16,
        use_cpu=True,
        activation_checkpointing=False,
        max_length=PACKED_LENGTH,
        packing=packing,
        dataset_kwargs={"skip_prepare_dataset": True},
        report_to="none",
        disable_tqdm=True,
    )
    return SFTTrainer(
        model=base,
        args=args,
        train_dataset=_columns(examples),
        processing_class=tokenizer,
        peft_config=LoraConfig(task_type="CAUSAL_LM", **config.lora.model_dump()),
    )


def _columns(examples: Sequence[TokenizedExample]) -> Any:
    """Return examples as TRL takes them."""
    from datasets import Dataset

    return Dataset.from_dict(
        {
            "input_ids": [row.input_ids for row in examples],
            "labels": [row.labels for row in examples],
        }
    )


def our_step(
    built: trainer.StepTrainer, config: Config, together: int
) -> Callable[[Sequence[TokenizedExample]], None]:
    """Return one optimizer step of this project's trainer over examples.

    Up to `together` questions of a database share a row.
    """
    optimizer = torch.optim.AdamW(
        [w for w in built.model.parameters() if w.requires_grad], lr=1e-5, fused=True
    )
    model = built.accelerator.prepare_model(built.model)
    batching = replace(config.batching, row_length=10**6, examples_per_row=together)
    pad = built.processing_class.pad_token_id

    def step(examples: Sequence[TokenizedExample]) -> None:
        batch = Steps(examples, batching, 0, 1, pad)[0]
        built.training_step(model, batch)
        optimizer.step()
        optimizer.zero_grad()

    return step


def useful_flops(model: Any, examples: Sequence[TokenizedExample]) -> float:
    """Return the multiplications that one step of a model with LoRA cannot do without.

    These are forward and the gradient with respect to the inputs for each distinct token (2 + 2 per
    frozen weight), forward and both gradients for LoRA's weights (6), and the vocabulary only where
    a label is.
    """
    unique = sum(row.tokens for row in rows.share(examples, len(examples), 10**9))
    labels = sum(len(row.input_ids) - row.prompt_length for row in examples)
    lora = sum(w.numel() for w in model.parameters() if w.requires_grad)
    head = model.get_output_embeddings().weight.numel()
    # peft's wrapper has the same name as the 4-bit layer in it
    layers = [
        m
        for m in model.modules()
        if type(m).__name__ == "Linear4bit" and not hasattr(m, "base_layer")
    ]
    frozen = sum(m.in_features * m.out_features for m in layers)
    return float(unique * (4 * frozen + 6 * lora) + labels * 4 * head)


def products_seconds(model: Any, examples: Sequence[TokenizedExample]) -> float:
    """Return the seconds of the matrix products that `useful_flops` counts.

    Each shape is timed by itself: this is a step in which nothing else takes time.
    """
    tokens = sum(row.tokens for row in rows.share(examples, len(examples), 10**9))
    labels = sum(len(row.input_ids) - row.prompt_length for row in examples)
    dtype = models.compute_dtype(settings().train.bf16)
    layers = [m for m in model.modules() if hasattr(m, "lora_A")]
    counted = Counter((m.in_features, m.out_features, m.r["default"]) for m in layers)

    def seconds(products: Sequence[tuple[int, int, int]]) -> float:
        return sum(
            _fastest(*(torch.randn(*each).to(dtype) for each in ((m, k), (k, n))))
            for m, k, n in products
        )

    total = 0.0
    for (wide, out, rank), count in counted.items():
        frozen = [(tokens, wide, out), (tokens, out, wide)]
        lora = [
            (tokens, wide, rank),
            (tokens, rank, out),
            (tokens, out, rank),
            (tokens, rank, wide),
        ]
        total += count * seconds([*frozen, *lora, (rank, tokens, wide), (rank, tokens, out)])
    vocabulary, hidden = model.get_output_embeddings().weight.shape
    return total + seconds([(labels, hidden, vocabulary), (labels, vocabulary, hidden)])


def _fastest(a: torch.Tensor, b: torch.Tensor, times: int = 7) -> float:
    """Return the seconds of `a @ b`, the shortest of a few after one that warms up."""
    took = []
    for _ in range(times + 1):
        started = time.perf_counter()
        a @ b
        took.append(time.perf_counter() - started)
    return min(took[1:])


def matmul_peak() -> float:
    """Return the FLOP/s of the largest of a few square products, in the training's type."""
    dtype = models.compute_dtype(settings().train.bf16)
    sizes = (1024, 2048, 3072)
    return max(2 * n**3 / _fastest(*(torch.randn(n, n).to(dtype) for _ in range(2))) for n in sizes)


def own_peak() -> float:
    """Return the peak resident memory of this process in GiB.

    `ru_maxrss` would be that of the process it was forked from, where that is larger.
    """
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) / 2**20


def peak_memory(variant: str) -> float:
    """Return the peak GiB of a process that makes one step of one round."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.training_speed", "--only", variant, "--rounds", "1"],
        capture_output=True,
        text=True,
        check=True,
    )
    peak: float = json.loads(done.stdout.splitlines()[-1])["peak_gib"]
    return peak


def spread(seconds: dict[str, list[float]], slow: str, fast: str) -> tuple[float, float, float]:
    """Return the smallest, median and largest ratio of two variants' seconds in a round."""
    ratios = sorted(a / b for a, b in zip(seconds[slow], seconds[fast], strict=True))
    return ratios[0], median(ratios), ratios[-1]


def report(
    bench: Bench, seconds: dict[str, list[float]], memory: dict[str, float], peak: float
) -> None:
    """Print the table of RESULTS.md."""
    lengths = [len(row.input_ids) for examples in bench.rounds for row in examples]
    print(
        f"{len(bench.rounds)} rounds of {EXAMPLES} examples, {min(lengths)} to {max(lengths)} "
        f"tokens (median {median(lengths):.0f}); "
        f"matrix multiplication peak {peak / 1e9:.0f} GFLOP/s\n"
    )
    print(
        "| variant | examples/s | vs plain (spread) | vs packing (spread) | share of peak | peak "
        "memory, GiB |"
    )
    print("|---|---|---|---|---|---|")
    for variant in bench.variants:
        rate = len(bench.rounds) / sum(seconds[variant])
        cells = [
            "{1:.1f}x ({0:.1f} to {2:.1f})".format(*spread(seconds, of, variant))
            for of in ("plain", "packing")
        ]
        gib = f"{memory[variant]:.1f}" if variant in memory else "not run"
        print(
            f"| {variant} | {rate:.2f} | {cells[0]} | {cells[1]} | "
            f"{bench.share_of_peak(seconds, variant, peak):.2f} | {gib} |"
        )


def profile(bench: Bench, variant: str) -> str:
    """Return the time of one round by kind of operation."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiling

    with profiling(activities=[ProfilerActivity.CPU]) as seen:
        bench.steps[variant](bench.rounds[0][: size(variant)])
    kinds: dict[str, float] = defaultdict(float)
    for event in seen.key_averages():
        kinds[_kind(event.key)] += event.self_cpu_time_total
    whole = sum(kinds.values())
    lines = [
        f"| {kind} | {100 * each / whole:.0f} % |"
        for kind, each in sorted(kinds.items(), key=lambda item: -item[1])
    ]
    return "\n".join(
        [f"| operation in a round of {variant} | share of the time |", "|---|---|", *lines]
    )


KINDS = {
    "matrix multiplication": ("mm", "linear", "bmm"),
    "attention kernels and softmax": ("attention", "softmax"),
    "copies and casts": (
        "copy",
        "_to_copy",
        "contiguous",
        "clone",
        "cat",
        "stack",
        "index",
        "slice",
        "repeat",
        "fill",
        "zero",
    ),
    "dropout": ("dropout", "bernoulli"),
    "elementwise": (
        "mul",
        "add",
        "silu",
        "neg",
        "pow",
        "mean",
        "rsqrt",
        "div",
        "sub",
        "sum",
        "native",
    ),
    "optimizer": ("adam", "norm"),
}


def _kind(name: str) -> str:
    return next(
        (kind for kind, words in KINDS.items() if any(word in name for word in words)), "other"
    )


def gradient_error(config: Config, folder: str, examples: Sequence[TokenizedExample]) -> float:
    """Return the largest relative difference of a LoRA weight's gradient.

    One shared row is compared with separate rows, in float32 with dropout off.
    """
    exact = config.changed({"train.bf16": False, "lora.lora_dropout": 0.0})
    found = []
    with tempfile.TemporaryDirectory() as scratch:
        base = models.load_base(folder, exact.quantization, exact.train.bf16)
        built = trainer.build(
            base,
            models.load_tokenizer(folder),
            examples,
            exact,
            replace(exact.batching, examples_per_row=STEP),
            Path(scratch),
        )
        torch.manual_seed(0)
        for name, weight in built.model.named_parameters():
            if "lora_B" in name:  # zero at first, which would hide every gradient of lora_A
                weight.data.normal_(std=0.02)
        for together in (1, len(examples)):
            built.model.zero_grad()
            batching = replace(exact.batching, examples_per_row=together)
            built.training_step(built.model, Steps(examples, batching, 0, 1, 0)[0])
            found.append(
                {
                    name: w.grad.clone()
                    for name, w in built.model.named_parameters()
                    if w.requires_grad
                }
            )
    separate, shared = found
    errors = [
        float((shared[name] - gradient).norm() / gradient.norm())
        for name, gradient in separate.items()
    ]
    return float(f"{max(errors):.2g}")


if __name__ == "__main__":
    main()
