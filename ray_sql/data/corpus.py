"""Questions and corpora as plain values, and what can be said of them without reading anything."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import TypeVar

from ray_sql.database import Schema

Item = TypeVar("Item")


EXECUTABLE = ("sqlite", "postgresql", "postgres")
"""The kinds of databases that SQL can be executed on, as SQLAlchemy and libpq name them."""


@dataclass(frozen=True)
class Example:
    """One question about one database. `schema_text` and `links_text` are set where the dataset brings its own."""

    id: str
    db_id: str
    question: str
    gold: str
    evidence: str = ""
    hardness: str | None = None
    schema_text: str | None = None
    links_text: str | None = None


@dataclass(frozen=True)
class Corpus:
    """Splits by name, and per db_id its schema and where its database is (a path or a SQLAlchemy URL)."""

    splits: dict[str, tuple[Example, ...]]
    schemas: dict[str, Schema] = field(default_factory=dict)
    databases: dict[str, str] = field(default_factory=dict)

    def executable(self, db_id: str) -> str | None:
        """The database to execute queries on, a SQLite file or a PostgreSQL URL; None where there is none or it is another kind."""
        place = self.databases.get(db_id, "").removeprefix("sqlite:///")
        dialect = place.partition("://")[0] if "://" in place else "sqlite"
        return place if place and dialect.partition("+")[0] in EXECUTABLE else None

    def fingerprint(self, splits: Sequence[str] | None = None) -> str:
        """16 hex digits of the content, not where it lies: examples of all splits and schemas, or of `splits` and theirs."""
        digest = hashlib.sha256()
        named = self.splits if splits is None else set(splits) & set(self.splits)
        used = {example.db_id for name in named for example in self.splits[name]}
        for name in sorted(named):
            for example in self.splits[name]:
                digest.update(json.dumps([name, asdict(example)], sort_keys=True).encode())
        for db_id in sorted(self.schemas if splits is None else used & set(self.schemas)):
            digest.update(json.dumps(self.schemas[db_id].to_dict(), sort_keys=True).encode())
        return digest.hexdigest()[:16]


def why_not_executable(corpus: Corpus) -> str:
    """What to do where no query can be executed, in words."""
    others = sorted(
        {place.partition("://")[0] for place in corpus.databases.values() if "://" in place}
    )
    found = f", not on {', '.join(others)}" if others else ""
    return f"queries run on SQLite files and on PostgreSQL{found}; name such databases with --data.databases"


def sample(examples: Sequence[Item], n: int | None, seed: int) -> tuple[Item, ...]:
    """At most `n` of the examples, drawn with `seed`, in their original order; all of them where `n` is None."""
    if n is None or n >= len(examples):
        return tuple(examples)
    chosen = sorted(random.Random(seed).sample(range(len(examples)), n))
    return tuple(examples[index] for index in chosen)


def leakage(corpus: Corpus) -> list[str]:
    """What other splits share with `train`, a line for each split: databases, and questions asked in both."""
    seen_questions = {_asked(example) for example in corpus.splits.get("train", ())}
    seen_databases = {example.db_id for example in corpus.splits.get("train", ())}
    lines = []
    for name, examples in corpus.splits.items():
        if name == "train" or not examples:
            continue
        databases = {example.db_id for example in examples}
        repeated = sum(_asked(example) in seen_questions for example in examples)
        shared = len(databases & seen_databases)
        lines.append(
            f"{name}: {len(examples)} questions on {len(databases)} databases, {shared} of them also in train; "
            f"{repeated} questions also in train"
        )
    return lines


def some(names: Iterable[str]) -> str:
    """A few of the names, for a message."""
    listed = sorted(names)
    return (
        ", ".join(listed[:5]) + (f" and {len(listed) - 5} more" if len(listed) > 5 else "")
        if listed
        else "none"
    )


def _asked(example: Example) -> tuple[str, str]:
    return example.db_id, " ".join(example.question.lower().split())
