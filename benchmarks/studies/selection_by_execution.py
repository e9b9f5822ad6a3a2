"""Compare choosing a checkpoint by executed answers with choosing it by validation loss.

    RAY_SQL_SHARED=… python -m benchmarks.studies.selection_by_execution out/selection

With --quick it runs one short trial, 2 minutes on 2 cores.

SmolLM2-135M is trained at three learning rates and ranks, on questions of some of Spider's training
databases. Every checkpoint answers two other sets of questions on the same databases: one to choose
by, where the loss of the gold answers is measured too, and one that nothing was chosen by. On
databases that it never met, a model of this size answers too few questions to choose by.

The checkpoint of the highest execution accuracy and that of the lowest loss are compared on the
held-out questions: over all checkpoints, as a sweep chooses, by McNemar's paired test, and within
every trial, all trials counted together. A trial whose file is in the folder is not repeated. The
last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import make_encoder
from benchmarks.shared_rows_quality import drawn, settings
from ray_sql import data, generate, models, rows
from ray_sql.config import Config
from ray_sql.evaluate import scoring
from ray_sql.generate import Question
from ray_sql.metrics import mcnemar, wilson_interval
from ray_sql.metrics.judged import JudgedRow
from ray_sql.tasks import TASKS

POINTS = ((3e-4, 64), (1e-3, 16), (2e-3, 8))
"""(learning rate, LoRA rank) of every trial: slow, middling and fast."""
DATABASES, TRAINED, CHOOSING, HELD_OUT = 12, 24, 5, 12
"""Databases, and questions of each: to train on, to choose by, and to compare with."""
EPOCHS, CHECKPOINTS, BATCH = 3, 4, 8


@dataclass(frozen=True)
class Checkpoint:
    """Hold what was measured at a step of a trial.

    `objective` and `tie_break` come from the questions to choose by, and `loss` from their gold
    answers. `right` says which held-out questions were answered rightly.
    """

    trial: str
    step: int
    loss: float
    objective: float
    tie_break: float
    right: list[bool]


def main(argv: list[str] | None = None) -> None:
    """Train what is missing, and compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where the trials' measurements are kept")
    parser.add_argument(
        "--quick", action="store_true", help="one trial on two databases: to see that it works"
    )
    arguments = parser.parse_args(argv)
    if not os.environ.get("RAY_SQL_SHARED"):
        parser.error("RAY_SQL_SHARED is not set: it names a folder with Spider in data/spider")
    arguments.folder.mkdir(parents=True, exist_ok=True)
    points = POINTS[: 1 if arguments.quick else None]
    prepared = None
    found: list[Checkpoint] = []
    for rate, rank in points:
        file = arguments.folder / f"{rate:g}-{rank}{'-quick' if arguments.quick else ''}.json"
        if not file.is_file():
            prepared = prepared or prepare(2 if arguments.quick else DATABASES)
            measured = trial(prepared, rate, rank, 1 if arguments.quick else EPOCHS)
            file.write_text(json.dumps([vars(one) for one in measured]))
        found += [Checkpoint(**one) for one in json.loads(file.read_text())]
    report(found)


@dataclass(frozen=True)
class Material:
    """Hold rows to train on, questions to choose by with their rows, and held-out questions."""

    trained: list[rows.TokenizedExample]
    choosing: list[Question]
    choosing_rows: list[rows.TokenizedExample]
    held_out: list[Question]


def prepare(databases: int) -> Material:
    """Return what every trial reads."""
    config = settings()
    corpus = data.load(config)
    tokenizer = models.load_tokenizer(
        models.resolve(config.model_name, config.cache, config.read_token)[0]
    )
    encoder = make_encoder(tokenizer, config, corpus.schemas)
    chosen = drawn(corpus.splits["train"], databases, TRAINED + CHOOSING + HELD_OUT)
    first, second = TRAINED, TRAINED + CHOOSING
    parts = [
        [example for database in chosen for example in database[:first]],
        [example for database in chosen for example in database[first:second]],
        [example for database in chosen for example in database[second:]],
    ]
    trained, choosing = (rows.build(part, encoder, config.rows)[0] for part in parts[:2])
    asked = [generate.make_questions(part, "train", corpus, encoder) for part in parts[1:]]
    return Material(trained, asked[0], choosing, asked[1])


def trial(made: Material, rate: float, rank: int, epochs: int) -> list[Checkpoint]:
    """Train at a point, and measure at `CHECKPOINTS` steps."""
    import torch

    from ray_sql.train import trainer

    layout = {
        "train_batch_size": BATCH,
        "grad_accum_steps": 1,
        "rows.examples_per_row": BATCH,
        "num_epochs": epochs,
        "seed": 1,
    }
    config = settings(**layout).changed(
        {"learning_rate": rate, "lora.r": rank, "lora.lora_alpha": 2 * rank}
    )
    config = config.changed(
        {"save_steps": -(-config.batching.steps(len(made.trained)) // CHECKPOINTS)}
    )
    task = TASKS[config.task_type]
    model_folder, _ = models.resolve(config.model_name, config.cache, config.read_token)
    tokenizer = models.load_tokenizer(model_folder)
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    measured: list[Checkpoint] = []
    started = time.monotonic()

    def on_save(step: int, local: Path, model: Any) -> None:
        pad = tokenizer.pad_token_id
        total, labels = trainer.held_out_loss(model, made.choosing_rows, config.batching, 0, 1, pad)
        ask: Callable[[list[Question]], list[JudgedRow]] = partial(judged, model, tokenizer, config)
        objective, tie_break = task.objective(
            scoring.summarise(ask(made.choosing), task, config.evaluate)
        )
        right = [
            row["verdict"] == "correct"
            for row in ask(made.held_out)
            if row["verdict"] != "gold_error"
        ]
        measured.append(
            Checkpoint(f"{rate:g}, {rank}", step, total / labels, objective, tie_break, right)
        )
        print(
            f"rate {rate:g}, rank {rank}, step {step} after {time.monotonic() - started:.0f} s: "
            f"loss {total / labels:.3f}, "
            f"to choose by {100 * objective:.1f} %, held out {100 * sum(right) / len(right):.1f} %",
            flush=True,
        )

    with tempfile.TemporaryDirectory() as scratch:
        trainer.train(
            models.load_base(model_folder, config.quantization, config.train.bf16, device),
            tokenizer,
            made.trained,
            config,
            config.batching,
            trainer.TrainerHooks(lambda *_: None, on_save),
            Path(scratch),
        )
    return measured


def judged(model: Any, tokenizer: Any, config: Config, asked: list[Question]) -> list[JudgedRow]:
    """Return the model's answers with their verdicts."""
    from ray_sql.generate.answers import Decoding, answer_questions

    answers = answer_questions(model, tokenizer, asked, Decoding(config.evaluate.max_new_tokens))
    return list(scoring.score(asked, answers, TASKS[config.task_type], config.evaluate))


def report(found: list[Checkpoint]) -> None:
    """Print both choices, and what the paired test says of them."""
    print("| rate, rank | step | loss | accuracy that chooses | held-out accuracy |")
    print("|---|---|---|---|---|")
    for one in found:
        print(
            f"| {one.trial} | {one.step} | {one.loss:.3f} | {100 * one.objective:.1f} % | "
            f"{accuracy([one])} |"
        )
    trials = list(dict.fromkeys(one.trial for one in found))
    within = [[one for one in found if one.trial == name] for name in trials]
    result: dict[str, Any] = {"over_all": compared([found]), "within_trials": compared(within)}
    result["best_held_out"] = max(sum(one.right) / len(one.right) for one in found)
    print(json.dumps(result))


def compared(groups: list[list[Checkpoint]]) -> dict[str, Any]:
    """Compare the checkpoints that each way chooses, by all their held-out answers."""
    by_answers = [max(group, key=_rank(group)) for group in groups]
    by_loss = [min(group, key=lambda one: one.loss) for group in groups]
    pairs = [
        pair
        for a, b in zip(by_answers, by_loss, strict=True)
        for pair in zip(a.right, b.right, strict=True)
    ]
    alone = sum(a and not b for a, b in pairs), sum(b and not a for a, b in pairs)
    return {
        "by_answers": [
            accuracy(by_answers),
            *(f"{one.trial}: step {one.step}" for one in by_answers),
        ],
        "by_loss": [accuracy(by_loss), *(f"{one.trial}: step {one.step}" for one in by_loss)],
        "n": len(pairs),
        "only_by_answers": alone[0],
        "only_by_loss": alone[1],
        # several trials answer the same questions, which the test takes for different ones
        **({"mcnemar_p": mcnemar(*alone)} if len(groups) == 1 else {}),
    }


def _rank(group: list[Checkpoint]) -> Callable[[Checkpoint], tuple[float, float, int, int]]:
    """Rank as a sweep does: of equals the earlier trial, and of its checkpoints the later."""
    trials = [one.trial for one in group]
    return lambda one: (one.objective, one.tie_break, -trials.index(one.trial), one.step)


def accuracy(chosen: list[Checkpoint]) -> str:
    """Return the held-out execution accuracy with its interval."""
    right = [verdict for one in chosen for verdict in one.right]
    interval = wilson_interval(sum(right), len(right))
    share = f"{100 * sum(right) / len(right):.1f} %"
    return f"{share} [{100 * interval.low:.1f}, {100 * interval.high:.1f}]"


if __name__ == "__main__":
    main()
