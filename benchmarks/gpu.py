"""Measure a training step on a GPU: TRL one by one, padded and packed, and shared rows.

    bash benchmarks/gpu.sh          the GPU tests, then this
    python -m benchmarks.gpu        (--quick: fewer rounds and variants; --tiny: any machine)

Needs torch, transformers, peft, trl, datasets and bitsandbytes, and no network. The model has the
shapes of Qwen2.5-1.5B and random weights, the examples random tokens. A round is 32 examples on one
database: 400 to 1500 tokens of schema (log-uniform), then 40 to 80 of question and SQL, of which 20
to 35 carry the loss. Every variant makes one optimizer step (LoRA rank 64 over NF4, bfloat16, paged
8-bit AdamW) on the first 8 of them, or on as many as its rows hold, in an order drawn anew for each
round. A ratio is that of seconds per example in the same round. The variants:

    plain         TRL, one example a forward pass
    padded 8      TRL, 8 a pass, padded to the longest (examples of a round are of about one length:
                  grouping by length at its best)
    packing       TRL's best-fit-decreasing packing to 4096 tokens; FlashAttention where flash-attn
                  is installed, else SDPA
    packing flex  the same through transformers' FlexAttention
    ours N        shared rows of N questions, FlexAttention, a row a pass or four in `one pass`
                  `mask`: SDPA with a mask
                  `expanded`: 4-bit weights expanded once, not at every call
                  `compiled`: every decoder layer through torch.compile

`share of peak` counts the multiplications that distinct tokens of a step need, attention's left
out, against the fastest bfloat16 product of two 8192 x 8192 matrices. Peak memory is that of a
variant's own model, gradients, optimizer and activations. Each part runs in a process of its own,
so that one that fails leaves the others. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.training_speed import spread, useful_flops
from ray_sql import models
from ray_sql.config import Config, load
from ray_sql.models import cpu_linear, packed_attention
from ray_sql.rows import TokenizedExample
from ray_sql.rows.batch import Steps
from ray_sql.train import trainer

SHAPE = {
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "max_position_embeddings": 32768,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
}
TINY = SHAPE | {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 320,
}
EXAMPLES = 32
"""Examples of a round."""
STEP = 8
"""Of these, how many a variant takes that needs no more: the original project's global batch."""
WARM_UP = 3
"""Rounds before those that count: kernels are compiled in the first for one length, in the second
for any."""
PACKED_LENGTH = 4096
TRL = ("plain", "padded 8", "packing", "packing flex")
OURS = ("ours 2 one pass", "ours 8", "ours 8 one pass", "ours 16", "ours 32")
PARTS: dict[str, tuple[str, ...]] = {
    "checkpointing": (
        *TRL,
        *OURS,
        "ours 8 mask",
        "ours 32 mask",
        "ours 8 expanded",
        "ours 32 expanded",
    ),
    "no checkpointing": (
        "plain",
        "packing",
        *OURS,
        "ours 32 mask",
        "ours 8 expanded",
        "ours 32 expanded",
    ),
    "compiled": ("ours 8", "ours 32", "ours 8 compiled", "ours 32 compiled"),
}
"""Variants measured against each other in one process; all but the first part keep activations."""
QUICK = {
    "checkpointing": ("plain", "packing", "ours 8", "ours 32"),
    "no checkpointing": ("plain", "packing", "ours 8"),
}
SECONDS = {"gradients": 150, "checkpointing": 260, "no checkpointing": 110, "compiled": 90}
"""How long a part may take at most; what it has measured by then counts."""


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=6, help="rounds of 32 examples")
    parser.add_argument(
        "--seconds", type=float, default=420, help="how long all parts together may take"
    )
    parser.add_argument("--quick", action="store_true", help="two rounds of few variants")
    parser.add_argument(
        "--tiny",
        action="store_true",
        help="a miniature of everything, to rehearse on a machine without a GPU",
    )
    parser.add_argument("--parts", default="", help="which parts, by comma; by default all")
    parser.add_argument("--tests", type=int, help="exit status of the GPU tests, for the last line")
    parser.add_argument(
        "--one", nargs=3, metavar=("PART", "FOLDER", "FILE"), help="one part, in this process"
    )
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available() and not arguments.tiny:
        sys.exit("benchmarks.gpu: no GPU here; --tiny rehearses without one")
    if arguments.one:
        part, folder, file = arguments.one
        one_part(part, folder, file, arguments)
    else:
        all_parts(arguments)


def all_parts(arguments: argparse.Namespace) -> None:
    """Run every part in a process of its own, then print the tables and the last line."""
    chosen = ["gradients", *(QUICK if arguments.quick else PARTS)]
    if arguments.parts:
        chosen = arguments.parts.split(",")
    found: dict[str, Any] = {}
    until = time.monotonic() + arguments.seconds
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        make_model(folder, TINY if arguments.tiny else SHAPE)
        for part in chosen:
            print(f"\n== {part}", flush=True)
            limit = min(SECONDS[part], until - time.monotonic())
            found[part] = run_part(part, folder, Path(scratch) / f"{part}.json", arguments, limit)
    for part in chosen:
        if "seconds" in found[part]:
            print(f"\n{table(part, found[part])}")
    print(json.dumps(summary(found, arguments.tests)))


def run_part(
    part: str, folder: Path, file: Path, arguments: argparse.Namespace, limit: float
) -> dict[str, Any]:
    """Return what a part wrote in at most `limit` seconds, finished or not."""
    if limit < 10:
        return {"ended": "no time left"}
    command = [sys.executable, "-m", "benchmarks.gpu", "--one", part, str(folder), str(file)]
    command += ["--rounds", str(arguments.rounds)]
    command += [flag for flag in ("--quick", "--tiny") if getattr(arguments, flag[2:])]
    started = time.monotonic()
    try:
        status: int | str = subprocess.run(command, check=False, timeout=limit).returncode
    except subprocess.TimeoutExpired:
        status = f"stopped after {limit:.0f} s"
    print(f"{part}: {time.monotonic() - started:.0f} s, exit {status}", flush=True)
    found: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    return found | ({} if status == 0 else {"ended": status})


def one_part(part: str, folder: str, file: str, arguments: argparse.Namespace) -> None:
    """Measure one part and write what is known after every round."""
    rounds = draw_rounds(
        WARM_UP + (2 if arguments.quick else arguments.rounds), folder, 10 if arguments.tiny else 1
    )
    if part == "gradients":
        Path(file).write_text(json.dumps(gradient_errors(folder, rounds[0][:STEP])))
        return
    bench = Bench(part, folder, rounds, (QUICK if arguments.quick else PARTS)[part])
    bench.run(Path(file))
    if torch.cuda.is_available() and not arguments.quick and part == "checkpointing":
        for variant in ("plain", "ours 8", "ours 32"):
            print(bench.profile(variant), flush=True)


def device() -> str:
    """Return the device of the model."""
    return "cuda:0" if torch.cuda.is_available() else "cpu"


def make_model(folder: Path, shape: Mapping[str, Any]) -> None:
    """Save a Qwen2 of random weights in bfloat16, with a tokenizer that knows bytes.

    Examples are made of token ids.
    """
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<|pad|>", "<|end|>", *alphabet])}
    made = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast = PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<|pad|>", eos_token="<|end|>")
    fast.save_pretrained(folder)
    models.quiet()
    torch.manual_seed(0)
    with torch.device(device()):
        config = AutoConfig.for_model(
            "qwen2", pad_token_id=0, bos_token_id=1, eos_token_id=1, **shape
        )
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    clear_peak(empty=True)


def settings(folder: str, **changes: Any) -> Config:
    """Return the settings of all variants: the original's LoRA, a global batch of a round."""
    return load(
        Config,
        [],
        model_name=folder,
        output_name="gpu",
        task_type="sql",
        dataset_id="demo",
        grad_accum_steps=EXAMPLES,
        scaling={"num_workers": 0},
        tracking={"enabled": False},
        **changes,
    )


def draw_rounds(count: int, folder: str, divisor: int) -> list[list[TokenizedExample]]:
    """Return rounds of examples on one database each.

    Their lengths are those of the module's docstring, divided by `divisor`.
    """
    vocabulary = json.loads((Path(folder) / "config.json").read_text())["vocab_size"]
    draw = random.Random(0)

    def tokens(length: float) -> list[int]:
        return [draw.randrange(300, vocabulary) for _ in range(max(2, round(length / divisor)))]

    made = []
    for number in range(count):
        schema = tokens(math.exp(draw.uniform(math.log(400), math.log(1500))))
        examples = []
        for index in range(EXAMPLES):
            own, answer = draw.uniform(40, 80), draw.uniform(20, 35)
            prompt = schema + tokens(own - answer)
            examples.append(
                TokenizedExample(str(index), f"db{number}", prompt + tokens(answer), len(prompt))
            )
        made.append(examples)
    return made


class Bench:
    """Hold a part's trainers, one for each kind of model, and each variant's step."""

    def __init__(
        self,
        part: str,
        folder: str,
        rounds: Sequence[Sequence[TokenizedExample]],
        variants: Sequence[str],
    ) -> None:
        self._part, self._folder, self._rounds = part, folder, rounds
        self._config = settings(folder, train={"gradient_checkpointing": part == "checkpointing"})
        self._tokenizer = models.load_tokenizer(folder)
        self._scratch = tempfile.TemporaryDirectory()
        self._own: dict[str, int] = {}
        self._trainers: dict[str, Any] = {}
        self._failed: dict[str, str] = {}
        self.variants = list(variants)

    def run(self, file: Path) -> None:
        """Make all rounds.

        After each of them `file` holds seconds an example, peak memory and failures.
        """
        seconds: dict[str, list[float]] = {variant: [] for variant in self.variants}
        flops: dict[str, list[float]] = {variant: [] for variant in self.variants}
        memory: dict[str, float] = dict.fromkeys(self.variants, 0.0)
        draw, peak = random.Random(1), matmul_peak()
        for number, examples in enumerate(self._rounds, start=1 - WARM_UP):
            for variant in draw.sample(self.variants, len(self.variants)):
                chosen = examples[: size(variant)]
                taken = self._measured(variant, chosen)
                if taken is None:
                    self.variants.remove(variant)
                elif number > 0:
                    seconds[variant].append(taken[0] / len(chosen))
                    flops[variant].append(
                        useful_flops(self._trainer(variant).model, chosen) / len(chosen)
                    )
                    memory[variant] = max(memory[variant], taken[1])
            said = "  ".join(
                f"{variant} {each[-1] * 1e3:.1f}" for variant, each in seconds.items() if each
            )
            what = f"round {number}" if number > 0 else "warm-up"
            print(f"{what}, {len(examples[0].input_ids)} tokens, ms an example: {said}", flush=True)
            known = {
                "seconds": seconds,
                "flops": flops,
                "memory": memory,
                "failed": self._failed,
                "peak": peak,
            }
            file.write_text(
                json.dumps(known | {"gpu": gpu(), "attention": self._attention("packing")})
            )

    def profile(self, variant: str) -> str:
        """Return the GPU's share of a step's time, and the kernels that take most of it."""
        from torch.profiler import ProfilerActivity
        from torch.profiler import profile as profiling

        if variant not in self.variants:
            return ""
        chosen = self._rounds[-1][: 2 if variant == "plain" else size(variant)]
        taken = self._measured(variant, chosen)
        with profiling(activities=[ProfilerActivity.CUDA]) as seen:
            self._measured(variant, chosen)
        events = sorted(seen.key_averages(), key=lambda event: -event.self_device_time_total)
        busy = sum(event.self_device_time_total for event in events) / 1e6
        lines = [
            f"{100 * e.self_device_time_total / 1e6 / busy:4.0f} %  {e.count:6} x {e.key[:90]}"
            for e in events[:10]
        ]
        wall = taken[0] if taken else math.nan
        return (
            f"{variant}: the GPU computes {busy:.2f} of {wall:.2f} s a step, most of it in\n"
            + "\n".join(lines)
        )

    def _measured(
        self, variant: str, examples: Sequence[TokenizedExample]
    ) -> tuple[float, float] | None:
        """Return seconds and peak GiB of one step; None, and a reason, where it fails."""
        try:
            built = self._trainer(variant)
            self._arrange(variant, built)
            work = batches(variant, examples) if kind(variant) == "trl" else examples
            before = clear_peak()
            started = time.perf_counter()
            self._step(variant, built, work)
            synchronize()
            taken = time.perf_counter() - started
            own = self._own[kind(variant)]
            return taken, (peak_bytes() - before + own) / 2**30
        # a variant that cannot run here (no memory, no kernel) must not take the others with it
        except Exception as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        # checkpointing's hooks live on in the frames of a forward pass that broke off, and would
        # catch other tensors
        gc.collect()
        self._failed[variant] = reason
        print(f"{variant} failed: {reason}", flush=True)
        if kind(variant) in self._trainers:
            self._trainers[kind(variant)].model.zero_grad()
        clear_peak(empty=True)
        return None

    def _trainer(self, variant: str) -> Any:
        of = kind(variant)
        if of not in self._trainers:
            before = clear_peak()
            self._trainers[of] = built = self._peer() if of == "trl" else self._ours(of)
            if self._part == "checkpointing":
                built.model.activation_checkpointing_enable()
            built.prepared = built.accelerator.prepare_model(built.model)
            built.create_optimizer()
            self._own[of] = clear_peak() - before
            print(f"{of}: a model of {self._own[of] / 2**30:.1f} GiB", flush=True)
        return self._trainers[of]

    def _ours(self, of: str) -> Any:
        base = models.load_base(
            self._folder, self._config.quantization, self._config.train.bf16, device()
        )
        if of == "expanded":
            cpu_linear.dequantise_once(base, models.compute_dtype(self._config.train.bf16))
        built = trainer.build(
            base,
            self._tokenizer,
            self._rounds[0],
            self._config,
            replace(self._config.batching, examples_per_row=STEP),
            Path(self._scratch.name),
        )
        if of == "compiled":
            for layer in (
                each
                for each in built.model.modules()
                if type(each).__name__.endswith("DecoderLayer")
            ):
                layer.compile(dynamic=True)
        print(f"{of}: attention {built.model.config._attn_implementation}", flush=True)
        built.fast = built.model.config._attn_implementation
        return built

    def _peer(self) -> Any:
        """Build TRL's own trainer and loss."""
        from datasets import Dataset
        from peft import LoraConfig
        from trl import SFTConfig, SFTTrainer

        dtype = models.compute_dtype(self._config.train.bf16)
        ours = trainer.arguments(self._config, Path(self._scratch.name), 1, dtype == torch.bfloat16)
        args = SFTConfig(
            output_dir=self._scratch.name,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=STEP,
            optim=ours.optim,
            bf16=dtype == torch.bfloat16,
            use_cpu=device() == "cpu",
            activation_checkpointing=self._part == "checkpointing",
            max_length=None,
            dataset_kwargs={"skip_prepare_dataset": True},
            report_to="none",
            disable_tqdm=True,
        )
        return SFTTrainer(
            model=models.load_base(
                self._folder, self._config.quantization, self._config.train.bf16, device()
            ),
            args=args,
            train_dataset=Dataset.from_dict(columns(self._rounds[0][:1])),
            processing_class=self._tokenizer,
            peft_config=LoraConfig(task_type="CAUSAL_LM", **self._config.lora.model_dump()),
        )

    def _attention(self, variant: str) -> str:
        """Return transformers' name of the attention that a variant of TRL uses."""
        from transformers.utils import is_flash_attn_2_available

        if "flex" in variant:
            return "flex_attention"
        return (
            "flash_attention_2" if "packing" in variant and is_flash_attn_2_available() else "sdpa"
        )

    def _arrange(self, variant: str, built: Any) -> None:
        if kind(variant) == "trl":
            built.model.set_attn_implementation(self._attention(variant))
        elif "mask" in variant:
            packed_attention.use_mask(built.model)
        else:
            built.model.set_attn_implementation(built.fast)

    def _step(self, variant: str, built: Any, work: Sequence[Any]) -> None:
        """Make one optimizer step.

        `work` is `batches`' result for a variant of TRL, else examples.
        """
        if kind(variant) == "trl":
            collate = (
                packed_collator(self._tokenizer) if "packing" in variant else built.data_collator
            )
            made = [collate(batch) for batch in work]
            items = torch.tensor(
                sum(int((each["labels"][:, 1:] != -100).sum()) for each in made), device=device()
            )
            for each in made:
                built.training_step(built.prepared, each, num_items_in_batch=items)
        else:
            batch = len(work) if "one pass" in variant else 1
            config = self._config.changed(
                {"train_batch_size": batch, "grad_accum_steps": EXAMPLES // batch}
            )
            batching = replace(config.batching, examples_per_row=int(variant.split()[1]))
            step = Steps(work, batching, 0, 1, self._tokenizer.pad_token_id)[0]
            built.training_step(built.prepared, step)
        built.optimizer.step()
        built.optimizer.zero_grad()


def kind(variant: str) -> str:
    """Name the trainer of a variant: TRL's, or ours with a model loaded, expanded or compiled."""
    if variant in TRL:
        return "trl"
    return next((word for word in ("expanded", "compiled") if word in variant), "ours")


def size(variant: str) -> int:
    """Return the number of examples that a variant takes of a round."""
    if variant in TRL:
        return STEP
    together = int(variant.split()[1])
    return 4 * together if "one pass" in variant else max(STEP, together)


def columns(examples: Sequence[TokenizedExample]) -> dict[str, list[list[int]]]:
    """Return examples as TRL's collator takes them."""
    return {
        "input_ids": [row.input_ids for row in examples],
        "labels": [row.labels for row in examples],
    }


def batches(variant: str, examples: Sequence[TokenizedExample]) -> list[list[dict[str, Any]]]:
    """Return the input of TRL's collator, pass by pass.

    A pass is one example, eight of about one length, or a packed row.
    """
    from datasets import Dataset
    from trl import pack_dataset

    data = Dataset.from_dict(columns(examples))
    if "packing" in variant:  # once for a whole run, so outside of a step's time
        return [[row] for row in pack_dataset(data, PACKED_LENGTH, "bfd")]
    together = 8 if "padded" in variant else 1
    listed = sorted(data, key=lambda row: -len(row["input_ids"]))
    return [listed[start : start + together] for start in range(0, len(listed), together)]


def packed_collator(tokenizer: Any) -> Any:
    """Return TRL's collator of packed rows, which its trainer makes where packing is set."""
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    return DataCollatorForLanguageModeling(pad_token_id=tokenizer.pad_token_id, padding_free=True)


def gradient_errors(folder: str, examples: Sequence[TokenizedExample]) -> dict[str, float]:
    """Return the relative error of the LoRA gradients, all as one vector.

    The reference is separate examples in float32. Dropout is off.
    """
    found: dict[str, torch.Tensor] = {}
    for bf16 in (False, True):
        config = settings(folder, train={"bf16": bf16}, lora={"lora_dropout": 0.0})
        base = models.load_base(folder, config.quantization, config.train.bf16, device())
        with tempfile.TemporaryDirectory() as scratch:
            built = trainer.build(
                base,
                models.load_tokenizer(folder),
                examples,
                config,
                replace(config.batching, examples_per_row=STEP),
                Path(scratch),
            )
        model, fast = (
            built.accelerator.prepare_model(built.model),
            built.model.config._attn_implementation,
        )
        draw = torch.Generator().manual_seed(0)
        for name, weight in built.model.named_parameters():
            if (
                weight.requires_grad
            ):  # lora_B is zero at first, which would hide every gradient of lora_A
                scale = 0.02 if "lora_B" in name else weight.shape[1] ** -0.5
                weight.data = torch.randn(weight.shape, generator=draw).mul(scale).to(weight)
        for name, together in (("separate", 1), (fast, STEP), (packed_attention.MASKED, STEP)):
            if name == packed_attention.MASKED:
                packed_attention.use_mask(built.model)
            built.model.zero_grad()
            batching = replace(config.batching, examples_per_row=together)
            built.training_step(model, Steps(examples, batching, 0, 1, 0)[0])
            gradient = torch.cat(
                [
                    w.grad.flatten().float().cpu()
                    for w in built.model.parameters()
                    if w.requires_grad
                ]
            )
            found[f"{'bf16' if bf16 else 'fp32'} {name.removeprefix('ray_sql_')}"] = gradient
            error = float(
                (gradient - found["fp32 separate"]).norm() / found["fp32 separate"].norm()
            )
            print(f"{'bf16' if bf16 else 'fp32'} {name}: gradients off by {error:.2g}", flush=True)
    exact = found.pop("fp32 separate")
    return {
        name: float(f"{float((each - exact).norm() / exact.norm()):.2g}")
        for name, each in found.items()
    }


def matmul_peak() -> float:
    """Return the FLOP/s of the fastest of some products of two square bfloat16 matrices."""
    side = 8192 if torch.cuda.is_available() else 512
    a, b = (torch.randn(side, side, device=device(), dtype=torch.bfloat16) for _ in range(2))
    best = math.inf
    for _ in range(8):
        synchronize()
        started = time.perf_counter()
        a @ b
        synchronize()
        best = min(best, time.perf_counter() - started)
    return 2 * side**3 / best


def synchronize() -> None:
    """Wait for the GPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def clear_peak(empty: bool = False) -> int:
    """Return the bytes in use on the GPU, from which a new peak is measured.

    `empty` gives back what PyTorch keeps for later.
    """
    if not torch.cuda.is_available():
        return 0
    torch.cuda.synchronize()
    if empty:
        torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return int(torch.cuda.memory_allocated())


def peak_bytes() -> int:
    """Return the most bytes in use on the GPU since `clear_peak`."""
    return int(torch.cuda.max_memory_allocated()) if torch.cuda.is_available() else 0


def gpu() -> str:
    """Name the device that was measured."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def table(part: str, found: Mapping[str, Any]) -> str:
    """Return a part's rows of RESULTS.md."""
    seconds = {variant: each for variant, each in found["seconds"].items() if each}
    against = [variant for variant in ("plain", "packing") if variant in seconds] or list(seconds)[
        :1
    ]
    head = [
        "variant",
        "examples/s",
        *(f"vs {of} (spread)" for of in against),
        "share of peak",
        "peak memory, GiB",
    ]
    lines = [
        f"{part}: {found['gpu']}, {found['peak'] / 1e12:.0f} TFLOP/s in bfloat16 products, packing "
        f"with {found['attention']}",
        f"| {' | '.join(head)} |",
        "|" + "---|" * len(head),
    ]
    for variant, each in seconds.items():
        cells = [
            "{1:.2f}x ({0:.2f} to {2:.2f})".format(
                *spread(shortest(seconds, of, variant), of, variant)
            )
            for of in against
        ]
        share = sum(found["flops"][variant]) / sum(each) / found["peak"]
        lines.append(
            f"| {variant} | {len(each) / sum(each):.1f} | {' | '.join(cells)} | {share:.2f} | "
            f"{found['memory'][variant]:.1f} |"
        )
    return "\n".join(
        [*lines, *(f"{variant} failed: {reason}" for variant, reason in found["failed"].items())]
    )


def shortest(seconds: Mapping[str, list[float]], *variants: str) -> dict[str, list[float]]:
    """Return the rounds that all these variants made.

    A part that was stopped may lack some of the last.
    """
    count = min(len(seconds[variant]) for variant in variants)
    return {variant: seconds[variant][:count] for variant in variants}


def summary(found: Mapping[str, Any], tests: int | None) -> dict[str, Any]:
    """Return the last line: the figures of every part, and what did not run."""
    parts = {name: part_summary(part) for name, part in found.items()}
    parts["gradients"] = found.get("gradients", "not run")
    return {
        "gpu": gpu(),
        "torch": torch.__version__,
        "tests": {None: "not run", 0: "passed"}.get(tests, f"failed with exit status {tests}"),
        **parts,
    }


def part_summary(part: Mapping[str, Any]) -> dict[str, Any]:
    """Return the figures of every variant of a part, and what failed."""
    seconds = {name: values for name, values in part.get("seconds", {}).items() if values}
    against = [peer for peer in ("plain", "packing") if peer in seconds]
    figures: dict[str, Any] = {}
    for name, values in seconds.items():
        ratios = {}
        for peer in against:
            ratio = spread(shortest(seconds, peer, name), peer, name)
            ratios[peer] = [round(value, 2) for value in ratio]
        figures[name] = {
            "examples_per_second": round(len(values) / sum(values), 2),
            "share_of_peak": round(sum(part["flops"][name]) / sum(values) / part["peak"], 4),
            "peak_gib": round(part["memory"][name], 2),
            "ratios": ratios,
        }
    if part.get("failed"):
        figures["failed"] = part["failed"]
    if "ended" in part:
        figures["ended"] = part["ended"]
    return figures


if __name__ == "__main__":
    main()
