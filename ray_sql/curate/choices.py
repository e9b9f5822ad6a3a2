"""Settings of a run that fit the size of a dataset, each with its reason."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import yaml

from ray_sql.data.splits import OWN_SPLITS

MODEL = "Qwen/Qwen2.5-0.5B-Instruct"
"""The base model, where none is given: small, and licensed for all uses."""
EPOCHS = ((100, 10), (300, 6), (1_000, 4), (5_000, 2))
"""Fewer training pairs than this → passes over them. More pairs get one."""
FEW = 400
"""Fewer training pairs than this leave none to choose a checkpoint by."""

Choice = tuple[str, object, str]
"""A setting, its value, and why."""


def choose(pairs: int, splits: Sequence[str], name: str, folder: Path) -> Iterator[Choice]:
    """Yield the settings of a run on so many training pairs, each with its reason.

    `splits` are those of the dataset.
    """
    epochs = next((epochs for fewer, epochs in EPOCHS if pairs < fewer), 1)
    yield "model_name", MODEL, "small enough for one GPU; name a larger one for better answers"
    yield "output_name", name, "after the pairs"
    yield "task_type", "sql", "pairs of questions and SQL"
    yield "dataset_id", str(folder), "made of the pairs"
    others = [split for split in splits if split not in OWN_SPLITS]
    if others and "dev" not in others:
        scored = "test" if "test" in others else others[0]
        yield "split", scored, "the pairs name their splits, and none is dev"
    yield "num_epochs", epochs, f"{pairs} training pairs: fewer pairs want more passes"
    yield "learning_rate", 2e-4, "short trainings want more than the default"
    if pairs < FEW:
        few = f"{pairs} training pairs are too few to choose a checkpoint by"
        yield "data.validation_fraction", 0, few
        yield "evaluate.select_examples", 0, "the last checkpoint is kept"
    yield "rows.examples_per_row", "auto", "questions on one database share its schema"
    yield "prompt.values", "matched", "cells that a question names helped on trained databases"


def as_yaml(choices: Sequence[Choice]) -> str:
    """Return settings as a file that --config reads, each reason as a comment."""
    lines = ["# Chosen by `ray-sql finetune` for this dataset."]
    for setting, value, why in choices:
        written = yaml.safe_dump({setting: value}, width=1_000_000, allow_unicode=True).strip()
        lines.append(f"{written}  # {why}")
    return "\n".join(lines) + "\n"


def as_flags(choices: Iterable[Choice]) -> list[str]:
    """Return settings as words of a command line."""
    return [word for setting, value, _ in choices for word in (f"--{setting}", str(value))]
