"""Score the ways of choosing an answer among samples, and time samples against one answer.

    python -m benchmarks.candidates --adapter out/demo/adapter   (--quick: 16 questions, 4 samples)

Asks the demo's 184 scored questions, or with RAY_SQL_SHARED and --spider N that many of Spider's
dev. All answers to a question are decoded together: greedy, greedy among names that exist, and
samples. Scores are in one table, each with its interval and its McNemar test against greedy.

The seconds are of the same questions, interleaved: one answer, `samples` answers, one answer among
names that exist, and transformers' own `generate(do_sample=True, num_return_sequences=samples)`.
The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import GenerationConfig

from benchmarks import make_encoder
from ray_sql import cluster, data, generate, models
from ray_sql.config import EvaluateConfig, load
from ray_sql.evaluate import scoring
from ray_sql.generate import Answer, Question
from ray_sql.generate.answers import Decoding, answer_questions
from ray_sql.generate.ends import Ends
from ray_sql.generate.hf_generate import inference
from ray_sql.generate.name_guard import guards
from ray_sql.metrics import wilson_interval
from ray_sql.metrics.statistics import mcnemar
from ray_sql.report.scores import WAYS
from ray_sql.tasks import TASKS

TASK = TASKS["sql"]


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--adapter", required=True, help="folder of an adapter over the demo model")
    parser.add_argument("--samples", type=int, default=8, help="samples a question")
    parser.add_argument("--temperature", type=float, default=0.4, help="of the samples")
    parser.add_argument("--top_p", type=float, default=1.0, help="of the samples")
    parser.add_argument("--serializer", default="compact", help="that the adapter was trained with")
    parser.add_argument("--ground", choices=("none", "constrain"), default="constrain")
    parser.add_argument("--spider", type=int, help="ask this many questions of Spider's dev")
    parser.add_argument("--rounds", type=int, default=3, help="of the timing; 0 leaves it out")
    parser.add_argument("--timed", type=int, default=32, help="questions of a round")
    parser.add_argument("--rows", help="write the judged rows to this file of JSON lines")
    parser.add_argument("--quick", action="store_true", help="16 questions, 4 samples, one round")
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.samples, arguments.rounds, arguments.timed = 4, 1, 4
    bench = Bench(arguments)
    questions = bench.questions[:: max(1, len(bench.questions) // 16)] if arguments.quick else None
    rows = bench.scored(questions or bench.questions)
    if arguments.rows:
        Path(arguments.rows).write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary = scoring.summarise(rows, TASK, bench.settings)
    for split in sorted({row["split"] for row in rows}):
        print(f"\n{split}\n")
        report([row for row in rows if row["split"] == split])
    print("\nall\n")
    report(rows)
    for key in (key for key in summary if key.startswith("pass@") and "_" not in key):
        print(f"| {key} | {100 * summary[key]:.1f} % | | |")
    seconds = bench.timed(arguments.rounds, arguments.timed)
    print(json.dumps(result(arguments, summary, seconds)))


def settings(arguments: argparse.Namespace) -> EvaluateConfig:
    """Return the settings of an evaluation that the arguments stand for."""
    shared = os.environ.get("RAY_SQL_SHARED", "")
    spider = arguments.spider is not None
    return load(
        EvaluateConfig,
        [],
        model_name="demo",
        output_name="candidates",
        task_type="sql",
        dataset_id=f"{shared}/data/spider" if spider else "demo",
        split=["dev"] if spider else ["seen", "unseen"],
        **{
            "evaluate.samples": arguments.samples,
            "evaluate.temperature": arguments.temperature,
            "evaluate.top_p": arguments.top_p,
            "evaluate.ground": arguments.ground,
            "evaluate.max_new_tokens": 96,
            "evaluate.limit": arguments.spider,
            "prompt.serializer": arguments.serializer,
        },
    )


class Bench:
    """Hold the model and the questions."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.config = settings(arguments)
        self.settings = self.config.evaluate
        cluster.keep_freed_memory()
        folder, _ = models.resolve(self.config.model_name, self.config.cache, None)
        self._tokenizer = models.load_tokenizer(folder)
        self._corpus = data.load_split(self.config, self.config.split)
        encoder = make_encoder(self._tokenizer, self.config, self._corpus.schemas)
        self.questions: list[Question] = []
        for split in self.config.split:
            examples = data.sample(
                self._corpus.splits[split], self.settings.limit, self.config.seed
            )
            self.questions += generate.make_questions(examples, split, self._corpus, encoder)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        base = models.load_base(folder, self.config.quantization, self.config.train.bf16, device)
        self._model = models.load_adapter(base, arguments.adapter)
        self._decoding = Decoding.from_settings(self.settings, 8, self.config.seed)
        names = {name: schema.lower_names() for name, schema in self._corpus.schemas.items()}
        self._guards = guards(names, self.questions)
        self._guards_of_samples = self._guards if arguments.ground == "constrain" else None

    def scored(self, questions: Sequence[Question]) -> list[dict[str, Any]]:
        """Return the judged rows of all questions, with the repaired answers too."""
        answers = answer_questions(
            self._model, self._tokenizer, questions, self._decoding, self._guards_of_samples
        )
        schemas = self._corpus.schemas
        rows = scoring.score(questions, answers, TASK, self.settings, schemas)
        mend = self.settings.model_copy(update={"ground": "repair", "samples": 1})
        greedy = [replace(answer, constrained=None, candidates=[]) for answer in answers]
        repaired = scoring.score(questions, greedy, TASK, mend, schemas)
        for row, other in zip(rows, repaired, strict=True):
            row["ways"]["repaired"] = other["ways"]["repaired"]
        return rows

    def timed(self, rounds: int, size: int) -> dict[str, list[float]]:
        """Return the seconds of each way to ask the same questions, one entry a round."""
        free, chance = Decoding(self._decoding.max_new_tokens), random.Random(14)
        ways: Mapping[str, Callable[[list[Question]], object]] = {
            "one": lambda asked: self._ask(asked, free),
            "samples": lambda asked: self._ask(asked, replace(self._decoding, num_beams=1)),
            "constrained": lambda asked: self._ask(asked, free, constrain=True),
            "generate": self._generate,
        }
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for number in range(rounds):
            asked = chance.sample(self.questions, size)
            for name in chance.sample(list(ways), len(ways)):
                started = time.perf_counter()
                ways[name](asked)
                seconds[name].append(time.perf_counter() - started)
            latest = {name: round(values[-1], 1) for name, values in seconds.items()}
            print(f"round {number + 1}: {latest} s", file=sys.stderr)
        return seconds

    def _ask(
        self, asked: list[Question], decoding: Decoding, constrain: bool = False
    ) -> list[Answer]:
        chosen = self._guards if constrain else None
        return answer_questions(self._model, self._tokenizer, asked, decoding, chosen)

    def _generate(self, asked: list[Question]) -> None:
        """Sample by transformers, 8 prompts of similar length in a batch."""
        ends = Ends(self._model, self._tokenizer, asked[0].input_ids)
        ordered = sorted(asked, key=lambda question: -len(question.input_ids))
        pad = self._tokenizer.pad_token_id
        config = GenerationConfig(
            max_new_tokens=self._decoding.max_new_tokens,
            do_sample=True,
            temperature=self.settings.temperature,
            top_p=self.settings.top_p,
            top_k=0,
            num_return_sequences=self.settings.samples,
            eos_token_id=ends.stops,
            pad_token_id=pad,
        )
        for start in range(0, len(ordered), 8):
            prompts = [question.input_ids for question in ordered[start : start + 8]]
            width = max(map(len, prompts))
            padding = [width - len(prompt) for prompt in prompts]
            ids = [[pad] * count + prompt for count, prompt in zip(padding, prompts, strict=True)]
            mask = [[0] * count + [1] * (width - count) for count in padding]
            with inference(self._model):
                self._model.generate(
                    input_ids=torch.tensor(ids, device=self._model.device),
                    attention_mask=torch.tensor(mask, device=self._model.device),
                    generation_config=config,
                )


def report(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print the table of RESULTS.md for these questions."""
    print("| answer | execution accuracy | p against greedy | valid SQL |")
    print("|---|---|---|---|")
    n = len(rows)
    for way in rows[0]["ways"]:
        right = sum(row["ways"][way]["right"] for row in rows)
        valid = sum(row["ways"][way]["verdict"] in ("correct", "wrong") for row in rows)
        only = [
            sum(row["ways"][a]["right"] and not row["ways"][b]["right"] for row in rows)
            for a, b in ((way, "greedy"), ("greedy", way))
        ]
        test = "–" if way == "greedy" else f"{mcnemar(*only):.2g} (+{only[0]} -{only[1]})"
        print(f"| {WAYS[way]} | {interval(right, n)} | {test} | {interval(valid, n)} |")


def interval(part: int, total: int) -> str:
    """Write a share with its interval."""
    bounds = wilson_interval(part, total)
    return f"{100 * part / total:.1f} % [{100 * bounds.low:.1f}, {100 * bounds.high:.1f}]"


def result(
    arguments: argparse.Namespace, summary: Mapping[str, Any], seconds: Mapping[str, list[float]]
) -> dict[str, Any]:
    """Return the object of the last line; ratios are medians over the rounds."""

    def ratio(over: str, under: str) -> float | None:
        pairs = [a / b for a, b in zip(seconds[over], seconds[under], strict=True)]
        return round(median(pairs), 2) if pairs else None

    accuracy = {
        way: round(summary[f"execution_accuracy_{way}"], 4)
        for way in WAYS
        if f"execution_accuracy_{way}" in summary
    }
    return {
        f"time_ratio_{arguments.samples}": ratio("samples", "one"),
        "vs_generate": ratio("generate", "samples"),
        "constrained_time_ratio": ratio("constrained", "one"),
        "accuracy": accuracy,
        "temperature": arguments.temperature,
        "top_p": arguments.top_p,
        "n": summary["n"],
        "seconds": {
            name: [round(value, 1) for value in values] for name, values in seconds.items()
        },
        "threads": torch.get_num_threads(),
    }


if __name__ == "__main__":
    main()
