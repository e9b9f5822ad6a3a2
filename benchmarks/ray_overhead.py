"""Measure Ray's cost to a training step: the same training under Ray and in a plain process.

    python -m benchmarks.ray_overhead            (--quick: 6 steps)

Both processes train the demo's adapter on the demo's data with `trainer.train`, as a run does, and
log every step. The worker under Ray Train also sends each to the driver. The processes hand a turn
to and fro through a file, so that neighbouring steps compare and neither computes while the other
does. Ray's own processes work beside both. The first steps do not count. A ratio is that of two
neighbouring steps on the same examples. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import make_encoder
from ray_sql import cluster
from ray_sql.cluster.events import DriverLink, TrainPoint
from ray_sql.config import Config, load

WARM_UP = 3
"""Steps at the beginning that do not count."""
BARE, RAY = "bare", "ray"
PATIENCE = 600.0
"""Seconds to wait for a turn; the other one may still be loading its model."""


class Turns:
    """Take turns through a file whose length is the number of steps that both have made."""

    def __init__(self, folder: str, me: str) -> None:
        self._file, self._mine = Path(folder) / "turns", (BARE, RAY).index(me)

    def wait(self) -> None:
        """Wait until it is this process's turn."""
        started = time.monotonic()
        while (self._file.stat().st_size if self._file.exists() else 0) % 2 != self._mine:
            if time.monotonic() - started > PATIENCE:
                raise TimeoutError("the other process has not made its step")
            time.sleep(0.02)

    def over(self) -> None:
        """Give the turn to the other process: the step is made."""
        with self._file.open("a") as file:
            file.write(".")


@dataclass(frozen=True)
class Job:
    """Describe one of the two trainings; `me` is `BARE` or `RAY`."""

    settings: dict[str, Any]
    folder: str
    me: str


def loop(job: Job, driver: DriverLink) -> list[float]:
    """Train, and return the seconds of every step; on a Ray worker or in a process of its own."""
    from ray_sql import data, models
    from ray_sql.train import trainer

    config, me = Config(**job.settings), job.me
    if me == RAY:
        device = cluster.claim_device(config.scaling)
    else:
        device = "cpu"
        cluster.keep_freed_memory()
    folder, _ = models.resolve(config.model_name, config.cache, config.read_token)
    tokenizer = models.load_tokenizer(folder)
    corpus = data.load(config)
    encoder = make_encoder(tokenizer, config, corpus.schemas)
    examples = [encoder.encode(example) for example in corpus.splits["train"]]
    turns, seconds = Turns(job.folder, me), []
    started = 0.0

    def on_log(step: int, steps: int, values: dict[str, float]) -> None:
        nonlocal started
        driver.emit(TrainPoint(step, steps, values))
        seconds.append(time.perf_counter() - started)
        turns.over()
        if step < steps:
            turns.wait()
        started = time.perf_counter()

    base = models.load_base(folder, config.quantization, config.train.bf16, device)
    with tempfile.TemporaryDirectory() as scratch:
        turns.wait()
        started = time.perf_counter()
        trainer.train(
            base,
            tokenizer,
            examples,
            config,
            config.batching,
            trainer.TrainerHooks(on_log, lambda *_: None),
            Path(scratch),
        )
    return seconds


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=40, help="steps of each")
    parser.add_argument("--quick", action="store_true", help="6 steps")
    parser.add_argument("--bare", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.bare:
        job = Job(**json.loads(Path(arguments.bare).read_text()))
        print(json.dumps(loop(job, DriverLink(lambda _: None, lambda: False))))
        return
    config = settings(6 if arguments.quick else arguments.steps)
    with tempfile.TemporaryDirectory() as folder:
        job = Job(config.for_workers(), folder, RAY)
        file = Path(folder) / "job.json"
        file.write_text(json.dumps(asdict(replace(job, me=BARE))))
        command = [sys.executable, "-m", "benchmarks.ray_overhead", "--bare", str(file)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as bare:
            try:
                under_ray = cluster.run_workers(
                    loop, job, config.scaling, f"{folder}/run", lambda _: None
                )
                out, _ = bare.communicate()
            finally:
                bare.kill()
    report(json.loads(out.splitlines()[-1])[WARM_UP:], under_ray[WARM_UP:])


def settings(steps: int) -> Config:
    """Return the demo's settings, logging every step."""
    changes = {"train.max_steps": steps, "train.logging_steps": 1, "tracking.enabled": False}
    return load(Config, ["--config", "jobs/configs/demo.yaml"], **changes)


def report(bare: list[float], under_ray: list[float]) -> None:
    """Print medians, and the ratio's median and quartiles."""
    ratios = sorted(ours / other for ours, other in zip(under_ray, bare, strict=True))
    low, high = ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]
    print(
        f"seconds a step: bare {median(bare):.3f}, under Ray {median(under_ray):.3f}; ratio "
        f"{median(ratios):.3f} [{low:.3f}, {high:.3f}]"
    )
    print(
        json.dumps(
            {
                "ray_overhead": round(median(ratios), 3),
                "quartiles": [round(low, 3), round(high, 3)],
                "sums": round(sum(under_ray) / sum(bare), 3),
                "steps": len(ratios),
            }
        )
    )


if __name__ == "__main__":
    main()
