"""Answer the same questions with transformers' `generate` and with schemas computed once.

    RAY_SQL_SHARED=… python -m benchmarks.generation_speed   (--quick: one round, few questions)

RAY_SQL_SHARED names a folder with Spider in data/spider; without it the demo's data are used.
Schemas are written as CREATE TABLE statements (the default). The questions are those on Spider
dev's databases with the longest prompts, among those with enough questions. A round asks 64
questions, the default of `evaluate.max_num_seqs`: 1, 8 or 32 of each database (1 of each: as many
as there are databases). Both ways answer them, in an order drawn anew:

    batched   transformers' `generate` of the model as peft loads it: whole prompts of similar
              length padded on the left, --batch_size at a time, each batch until its last answer
    ours      this project's decoding: each schema once, all questions in step token by token, and
              an answered one leaves; on a CPU the adapter is added to the weights meanwhile

Both stop an answer at its end of turn, at its closing code fence, or after
`evaluate.max_new_tokens` tokens. The model is SmolLM2-135M in 4-bit NF4, and over it --adapter
where given: an adapter stops where an answer ends, the base model often rambles.

A ratio is that of seconds in the same round. Answers are the same in float32, which is checked on a
few questions of every round. In bfloat16, sums in another order round to other tokens: the number
of equal answers is printed, and beside it that of `generate` itself at batch size 1. The last line
is one JSON object; `vs_batched` is the median at the most questions a database.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from statistics import median
from typing import Any

import torch

from benchmarks import make_encoder
from ray_sql import cluster, data, generate, models
from ray_sql.config import Config, load
from ray_sql.generate import Answer, Question, hf_generate
from ray_sql.generate.answers import Decoding, answer_questions

PER_DATABASE = (1, 8, 32)
"""Questions of a database in a round."""
ROUND = 64
"""Questions of a round, where there are as many databases; an evaluation has hundreds, and as many
go on together."""


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--rounds", type=int, default=3, help="rounds at each number of questions a database"
    )
    parser.add_argument(
        "--per_database", type=int, nargs="+", default=PER_DATABASE, help="questions of a database"
    )
    parser.add_argument(
        "--batch_size", type=int, default=8, help="prompts that `generate` answers together"
    )
    parser.add_argument("--adapter", help="folder of an adapter over the demo's model")
    parser.add_argument(
        "--max_new_tokens", type=int, help="by default what evaluate.max_new_tokens is"
    )
    parser.add_argument(
        "--exact",
        type=int,
        default=2,
        help="questions of a round whose answers are compared in float32",
    )
    parser.add_argument(
        "--quick", action="store_true", help="one round of 4, 8 and 32 questions, 32 new tokens"
    )
    arguments = parser.parse_args(argv)
    config = settings(arguments.max_new_tokens or (32 if arguments.quick else None))
    rounds, exact = (1, 2) if arguments.quick else (arguments.rounds, arguments.exact)
    started = time.monotonic()
    bench = Bench(config, arguments.adapter, arguments.batch_size)
    measured = {}
    for each in arguments.per_database:
        size = max(4 if arguments.quick else ROUND, each)
        measured[each] = [
            bench.round(asked, exact) for asked in draw(bench.asked, each, size, rounds)
        ]
    report(measured)
    found = {each: median(one["ratio"] for one in made) for each, made in measured.items()}
    every = [one for made in measured.values() for one in made]
    print(
        json.dumps(
            {
                "vs_batched": round(found[max(found)], 2),
                **{f"vs_batched_{each}": round(ratio, 2) for each, ratio in found.items()},
                "equal_float32": sum(one["exact_equal"] for one in every)
                / max(1, sum(one["exact"] for one in every)),
                f"equal_{bench.dtype}": round(
                    sum(one["equal"] for one in every) / sum(one["n"] for one in every), 3
                ),
                "batch_size": arguments.batch_size,
                "max_new_tokens": config.evaluate.max_new_tokens,
                "adapter": arguments.adapter is not None,
                "rounds": rounds,
                "threads": torch.get_num_threads(),
                "device": device_name(bench.device),
                "seconds": round(time.monotonic() - started, 1),
            }
        )
    )


def settings(max_new_tokens: int | None) -> Config:
    """Return the default settings over the demo's model."""
    shared = os.environ.get("RAY_SQL_SHARED")
    return load(
        Config,
        [],
        model_name="demo",
        output_name="generation",
        task_type="sql",
        dataset_id=f"{shared}/data/spider" if shared else "demo",
        split=["dev"] if shared else ["seen", "unseen"],
        scaling={"num_workers": 0},
        tracking={"enabled": False},
        **({"evaluate.max_new_tokens": max_new_tokens} if max_new_tokens else {}),
    )


def draw(asked: Sequence[Question], each: int, size: int, rounds: int) -> Iterator[list[Question]]:
    """Yield rounds of up to `size` questions, `each` of a database where it has that many.

    The databases with the longest prompts come first.
    """
    by_database: dict[str, list[Question]] = {}
    for question in asked:
        by_database.setdefault(question.db_id, []).append(question)
    each = min(each, size, max(map(len, by_database.values())))
    longest = sorted(
        (questions for questions in by_database.values() if len(questions) >= each),
        key=lambda questions: -median(len(one.input_ids) for one in questions),
    )
    count = max(1, size // each)
    chance = random.Random(14)
    for number in range(rounds):
        # as many other databases a round as there are among the longest half; after them, other
        # questions of the same
        first = number * count % max(1, max(count, len(longest) // 2) - count + 1)
        yield [
            one
            for questions in longest[first : first + count]
            for one in chance.sample(questions, each)
        ]


class Bench:
    """Hold the model, and both ways to ask it."""

    def __init__(self, config: Config, adapter: str | None, batch_size: int) -> None:
        self.config, self._adapter, self._batch_size = config, adapter, batch_size
        cluster.keep_freed_memory()
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._folder, _ = models.resolve(config.model_name, config.cache, config.read_token)
        self._tokenizer = models.load_tokenizer(self._folder)
        corpus = data.load_split(config, config.split)
        encoder = make_encoder(self._tokenizer, config, corpus.schemas)
        self.asked = [
            question
            for split in config.split
            for question in generate.make_questions(corpus.splits[split], split, corpus, encoder)
        ]
        self._model = self._load(config)
        self.dtype = str(self._model.dtype).removeprefix("torch.")
        full = self.dtype == "float32"
        self._exact = self._model if full else self._load(config.changed({"train.bf16": False}))
        self._chance = random.Random()

    def round(self, asked: list[Question], exact: int) -> dict[str, Any]:
        """Ask the same questions in both ways; return seconds and the number of equal answers."""
        said: dict[str, list[Answer]] = {}
        seconds: dict[str, float] = {}
        ways: dict[str, Callable[[], list[Answer]]] = {
            "batched": lambda: self.batched(asked),
            "ours": lambda: self.ours(asked),
        }
        for name in self._chance.sample(list(ways), len(ways)):
            self._synchronise()
            started = time.perf_counter()
            said[name] = ways[name]()
            self._synchronise()
            seconds[name] = time.perf_counter() - started
        few = asked[:: max(1, len(asked) // exact)][:exact] if exact else []
        other = self.batched(few, size=1)
        places = [asked.index(one) for one in few]
        made = {
            "n": len(asked),
            "databases": len({one.db_id for one in asked}),
            "prompts": [len(one.input_ids) for one in asked],
            "answers": [one.new_tokens for one in said["batched"]],
            "seconds": seconds,
            "ratio": seconds["batched"] / seconds["ours"],
            "equal": _equal(said["batched"], said["ours"]),
            "exact": len(few),
            "exact_equal": _equal(
                self.batched(few, model=self._exact, size=1), self.ours(few, model=self._exact)
            ),
            "own_equal": _equal(other, [said["batched"][place] for place in places]),
        }
        print(
            f"{made['n']} questions on {made['databases']} databases: batched "
            f"{seconds['batched']:.1f} s, ours "
            f"{seconds['ours']:.1f} s, {made['ratio']:.1f}x",
            file=sys.stderr,
        )
        return made

    def batched(
        self, asked: Sequence[Question], model: Any = None, size: int | None = None
    ) -> list[Answer]:
        """Answer with transformers' `generate`, prompts of similar length in a batch."""
        size = size or self._batch_size
        order = sorted(range(len(asked)), key=lambda number: -len(asked[number].input_ids))
        said: dict[int, Answer] = {}
        for start in range(0, len(order), size):
            batch = order[start : start + size]
            prompts = [asked[number].input_ids for number in batch]
            answers = hf_generate.answer_batch(
                model or self._model, self._tokenizer, prompts, self.config.evaluate.max_new_tokens
            )
            said |= dict(zip(batch, answers, strict=True))
        return [said[number] for number in range(len(asked))]

    def ours(self, asked: Sequence[Question], model: Any = None) -> list[Answer]:
        """Answer with this project's decoding, its check of the model included."""
        limit = self.config.evaluate.max_new_tokens
        return answer_questions(model or self._model, self._tokenizer, asked, Decoding(limit))

    def _load(self, config: Config) -> Any:
        model = models.load_base(self._folder, config.quantization, config.train.bf16, self.device)
        return models.load_adapter(model, self._adapter) if self._adapter else model

    def _synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def _equal(some: Sequence[Answer], others: Sequence[Answer]) -> int:
    return sum(one.raw == other.raw for one, other in zip(some, others, strict=True))


def report(measured: dict[int, list[dict[str, Any]]]) -> None:
    """Print the table of RESULTS.md."""
    print(
        "| questions a database | questions, databases | prompt tokens | answer tokens | batched, "
        "questions/s | ours, questions/s | "
        "ratio (spread) | equal | equal in float32 | batched equal to itself one by one |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for each, rounds in measured.items():
        n, exact = sum(one["n"] for one in rounds), sum(one["exact"] for one in rounds)
        prompts = [length for one in rounds for length in one["prompts"]]
        answers = [length for one in rounds for length in one["answers"]]
        rate = {
            name: n / sum(one["seconds"][name] for one in rounds) for name in ("batched", "ours")
        }
        ratios = sorted(one["ratio"] for one in rounds)
        print(
            f"| {each} | {n}, {max(one['databases'] for one in rounds)} a round | {min(prompts)} "
            f"to {max(prompts)} (median "
            f"{median(prompts):.0f}) | {min(answers)} to {max(answers)} (median "
            f"{median(answers):.0f}) | {rate['batched']:.2f} | "
            f"{rate['ours']:.2f} | {median(ratios):.1f}x ({ratios[0]:.1f} to {ratios[-1]:.1f}) | "
            f"{sum(one['equal'] for one in rounds)} of {n} | "
            f"{sum(one['exact_equal'] for one in rounds)} of {exact} | "
            f"{sum(one['own_equal'] for one in rounds)} of {exact} |"
        )


def device_name(device: torch.device) -> str:
    """Return the GPU's name, or the processor's."""
    return (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else platform.processor() or platform.machine()
    )


if __name__ == "__main__":
    main()
