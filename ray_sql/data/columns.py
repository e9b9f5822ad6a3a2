"""Find our fields in the columns of a dataset, and read each row as an example or a bad row.

The columns are chosen once for a file, so that what was chosen can be said. A value that is no
text is never made one: the row is left out, with its place and the reason.
"""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray_sql.config.sections import DataSection
from ray_sql.data.answers import after_thoughts, answer_block, has_thoughts
from ray_sql.data.corpus import Example, LeftOut
from ray_sql.data.formats import Record
from ray_sql.data.prompted import unfold
from ray_sql.data.schema_texts import CREATES
from ray_sql.errors import DataError
from ray_sql.tasks import TaskName

COLUMNS: dict[str, tuple[str, ...]] = {
    "id": ("id", "question_id"),
    "db_id": ("db_id", "database_id", "db_name"),
    "question": (
        *("question", "question_en", "SpiderSynQuestion", "sql_prompt", "utterance"),
        *("nl", "nl_question", "natural_language", "user_question", "input", "prompt"),
    ),
    "queries": ("queries", "golds", "gold_queries"),
    "query": (
        *("query", "SQL", "sql", "answer", "gold", "gold_sql", "sql_query", "gold_query"),
        *("output", "response", "completion", "target"),
    ),
    "evidence": ("evidence", "instructions"),
    "hardness": ("hardness", "difficulty"),
}
"""Our field → the column names understood without a column map; the first that is used wins."""

SCHEMA_TEXTS = ("context", "sql_context", "ddl")
"""Columns that are a schema where they hold CREATE TABLE."""

TASK_COLUMNS: dict[TaskName, dict[str, tuple[str, ...]]] = {
    "sql": {"schema": ("schema", "schema_SQLDatabase", *SCHEMA_TEXTS)},
    "schema": {
        "schema": ("schema", "schema_SQLDatabase_min", *SCHEMA_TEXTS),
        "links": ("links", "selector_correct"),
    },
}
"""Columns that depend on the task: ready-made schema text and ready-made links."""

NEEDED = ("question", "query")

_NAME = re.compile(r"[\w.$-]*")
"""A name, as of a server's schema: no text that shows tables and columns."""
_WHOLE = re.compile(r"\A(\d+)\.0\Z")
"""A whole number as tables write it, where another row of its column has none."""

NO_TEXT = {"", "nan", "none", "null"}
"""Texts, in lower case, that scripts write for a missing value."""

Columns = dict[str, str]
"""Our field → the column that holds it; a field without a column is absent."""


@dataclass(frozen=True)
class Source:
    """A dataset as the settings name it."""

    dataset_id: str
    task: TaskName
    section: DataSection
    cache: Path
    """Where the demo's databases, and those of schema texts, are built."""
    token: str | None
    """The Hub's read token."""
    asked: tuple[str, ...] = ()
    """The splits that are to be scored, by the names that the user gives."""
    setting: str = "--dataset_id"

    @property
    def flag(self) -> str:
        """Return the flag that names the dataset, for messages."""
        return f"{self.setting} {self.dataset_id}"

    @property
    def columns(self) -> dict[str, tuple[str, ...]]:
        """Return our field → the columns that may hold it, without the user's own map."""
        return COLUMNS | TASK_COLUMNS[self.task]


@dataclass(frozen=True)
class ReadRows:
    """The rows of a split: examples, bad rows, and what was chosen, in words."""

    examples: list[Example]
    left_out: list[LeftOut]
    notes: list[str]


def require_known_fields(source: Source) -> None:
    """Raise `DataError` for a field of `data.columns` that is none of ours."""
    for field in source.section.columns:
        if field not in source.columns:
            raise DataError(
                f"--data.columns {field}: no such field; fields are {', '.join(source.columns)}"
            )


def read_rows(
    source: Source, records: Sequence[Record], file: str, split: str, first_id: int = 0
) -> ReadRows:
    """Return the records of a file as examples; rows without an id are counted from `first_id`.

    Raises:
        DataError: no row can be used, or `bad_rows` is `error` and one cannot.
    """
    notes: list[str] = []
    whole = [record for record in records if not record.fault]
    if not set(NEEDED) & source.section.columns.keys():
        unfolded, note = unfold(whole)
        notes += [note] if note else []
        by_row = {record.row: record for record in unfolded}
        records = [by_row.get(record.row, record) for record in records]
        whole = [record for record in records if not record.fault]
    columns = _choose(source, whole, file)
    notes += _say(source, columns, whole)
    examples, left_out = list[Example](), list[LeftOut]()
    for record in records:
        default_id = str(first_id + record.row)
        try:
            examples.append(_example(source, columns, record, default_id))
        except ValueError as error:
            own_id = record.values.get(columns.get("id", ""))
            name = default_id if own_id is None else str(own_id)
            left_out.append(LeftOut(split, name, record.place, str(error)))
    golds = [str(record.values.get(columns.get("query", ""))) for record in records]
    taken_off = {
        "thoughts": sum(map(has_thoughts, golds)),
        "fences": sum("```" in gold for gold in golds),
    }
    notes += [f"{what} were taken off {n} gold queries" for what, n in taken_off.items() if n]
    if left_out and (not examples or source.section.bad_rows == "error"):
        shown = "; ".join(f"{row.place} {row.reason}" for row in left_out[:3])
        how_many = "no row can be used" if not examples else f"{len(left_out)} bad rows"
        raise DataError(
            f"{file}: {how_many}: {shown}; correct them, or map other columns with --data.columns"
        )
    return ReadRows(examples, left_out, notes)


def _as_name(column: str) -> str:
    """Return a column's name as `COLUMNS` writes them: "SQL Query" is `sql_query`."""
    return re.sub(r"[\s-]+", "_", column.strip().lower())


def _choose(source: Source, records: Sequence[Record], file: str) -> Columns:
    """Return the column of each field: the mapped one, or the first known one with a value.

    Raises `DataError` for a field that must be there, or that is mapped, and is in no row.
    """
    found = dict.fromkeys(str(name) for record in records for name in record.values)
    by_name = {_as_name(name): name for name in reversed(found)}
    columns: Columns = {}
    taken = set(source.section.columns.values())
    for field, known in source.columns.items():
        mapped = source.section.columns.get(field)
        # a column that is mapped to one field is no guess for another
        names = (mapped,) if mapped else tuple(name for name in known if name not in taken)
        exact = [name for name in names if name in found]
        alike = [by_name[_as_name(name)] for name in names if _as_name(name) in by_name]
        present = exact or alike
        used = [name for name in present if _has_value(records, name, field)]
        needed = mapped or (field in NEEDED and not (field == "query" and "queries" in columns))
        if used or (present and needed):
            columns[field] = (used or present)[0]
        elif records and needed:
            raise DataError(
                f"{file}: no column {' or '.join(map(repr, names))} for {field}; found "
                f"{', '.join(map(shlex.quote, sorted(found)))}. Map it with --data.columns "
                f"{field}=THEIR_COLUMN"
            )
    return columns


def _has_value(records: Sequence[Record], column: str, field: str) -> bool:
    """Tell whether a column holds a value in any row; a schema's must show what there is."""
    values = [record.values.get(column) for record in records]
    if column in SCHEMA_TEXTS:
        return any(isinstance(value, str) and CREATES.search(value) for value in values)
    if field == "schema":
        values = [value for value in values if not _is_name(value)]
    return not all(_is_missing(value) for value in values)


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and bool(_NAME.fullmatch(value.strip()))


def _say(source: Source, columns: Columns, records: Sequence[Record]) -> list[str]:
    """Say which columns of other names were taken for the fields that shape a prompt."""
    guessed = [
        f"{field} ← {columns[field]}"
        for field in (*NEEDED, "db_id", "schema", "evidence")
        if columns.get(field, field) not in (field, "SQL") and field not in source.section.columns
    ]
    said = [f"columns: {', '.join(guessed)}"] if guessed else []
    names = [record.values.get("schema") for record in records if record.values.get("schema")]
    if names and "schema" not in columns and all(map(_is_name, names)):
        said.append(f"column schema holds a name ({names[0]}) and no schema: it is not shown")
    return said


def _example(source: Source, columns: Columns, record: Record, default_id: str) -> Example:
    """Return one record as an `Example`; raise `ValueError` with the reason if it is a bad row."""
    if record.fault:
        raise ValueError(record.fault)
    values = {field: record.values.get(column) for field, column in columns.items()}
    keep = source.section.bad_rows == "keep"
    several = _queries(values.get("queries"))
    if several and _is_missing(values.get("query")):
        values["query"] = several[0]
    gold = without_fence(_required(values, "query", keep))
    if not gold:
        raise ValueError("query is empty")
    links = values.get("links")
    if isinstance(links, dict):
        links = json.dumps(links, ensure_ascii=False)
    return Example(
        id=_word(values.get("id")) or default_id,
        db_id=_word(values.get("db_id")) or "",
        question=_required(values, "question", keep),
        gold=gold,
        evidence=_text(values, "evidence", keep) or "",
        hardness=_word(values.get("hardness")),
        schema_text=_text(values, "schema", keep),
        links_text=_word(links),
        other_golds=tuple(one for one in several if one != gold),
        place=record.place,
    )


def _queries(value: Any) -> list[str]:
    """Return several queries, given as a list or as one in JSON; raise `ValueError` for others."""
    if _is_missing(value):
        return []
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            raise ValueError("queries is no JSON list of texts") from None
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        raise ValueError("queries is no list of texts")
    return list(dict.fromkeys(without_fence(one) for one in value if not _is_missing(one)))


def _word(value: Any) -> str | None:
    """Return a name or a number as text, 3 for 3.0; None for a missing value."""
    return None if _is_missing(value) else _WHOLE.sub(r"\1", str(value).strip())


def _text(values: Mapping[str, Any], field: str, keep: bool) -> str | None:
    """Return a field's text, None for a missing value; raise `ValueError` for what is no text."""
    value = values.get(field)
    if _is_missing(value):
        return None
    if not isinstance(value, str) and not keep:
        raise ValueError(f"{field} is no text but {type(value).__name__} {str(value)[:40]}")
    return str(value).strip()


def _required(values: Mapping[str, Any], field: str, keep: bool) -> str:
    text = _text(values, field, keep)
    if text is None:
        raise ValueError(f"{field} is empty")
    return text


def _is_missing(value: Any) -> bool:
    """Tell None, NaN, empty text, and the words that scripts write for them."""
    if isinstance(value, float) and math.isnan(value):
        return True
    return value is None or (isinstance(value, str) and value.strip().lower() in NO_TEXT)


def without_fence(sql: str) -> str:
    """Return the query in a gold answer: behind thoughts, in its fenced block, or as it is."""
    sql = after_thoughts(sql).strip() if has_thoughts(sql) else sql
    block = answer_block(sql)
    return block.code.strip() if block else sql
