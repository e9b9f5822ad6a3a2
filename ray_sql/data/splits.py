"""Choose the examples to train on, to select by and to score, and find the schemas they need."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

from ray_sql.config import Config
from ray_sql.config.sections import PromptSection
from ray_sql.data import descriptions, layouts, schema_texts
from ray_sql.data.columns import Source
from ray_sql.data.corpus import Corpus, Example, LeftOut, join_some, sample
from ray_sql.data.read import read_corpus
from ray_sql.data.values import with_values
from ray_sql.database import Executor, Schema, foreign_keys, reflect, suite
from ray_sql.errors import DataError
from ray_sql.tasks import TASKS

OWN_SPLITS = ("train", "validation")
"""Splits that a run trains on or selects by."""

Examples = tuple[Example, ...]


def load(config: Config) -> Corpus:
    """Return the corpus as `train`, `validation` and the splits to be scored, with schemas.

    Raises:
        DataError: names the file, the row and the field that is missing or malformed.
    """
    for split in config.split:
        if split in OWN_SPLITS:
            raise DataError(
                f"--split {split}: is trained or chosen on, so it cannot score a run; name a "
                "split that is not"
            )
    source = _source(config, config.split)
    corpus = _divide(read_corpus(source), source, config.split, config.seed)
    by_suites = config.evaluate.semantics == "spider"
    corpus = _with_schemas(corpus, source, config.prompt, suites=by_suites)
    return with_values(corpus, config.prompt)


def load_split(config: Config, splits: Sequence[str], *, undivided: bool = False) -> Corpus:
    """Return only the named splits, whole, with the schemas and databases they need.

    One file without splits is divided as for training; if `undivided`, all of it is the split.
    """
    source = _source(config, splits)
    corpus = read = read_corpus(source)
    if len(corpus.splits) == 1 and not corpus.splits.keys() & {"dev", "test", *splits}:
        corpus = replace(corpus, has_splits=False)
        if undivided and len(splits) == 1 and splits[0] not in OWN_SPLITS:
            corpus = read = _named(corpus, splits[0])
    if "validation" in splits or not set(splits) <= set(corpus.splits):
        scored = tuple(split for split in splits if split not in OWN_SPLITS)
        # Training sets the test part of one unsplit file aside first, so it is set aside here too.
        if not scored and set(corpus.splits) == {"train"}:
            scored = ("dev",)
        corpus = _divide(corpus, source, scored, config.seed)
    left_out = corpus.left_out
    if set(read.splits) != {"train"}:
        left_out = tuple(row for row in left_out if row.split in splits)
    chosen = {split: corpus.splits[split] for split in splits}
    corpus = replace(corpus, splits=chosen, left_out=left_out)
    by_suites = config.evaluate.semantics == "spider"
    corpus = _with_schemas(corpus, source, config.prompt, suites=by_suites)
    return with_values(corpus, config.prompt)


def read_databases(config: Config) -> Corpus:
    """Return the places of the dataset's databases, without questions; `add_schema` reads one."""
    return replace(read_corpus(_source(config)), splits={}, left_out=(), notes=())


def add_schema(corpus: Corpus, db_id: str, config: Config) -> Corpus:
    """Return a corpus of `read_databases` with the schema that prompts on a database show."""
    asked = Example(id="", db_id=db_id, question="", gold="")
    corpus_of_one = replace(corpus, splits={"": (asked,)})
    read = _with_schemas(corpus_of_one, _source(config), config.prompt, suites=False)
    return replace(corpus, schemas=corpus.schemas | read.schemas)


def only_as_train(corpus: Corpus, scored: Sequence[str] = ()) -> Corpus:
    """Return a corpus whose only split is called after no use of it with that split as `train`."""
    only = next(iter(corpus.splits), "")
    if len(corpus.splits) != 1 or only in ("train", "dev", "test", *scored):
        return corpus
    note = f"{only}: the only file of the folder, divided here"
    return replace(_named(corpus, "train"), notes=(*corpus.notes, note))


def _named(corpus: Corpus, split: str) -> Corpus:
    """Return a corpus of one split under another name."""
    (examples,) = corpus.splits.values()
    left_out = tuple(replace(row, split=split) for row in corpus.left_out)
    return replace(corpus, splits={split: examples}, left_out=left_out)


def _source(config: Config, splits: Sequence[str] = ()) -> Source:
    token = config.read_token.get_secret_value() if config.read_token else None
    return Source(
        config.dataset_id, config.task_type, config.data, config.cache, token, tuple(splits)
    )


def _divide(corpus: Corpus, source: Source, scored: Sequence[str], seed: int) -> Corpus:
    """Return `train`, `validation` and the scored splits; one unsplit file is divided here."""
    corpus = only_as_train(corpus, scored)
    splits, section, notes = corpus.splits, source.section, corpus.notes
    if not splits.get("train"):
        meant = layouts.alike("train", splits)
        unlike = f"; {meant} differs from train in case alone: rename it" if meant else ""
        raise DataError(
            f"{source.flag}: no training examples; found splits {join_some(splits)}{unlike}"
        )
    missing = [split for split in scored if split not in splits]
    if missing and set(splits) == {"train"} and len(scored) == 1:
        # The draw does not depend on the split's name: else `--split test` would score examples
        # that a run with `--split dev` trained on.
        train, held_out = set_aside(
            splits["train"], section.test_fraction, section.split_by, f"{seed}-held-out"
        )
        splits = {"train": train, missing[0]: held_out}
    elif missing:
        raise layouts.no_such_split(missing[0], source.flag, splits)
    train, validation = set_aside(
        splits["train"], section.validation_fraction, section.split_by, f"{seed}-validation"
    )
    if section.limit:
        train = sample(train, section.limit, seed)
    own = {"train": train, "validation": validation}
    used = own | {split: splits[split] for split in scored}
    left_out = tuple(row for row in corpus.left_out if row.split in used)
    return replace(corpus, splits=used, notes=notes, left_out=left_out)


def _with_schemas(corpus: Corpus, source: Source, prompt: PromptSection, *, suites: bool) -> Corpus:
    """Add the schema of every database in use: the live database's, else that of tables.json.

    Examples on an unknown database are left out. Raises `DataError` if a split has no others.
    """
    schemas, known = dict[str, Schema](), corpus.databases.keys() | corpus.schemas.keys()
    splits, left_out = dict[str, Examples](), list(corpus.left_out)
    for split, examples in corpus.splits.items():
        usable = tuple(one for one in examples if one.schema_text or one.db_id in known)
        unknown = [one for one in examples if not one.schema_text and one.db_id not in known]
        if unknown and not usable:
            raise DataError(f"{source.flag}, {split} {_unknown(unknown[0], corpus)}")
        left_out += [LeftOut(split, one.id, one.place, _unknown(one, corpus)) for one in unknown]
        splits[split] = usable
    notes = list(corpus.notes)
    said = bool(prompt.description_chars)
    with Executor(1) as executor:
        for db_id in dict.fromkeys(one.db_id for rows in splits.values() for one in rows):
            if db_id in corpus.databases:
                place = corpus.databases[db_id]
                schemas[db_id] = reflect(
                    place, db_id, prompt.example_values, executor, comments=said
                )
                if missing := schemas[db_id].left_out:
                    notes.append(f"database {db_id}: {join_some(missing)}")
            elif db_id in corpus.schemas:
                schemas[db_id] = corpus.schemas[db_id]
        if suites and TASKS[source.task].executes_sql:
            places = [run_on for db_id in schemas if (run_on := corpus.executable(db_id))]
            notes += suite.remarks(executor, places)
    splits = _on_tables(splits, schemas, left_out)
    used = replace(
        corpus, splits=splits, schemas=schemas, left_out=tuple(left_out), notes=tuple(notes)
    )
    keyed = _with_listed_keys(used, corpus.schemas)
    whole = schema_texts.add_to(keyed, source.cache, not TASKS[source.task].executes_sql)
    return _with_descriptions(whole, source.dataset_id, prompt.description_chars)


def _with_descriptions(corpus: Corpus, dataset_id: str, chars: int) -> Corpus:
    """Return the corpus with what its tables and columns mean, in at most `chars` a database."""
    if not chars:
        return corpus
    schemas, notes = dict[str, Schema](), list(corpus.notes)
    for db_id, schema in corpus.schemas.items():
        sources = descriptions.Sources.of(corpus.databases.get(db_id), dataset_id)
        schemas[db_id], said = descriptions.describe(schema, sources, chars)
        notes += said
    if not any(table.is_described for schema in schemas.values() for table in schema.tables):
        notes.append(
            f"descriptions: there are none ({descriptions.FILE} beside the data, "
            f"{descriptions.BIRD_FOLDER} beside a database, or a server's comments)"
        )
    return replace(corpus, schemas=schemas, notes=tuple(notes))


def _on_tables(
    splits: Mapping[str, Examples], schemas: Mapping[str, Schema], left_out: list[LeftOut]
) -> dict[str, Examples]:
    """Return the examples on databases that have a table; add the others to `left_out`.

    Raises `DataError` if there are none.
    """
    bare = {db_id for db_id, schema in schemas.items() if not schema.tables}
    kept: dict[str, Examples] = {}
    for split, examples in splits.items():
        lost = [one for one in examples if one.db_id in bare and not one.schema_text]
        reason = "database {} has no table; give the file that was filled"
        left_out += [LeftOut(split, one.id, one.place, reason.format(one.db_id)) for one in lost]
        kept[split] = tuple(one for one in examples if one.db_id not in bare or one.schema_text)
    if bare and not any(kept.values()):
        raise DataError(left_out[-1].reason)
    return kept


def _with_listed_keys(corpus: Corpus, listed: Mapping[str, Schema]) -> Corpus:
    """Add the foreign keys of tables.json to those of the databases, and say where they differ."""
    listed = {db_id: listed[db_id] for db_id in corpus.schemas if db_id in listed}
    found = corpus.schemas
    unlike = [db_id for db_id in listed if foreign_keys.differ(found[db_id], listed[db_id])]
    joined = {db_id: foreign_keys.joined(found[db_id], listed[db_id]) for db_id in unlike}
    notes = corpus.notes
    if unlike:
        notes = (
            *notes,
            f"foreign keys of {len(unlike)} databases differ between tables.json and the database "
            f"({join_some(unlike)}): prompts show both, exact set match takes tables.json's",
        )
    return replace(corpus, schemas=found | joined, listed=listed, notes=notes)


def _unknown(example: Example, corpus: Corpus) -> str:
    known = join_some(corpus.databases or corpus.schemas)
    return (
        f"example {example.id}: unknown db_id {example.db_id!r}: no database file "
        f"{example.db_id}/{example.db_id}.sqlite and no entry in tables.json; have {known}"
    )


def set_aside(
    examples: Examples, fraction: float, split_by: Literal["database", "question"] | None, seed: str
) -> tuple[Examples, Examples]:
    """Divide examples into (those left, those set aside), drawn with the seed.

    By database, whole databases are drawn until `fraction` is reached; by question, single
    questions. None means by database, but by question where databases are too unequal. They are
    where the drawn ones hold less than half or more than twice of `fraction`.

    Raises:
        DataError: one database alone cannot be split by database.
    """
    wanted = round(fraction * len(examples))
    if not wanted:
        return examples, ()
    sizes = Counter(example.db_id for example in examples)
    databases = _draw_databases(sizes, wanted, random.Random(seed))
    if split_by is None:
        drawn = sum(sizes[db_id] for db_id in databases)
        near = len(sizes) > 1 and wanted / 2 <= drawn <= 2 * wanted
        split_by = "database" if near else "question"
    if split_by == "question":
        chosen = set(random.Random(seed).sample(range(len(examples)), wanted))
    elif len(sizes) > 1:
        chosen = {index for index, example in enumerate(examples) if example.db_id in databases}
    else:
        raise DataError(
            f"--data.split_by database: all {len(examples)} examples are on one database "
            f"({join_some(sizes)}), so none can be set aside whole; use --data.split_by question"
        )
    left = tuple(example for index, example in enumerate(examples) if index not in chosen)
    return left, tuple(examples[index] for index in sorted(chosen))


def _draw_databases(sizes: Mapping[str, int], wanted: int, generator: random.Random) -> set[str]:
    """Draw databases until they hold `wanted` examples; at least one database is left out.

    A database that would bring the sum over 1.5 times `wanted` is passed over. Where every
    database is too large, the smallest is drawn.
    """
    order = sorted(sizes)
    generator.shuffle(order)
    drawn: set[str] = set()
    total = 0
    for db_id in order:
        fits = total + sizes[db_id] <= 1.5 * wanted
        if total < wanted and fits and len(drawn) < len(order) - 1:
            drawn.add(db_id)
            total += sizes[db_id]
    return drawn or {min(order, key=lambda db_id: sizes[db_id])}
