"""Ask a service as 1, 8 and 32 clients at a time, beside the naive way; both over real HTTP.

    python -m benchmarks.serving --output_name demo            (--quick: fewer questions)

The run's own service answers questions that arrive together, over schemas that are computed once
and kept. The naive way is the same service over transformers' `generate` of the model as PEFT loads
it: one request at a time, each with its whole prompt. Both run in this process, one after the
other, on the same model, with the same questions of the run. Each client sends its next question
when it has the last answer. Before the clock starts, our service was asked about each database
once, as one that stays is; the naive way keeps nothing from question to question.

`throughput_ratio_N` is the questions a second of our service by those of the naive way at N
clients. `p95_ratio_1` is the 95th percentile of seconds with one client, by that of the bare
decoder: the engine called without HTTP. Answers are compared question by question. The last line is
one JSON object.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import requests
import torch

from ray_sql import models
from ray_sql.config import ServeConfig, load
from ray_sql.config.sections import AnswersSection
from ray_sql.generate import Answer, hf_generate
from ray_sql.generate.answers import OnAnswer
from ray_sql.serve.databases import registered
from ray_sql.serve.engine import Engine
from ray_sql.serve.opening import open_engine
from ray_sql.serve.prompter import Asked, Prompter
from ray_sql.serve.recipe import find
from ray_sql.store.run_folder import RunFolder
from tests.serving import serving

CLIENTS = (1, 8, 32)
PATIENCE = 3600.0
"""Seconds after which a request is given up: the naive way lets 32 clients wait for minutes."""
Asking = tuple[str, str]
"""A database, and a question about it."""


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output_name", default="demo", help="a finished run for task sql")
    parser.add_argument("--output_dir", default="out")
    parser.add_argument("--questions", type=int, default=96, help="questions at each level")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="32 questions at each level, and no 8 clients for the naive way",
    )
    parser.add_argument("--float32", action="store_true", help="compute in float32")
    arguments = parser.parse_args(argv)
    started = time.monotonic()
    config = load(
        ServeConfig, [], output_name=arguments.output_name, output_dir=arguments.output_dir
    )
    found = find(config)
    if arguments.float32:
        found = replace(found, config=found.config.changed({"train.bf16": False}))
    asked = draw(RunFolder(config.run_dir), 32 if arguments.quick else arguments.questions)
    measured: dict[str, dict[int, dict[str, Any]]] = {}
    prompter = Prompter(found, registered({}, found.config))
    one = found.config.changed({"evaluate.max_num_seqs": 1})  # the service sends one at a time
    alone = Prompter(replace(found, config=one), prompter.databases)
    with Engine(alone, Naive(alone)) as engine:
        levels = (CLIENTS[0], CLIENTS[-1]) if arguments.quick else CLIENTS
        measured["naive"] = {clients: level(engine, asked, clients) for clients in levels}
    with open_engine(prompter) as engine:
        engine.answer([prompter.ask("How many?", name) for name in prompter.databases])
        measured["ours"] = {clients: level(engine, asked, clients) for clients in CLIENTS}
        bare = seconds_of_bare(engine, asked)
    print(json.dumps(report(measured, bare) | {"seconds": round(time.monotonic() - started, 1)}))


def draw(run: RunFolder, count: int) -> list[Asking]:
    """Return questions of the run, in an order in which databases are mixed."""
    rows = run.read_predictions()
    rows = random.Random(14).sample(rows, k=min(count, len(rows)))
    return [(row["db_id"], row["question"]) for row in rows]


class Naive:
    """Answers one question after the other with `generate`, and computes each prompt whole."""

    def __init__(self, prompter: Prompter) -> None:
        config = prompter.config
        base = models.load_base(
            prompter.model_folder, config.quantization, config.train.bf16, "cpu"
        )
        self._model = models.load_adapter(base, prompter.adapter.uri).eval()
        self._tokenizer = prompter.tokenizer
        self.described: dict[str, str] = {}

    def answer(
        self, asked: Sequence[Asked], settings: AnswersSection, on_answer: OnAnswer, *_: Any
    ) -> None:
        """Answer prompts one by one."""
        for index, one in enumerate(asked):
            on_answer(index, self._answer(one.question.input_ids, settings.max_new_tokens))

    def _answer(self, prompt: list[int], limit: int) -> Answer:
        (answer,) = hf_generate.answer_batch(self._model, self._tokenizer, [prompt], limit)
        return answer

    def close(self) -> None:
        """Hold nothing that must be given back."""


def level(engine: Engine, asked: Sequence[Asking], clients: int) -> dict[str, Any]:
    """Let clients ask all questions of a service; return answers, seconds and throughput."""
    with serving(engine, max_waiting=len(asked) + 1, request_timeout_s=PATIENCE) as client:
        place = f"{str(client.base_url).rstrip('/')}/v1/sql"
        began = time.perf_counter()
        with ThreadPoolExecutor(clients) as threads:
            made = list(threads.map(lambda one: ask(place, *one), asked))
        seconds = time.perf_counter() - began
    print(f"{clients} clients: {seconds:.1f} s", file=sys.stderr)
    return {
        "answers": [answer for answer, _ in made],
        "latencies": [latency for _, latency in made],
        "per_second": len(asked) / seconds,
    }


def ask(place: str, database: str, question: str) -> tuple[str, float]:
    """Return the SQL of an answer, and the seconds until it came."""
    began = time.perf_counter()
    body = {"database": database, "question": question}
    response = requests.post(place, json=body, timeout=PATIENCE)
    response.raise_for_status()
    return response.json()["sql"], time.perf_counter() - began


def seconds_of_bare(engine: Engine, asked: Sequence[Asking]) -> list[float]:
    """Return the seconds of each question, asked of the engine itself, one after the other."""
    seconds = []
    for database, question in asked:
        began = time.perf_counter()
        (reply,) = engine.answer([engine.prompter.ask(question, database)])
        engine.run(database, reply.predicted or "")
        seconds.append(time.perf_counter() - began)
    return seconds


def report(measured: dict[str, dict[int, dict[str, Any]]], bare: Sequence[float]) -> dict[str, Any]:
    """Print the table of RESULTS.md, and return the numbers."""
    print("| clients | way | questions/s | p50, s | p95, s |")
    print("|---|---|---|---|---|")
    for clients in CLIENTS:
        for name, levels in measured.items():
            if clients not in levels:
                continue
            one = levels[clients]
            p50, p95 = np.percentile(one["latencies"], [50, 95])
            rate = one["per_second"]
            print(f"| {clients} | {name} | {rate:.2f} | {p50:.2f} | {p95:.2f} |")
    ours, naive = measured["ours"], measured["naive"]
    n = len(bare)
    pairs = zip(naive[1]["answers"], ours[CLIENTS[-1]]["answers"], strict=True)
    ratios = {
        f"throughput_ratio_{clients}": round(
            ours[clients]["per_second"] / naive[clients]["per_second"], 2
        )
        for clients in naive
    }
    return {
        **ratios,
        "p95_ratio_1": round(p95_of(ours[1]["latencies"]) / p95_of(bare), 3),
        "p95_ratio_1_naive": round(p95_of(ours[1]["latencies"]) / p95_of(naive[1]["latencies"]), 3),
        "same_answers": sum(some == other for some, other in pairs),
        "same_at_any_level": all(ours[c]["answers"] == ours[1]["answers"] for c in CLIENTS),
        "n": n,
        "threads": torch.get_num_threads(),
    }


def p95_of(seconds: Sequence[float]) -> float:
    """Return the 95th percentile."""
    return float(np.percentile(seconds, 95))


if __name__ == "__main__":
    main()
