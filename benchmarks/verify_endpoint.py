"""Plant eight faults into services of a run, and see what `ray-sql verify` says of each.

    python -m benchmarks.verify_endpoint --output_name demo     (--quick: fewer questions and runs)

Each service is a real one on a port of this machine, and is asked over HTTP:

    no adapter       its update is zero, and the service says that it is the measured one
    other template   the system turn is left out
    other rank       the second half of the adapter's rank is missing
    other base       noise on all weights of the base, 5 % of their spread
    other quantization  4 bits where the run had none, or none where it had 4
    prompt cut       long prompts lose their end
    sampling         answers are drawn at temperature 1
    older adapter    the update is 0.9 of the measured one

The four faults of weights are asked about a second time while the service does not say of what it
is made, as servers of others do not: then answers alone speak. Clean runs ask the faultless service
about other numbers of questions, computed together in other numbers. The last line is one JSON
object.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import requests

from ray_sql import models
from ray_sql.config import VerifyConfig, load
from ray_sql.display import Display
from ray_sql.publish import merge
from ray_sql.serve import verify
from ray_sql.serve.diagnosis import FINE
from ray_sql.serve.engine import Engine, Joinable, completed
from ray_sql.serve.prompter import Prompter
from ray_sql.serve.recipe import find
from ray_sql.store.run_folder import RunFolder
from tests.planted import half_the_rank, over_another_base, over_other_bits, weakened
from tests.serving import make_engine, serving, settings
from tests.waiting import wait_until

Making = contextlib.AbstractContextManager[Engine]
WEIGHTS = ("other rank", "other base", "other quantization", "older adapter")
"""Faults that answers alone do not tell apart."""
NAMED = {
    "no adapter": "no adapter",
    "other template": "another template",
    "other rank": "another rank",
    "other base": "another base",
    "other quantization": "another quantization",
    "prompt cut": "truncated prompt",
    "sampling": "sampling is on",
    "older adapter": "another adapter",
}
"""Faults with the verdicts that name them."""


@dataclass(frozen=True)
class Bench:
    """A run, and the number of questions that each service is asked."""

    run: Path
    questions: int

    def verdict(self, engine: Engine, questions: int | None = None) -> dict[str, Any]:
        """Return what `verify` says of a service."""
        with serving(engine) as client:
            return self.verdict_at(f"{str(client.base_url).rstrip('/')}/v1", questions)

    def verdict_at(
        self, url: str, questions: int | None = None, model: str | None = None
    ) -> dict[str, Any]:
        """Return what `verify` says of an address."""
        given: dict[str, Any] = {
            **named(self.run),
            "questions": questions or self.questions,
            "evaluate.url": url,
        }
        if model:
            given["evaluate.served_model"] = model
        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
            verify.run(load(VerifyConfig, [], **given))
        found: dict[str, Any] = json.loads(said.getvalue().splitlines()[-1])
        return found

    @contextlib.contextmanager
    def planted(self, plant: Callable[..., Path], *words: Any) -> Iterator[Engine]:
        """Yield an engine over a changed copy of the adapter."""
        with tempfile.TemporaryDirectory(prefix="ray_sql-") as scratch:
            adapter = plant(self.run, Path(scratch) / "planted", *words)
            with make_engine(self.run, adapter=str(adapter)) as engine:
                yield engine


def named(run: Path) -> dict[str, str]:
    """Return the settings that name a run."""
    return {"output_name": run.name, "output_dir": str(run.parent)}


def main(argv: list[str] | None = None) -> None:
    """Ask about every fault, and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output_name", default="demo", help="a finished run for task sql")
    parser.add_argument("--output_dir", default="out")
    parser.add_argument("--questions", type=int, default=64)
    parser.add_argument("--clean", type=int, default=20, help="runs without a fault")
    parser.add_argument(
        "--transformers",
        help="a Python with transformers[serving]: ask its server too, with the merged model and "
        "with the base alone",
    )
    parser.add_argument("--quick", action="store_true", help="32 questions, 2 clean runs")
    arguments = parser.parse_args(argv)
    started = time.monotonic()
    questions, clean = (32, 2) if arguments.quick else (arguments.questions, arguments.clean)
    bench = Bench(Path(arguments.output_dir).absolute() / arguments.output_name, questions)
    print("| fault | verdict | same answers | answers alone say |\n|---|---|---|---|")
    found, alone = {}, {}
    for name, make in faults(bench).items():
        with make as engine:
            found[name] = bench.verdict(engine)
            if name in WEIGHTS:
                engine.described = {}
                alone[name] = bench.verdict(engine)
        show(name, found[name], alone.get(name))
    others = by_transformers(bench, arguments.transformers) if arguments.transformers else {}
    for name, one in others.items():
        show(name, one, None)
    verdicts = clean_verdicts(bench, clean)
    missed = [name for name, one in found.items() if one["verdict"] != NAMED[name]]
    false = [one["verdict"] for one in verdicts if one["verdict"] not in FINE]
    print(f"| none, {clean} runs | {', '.join(sorted({v['verdict'] for v in verdicts}))} | | |")
    print(
        json.dumps(
            {
                "named": len(found) - len(missed),
                "faults": len(found),
                "missed": missed,
                "false_alarms": len(false),
                "clean_runs": clean,
                "answers_alone": {name: one["verdict"] for name, one in alone.items()},
                "transformers_serve": {name: one["verdict"] for name, one in others.items()},
                "questions": questions,
                "seconds": round(time.monotonic() - started, 1),
            }
        )
    )


def faults(bench: Bench) -> dict[str, Making]:
    """Return what makes each faulty service."""
    with make_engine(bench.run) as engine:
        measured, base = engine.described, Path(engine.prompter.model_folder)
    return {
        "no adapter": pretending(bench.planted(weakened, 0.0), measured),
        "other template": changed(bench, without_system),
        "other rank": bench.planted(half_the_rank),
        "other base": bench.planted(over_another_base, base),
        "other quantization": bench.planted(over_other_bits),
        "prompt cut": changed(bench, cut),
        "sampling": changed(bench, draw),
        "older adapter": bench.planted(weakened, 0.9),
    }


@contextlib.contextmanager
def pretending(making: Making, described: dict[str, str]) -> Iterator[Engine]:
    """Yield an engine that says it is another."""
    with making as engine:
        engine.described = described
        yield engine


@contextlib.contextmanager
def changed(bench: Bench, change: Callable[[Bench, Any], None]) -> Iterator[Engine]:
    """Yield the engine of the run after a change to how it asks or answers."""
    with make_engine(bench.run) as engine:
        change(bench, engine)
        yield engine


def without_system(_: Bench, engine: Any) -> None:
    """Leave out the system turn."""
    ask = engine.prompter.ask_turns
    engine.prompter.ask_turns = lambda turns, settings: ask(turns[1:], settings)


def cut(bench: Bench, engine: Any) -> None:
    """Read no more of a prompt than the shorter half of them is long."""
    lengths = sorted(row["prompt_tokens"] for row in RunFolder(str(bench.run)).read_predictions())
    most, ask = lengths[len(lengths) // 2] - 1, engine.prompter.ask_turns

    def ask_cut(turns: Any, settings: Any) -> Any:
        asked = ask(turns, settings)
        tokens = asked.question.input_ids[:most]
        return replace(asked, question=replace(asked.question, input_ids=tokens))

    engine.prompter.ask_turns = ask_cut


def draw(_: Bench, engine: Any) -> None:
    """Answer by a sample at temperature 1, with another seed each time."""
    seeds = itertools.count()

    def drawn(batch: Joinable) -> None:
        engine.prompter.config = engine.prompter.config.changed({"seed": next(seeds)})
        batch.more(lambda one: True)
        settings = {"samples": 2, "temperature": 1.0}
        sampled = [
            replace(one, settings=one.settings.model_copy(update=settings)) for one in batch.asked
        ]
        for index, one in enumerate(engine.answer(sampled)):
            batch.tell(index, completed(replace(one, raw=f"```sql\n{one.candidates[0]}\n```")))

    engine.answer_joinable = drawn


def clean_verdicts(bench: Bench, runs: int) -> list[dict[str, Any]]:
    """Return what is said of a faultless service."""
    together = itertools.cycle((1, 4, 16, 64))
    verdicts = []
    for number in range(runs):
        size = {"evaluate.max_num_seqs": next(together)}
        with make_engine(bench.run, **size) as engine:
            verdicts.append(bench.verdict(engine, bench.questions - number))
        print(f"clean run {number + 1}: {verdicts[-1]['verdict']}", file=sys.stderr)
    return verdicts


def by_transformers(bench: Bench, python: str) -> dict[str, dict[str, Any]]:
    """Return what is said of `transformers serve` over the merged model, and over its base."""
    found = find(settings(bench.run))
    prompter = Prompter(found, {})
    run = RunFolder(str(bench.run))
    merge.merged(found.config, run, Display())
    verdicts = {}
    with tempfile.TemporaryDirectory(prefix="ray_sql-") as base:
        plain = found.config.quantization.model_copy(update={"load_in_4bit": False})
        models.load_base(prompter.model_folder, plain, False, "cpu").save_pretrained(base)
        prompter.tokenizer.save_pretrained(base)
        for name, folder in (("merged", run.place("merged")), ("base", base)):
            with transformers_serving(python, folder) as url:
                verdicts[f"transformers serve, {name}"] = bench.verdict_at(url, model=folder)
    return verdicts


@contextlib.contextmanager
def transformers_serving(python: str, folder: str) -> Iterator[str]:
    """Serve a model's folder by `transformers serve`; yield the address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [python, "-m", "transformers.cli.transformers", "serve", folder]
    command += ["--port", str(port), "--device", "cpu"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: is_up(f"http://localhost:{port}/health") or process.poll() is not None)
        yield f"http://localhost:{port}/v1"
    finally:
        process.terminate()
        process.wait()


def is_up(address: str) -> bool:
    """Tell whether a server answers."""
    try:
        return bool(requests.get(address, timeout=5).status_code == 200)
    except requests.RequestException:
        return False


def show(name: str, found: dict[str, Any], alone: dict[str, Any] | None) -> None:
    """Print a line of the table of RESULTS.md."""
    same = f"{found['same']} of {found['questions']}"
    besides = alone["verdict"] if alone else ""
    print(f"| {name} | {found['verdict']} | {same} | {besides} |", flush=True)


if __name__ == "__main__":
    main()
