"""Measure the seconds from a command to what it is for: help, a plan, a first step, an answer.

    python -m benchmarks.startup_seconds                    (--quick: one round, no Ray)
    python -m benchmarks.startup_seconds --before ../older  (another commit's checkout, in turns)

The cases are `ray-sql --help`, `finetune --help`, `finetune --dry_run`, `finetune` to its first
step in its own process and under Ray, and `ask` to its rows. The model and the data are the demo's,
as far as a run of one step needs them. A round runs every case once, of each checkout in turn. A
run that has made its first step is told to stop, and its end is not counted.

Of each case the least wall seconds and the least CPU seconds, of the command and its children, are
printed. CPU seconds hardly depend on what else runs on the machine. `--cold` gives up the files of
the libraries that the system holds in memory before each command, and every round has a new cache
but for the model: what a first run meets. The last line is one JSON object, seconds by case.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import resource
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
FIRST_STEP = re.compile(r"first step after (\d+) s: (.*)")
RUN = [
    *("--model_name", "demo", "--task_type", "sql", "--dataset_id", "demo", "--split", "seen"),
    *("--data.split_by", "question", "--data.validation_fraction", "0", "--lora.r", "16"),
    *("--prompt.serializer", "compact", "--evaluate.select_examples", "0", "--evaluate.limit", "1"),
]
"""Settings of the demo, and as little to score as there can be."""
QUESTION = ["ask", "How many books are there?", "--database", "bookshop"]


@dataclass(frozen=True)
class Case:
    """A command to be timed, up to its end or to its first step. `ray` says that it starts Ray."""

    name: str
    words: Sequence[str]
    to_first_step: bool = False
    ray: bool = False


CASES = (
    Case("help", ["--help"]),
    Case("finetune_help", ["finetune", "--help"]),
    Case("dry_run", ["finetune", "--output_name", "plan", *RUN, "--dry_run"]),
    Case("ask", QUESTION),
    Case(
        "first_step",
        ["finetune", "--output_name", "alone", "--overwrite", *RUN, "--scaling.num_workers", "0"],
        to_first_step=True,
    ),
    Case(
        "first_step_ray",
        ["finetune", "--output_name", "workers", "--overwrite", *RUN],
        to_first_step=True,
        ray=True,
    ),
)


@dataclass(frozen=True)
class Took:
    """The seconds of a command, by the clock and of all its processes' computing."""

    wall: float
    cpu: float
    stages: str = ""


class Checkout:
    """A checkout whose commands are timed, with output and cache folders of its own."""

    def __init__(self, name: str, folder: Path, scratch: Path) -> None:
        self.name, self._folder = name, folder
        self._scratch, self._rounds = scratch / name, 0

    def begin_round(self, cold: bool) -> None:
        """Give the next commands a cache that is new if `cold`, but for the model."""
        self._rounds += cold
        cache = self._cache
        models = Path("~/.cache/ray_sql/models").expanduser()
        cache.mkdir(parents=True, exist_ok=True)
        if models.is_dir() and not (cache / "models").exists():
            (cache / "models").symlink_to(models)

    def make_adapter(self) -> None:
        """Train for one step the adapter that is asked."""
        words = ["finetune", "--output_name", "asked", *RUN, "--train.max_steps", "1"]
        self._run([*words, "--scaling.num_workers", "0"], to_first_step=False)

    def time(self, case: Case) -> Took:
        """Run a case's command."""
        words = [*case.words]
        if words[0] == "ask":
            words += ["--output_name", "asked"]
        return self._run(words, case.to_first_step)

    @property
    def _cache(self) -> Path:
        return self._scratch / f"cache-{self._rounds}"

    def _run(self, words: Sequence[str], to_first_step: bool) -> Took:
        words = [*words]
        if "--help" not in words:
            places = ["--output_dir", str(self._scratch / "out"), "--cache_dir", str(self._cache)]
            words += places
        if "finetune" in words and "--help" not in words:
            words += ["--tracking.uri", f"sqlite:///{self._scratch}/mlflow.db"]
        environment = os.environ | {"PYTHONPATH": str(self._folder)}
        before, started = _children_cpu(), time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "-m", "ray_sql", *words],
            cwd=self._scratch,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        shown, stages, wall = "", "", 0.0
        assert process.stdout is not None
        for line in process.stdout:
            shown += line
            if to_first_step and (found := FIRST_STEP.search(line)):
                wall, stages = time.perf_counter() - started, found[2]
                process.send_signal(signal.SIGTERM)
                break
        process.communicate()
        if not wall:
            wall = time.perf_counter() - started
        if process.returncode and not stages:
            raise SystemExit(f"{' '.join(words)}\n{shown}")
        return Took(wall, _children_cpu() - before, stages)


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--before", type=Path, help="a checkout to compare with")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cases", nargs="+", choices=[case.name for case in CASES])
    parser.add_argument("--cold", action="store_true", help="forget the libraries' files first")
    parser.add_argument("--quick", action="store_true", help="one round, without Ray")
    arguments = parser.parse_args(argv)
    cases = [case for case in CASES if case.name in (arguments.cases or case.name)]
    if arguments.quick:
        cases = [case for case in cases if not case.ray]
    with tempfile.TemporaryDirectory(prefix="ray_sql-startup-") as scratch:
        checkouts = [Checkout("now", ROOT, Path(scratch))]
        if arguments.before:
            checkouts.insert(0, Checkout("before", arguments.before.resolve(), Path(scratch)))
        rounds = 1 if arguments.quick else arguments.rounds
        took = measure(checkouts, cases, rounds, arguments.cold)
    result = summary(took)
    for case, seconds in result.items():
        print(case, *(f"{name} {value:.2f}" for name, value in seconds.items()))
    facts = {"cold": arguments.cold, "rounds": rounds, "cores": os.cpu_count()}
    print(json.dumps({**result, **facts, "processor": platform.processor()}))


def measure(
    checkouts: Sequence[Checkout], cases: Sequence[Case], rounds: int, cold: bool
) -> dict[tuple[str, str], list[Took]]:
    """Return what the commands took, by case and checkout."""
    took: dict[tuple[str, str], list[Took]] = defaultdict(list)
    for checkout in checkouts:
        checkout.begin_round(cold=False)
        if any(case.name == "ask" for case in cases):
            checkout.make_adapter()
    for number in range(rounds):
        for case in cases:
            for checkout in checkouts[:: (-1) ** number]:
                checkout.begin_round(cold)
                if cold:
                    forget(Path(sysconfig.get_path("purelib")))
                one = checkout.time(case)
                took[case.name, checkout.name].append(one)
                print(f"{case.name} {checkout.name}: {one.wall:.1f} s, {one.cpu:.1f} s computed")
                if one.stages:
                    print(f"  {one.stages}", flush=True)
    return took


def summary(took: dict[tuple[str, str], list[Took]]) -> dict[str, dict[str, float]]:
    """Return the least seconds by case: `wall` and `cpu` of every checkout."""
    result: dict[str, dict[str, float]] = defaultdict(dict)
    for (case, checkout), runs in took.items():
        result[case][checkout] = round(min(one.wall for one in runs), 2)
        result[case][f"{checkout}_cpu"] = round(min(one.cpu for one in runs), 2)
    return dict(result)


def forget(folder: Path) -> None:
    """Ask the system to drop what it holds of a folder's files; those in use stay."""
    for path in folder.rglob("*"):
        if path.is_file():
            file = os.open(path, os.O_RDONLY)
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(file)


def _children_cpu() -> float:
    """Return the CPU seconds of all children that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()
