"""Whether sharing rows costs quality: the same examples, plain and shared, on real Spider over several seeds.

    RAY_SQL_SHARED=… python -m benchmarks.quality out/quality                          (--quick: a few examples, one seed)
    RAY_SQL_SHARED=… python -m benchmarks.quality out/quality --phase prepare          the three phases apart: only the second
    python -m benchmarks.quality out/quality --phase train                             needs a GPU, and it needs neither Spider
    RAY_SQL_SHARED=… python -m benchmarks.quality out/quality --phase score            nor Ray nor MLflow

Every run sees the same examples once, from the same base model, with the same settings; only the seed, the number of questions in
a row and the global batch differ. A row of 8 in a batch of 8 makes every step one database's; in a batch of 32, four databases'. All
answer Spider's dev questions, whose databases none has seen, and are judged by executing their SQL. Shared and plain runs of a
seed and batch are compared question by question (McNemar). A run whose predictions are in the folder is not repeated. The last
line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

from ray_sql import generate, models, rows
from ray_sql.config import Config, load
from ray_sql.generate import Answer
from ray_sql.metrics import mcnemar, wilson_interval

SEEDS, TOGETHER, BATCHES = (1, 2, 3), (1, 8), (8, 32)
SETTINGS: dict[str, Any] = {
    "model_name": "demo",
    "output_name": "quality",
    "task_type": "sql",
    "split": ["dev"],
    "prompt.serializer": "compact",
    "rows.max_length": 1024,
    "rows.too_long": "drop",
    "lora.r": 16,
    "lora.lora_alpha": 32,
    "lora.lora_dropout": 0.0,
    "learning_rate": 5e-4,
    "save_steps": 1_000_000,  # once, at the end
    "train.gradient_checkpointing": False,
    "scaling.num_workers": 0,
    "tracking.enabled": False,
    "evaluate.select_examples": 0,
    "evaluate.max_new_tokens": 96,
}
FULL = {"data.limit": 4000}
QUICK = {"data.limit": 32, "evaluate.limit": 16}


def main(argv: list[str] | None = None) -> None:
    """The phases asked for, or all three."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where inputs and predictions are kept")
    parser.add_argument("--phase", choices=["prepare", "train", "score"], help="only this one")
    parser.add_argument("--jobs", type=int, default=1, help="training runs at a time")
    parser.add_argument("--run", help="train only this run, `seed-together-batch`")
    parser.add_argument("--quick", action="store_true", help="32 examples, one seed: to see that it works")
    arguments = parser.parse_args(argv)
    if arguments.phase in (None, "prepare"):
        prepare(arguments.folder, QUICK if arguments.quick else FULL)
    if arguments.phase in (None, "train"):
        if arguments.run:
            train(arguments.folder, arguments.run)
        else:
            train_all(arguments.folder, SEEDS[:1] if arguments.quick else SEEDS, arguments.jobs)
    if arguments.phase in (None, "score"):
        score(arguments.folder)


def settings(**changes: Any) -> Config:
    """Settings of all runs."""
    shared = os.environ.get("RAY_SQL_SHARED")
    source = f"{shared}/data/spider" if shared else "demo"
    return load(Config, [], **SETTINGS, dataset_id=source, **changes)


def prepare(folder: Path, size: dict[str, int]) -> None:
    """Rows and questions, as files that a machine without the data can use."""
    from ray_sql.prepare import prepare as prepare_run

    if not os.environ.get("RAY_SQL_SHARED"):
        raise SystemExit("RAY_SQL_SHARED is not set: it names a folder with Spider in data/spider")
    config = settings(**size)
    prepared = prepare_run(config)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rows.parquet").write_bytes(prepared.rows_file.read_bytes())
    (folder / "questions.jsonl").write_text(generate.dump(prepared.questions(config)))
    print(f"{prepared.audit.line()}; {len(prepared.questions(config))} questions")


def train_all(folder: Path, seeds: tuple[int, ...], jobs: int) -> None:
    """Every run in a process of its own, `jobs` at a time."""
    runs = [f"{seed}-{together}-{batch}" for seed, batch, together in product(seeds, BATCHES, TOGETHER)]
    models.resolve(settings())  # converted once, not by every process

    def one(run: str) -> None:
        command = [sys.executable, "-m", "benchmarks.quality", str(folder), "--phase", "train", "--run", run]
        if subprocess.run(command, check=False).returncode:
            print(f"{run}: failed", flush=True)

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(one, runs))


def train(folder: Path, run: str) -> None:
    """One run: its answers to all questions, in `<folder>/<run>.jsonl`."""
    import torch

    from ray_sql import trainer

    target = folder / f"{run}.jsonl"
    if target.is_file():
        return
    seed, together, batch = map(int, run.split("-"))
    # plain rows as wide as the batch: one padded pass is faster than eight
    config = settings(
        seed=seed, train_batch_size=min(batch, 8), grad_accum_steps=max(1, batch // 8), eval_batch_size=64
    )
    data = rows.read(folder / "rows.parquet")
    asked = generate.parse((folder / "questions.jsonl").read_text())
    model_folder, _ = models.resolve(config)
    tokenizer = models.load_tokenizer(model_folder)
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    started, curve, said, trained = time.monotonic(), {}, [], 0.0

    def on_log(step: int, steps: int, values: dict[str, float]) -> None:
        curve[step] = values.get("loss")

    def on_save(step: int, local: Path, model: Any) -> None:
        nonlocal trained
        trained = time.monotonic() - started
        said.extend(
            generate.answer(
                model,
                tokenizer,
                asked,
                batch_size=config.eval_batch_size,
                max_new_tokens=config.evaluate.max_new_tokens,
            )
        )

    with tempfile.TemporaryDirectory() as scratch:
        trainer.train(
            models.load_base(model_folder, config, device),
            tokenizer,
            data,
            config,
            together=together,
            scratch=Path(scratch),
            resume_from=None,
            on_log=on_log,
            on_save=on_save,
        )
    target.write_text("".join(json.dumps(asdict(answer)) + "\n" for answer in said))
    (folder / f"{run}.json").write_text(json.dumps({"curve": curve, "training_seconds": trained}))
    last = [loss for loss in curve.values() if loss is not None][-5:]
    print(
        f"{run}: {len(data)} examples in {trained:.0f} s, loss at the end {sum(last) / len(last):.3f}, answered after "
        f"{time.monotonic() - started:.0f} s",
        flush=True,
    )


def score(folder: Path) -> None:
    """Judge every run's answers, and compare shared with plain ones."""
    from ray_sql import evaluate

    config = settings()
    asked = generate.parse((folder / "questions.jsonl").read_text())
    right: dict[tuple[int, int, int], list[bool]] = {}
    for file in sorted(folder.glob("*-*-*.jsonl")):
        answers = [Answer(**json.loads(line)) for line in file.read_text().splitlines()]
        verdicts = [row["verdict"] for row in evaluate.score(asked, answers, config)]
        seed, together, batch = map(int, file.stem.split("-"))
        right[seed, together, batch] = [verdict == "correct" for verdict in verdicts if verdict != "gold_error"]
    print(f"{'batch':>5} {'a row':>5}  execution accuracy by seed, pooled [95 % interval]")
    summary = []
    for batch, together in product(BATCHES, TOGETHER):
        runs = [right[key] for key in sorted(right) if key[1:] == (together, batch)]
        if not runs:
            continue
        hits, asked_all = sum(map(sum, runs)), sum(map(len, runs))
        interval = wilson_interval(hits, asked_all)
        by_seed = [sum(run) / len(run) for run in runs]
        shown = "  ".join(f"{100 * share:.1f}" for share in by_seed)
        print(
            f"{batch:>5} {together:>5}  {shown}  pooled {100 * hits / asked_all:.1f} [{100 * interval.low:.1f}, {100 * interval.high:.1f}]"
        )
        summary.append({"batch": batch, "together": together, "by_seed": by_seed, "n": asked_all})
    compared = []
    for batch in BATCHES:
        pairs = [
            pair
            for seed in SEEDS
            if (seed, 1, batch) in right and (seed, 8, batch) in right
            for pair in zip(right[seed, 1, batch], right[seed, 8, batch], strict=True)
        ]
        if pairs:
            plain, shared = sum(a and not b for a, b in pairs), sum(b and not a for a, b in pairs)
            p = mcnemar(plain, shared)
            print(
                f"batch {batch}: right with plain rows alone {plain}, with shared rows alone {shared}, McNemar p = {p:.2g}"
            )
            compared.append({"batch": batch, "only_plain": plain, "only_shared": shared, "mcnemar_p": p})
    print(json.dumps({"runs": summary, "compared": compared}))


if __name__ == "__main__":
    main()
