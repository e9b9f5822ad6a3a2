"""Judge gold queries, or predictions, by running them: the door of `ray-sql audit`."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ray_sql.config import AuditConfig, absolute
from ray_sql.config.files import read_json
from ray_sql.curate import MEANING, Flag, Subject, bench, examine_all, near, pairs
from ray_sql.curate.divide import across
from ray_sql.data import layouts
from ray_sql.data.columns import Source
from ray_sql.data.corpus import Corpus, Example
from ray_sql.database import Executor
from ray_sql.display import Display
from ray_sql.errors import DataError
from ray_sql.evaluate import matching, prediction_forms
from ray_sql.evaluate.judge_sql import limits
from ray_sql.metrics.judged import Evaluation
from ray_sql.store import storage
from ray_sql.store.run_folder import AUDIT, RunFolder

SHOWN = 3
"""Queries of each kind that are shown in the terminal."""


@dataclass(frozen=True)
class Asked:
    """A query to be judged: a split, the question, and the SQL."""

    split: str
    example: Example
    sql: str


@dataclass(frozen=True)
class FlaggedQuery:
    """An entry of `audit.json`."""

    id: str
    query: str
    flags: list[Flag]


@dataclass(frozen=True)
class AuditFile:
    """The part of `audit.json` that scores need."""

    of: str
    questions: list[FlaggedQuery]


def audit(config: AuditConfig) -> dict[str, Any]:
    """Judge as `config` says, write `audit.json`, and return what it holds."""
    folder = RunFolder(config.run_dir)
    token = config.read_token.get_secret_value() if config.read_token else None
    source = Source(config.dataset_id, "sql", config.data, config.cache, token, config.split)
    public = frozenset[str]().union(*(near.read_hashes(absolute(file)) for file in config.hashes))
    with (
        Display() as display,
        Executor(config.evaluate.processes, limits(config.evaluate)) as executor,
    ):
        corpus = pairs.read(source)
        for note in corpus.notes:
            display.line(note)
        splits = config.split or tuple(corpus.splits)
        missing = [split for split in splits if split not in corpus.splits]
        if missing:
            raise layouts.no_such_split(missing[0], source.flag, corpus.splits)
        if config.write_hashes:
            return _write_hashes(corpus, splits, absolute(config.write_hashes), display)
        asked = _golds(corpus, splits)
        if config.predictions_file:
            asked = _predictions(absolute(config.predictions_file), corpus, splits)
        usable = [one for one in asked if corpus.executable(one.example.db_id)]
        if not usable:
            raise DataError(
                f"{source.flag}: no query can be executed; name databases with --data.databases"
            )
        if config.dry_run:
            display.line(f"would judge {len(usable)} queries and write {folder.place(AUDIT)}")
            return {}
        folder.require_ours(AUDIT)
        flags, reasons = _flags(corpus, usable, executor, display)
        if not config.predictions_file:
            flags = _beside(corpus, usable, flags, public)
        found = _result(config, asked, usable, flags, reasons)
        storage.write_text(folder.audit, json.dumps(found, indent=2, ensure_ascii=False) + "\n")
        for line in _lines(usable, flags, found):
            display.line(line)
        display.line(f"\nall of it {folder.audit}")
    return found


def _write_hashes(
    corpus: Corpus, splits: Sequence[str], file: Path, display: Display
) -> dict[str, Any]:
    examples = [one for split in splits for one in corpus.splits[split]]
    storage.write_local_text(file, near.hash_lines(examples))
    display.line(f"hashes of {len(examples)} pairs  {file}")
    return {"n": len(examples)}


def _golds(corpus: Corpus, splits: Sequence[str]) -> list[Asked]:
    asked = []
    for split in splits:
        for one in corpus.splits[split]:
            asked += [Asked(split, one, sql) for sql in (one.gold, *one.other_golds)]
    return asked


def _predictions(path: Path, corpus: Corpus, splits: Sequence[str]) -> list[Asked]:
    """Return the predictions of a file, matched with their questions as `evaluate` does."""
    examples = matching.questions_of(corpus, splits)
    file = prediction_forms.read(path, len(examples), {*corpus.databases, *corpus.schemas})
    found = matching.match(file, examples, splits).found
    asked = []
    for (place, record), match in zip(file.records.items(), found, strict=True):
        split, example = match or ("file", Example(place, str(record.get("db_id")), "", ""))
        sql = prediction_forms.sql_in(str(record.get("predicted") or ""))
        asked.append(Asked(split, example, sql))
    return asked


def _flags(
    corpus: Corpus, asked: Sequence[Asked], executor: Executor, display: Display
) -> tuple[list[list[Flag]], list[str]]:
    """Return each query's flags, and what could not be tried."""
    places = [corpus.executable(one.example.db_id) or "" for one in asked]
    subjects = [
        Subject(place, one.sql, corpus.schemas[one.example.db_id])
        for one, place in zip(asked, places, strict=True)
    ]
    with bench(executor, places, display.counter("copying databases")) as tried:
        flags = examine_all(tried, subjects, display.counter("judging queries"))
        reasons = [
            f"{Path(place).stem}: {reason}"
            for place in dict.fromkeys(places)
            for reason in tried.copies_of(place).left_out
        ]
    return flags, reasons


def _beside(
    corpus: Corpus, asked: Sequence[Asked], flags: Sequence[Sequence[Flag]], public: frozenset[str]
) -> list[list[Flag]]:
    """Add what is known of pairs beside others: in another split, or in public."""
    groups = near.groups([one.example for one in asked], corpus.schemas)
    splits = dict.fromkeys(one.split for one in asked)
    members = [
        [group for one, group in zip(asked, groups, strict=True) if one.split == split]
        for split in splits
    ]
    close = across(members)
    added = []
    for one, group, found in zip(asked, groups, flags, strict=True):
        more = list(found)
        if group in close:
            more.append(Flag("near_duplicate", "a pair of another split is almost alike"))
        if public and any(key in public for key in near.hashes(one.example)):
            more.append(Flag("public", "is in a file of --hashes"))
        added.append(more)
    return added


def _result(
    config: AuditConfig,
    asked: Sequence[Asked],
    usable: Sequence[Asked],
    flags: Sequence[Sequence[Flag]],
    reasons: Sequence[str],
) -> dict[str, Any]:
    """Return what `audit.json` holds."""
    counts = Counter(flag.kind for found in flags for flag in found)
    questions = [
        {
            "split": one.split,
            "id": one.example.id,
            "db_id": one.example.db_id,
            "question": one.example.question,
            "query": one.sql,
            "flags": [asdict(flag) for flag in found],
        }
        for one, found in zip(usable, flags, strict=True)
        if found
    ]
    return {
        "of": "predictions" if config.predictions_file else "gold",
        "dataset_id": config.dataset_id,
        "n": len(usable),
        "not_executed": len(asked) - len(usable),
        "flagged": len(questions),
        "counts": dict(counts.most_common()),
        "not_reordered": list(reasons),
        "questions": questions,
    }


def _lines(
    asked: Sequence[Asked], flags: Sequence[Sequence[Flag]], found: dict[str, Any]
) -> Iterator[str]:
    yield f"{found['flagged']} of {found['n']} queries are flagged"
    if found["not_executed"]:
        yield f"{found['not_executed']} more have no database to execute them on"
    for kind, count in found["counts"].items():
        yield f"{count:>5}  {kind}: {MEANING[kind]}"
        shown = [
            f"{one.split} {one.example.id}: {flag.detail}"
            for one, of_one in zip(asked, flags, strict=True)
            for flag in of_one
            if flag.kind == kind
        ]
        for line in shown[:SHOWN]:
            yield f"         {line}"
    for reason in found["not_reordered"]:
        yield f"not tried in another order: {reason}"


Flagged = Mapping[tuple[str, str], Sequence[str]]
"""(id of a question, gold query) → the kinds of what an audit found. Splits may be drawn anew."""


def read_flagged(file: str) -> Flagged:
    """Return what an audit of gold found.

    Raises `DataError` for a file that is none, or of predictions.
    """
    name, way_out = f"--audit {file}", "give the audit.json of ray-sql audit or prepare"
    found = read_json(AuditFile, absolute(file), way_out, name)
    if found.of != "gold":
        raise DataError(f"{name}: is no audit of gold queries; {way_out}")
    return {(one.id, one.query): [flag.kind for flag in one.flags] for one in found.questions}


def with_flags(evaluation: Evaluation, file: str) -> Evaluation:
    """Add `flags` to judged rows, by which scores are given without flagged golds, too."""
    flagged = read_flagged(file)
    return {
        model: [row | {"flags": flags_of(row, flagged)} for row in rows]
        for model, rows in evaluation.items()
    }


def flags_of(row: Mapping[str, Any], flagged: Flagged) -> list[str]:
    """Return the kinds of flags that the golds of a judged row have."""
    golds = [row["gold"], *(row.get("other_golds") or ())]
    return [kind for gold in golds for kind in flagged.get((row["id"], gold), ())]
