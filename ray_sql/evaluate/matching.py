"""Find the question of each prediction: by id, by the question's text, or by order."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ray_sql.data import Corpus, Example, databases
from ray_sql.errors import DataError
from ray_sql.evaluate.prediction_forms import ID_NAMES, PredictionsFile, Record

Match = tuple[str, Example]
"""A split and one of its questions."""


class LeftOutQuestion(Example):
    """A row of the data that is not scored; a prediction for it has its place, and is left out."""


@dataclass(frozen=True)
class Matches:
    """The question of each record, None for one that brings its own gold, and how it was found."""

    found: list[Match | None]
    how: str


def has_gold(record: Mapping[str, Any]) -> bool:
    """Tell whether a record is scored against a gold query of its own."""
    return record.get("db_id") is not None and record.get("gold") is not None


def questions_of(corpus: Corpus, splits: Sequence[str]) -> list[Match]:
    """Return the questions of the splits; rows that were left out stand where they do in the file.

    Where the places of two rows cannot be compared, those rows come last.
    """
    found: list[Match] = []
    for split in splits:
        bad_rows = [
            LeftOutQuestion(row.id, "", "", "", place=row.place)
            for row in corpus.left_out
            if row.split == split
        ]
        rows = [*corpus.splits[split], *bad_rows]
        ends = [re.fullmatch(r"(.*?)(\d+)", row.place) for row in rows]
        if bad_rows and all(ends) and len({end[1] for end in ends if end}) == 1:
            rows.sort(key=lambda row: int(re.findall(r"\d+", row.place)[-1]))
        found += [(split, row) for row in rows]
    return found


def match(file: PredictionsFile, examples: Sequence[Match], splits: Sequence[str]) -> Matches:
    """Match the records of a file with the questions of the splits.

    Raises `DataError` with the place of a record that has no question, or that contradicts it.
    """
    scored = ",".join(splits)
    matcher, how = _choose(file, examples, scored)
    seen: dict[tuple[str, str], str] = {}
    found: list[Match | None] = []
    for place, record in file.records.items():
        matched = matcher(place, record)
        if matched is not None:
            key = matched[0], matched[1].id
            if key in seen:
                raise DataError(
                    f"{file.path}, {place}: {_called(record)} was predicted before, in "
                    f"{seen[key]}; keep one of the two"
                )
            seen[key] = place
        found.append(matched)
    _check(file, found, examples)
    return Matches(found, how)


Matcher = Callable[[str, Record], Match | None]


def _choose(file: PredictionsFile, examples: Sequence[Match], scored: str) -> tuple[Matcher, str]:
    """Return a function that finds the question of a record, and its way in words."""
    records = [record for record in file.records.values() if not has_gold(record)]
    given = [name for name in ID_NAMES if any(_id(record, name) for record in records)]
    ids = {example.id for _, example in examples}
    for name in given:
        values = [(str(record.get("split")), _id(record, name)) for record in records]
        if len(set(values)) == len(values) and all(value in ids for _, value in values):
            return _by_id(file, examples, scored, name), f"by {name}{_doubt(values, examples)}"
    for name in given:
        for first in (0, 1):
            places = {str(number): place for number, place in enumerate(examples, first)}
            if sorted(_id(record, name) for record in records) == sorted(places):
                how = f"by place in the split, as their {name} counts from {first}"
                return _by_place(places, name), how
    asked = [record.get("question") for record in records]
    strange = not any(_id(record, name) in ids for record in records for name in given)
    if records and all(asked) and strange:
        texts = {_plain(example.question) for _, example in examples}
        if not given or all(_plain(question) in texts for question in asked):
            return _by_question(file, examples, scored), "by the question's text"
    if not records:
        return _by_id(file, examples, scored, "id"), "with gold of their own"
    if given or len(records) < len(file.records):
        name = given[0] if given else "id"
        return _by_id(file, examples, scored, name), f"by {name}"
    usable = [each for each in examples if not isinstance(each[1], LeftOutQuestion)]
    if len(records) == len(usable):
        examples = usable
    if len(records) != len(examples):
        raise DataError(
            f"{file.path}: {len(records)} {file.unit}, but --split {scored} has {len(usable)} "
            "examples; without ids the two must be in the same order and equal in number"
        )
    order = iter(examples)
    return lambda place, record: next(order), "by order, for they have neither ids nor questions"


def _doubt(values: Sequence[tuple[str, str]], examples: Sequence[Match]) -> str:
    """Say where ids of the first questions may count from 1, and the questions do from 0."""
    counted = all(example.id == str(place) for place, (_, example) in enumerate(examples))
    given = {value for _, value in values}
    if counted and len(given) > 1 and given == {str(n) for n in range(1, len(given) + 1)}:
        return (
            "; they begin at 1, where the first question is 0: give `question` beside, or count "
            "from 0, if the first prediction is for the first question"
        )
    return ""


def _by_place(places: Mapping[str, Match], name: str) -> Matcher:
    def find(place: str, record: Record) -> Match | None:
        return None if has_gold(record) else places[_id(record, name)]

    return find


def _by_id(file: PredictionsFile, examples: Sequence[Match], scored: str, name: str) -> Matcher:
    by_id: dict[str, list[Match]] = defaultdict(list)
    for split, example in examples:
        by_id[example.id].append((split, example))

    def find(place: str, record: Record) -> Match | None:
        candidates = [
            match
            for match in by_id.get(_id(record, name), [])
            if match[0] == (record.get("split") or match[0])
        ]
        if len(candidates) == 1:
            return candidates[0]
        if has_gold(record):
            return None
        way_out = (
            "its `split` too" if candidates else "an id of the split, or its own db_id and gold"
        )
        raise DataError(
            f"{file.path}, {place}: {name} {record.get(name)!r} is in {len(candidates) or 'none'} "
            f"of --split {scored}; give the line {way_out}"
        )

    return find


def _by_question(file: PredictionsFile, examples: Sequence[Match], scored: str) -> Matcher:
    """Return a function that gives a question asked several times on one database in its order."""
    by_text: dict[str, list[Match]] = defaultdict(list)
    for split, example in examples:
        by_text[_plain(example.question)].append((split, example))

    def find(place: str, record: Record) -> Match | None:
        all_of_text = by_text.get(_plain(record["question"]), [])
        candidates = [
            (split, example)
            for split, example in all_of_text
            if split == (record.get("split") or split)
            and example.db_id == _database(record, example)
        ]
        databases = sorted({example.db_id for _, example in candidates})
        where = f"{file.path}, {place}: the question {str(record['question'])[:60]!r}"
        if len(databases) > 1:
            raise DataError(f"{where} is asked on {', '.join(databases)}; give the line its db_id")
        if not candidates:
            reason = f"is not in --split {scored}"
            if all_of_text:
                reason = f"is asked on {all_of_text[0][1].db_id}, not on {record.get('db_id')}"
            raise DataError(f"{where} {reason}; give it an id or a question of the split")
        if len(candidates) > 1:
            all_of_text.remove(candidates[0])
        return candidates[0]

    return find


def _check(file: PredictionsFile, found: Sequence[Match | None], examples: Sequence[Match]) -> None:
    """Raise `DataError` for a record with another database, or with another's question."""
    questions = {_plain(example.question) for _, example in examples}
    for (place, record), matched in zip(file.records.items(), found, strict=True):
        if matched is None or has_gold(record) or isinstance(matched[1], LeftOutQuestion):
            continue
        split, example = matched
        place = f"{file.path}, {place}"
        if example.db_id != _database(record, example):
            raise DataError(
                f"{place}: db_id {record['db_id']!r}, but question {example.id} of --split "
                f"{split}, with which it is matched, is on {example.db_id!r}; correct the one or "
                "give it the id of its question"
            )
        asked = _plain(record.get("question") or example.question)
        if asked != _plain(example.question) and asked in questions:
            raise DataError(
                f"{place}: asks {str(record['question'])[:60]!r}, but question {example.id} of "
                f"--split {split}, with which it is matched, is {example.question[:60]!r}; "
                "correct its id"
            )


def _database(record: Record, example: Example) -> str:
    """Return the database that a record names; without a name that of the example."""
    return databases.called(str(record.get("db_id") or example.db_id), [example.db_id])


def _id(record: Record, name: str) -> str:
    """Return an id as text, 3 for 3.0, which is what a table makes of a whole number."""
    value = record.get(name)
    return "" if value is None else re.sub(r"^(\d+)\.0$", r"\1", str(value).strip())


def _called(record: Record) -> str:
    """Return the name of a record's question, for a message."""
    names: Iterator[str] = (
        name for name in (*ID_NAMES, "question") if record.get(name) is not None
    )
    name = next(names, None)
    return f"{name} {record[name]!r}" if name else "its question"


def _plain(question: Any) -> str:
    return " ".join(str(question).casefold().split())
