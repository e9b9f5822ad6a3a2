"""Questions and corpora as plain values, and judgements of them that read no file."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

from ray_sql.database import Schema, places
from ray_sql.tasks import Task

Item = TypeVar("Item")


@dataclass(frozen=True)
class CellValue:
    """A cell of a database that a question names; `literal` is written as in SQL."""

    table: str
    column: str
    literal: str


@dataclass(frozen=True)
class Example:
    """One question about one database.

    `schema_text` and `links_text` are set where the dataset brings its own. `values` are cells that
    the question names, under `prompt.values`.
    """

    id: str
    db_id: str
    question: str
    gold: str
    evidence: str = ""
    hardness: str | None = None
    schema_text: str | None = None
    links_text: str | None = None
    other_golds: tuple[str, ...] = ()
    """Further queries that are right as well; the first, `gold`, is trained on."""
    values: tuple[CellValue, ...] = ()
    place: str = field(default="", compare=False)
    """The file and the line of it, for messages."""

    def content(self) -> dict[str, Any]:
        """Return all but the place as plain values, of which hashes and cache keys are made.

        Hashes of examples without values, or without other golds, are as before there were any.
        """
        content = asdict(self)
        del content["place"]
        for name in ("other_golds", "values"):
            if not content[name]:
                del content[name]
        return content


@dataclass(frozen=True)
class LeftOut:
    """A row that is neither trained on nor scored, and why."""

    split: str
    id: str
    place: str
    reason: str


Splits = dict[str, tuple[Example, ...]]


@dataclass(frozen=True)
class Corpus:
    """Splits by name, and per db_id its schema and its database (a path or a SQLAlchemy URL)."""

    splits: Splits
    schemas: dict[str, Schema] = field(default_factory=dict)
    databases: dict[str, str] = field(default_factory=dict)
    listed: dict[str, Schema] = field(default_factory=dict)
    """The schemas of tables.json, for databases that it lists."""
    empty: frozenset[str] = frozenset()
    """Databases without rows, made of a schema's text: SQL is tried there, and never scored."""
    left_out: tuple[LeftOut, ...] = ()
    """Rows that could not be used."""
    notes: tuple[str, ...] = ()
    """Guesses that were made in reading, in words, to be said aloud."""
    has_splits: bool = True
    """False where it was read from one file, of which a part may be set aside."""

    def judged_schemas(self, task: Task) -> dict[str, Schema]:
        """Return the schemas that answers are judged by.

        Exact set match takes names and foreign keys of tables.json, as the official code does.
        Links are judged by the names that prompts show.
        """
        return self.schemas | self.listed if task.executes_sql else self.schemas

    def executable(self, db_id: str) -> str | None:
        """Return the file or URL that SQL is scored on; None where there is none.

        On empty tables almost any two queries agree, so they score nothing.
        """
        return None if db_id in self.empty else self.trial(db_id)

    def trial(self, db_id: str) -> str | None:
        """Return the file or URL that shows whether a query runs; None where there is none."""
        place = self.databases.get(db_id, "").removeprefix("sqlite:///")
        if not place:
            return None
        return place if "://" not in place or places.kind_of(place) else None

    def fingerprint(self, splits: Sequence[str] | None = None) -> str:
        """Return 16 hex digits of the content: examples and schemas, not where they lie.

        With `splits`, only those splits and the schemas they use count.
        """
        digest = hashlib.sha256()
        names, db_ids = set(self.splits), set(self.schemas)
        if splits is not None:
            names &= set(splits)
            db_ids &= {example.db_id for name in names for example in self.splits[name]}
        for name in sorted(names):
            for example in self.splits[name]:
                digest.update(json.dumps([name, example.content()], sort_keys=True).encode())
        for db_id in sorted(db_ids):
            digest.update(json.dumps(self.schemas[db_id].to_dict(), sort_keys=True).encode())
        return digest.hexdigest()[:16]


def why_not_executable(corpus: Corpus) -> str:
    """Say which databases run queries, which of the corpus do not, and the way out."""
    if corpus.databases and corpus.databases.keys() <= corpus.empty:
        return (
            "its schema texts hold no rows (INSERT INTO …), and on empty tables almost any two "
            "queries agree; name databases with --data.databases"
        )
    urls = [place for place in corpus.databases.values() if "://" in place]
    dialects = sorted({url.partition("://")[0] for url in urls})
    others = f", not on {', '.join(dialects)}" if dialects else ""
    return f"queries run on {places.EXECUTABLE}{others}; name such databases with --data.databases"


def remarks(notes: Iterable[str], left_out: Sequence[LeftOut]) -> Iterator[str]:
    """Yield what was guessed in reading, and how many rows were left out and why."""
    yield from notes
    if left_out:
        shown = [f"{row.place} {row.reason}" for row in left_out[:3]]
        more = ["all are in left_out.jsonl"] if len(left_out) > 3 else []
        yield f"rows left out: {len(left_out)} ({'; '.join([*shown, *more])})"


def sample(examples: Sequence[Item], n: int | None, seed: int) -> tuple[Item, ...]:
    """Draw at most `n` examples with `seed`, in their original order; None means all."""
    if n is None or n >= len(examples):
        return tuple(examples)
    chosen = sorted(random.Random(seed).sample(range(len(examples)), n))
    return tuple(examples[index] for index in chosen)


def repeated(corpus: Corpus) -> dict[str, int]:
    """Return how many questions of each split stand in `train`, too."""
    train = {_normalized(example) for example in corpus.splits.get("train", ())}
    return {
        split: sum(_normalized(example) in train for example in examples)
        for split, examples in corpus.splits.items()
        if split != "train"
    }


def leakage(corpus: Corpus) -> list[str]:
    """Say, in a line per split, how many databases and questions it shares with `train`."""
    train_databases = {example.db_id for example in corpus.splits.get("train", ())}
    also_trained = repeated(corpus)
    lines = []
    for name, examples in corpus.splits.items():
        if name == "train" or not examples:
            continue
        databases = {example.db_id for example in examples}
        known = f"{len(databases & train_databases)} of them also in train"
        if len(databases) == 1:
            known = "which train has too" if databases <= train_databases else "not in train"
        lines.append(
            f"{name}: {counted(len(examples), 'question')} on {counted(len(databases), 'database')}"
            f", {known}; {counted(also_trained[name], 'question')} also in train"
        )
    return lines


def counted(count: int, noun: str) -> str:
    """Return `1 question`, `2 questions`."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def join_some(names: Iterable[str]) -> str:
    """Join the first five names, for a message; "none" for no name."""
    listed = sorted(names)
    if not listed:
        return "none"
    more = f" and {len(listed) - 5} more" if len(listed) > 5 else ""
    return ", ".join(listed[:5]) + more


def _normalized(example: Example) -> tuple[str, str]:
    return example.db_id, " ".join(example.question.lower().split())
