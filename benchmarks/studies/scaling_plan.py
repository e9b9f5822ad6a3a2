"""Compute how a training step scales past one GPU: a plan on paper from measured parts.

    python -m benchmarks.studies.scaling_plan

docs/scaling.md shows the tables that this prints.

Measured: the time of a pass, forward and backward, on one H100 over 8, 16 and 32 questions that
share a row (RESULTS.md). Computed: the bytes of LoRA gradients that a step exchanges, from the
shapes of Qwen2.5-1.5B, and how a step's questions spread over GPUs, by the very function that
training uses (`rows.passes`). Assumed: the networks' nominal rates, and a ring all-reduce of which
nothing is hidden behind the backward pass. Nothing is trained, so it takes seconds with and without
--quick. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from ray_sql import rows
from ray_sql.config import Config, load
from ray_sql.rows import TokenizedExample

EXAMPLES_PER_SECOND = {8: 25.6, 16: 50.4, 32: 107.7}
"""Questions a row = examples/s on one H100 with one row a step, r = 64, no gradient checkpointing
(RESULTS.md)."""
HIDDEN, INNER, KEYS, LAYERS = 1536, 8960, 256, 28
"""Qwen2.5-1.5B: widths of its layers, of their MLPs, of keys and of values; layers."""
BYTES = 4
"""LoRA weights and their gradients are float32 (`trainer.build`)."""
NETWORKS = {"NVLink": 450e9, "100 Gb/s": 100e9 / 8, "25 Gb/s": 25e9 / 8}
"""Bytes a second in one direction: NVLink 4 of one H100, and the network card of a machine."""
TOGETHER = 32
"""Questions a row, as the settings ask for; a step with fewer questions a GPU gets smaller rows."""
SCHEMA, OWN = 26, 2
"""Tokens of a schema and of what a question adds, a thirtieth of the benchmark's: only their
proportion matters here."""


@dataclass(frozen=True)
class Step:
    """Describe a step of `batch` examples on `gpus`, as the GPU with most to do sees it."""

    batch: int
    gpus: int
    network: str
    r: int
    passes: tuple[int, ...]
    computing: float
    exchanging: float
    efficiency: float

    @property
    def seconds(self) -> float:
        """Return the seconds of the whole step."""
        return self.computing + self.exchanging


def lora_parameters(r: int) -> int:
    """Return r x (inputs + outputs), summed over every layer that gets an adapter.

    These are q, k, v, o, gate, up and down.
    """
    shapes = [
        *((HIDDEN, HIDDEN), (HIDDEN, KEYS), (HIDDEN, KEYS), (HIDDEN, HIDDEN)),
        *((HIDDEN, INNER), (HIDDEN, INNER), (INNER, HIDDEN)),
    ]
    return LAYERS * r * sum(inputs + outputs for inputs, outputs in shapes)


def sent(r: int, gpus: int) -> float:
    """Return the bytes that each GPU sends, and receives, in a ring all-reduce.

    They are 2 (N - 1) / N of the gradients' size.
    """
    return 2 * (gpus - 1) / gpus * lora_parameters(r) * BYTES


def passes(batch: int, gpus: int) -> tuple[int, ...]:
    """Return the questions in each forward pass of the first GPU, which has the most.

    The step is over databases of `TOGETHER` questions each.
    """
    config = load(
        Config,
        [],
        model_name="plan",
        output_name="plan",
        task_type="sql",
        rows={"examples_per_row": TOGETHER},
        scaling={"num_workers": gpus},
        train={"global_batch_size": batch},
    )
    examples = [
        TokenizedExample(
            str(number),
            f"db{number // TOGETHER}",
            [number // TOGETHER] * SCHEMA + [-number, -number],
            SCHEMA + OWN - 1,
        )
        for number in range(batch)
    ]
    return tuple(
        sum(len(row.examples) for row in one)
        for one in rows.passes(examples, config.batching, 0, gpus)
    )


def pass_seconds(questions: int) -> float:
    """Return the seconds of the smallest measured pass that holds as many questions.

    Below 8, where none was measured, they are those of 8.
    """
    size = min(measured for measured in EXAMPLES_PER_SECOND if measured >= questions)
    return size / EXAMPLES_PER_SECOND[size]


def step(batch: int, gpus: int, network: str, r: int) -> Step:
    """Return the step's times, and its efficiency: the speed-up over one GPU, by GPU."""
    made = passes(batch, gpus)
    computing, exchanging = sum(map(pass_seconds, made)), sent(r, gpus) / NETWORKS[network]
    alone = sum(map(pass_seconds, passes(batch, 1)))
    return Step(
        batch,
        gpus,
        network,
        r,
        made,
        computing,
        exchanging,
        alone / (computing + exchanging) / gpus,
    )


def plan() -> list[Step]:
    """Return the page's steps: two global batches on 1, 8 and 64 GPUs.

    The latter are over two networks and two ranks.
    """
    steps = []
    for batch in (64, 2048):
        steps += [step(batch, 1, "NVLink", 64), step(batch, 8, "NVLink", 64)]
        steps += [
            step(batch, 64, network, r) for network in ("100 Gb/s", "25 Gb/s") for r in (64, 16)
        ]
    return steps


def bytes_table(ranks: Sequence[int] = (64, 16)) -> str:
    """Return the table of what a step exchanges, with the time it takes."""
    lines = [
        "| LoRA rank | weights | gradients, MB | each of 64 GPUs sends, MB | NVLink, 8 GPUs | 100 "
        "Gb/s, 64 | 25 Gb/s, 64 |"
    ]
    lines.append("|---|---|---|---|---|---|---|")
    for r in ranks:
        times = (
            sent(r, gpus) / NETWORKS[name]
            for name, gpus in (("NVLink", 8), ("100 Gb/s", 64), ("25 Gb/s", 64))
        )
        size = lora_parameters(r)
        shown = " | ".join(f"{1e3 * seconds:.1f} ms" for seconds in times)
        lines.append(
            f"| {r} | {size:,} | {size * BYTES / 1e6:.1f} | {sent(r, 64) / 1e6:.1f} | {shown} |"
        )
    return "\n".join(lines)


def steps_table() -> str:
    """Return the table of every step of the plan."""
    lines = [
        "| global batch | GPUs | network, rank | passes a GPU | step, s | examples/s | efficiency "
        "|",
        "|---|---|---|---|---|---|---|",
    ]
    for one in plan():
        network = "" if one.gpus == 1 else f"{one.network}, r = {one.r}"
        layout = f"{len(one.passes)} of {one.passes[0]}"
        lines.append(
            f"| {one.batch:,} | {one.gpus} | {network} | {layout} | {one.seconds:.2f} | "
            f"{one.batch / one.seconds:,.0f} | "
            f"{100 * one.efficiency:.0f} % |"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Print the tables and the JSON object."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="nothing is left out")
    parser.parse_args(argv)
    print(f"{bytes_table()}\n\n{steps_table()}\n")
    ranks = {
        r: {"parameters": lora_parameters(r), "bytes": lora_parameters(r) * BYTES} for r in (64, 16)
    }
    steps = [asdict(one) | {"seconds": one.seconds} for one in plan()]
    print(json.dumps({"lora": ranks, "steps": steps}))


if __name__ == "__main__":
    main()
