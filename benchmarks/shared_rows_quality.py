"""Train the same examples in plain and in shared rows on real Spider, over several seeds.

    export RAY_SQL_SHARED=…             # a folder with Spider in data/spider
    python -m benchmarks.shared_rows_quality out/rows --together 1 2 4 8   (--quick: one seed)
    python -m benchmarks.shared_rows_quality out/rows --batch 32 --epochs 2
    python -m benchmarks.shared_rows_quality out/rows --phase prepare      (then train, then score)

The phase `train` is faster on a GPU, and needs neither Spider nor Ray nor MLflow.

Every run sees the same examples equally often, from the same base model, with the same settings.
Only the seed and the number of questions in a row differ, and with it which examples meet in a
step. In a batch of 8, rows of 8 make every step one database's, rows of 4 two databases', rows of
2 four databases'. Plain rows mix all.

The examples are 40 questions each of 12 of Spider's training databases. They are drawn once among
those with short prompts: length changes the cost, and not the answer to this question. Another 15
questions of each database are asked at the end and judged by executing their SQL. Every run of a
seed is compared with its plain run question by question (McNemar). The loss of their gold answers,
without dropout, tells runs apart more finely.

A run whose answers are in the folder is not repeated, and the table shows all runs there. The last
line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import make_encoder
from ray_sql import data, generate, models, rows
from ray_sql.config import Config, load
from ray_sql.generate import Answer
from ray_sql.metrics import mcnemar, wilson_interval
from ray_sql.tasks import TASKS

TOGETHER, PASS = (1, 8), 8
TRAINED, ASKED = 40, 15
"""Questions of a database that are trained on, and others that are asked."""
SETTINGS: dict[str, Any] = {
    "model_name": "demo",
    "output_name": "quality",
    "task_type": "sql",
    "split": ["dev"],
    "prompt.serializer": "compact",
    "rows.max_length": 448,
    "lora.r": 16,
    "lora.lora_alpha": 32,
    "lora.lora_dropout": 0.0,
    "learning_rate": 1e-3,
    "save_steps": 1_000_000,  # once, at the end
    "train.gradient_checkpointing": False,
    "scaling.num_workers": 0,
    "tracking.enabled": False,
    "evaluate.select_examples": 0,
    "evaluate.max_new_tokens": 96,
    "data.validation_fraction": 0,
}


@dataclass(frozen=True, order=True)
class Run:
    """Describe one training by what sets it apart from others."""

    seed: int
    together: int
    batch: int
    epochs: int

    @property
    def name(self) -> str:
        """Return the name of the run's files."""
        return f"{self.seed}-{self.together}-{self.batch}-{self.epochs}"

    @classmethod
    def parse(cls, name: str) -> Run:
        """Return the run of that name."""
        return cls(*map(int, name.split("-")))


def main(argv: list[str] | None = None) -> None:
    """Run the given phase, or all three."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where inputs and predictions are kept")
    parser.add_argument("--phase", choices=["prepare", "train", "score"], help="only this one")
    parser.add_argument("--databases", type=int, default=12, help="training databases")
    parser.add_argument("--jobs", type=int, default=1, help="training runs at a time")
    parser.add_argument(
        "--together",
        type=int,
        nargs="+",
        default=TOGETHER,
        help="questions in a row; 1 is plain rows",
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument(
        "--batch", type=int, default=PASS, help="examples in a step, a multiple of 8"
    )
    parser.add_argument("--epochs", type=int, default=1, help="how often every example is seen")
    parser.add_argument("--run", help="train only this run, `seed-together-batch-epochs`")
    parser.add_argument(
        "--quick", action="store_true", help="one database, one seed: to see that it works"
    )
    arguments = parser.parse_args(argv)
    if arguments.batch % PASS:
        parser.error(f"--batch {arguments.batch} is no multiple of {PASS}")
    if arguments.phase in (None, "prepare"):
        prepare(arguments.folder, 1 if arguments.quick else arguments.databases)
    if arguments.phase in (None, "train"):
        if arguments.run:
            train(arguments.folder, Run.parse(arguments.run))
        else:
            seeds = [1] if arguments.quick else arguments.seeds
            runs = [
                Run(*each, arguments.batch, arguments.epochs)
                for each in product(seeds, arguments.together)
            ]
            train_all(arguments.folder, runs, arguments.jobs)
    if arguments.phase in (None, "score"):
        score(arguments.folder)


def settings(**changes: Any) -> Config:
    """Return the settings of all runs."""
    shared = os.environ.get("RAY_SQL_SHARED")
    source = f"{shared}/data/spider" if shared else "demo"
    return load(Config, [], **SETTINGS, dataset_id=source, **changes)


def prepare(folder: Path, databases: int) -> None:
    """Write rows and questions as files that a machine without the data can use."""
    if not os.environ.get("RAY_SQL_SHARED"):
        raise SystemExit("RAY_SQL_SHARED is not set: it names a folder with Spider in data/spider")
    config = settings()
    corpus = data.load(config)
    tokenizer = models.load_tokenizer(
        models.resolve(config.model_name, config.cache, config.read_token)[0]
    )
    encoder = make_encoder(tokenizer, config, corpus.schemas)
    short = [
        example
        for example in corpus.splits["train"]
        if len(encoder.encode(example).input_ids) <= config.rows.max_length
    ]
    chosen = drawn(short, databases, TRAINED + ASKED)
    trained = [example for examples in chosen for example in examples[:TRAINED]]
    asked = [example for examples in chosen for example in examples[TRAINED:]]
    file, audit = rows.prepare(trained, encoder, config.rows, config.cache)
    questions = generate.make_questions(asked, "held-out", corpus, encoder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rows.parquet").write_bytes(file.read_bytes())
    (folder / "held-out.parquet").write_bytes(
        rows.prepare(asked, encoder, config.rows, config.cache)[0].read_bytes()
    )
    (folder / "questions.jsonl").write_text(generate.dump(questions))
    print(f"{audit.line()}; {len(questions)} questions")


def drawn(examples: Sequence[data.Example], databases: int, count: int) -> list[list[data.Example]]:
    """Draw `count` examples of each of `databases` databases that have as many."""
    by_database: dict[str, list[data.Example]] = defaultdict(list)
    for example in examples:
        by_database[example.db_id].append(example)
    large = sorted(name for name, each in by_database.items() if len(each) >= count)
    if len(large) < databases:
        raise SystemExit(f"{len(large)} databases have {count} short questions, of {databases}")
    draw = random.Random(14)
    return [draw.sample(by_database[name], count) for name in draw.sample(large, databases)]


def train_all(folder: Path, runs: Sequence[Run], jobs: int) -> None:
    """Train every run in a process of its own, `jobs` at a time."""
    config = settings()
    models.resolve(
        config.model_name, config.cache, config.read_token
    )  # converted once, not by every process

    def one(run: Run) -> None:
        command = [
            sys.executable,
            "-m",
            "benchmarks.shared_rows_quality",
            str(folder),
            "--phase",
            "train",
            "--run",
            run.name,
        ]
        if subprocess.run(command, check=False).returncode:
            print(f"{run.name}: failed", flush=True)

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(one, runs))


def train(folder: Path, run: Run) -> None:
    """Train one run, and write its answers to `<folder>/<name>.jsonl`."""
    import torch

    from ray_sql.generate.answers import Decoding, answer_questions
    from ray_sql.train import trainer

    target = folder / f"{run.name}.jsonl"
    if target.is_file():
        return
    # plain rows up to eight at a time: one padded pass is faster than eight
    config = settings(
        seed=run.seed,
        train_batch_size=PASS,
        grad_accum_steps=run.batch // PASS,
        num_epochs=run.epochs,
    )
    examples = rows.read(folder / "rows.parquet")
    asked = generate.parse((folder / "questions.jsonl").read_text())
    model_folder, _ = models.resolve(config.model_name, config.cache, config.read_token)
    tokenizer = models.load_tokenizer(model_folder)
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    held_out = rows.read(folder / "held-out.parquet")
    started, curve, said, trained, loss = time.monotonic(), {}, [], 0.0, 0.0

    def on_log(step: int, steps: int, values: dict[str, float]) -> None:
        curve[step] = values.get("loss")

    def on_save(step: int, local: Path, model: Any) -> None:
        nonlocal trained, loss
        trained = time.monotonic() - started
        total, labels = trainer.held_out_loss(
            model,
            held_out,
            replace(config.batching, examples_per_row=PASS),
            0,
            1,
            tokenizer.pad_token_id,
        )
        loss = total / labels
        said.extend(
            answer_questions(model, tokenizer, asked, Decoding(config.evaluate.max_new_tokens))
        )

    with tempfile.TemporaryDirectory() as scratch:
        trainer.train(
            models.load_base(model_folder, config.quantization, config.train.bf16, device),
            tokenizer,
            examples,
            config,
            replace(config.batching, examples_per_row=run.together),
            trainer.TrainerHooks(on_log, on_save),
            Path(scratch),
        )
    curves = {"curve": curve, "training_seconds": trained, "held_out_loss": loss}
    (folder / f"{run.name}.json").write_text(json.dumps(curves))
    target.write_text(
        "".join(json.dumps(asdict(answer)) + "\n" for answer in said)
    )  # last: with it the run is complete
    print(
        f"{run.name}: {len(examples)} examples in {trained:.0f} s, held-out loss {loss:.3f}, "
        "answered after "
        f"{time.monotonic() - started:.0f} s",
        flush=True,
    )


@dataclass(frozen=True)
class Scored:
    """Hold a run's mean loss on answer tokens, its right answers, and seconds of training."""

    loss: float
    right: list[bool]
    seconds: float


def score(folder: Path) -> None:
    """Judge every run's answers, and compare shared with plain ones."""
    from ray_sql.evaluate import scoring

    config = settings()
    asked = generate.parse((folder / "questions.jsonl").read_text())
    found: dict[Run, Scored] = {}
    for file in sorted(folder.glob("*-*-*-*.jsonl")):
        answers = [Answer(**json.loads(line)) for line in file.read_text().splitlines()]
        verdicts = [
            row["verdict"]
            for row in scoring.score(asked, answers, TASKS[config.task_type], config.evaluate)
        ]
        right = [verdict == "correct" for verdict in verdicts if verdict != "gold_error"]
        measured = json.loads(file.with_suffix(".json").read_text())
        found[Run.parse(file.stem)] = Scored(
            measured["held_out_loss"], right, measured["training_seconds"]
        )
    print(
        "| batch | epochs | questions a row | seconds of training | held-out loss by seed | "
        "execution accuracy by seed "
        "| pooled [95 % interval] | right alone, plain alone | McNemar p "
        "|\n|---|---|---|---|---|---|---|---|---|"
    )
    kinds = sorted({(run.batch, run.epochs, run.together) for run in found})
    lines = [_line(Run(0, together, batch, epochs), found) for batch, epochs, together in kinds]
    print(json.dumps({"runs": lines}))


def _line(kind: Run, found: dict[Run, Scored]) -> dict[str, Any]:
    """Print one line of the table: all seeds of one kind of run, paired with their plain runs."""
    runs = sorted(run for run in found if replace(run, seed=0) == kind)
    hits, n = sum(sum(found[run].right) for run in runs), sum(len(found[run].right) for run in runs)
    interval = wilson_interval(hits, n)
    pairs = [
        pair
        for run in runs
        if (plain := _plain(run, found))
        for pair in zip(plain, found[run].right, strict=True)
    ]
    plain_alone, alone = sum(a and not b for a, b in pairs), sum(b and not a for a, b in pairs)
    line = {
        **{name: value for name, value in asdict(kind).items() if name != "seed"},
        "seconds": median(found[run].seconds for run in runs),
        "held_out_loss": [found[run].loss for run in runs],
        "by_seed": [sum(found[run].right) / len(found[run].right) for run in runs],
        "n": n,
        "alone": alone,
        "plain_alone": plain_alone,
        "mcnemar_p": mcnemar(plain_alone, alone),
    }
    print(
        f"| {kind.batch} | {kind.epochs} | {kind.together} | {line['seconds']:.0f} "
        f"| {', '.join(f'{loss:.3f}' for loss in line['held_out_loss'])} "
        f"| {', '.join(f'{100 * share:.1f}' for share in line['by_seed'])} % | "
        f"{100 * hits / n:.1f} % "
        f"[{100 * interval.low:.1f}, {100 * interval.high:.1f}] of {n} | "
        + (
            f"{alone}, {plain_alone} | {line['mcnemar_p']:.2g} |"
            if pairs and kind.together > 1
            else "| |"
        )
    )
    return line


def _plain(run: Run, found: dict[Run, Scored]) -> list[bool] | None:
    """Return the right answers of the plain run of the same seed and batch.

    It has as many epochs, or where there is none of those, one.
    """
    same, once = replace(run, together=1), replace(run, together=1, epochs=1)
    plain = found.get(same) or found.get(once)
    return plain.right if plain else None


if __name__ == "__main__":
    main()
