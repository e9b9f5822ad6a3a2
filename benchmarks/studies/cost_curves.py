"""Measure how a step's cost grows with the schema's length and the questions in a row.

    python -m benchmarks.studies.cost_curves --figure benchmarks/studies/cost_curves.svg

With --quick it measures a few points in one round.

Rows hold random tokens over SmolLM2-135M in 4-bit NF4 with the original's LoRA: a schema, and for
every question 30 tokens of its own and 40 of an answer. Schemas have 100 to 4,000 tokens, with one
question a row (nothing is shared), 8 and 32. Then a schema of 500 tokens has 1 to 64 questions in a
row. Every round makes one step at every point, in an order drawn anew; a point is the median of its
rounds. It prints two tables; the last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, NamedTuple

import torch

from benchmarks.training_speed import Bench, our_step, settings
from ray_sql import models
from ray_sql.rows import TokenizedExample

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LENGTHS: tuple[int, ...] = (100, 250, 500, 1000, 2000, 4000)
QUESTIONS: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
TOGETHER: tuple[int, ...] = (1, 8, 32)
"""Questions in a row of the first table."""
LENGTH = 500
"""Tokens of the schema of the second."""
OWN, ANSWER = 30, 40
"""Tokens of a question's own, and of its answer."""
SEPARATE = 2
"""Examples of a step where each has a row of its own."""


class Point(NamedTuple):
    """Describe a step: tokens of the schema, and questions that share it in a row."""

    schema: int
    questions: int


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3, help="steps at every point")
    parser.add_argument("--figure", type=Path, help="where to draw the curves, e.g. curves.svg")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="one round of schemas up to 1,000 tokens and rows up to 8",
    )
    arguments = parser.parse_args(argv)
    lengths, together, questions = LENGTHS, TOGETHER, QUESTIONS
    if arguments.quick:
        lengths, together, questions = LENGTHS[:4], TOGETHER[:2], QUESTIONS[:4]
    points = [Point(length, each) for each in together for length in lengths]
    points += [Point(LENGTH, each) for each in questions]
    rate = measure(list(dict.fromkeys(points)), 1 if arguments.quick else arguments.rounds)
    by_length = {
        each: {length: rate[Point(length, each)] for length in lengths} for each in together
    }
    by_questions = {each: rate[Point(LENGTH, each)] for each in questions}
    print(table("questions a row", "schema, tokens", by_length))
    print(table("schema, tokens", "questions a row", {LENGTH: by_questions}))
    if arguments.figure:
        draw(by_length, by_questions, arguments.figure)
    print(
        json.dumps(
            {
                "by_schema_length": by_length,
                "by_questions": by_questions,
                "threads": torch.get_num_threads(),
            }
        )
    )


def measure(points: list[Point], rounds: int) -> dict[Point, float]:
    """Return the examples a second at every point."""
    # a step takes no more examples than the global batch
    config = settings().changed({"grad_accum_steps": max(point.questions for point in points)})
    folder, _ = models.resolve(config.model_name, config.cache, config.read_token)
    chance = random.Random(0)
    made = {point: examples(point, chance) for point in points}
    bench = Bench(config, folder, [made[points[0]]], ("ours 1",))
    steps = {
        each: our_step(bench.ours, config, each) for each in {point.questions for point in points}
    }
    seconds: dict[Point, list[float]] = {point: [] for point in points}
    for number in range(rounds + 1):
        for point in chance.sample(points, len(points)):
            if not number and point.schema > LENGTH:
                continue  # a short round to warm up
            started = time.perf_counter()
            steps[point.questions](made[point])
            if number:
                seconds[point].append((time.perf_counter() - started) / len(made[point]))
        print(f"round {number} of {rounds}", file=sys.stderr)
    return {point: round(1 / median(taken), 3) for point, taken in seconds.items()}


def examples(point: Point, chance: random.Random) -> list[TokenizedExample]:
    """Return one row's worth of examples on one schema, or a few separate ones."""
    schema = [chance.randrange(1000, 40_000) for _ in range(point.schema)]
    count = point.questions if point.questions > 1 else SEPARATE
    own = [[chance.randrange(1000, 40_000) for _ in range(OWN + ANSWER)] for _ in range(count)]
    return [
        TokenizedExample(str(number), "schema", schema + each, point.schema + OWN)
        for number, each in enumerate(own)
    ]


def table(rows: str, columns: str, rates: dict[int, dict[int, float]]) -> str:
    """Return the examples a second as a table of RESULTS.md."""
    head = list(next(iter(rates.values())))
    lines = [
        f"| {rows} \\ {columns} | {' | '.join(f'{each:,}' for each in head)} |",
        "|---" * (len(head) + 1) + "|",
    ]
    lines += [
        f"| {name:,} | {' | '.join(f'{rate:.2f}' for rate in line.values())} |"
        for name, line in rates.items()
    ]
    return "\n".join(lines) + "\n"


def draw(
    by_length: dict[int, dict[int, float]], by_questions: dict[int, float], file: Path
) -> None:
    """Draw both tables as curves."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for each, curve in by_length.items():
        left.plot(
            list(curve),
            list(curve.values()),
            marker="o",
            label=f"{each} a row" if each > 1 else "one a row",
        )
    _axes(left, "schema, tokens", list(next(iter(by_length.values()))))
    left.set_ylabel("examples / s")
    left.legend()
    right.plot(list(by_questions), list(by_questions.values()), marker="o")
    _axes(right, f"questions in a row, schema of {LENGTH} tokens", list(by_questions))
    right.set_yscale("linear")
    right.set_ylim(bottom=0)
    figure.savefig(file)


def _axes(axes: Axes, label: str, ticks: list[int]) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(ticks, [f"{each:,}" for each in ticks])
    axes.minorticks_off()
    axes.set_xlabel(label)
    axes.grid(alpha=0.3)


if __name__ == "__main__":
    main()
