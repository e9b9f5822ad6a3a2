"""Measure how soon a job is gone that is told to end, and whether the same command goes on.

    python -m benchmarks.signals            # ten moments a job, about 15 minutes on 2 cores
    python -m benchmarks.signals --quick    # three moments a job, about 3 minutes

Three jobs are told to end: a preparation (`finetune --dry_run`), an evaluation of which some
queries take 20 seconds, and a publication to a Hub that never answers. They get SIGINT, SIGTERM and
SIGKILL in turn, each at a moment drawn from the seed. `--jobs train` takes a training in the job's
own process, which is given again with `--dry_run`. Model and data are those of the tests, and so is
the Hub.

`seconds` is from the signal to the end of the job's last process, `left` counts the processes alive
after `--patience` seconds. At last each job is given again, undisturbed: `goes_on` is whether it
ends with exit code 0. The exit code is 1 if a process was left, a traceback was shown, or a job did
not go on. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import psutil

ROOT = Path(__file__).parent.parent
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)
ENDLESS = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT max(i) FROM n"
LONGEST_MOMENT = {"prepare": 12.0, "evaluate": 8.0, "publish": 12.0, "train": 40.0}
"""Seconds after which a job is told to end at the latest."""
UNDISTURBED_SECONDS = 400.0
LEAST_SECONDS = 0.2


@dataclass
class Case:
    """A job: its command, what it takes from the environment, and what was seen."""

    name: str
    words: list[str]
    again: list[str]
    """Words that let the last try come to its end."""
    environment: dict[str, str] = field(default_factory=dict)
    undisturbed: Callable[[], object] = lambda: None
    """Called before the last try."""
    seconds: list[float] = field(default_factory=list)
    left: int = 0
    tracebacks: int = 0
    ended_before: int = 0
    goes_on: bool = False

    def start(self, more: Sequence[str] = ()) -> subprocess.Popen[str]:
        """Start the job in a session of its own, so that all its processes are found."""
        return subprocess.Popen(
            [sys.executable, "-m", *self.words, *more],
            cwd=ROOT,
            env=os.environ | self.environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            # what is started in the background hands down an ignored Ctrl-C
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )

    def disturb(self, number: int, moment: float, patience: float) -> float:
        """Tell the job to end after `moment` seconds; return how long it stayed."""
        process = self.start()
        time.sleep(moment)
        if process.poll() is not None:
            self.ended_before += 1
        began = time.monotonic()
        process.send_signal(number)
        alive = session(process.pid)
        while alive and time.monotonic() - began < patience:
            time.sleep(0.05)
            alive = session(process.pid)
        seconds = time.monotonic() - began
        self.left += len(alive)
        for pid in alive:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.tracebacks += "Traceback" in process.communicate()[1]
        self.seconds.append(seconds)
        return seconds

    def finish(self) -> None:
        """Give the command again, undisturbed."""
        self.undisturbed()
        process = self.start(self.again)
        try:
            said = process.communicate(timeout=UNDISTURBED_SECONDS)[1]
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            said = process.communicate()[1]
        self.goes_on = process.returncode == 0
        if not self.goes_on:
            print(f"{self.name} did not go on: {said[-1000:]}", flush=True)

    def row(self) -> dict[str, object]:
        """Return what was seen, for the JSON line."""
        return {
            "moments": len(self.seconds),
            "median_seconds": round(median(self.seconds), 2),
            "most_seconds": round(max(self.seconds), 2),
            "left": self.left,
            "tracebacks": self.tracebacks,
            "ended_before": self.ended_before,
            "goes_on": self.goes_on,
        }


def session(leader: int) -> list[int]:
    """Return the processes of a session that are alive."""
    found = []
    for process in psutil.process_iter():
        with suppress(ProcessLookupError, psutil.NoSuchProcess):
            alive = process.status() != psutil.STATUS_ZOMBIE
            if alive and os.getsid(process.pid) == leader:
                found.append(process.pid)
    return found


@contextmanager
def cases(folder: Path, jobs: Sequence[str]) -> Iterator[list[Case]]:
    """Make model, data, a finished run and a Hub in a folder; yield the jobs that are wanted."""
    from ray_sql import finetune  # these load torch, which --help does without
    from ray_sql.config import Config, load
    from tests import hub
    from tests.conftest import make_model, make_spider_folder
    from tests.test_publish import settings

    model, data = make_model(folder / "model"), make_spider_folder(folder / "data")
    given = settings(model, data, folder) | {"hub.force": True}
    if "publish" in jobs:
        finetune.run(load(Config, [], **given))
    prepared = given | {"output_name": "p", "cache_dir": folder / "unused"}
    trained = given | {"output_name": "t", "train.max_steps": 100_000}
    gold = "SELECT name FROM customer"
    lines = [{"db_id": "mall", "gold": gold, "predicted": sql} for sql in (gold, ENDLESS, gold)]
    (folder / "predictions.jsonl").write_text("\n".join(map(json.dumps, lines * 3)))
    evaluation = [
        *("jobs.evaluate", "--dataset_id", str(data), "--output_name", "e"),
        *("--output_dir", str(folder), "--predictions_file", str(folder / "predictions.jsonl")),
        *("--evaluate.processes", "2", "--evaluate.timeout", "20"),
    ]
    publication = ["jobs.publish", "--output_name", "run", "--output_dir", str(folder / "out")]
    preparation = ["jobs.finetune", *words_of(prepared), "--dry_run"]
    with hub.running() as stand_in:
        stand_in.fail("POST .*/commit/", "silent")
        away = stand_in.environment(folder / "home")
        made = [
            Case("prepare", preparation, []),
            Case("evaluate", evaluation, []),
            Case("publish", [*publication, "--hub.force"], [], away, stand_in.heal),
            Case("train", ["jobs.finetune", *words_of(trained)], ["--dry_run"]),
        ]
        yield [case for case in made if case.name in jobs]


def words_of(settings: Mapping[str, object]) -> list[str]:
    """Return settings as words of a command line."""
    words = []
    for name, value in settings.items():
        switch = f"--{name}" if value else f"--no-{name}"
        words += [switch] if isinstance(value, bool) else [f"--{name}", str(value)]
    return words


def main() -> None:
    """Tell each job to end at every moment drawn, and print what was seen."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="three moments a job")
    parser.add_argument("--moments", type=int, help="moments a job (10, or 3 with --quick)")
    parser.add_argument("--patience", type=float, default=60.0, help="seconds for a job to end")
    parser.add_argument("--jobs", default="prepare,evaluate,publish", help="with commas")
    parser.add_argument("--seed", type=int, default=17)
    options = parser.parse_args()
    count = options.moments or (3 if options.quick else 10)
    draw = random.Random(options.seed)
    with (
        tempfile.TemporaryDirectory(prefix="ray_sql-") as scratch,
        cases(Path(scratch), options.jobs.split(",")) as found,
    ):
        for case in found:
            for index in range(count):
                number = SIGNALS[index % len(SIGNALS)]
                moment = draw.uniform(LEAST_SECONDS, LONGEST_MOMENT[case.name])
                seconds = case.disturb(number, moment, options.patience)
                name = signal.Signals(number).name
                print(f"{case.name}: {name} at {moment:.1f} s, gone in {seconds:.2f} s", flush=True)
            case.finish()
    rows = {case.name: case.row() for case in found}
    print(json.dumps({"load": os.getloadavg()[0], "cores": os.cpu_count(), **rows}))
    wrong = any(case.left or case.tracebacks or not case.goes_on for case in found)
    sys.exit(int(wrong))


if __name__ == "__main__":
    main()
