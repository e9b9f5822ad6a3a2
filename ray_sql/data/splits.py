"""Choose what is trained on, what chooses the best checkpoint, and what is scored; then find the schemas these need."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from ray_sql.config import Config
from ray_sql.data.corpus import Corpus, Example, sample, some
from ray_sql.data.read import read_corpus
from ray_sql.database import Schema, reflect
from ray_sql.errors import DataError


def load(config: Config) -> Corpus:
    """The corpus that `config` names, split into `train`, `validation` and the splits to be scored.

    Raises `DataError` naming the file, the row and the field of whatever is missing or malformed.
    """
    for split in {"train", "validation"} & set(config.split):
        raise DataError(
            f"--split {split}: is trained or chosen on, so it cannot score a run; name a split that is not"
        )
    corpus = _with_scored_splits(read_corpus(config), config)
    train, validation = _set_aside(
        corpus.splits["train"], config.data.validation_fraction, config, "validation"
    )
    if config.data.limit:
        train = sample(train, config.data.limit, config.seed)
    scored = {split: corpus.splits[split] for split in config.split}
    return _with_schemas(
        config, replace(corpus, splits={"train": train, "validation": validation} | scored)
    )


def load_split(config: Config, splits: Sequence[str]) -> Corpus:
    """Only the named splits, whole, with the schemas and databases they need."""
    corpus = read_corpus(config)
    if "validation" in splits or not all(split in corpus.splits for split in splits):
        scored = tuple(split for split in splits if split not in ("train", "validation"))
        # one unsplit file: training set its test part aside first, so the same is done here
        corpus = load(
            config.changed(
                {"split": scored or (("dev",) if set(corpus.splits) == {"train"} else ())}
            )
        )
    return _with_schemas(
        config, replace(corpus, splits={split: corpus.splits[split] for split in splits})
    )


def _with_schemas(config: Config, corpus: Corpus) -> Corpus:
    """Add the schema of every database in use: from the live database where there is one, else from tables.json."""
    schemas: dict[str, Schema] = {}
    for split, examples in corpus.splits.items():
        for example in examples:
            db_id = example.db_id
            if db_id in schemas or (example.schema_text and db_id not in corpus.databases):
                continue
            if db_id in corpus.databases:
                schemas[db_id] = reflect(
                    corpus.databases[db_id], db_id, config.prompt.example_values
                )
            elif db_id in corpus.schemas:
                schemas[db_id] = corpus.schemas[db_id]
            else:
                raise DataError(
                    f"--dataset_id {config.dataset_id}, {split} example {example.id}: unknown db_id {db_id!r}: no database file "
                    f"{db_id}/{db_id}.sqlite and no entry in tables.json; have {some(corpus.databases or corpus.schemas)}"
                )
    return replace(corpus, schemas=schemas)


def _with_scored_splits(corpus: Corpus, config: Config) -> Corpus:
    """Make sure that there is a `train` split, and every split to be scored; one unsplit file is divided here."""
    if not corpus.splits.get("train"):
        raise DataError(
            f"--dataset_id {config.dataset_id}: no training examples; found splits {some(corpus.splits)}"
        )
    missing = [split for split in config.split if split not in corpus.splits]
    if missing and set(corpus.splits) == {"train"} and len(config.split) == 1:
        # drawn under one name whatever the user calls it, or `--split test` would score what `--split dev` trained on
        train, held_out = _set_aside(
            corpus.splits["train"], config.data.test_fraction, config, "held-out"
        )
        return replace(corpus, splits={"train": train, missing[0]: held_out})
    if missing:
        raise DataError(
            f"--split {missing[0]}: --dataset_id {config.dataset_id} has no such split; it has {some(corpus.splits)}"
        )
    return corpus


def _set_aside(
    examples: tuple[Example, ...], fraction: float, config: Config, name: str
) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    """Divide examples into (kept, set aside): whole databases drawn with the seed until `fraction` is reached, or questions.

    Where databases are so unequal that what can be set aside is less than half or more than twice what was wanted, it is questions,
    unless the settings say databases.
    """
    wanted = round(fraction * len(examples))
    if not wanted:
        return examples, ()
    by_database = Counter(example.db_id for example in examples)
    seed = f"{config.seed}-{name}"
    held = _whole_databases(by_database, wanted, random.Random(seed))
    size = sum(by_database[db_id] for db_id in held)
    by_default = (
        "database" if len(by_database) > 1 and wanted / 2 <= size <= 2 * wanted else "question"
    )
    if (config.data.split_by or by_default) == "question":
        chosen = set(random.Random(seed).sample(range(len(examples)), wanted))
        aside = [index in chosen for index in range(len(examples))]
    else:
        if len(by_database) < 2:
            raise DataError(
                f"--data.split_by database: all {len(examples)} examples are on one database ({some(by_database)}), so none "
                "can be set aside whole; use --data.split_by question"
            )
        aside = [example.db_id in held for example in examples]
    kept = tuple(example for example, out in zip(examples, aside, strict=True) if not out)
    return kept, tuple(example for example, out in zip(examples, aside, strict=True) if out)


def _whole_databases(
    by_database: Mapping[str, int], wanted: int, generator: random.Random
) -> set[str]:
    """Databases to set aside for so many examples: in an order drawn at random, passing over those that are more than half too many."""
    order = sorted(by_database)
    generator.shuffle(order)
    held: set[str] = set()
    size = 0
    for db_id in order:
        if (
            size < wanted
            and size + by_database[db_id] <= 1.5 * wanted
            and len(held) < len(order) - 1
        ):
            held.add(db_id)
            size += by_database[db_id]
    return held or {min(order, key=lambda db_id: by_database[db_id])}
