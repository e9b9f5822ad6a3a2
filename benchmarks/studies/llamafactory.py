"""Measure a training step beside LLaMA-Factory's, on the same examples in one interleaved run.

    python -m venv peer && peer/bin/pip install torch==2.13.0 llamafactory==0.9.5 bitsandbytes
    peer/bin/pip uninstall torchvision torchaudio    # where torch is built for CPUs, unlike these
    RAY_SQL_SHARED=… python -m benchmarks.studies.llamafactory --python peer/bin/python

With --quick it has one round. LLaMA-Factory pins other versions of transformers, TRL and PEFT, so
it has an environment and a process of its own, which waits while this one computes. Rounds, model,
LoRA and type are those of `benchmarks.training_speed`: 32 examples of one database, SmolLM2-135M in
NF4.

One example a pass and this project's 8 a row take the first 8 of a round. LLaMA-Factory's packing
and 32 a row take all. (Its neat_packing keeps examples apart and pads each row to 2,048 tokens.) A
ratio is that of two variants' seconds an example in the same round. The last line is one JSON
object.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.training_speed import (
    EXAMPLES,
    PACKED_LENGTH,
    STEP,
    Bench,
    draw_rounds,
    settings,
    spread,
)
from ray_sql import models
from ray_sql.config import Config
from ray_sql.rows import TokenizedExample

TAKES = {"plain": STEP, "packing": EXAMPLES, "ours 8": STEP, "ours 32": EXAMPLES}
"""How many examples of a round a variant takes; the first two are LLaMA-Factory's."""


class Peer:
    """Run LLaMA-Factory in its own process."""

    def __init__(self, python: Path, config: Config, folder: str) -> None:
        script = Path(__file__).with_name("llamafactory_peer.py")
        command = [str(python), "-P", str(script)]  # without -P this file would be the package
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        given = {
            "model": folder,
            "variants": ["plain", "packing"],
            "rank": config.lora.r,
            "alpha": config.lora.lora_alpha,
            "dropout": config.lora.lora_dropout,
            "bf16": str(models.compute_dtype(config.train.bf16)) == "torch.bfloat16",
            "packed_length": PACKED_LENGTH,
        }
        if self._ask(given) != "ready":
            raise SystemExit(f"{python} cannot run LLaMA-Factory; its message is above")

    def _ask(self, given: dict[str, Any]) -> str:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps(given) + "\n")
        self._process.stdin.flush()
        return self._process.stdout.readline().strip()

    def step(self, variant: str, examples: Sequence[TokenizedExample]) -> dict[str, float]:
        """Return the seconds of a step over these examples, and its loss."""
        asked = [{"input_ids": row.input_ids, "labels": row.labels} for row in examples]
        answer: dict[str, float] = json.loads(self._ask({"variant": variant, "examples": asked}))
        return answer


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--python", type=Path, required=True, help="the Python for which llamafactory is installed"
    )
    parser.add_argument("--rounds", type=int, default=5, help="rounds of 32 examples")
    parser.add_argument("--quick", action="store_true", help="one round")
    arguments = parser.parse_args(argv)
    config = settings()
    folder, _ = models.resolve(config.model_name, config.cache, config.read_token)
    rounds = list(draw_rounds(config, folder, 1 if arguments.quick else arguments.rounds))
    bench = Bench(config, folder, rounds, ("ours 8", "ours 32"))
    seconds = run(bench, Peer(arguments.python, config, folder))
    print(
        "| variant | examples/s | against LLaMA-Factory, one a pass | against its packing "
        "|\n|---|---|---|---|"
    )
    for variant in TAKES:
        rate = len(rounds) / sum(seconds[variant])
        cells = [
            "{1:.1f}x ({0:.1f} to {2:.1f})".format(*spread(seconds, of, variant))
            for of in ("plain", "packing")
        ]
        print(f"| {variant} | {rate:.2f} | {cells[0]} | {cells[1]} |")
    ratios = {
        f"{ours} against {peer}": round(spread(seconds, peer, ours)[1], 2)
        for ours in ("ours 8", "ours 32")
        for peer in ("plain", "packing")
    }
    print(json.dumps({**ratios, "rounds": len(rounds)}))


def run(bench: Bench, peer: Peer) -> dict[str, list[float]]:
    """Return the seconds an example of every variant in every round, after a warm-up."""
    seconds: dict[str, list[float]] = {variant: [] for variant in TAKES}
    draw = random.Random(1)
    for number, examples in enumerate([bench.rounds[0][:STEP], *bench.rounds]):
        for variant in draw.sample(list(TAKES), len(TAKES)):
            chosen = examples[: TAKES[variant]]
            if variant in bench.steps:
                started = time.perf_counter()
                bench.steps[variant](chosen)
                taken = time.perf_counter() - started
            else:
                taken = peer.step(variant, chosen)["seconds"]
            if number:
                seconds[variant].append(taken / len(chosen))
        said = "  ".join(f"{variant} {each[-1]:.2f}" for variant, each in seconds.items() if each)
        print(f"round {number} of {len(bench.rounds)}, seconds an example: {said}", file=sys.stderr)
    return seconds


if __name__ == "__main__":
    main()
