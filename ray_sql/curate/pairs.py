"""Read raw pairs with their databases, and judge each: kept, fixed or rejected."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ray_sql.curate import fixes
from ray_sql.curate.audit import Subject, bench, examine_all
from ray_sql.curate.fixes import Fix
from ray_sql.curate.flags import Flag
from ray_sql.data import schema_texts
from ray_sql.data.columns import Source
from ray_sql.data.corpus import Corpus, Example, LeftOut, join_some
from ray_sql.data.read import read_corpus
from ray_sql.database import Executor, Schema, reflect
from ray_sql.display import Display
from ray_sql.errors import DataError

OWN_WORDS = {
    "--dataset_id": "--pairs",
    "--data.databases": "--url",
    "a path, a Hub id (owner/name), or demo": "the path of a file or folder",
}
"""Words of messages about datasets, as this job's own flags say them."""


@dataclass(frozen=True)
class Pair:
    """A pair that was judged; `split` is "train" where the file has none."""

    split: str
    example: Example
    flags: tuple[Flag, ...] = ()
    before: str = ""
    """The query as it was given, where it was fixed."""


@dataclass(frozen=True)
class Rejected:
    """A pair that is not used, and why."""

    split: str
    place: str
    id: str
    reason: str
    example: Example | None = None
    fix: Fix | None = None

    def row(self) -> dict[str, Any]:
        """Return a line of `rejected.jsonl`."""
        values = {
            "place": self.place,
            "split": self.split,
            "id": self.id,
            "reason": self.reason,
            "db_id": self.example and self.example.db_id,
            "question": self.example and self.example.question,
            "query": self.example and self.example.gold,
            "fix": self.fix and self.fix.sql,
            "fix_how": self.fix and self.fix.how,
        }
        return {name: value for name, value in values.items() if value}


@dataclass(frozen=True)
class Judged:
    """All pairs of a source, judged, with the databases they are on."""

    corpus: Corpus
    pairs: list[Pair]
    rejected: list[Rejected]
    unexamined: list[str] = field(default_factory=list)
    """Databases and tables that could not be put in another order, in words."""


def read(source: Source) -> Corpus:
    """Return raw pairs with their databases and schemas; unknown databases are left out.

    Raises `DataError`, in the words of the job's own flags.
    """
    try:
        corpus = read_corpus(source)
    except DataError as error:
        raise DataError(_own_words(source, str(error))) from None
    notes = [_own_words(source, note) for note in corpus.notes]
    schemas = dict[str, Schema]()
    used = dict.fromkeys(one.db_id for rows in corpus.splits.values() for one in rows)
    with Executor(1) as executor:
        for db_id in used:
            if db_id in corpus.databases:
                schemas[db_id] = reflect(corpus.databases[db_id], db_id, 0, executor)
                if missing := schemas[db_id].left_out:
                    notes.append(f"database {db_id}: {join_some(missing)}")
    listed = {db_id: schema for db_id, schema in corpus.schemas.items() if db_id in used}
    corpus = replace(corpus, schemas=listed | schemas, notes=tuple(notes))
    return schema_texts.add_to(corpus, source.cache, False)


def _own_words(source: Source, message: str) -> str:
    if source.setting != "--pairs":
        return message
    for theirs, ours in OWN_WORDS.items():
        message = message.replace(theirs, ours)
    return message


def judge(
    corpus: Corpus,
    executor: Executor,
    display: Display,
    reject: Sequence[str] = ("does_not_run",),
    apply_fixes: bool = False,
) -> Judged:
    """Execute every pair, and divide them into those that are kept and those that are not."""
    rejected = [_unread(row) for row in corpus.left_out]
    found, repeated = _once(corpus)
    rejected += repeated
    runnable = [pair for pair in found if corpus.trial(pair.example.db_id)]
    lost = [pair for pair in found if not corpus.trial(pair.example.db_id)]
    rejected += [_no_database(pair, corpus) for pair in lost]
    places = list(dict.fromkeys(str(corpus.trial(one.example.db_id)) for one in runnable))
    with bench(executor, places, display.counter("copying databases")) as tried:
        subjects = [_subject(pair.example, corpus) for pair in runnable]
        counter = display.counter("judging queries")
        flagged = examine_all(tried, subjects, counter)
        pairs = list[Pair]()
        for pair, subject, flags in zip(runnable, subjects, flagged, strict=True):
            if pair.example.db_id in corpus.empty:
                flags = [flag for flag in flags if flag.kind == "does_not_run"]
            others = [*_other_golds(pair.example, subject, executor)]
            judged = replace(pair, flags=(*flags, *others))
            fault = _fault(judged, reject)
            fix = None
            if fault is not None and fault in flags and fault.kind == "does_not_run":
                fix = fixes.find(executor, subject, fault.detail)
            if apply_fixes and fix is not None and fix.is_clear:
                example = replace(pair.example, gold=fix.sql)
                again = examine_all(tried, [_subject(example, corpus)])[0]
                judged = Pair(pair.split, example, (*again, *others), pair.example.gold)
                fault = _fault(judged, reject)
            if fault is None:
                pairs.append(judged)
            else:
                reason = f"{fault.kind}: {fault.detail}"
                one = pair.example
                rejected.append(Rejected(pair.split, one.place, one.id, reason, one, fix))
        unexamined = [
            f"{Path(place).stem}: {reason}"
            for place in places
            for reason in tried.copies_of(place).left_out
        ]
    rejected.sort(key=lambda row: _in_order(row.place))
    return Judged(corpus, pairs, rejected, unexamined + _on_servers(places))


def _fault(pair: Pair, reject: Sequence[str]) -> Flag | None:
    """Return the first flag for which a pair is rejected."""
    return next((flag for flag in pair.flags if flag.kind in reject), None)


def _in_order(place: str) -> list[tuple[int, str]]:
    """Return a key by which line 9 comes before line 10."""
    parts = re.split(r"(\d+)", place)
    return [(int(part) if part.isdecimal() else -1, part) for part in parts]


def _subject(example: Example, corpus: Corpus) -> Subject:
    place = corpus.trial(example.db_id) or ""
    return Subject(place, example.gold, corpus.schemas[example.db_id])


def _other_golds(example: Example, subject: Subject, executor: Executor) -> Iterator[Flag]:
    """Yield the further golds of a question that do not run."""
    for sql in example.other_golds:
        result = executor.run(subject.database, sql)
        if result.status != "ok":
            yield Flag("does_not_run", f"another of its queries: {result.error}")


def _on_servers(places: Sequence[str]) -> list[str]:
    if any("://" in place for place in places):
        return ["a server's rows were not put in another order: ties were looked for by the keys"]
    return []


def _unread(row: LeftOut) -> Rejected:
    return Rejected(row.split, row.place, row.id, row.reason)


def _no_database(pair: Pair, corpus: Corpus) -> Rejected:
    example = pair.example
    reason = f"unknown database {example.db_id!r}; there are {join_some(corpus.databases)}"
    return Rejected(pair.split, example.place, example.id, reason, example)


def _once(corpus: Corpus) -> tuple[list[Pair], list[Rejected]]:
    """Return the pairs, and those that repeat an earlier one of their split to the letter."""
    pairs, repeated = list[Pair](), list[Rejected]()
    first: dict[tuple[str, str, str, str], str] = {}
    for split, examples in corpus.splits.items():
        for one in examples:
            key = (split, one.db_id, one.question, one.gold)
            before = first.setdefault(key, one.place)
            if before is one.place:
                pairs.append(Pair(split, one))
            else:
                reason = f"is the same pair as {Path(before).name}"
                repeated.append(Rejected(split, one.place, one.id, reason, one))
    return pairs, repeated
