"""Read predictions in the forms that people's tools write: each becomes a record of plain fields.

Forms are JSON lines, a JSON list, BIRD's object of text by key, a batch's output, tables, and SQL.
SQL comes a query a line, over several lines with `;` between, or as a folder of `<id>.sql`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlparse

from ray_sql import data
from ray_sql.config.files import parse_json
from ray_sql.data import formats, tables
from ray_sql.data.answers import unwrap_sql
from ray_sql.errors import DamagedFile, DataError

Record = dict[str, Any]

ANSWER_NAMES = (
    *("predicted", "prediction", "pred", "predict", "predicted_sql", "prediction_sql", "pred_sql"),
    *("predict_sql", "sql_pred", "predicted_query", "generated_sql", "generated_query"),
    *("model_output", "generated_text", "response"),
)
"""Fields that hold a prediction and nothing else; the first one there wins."""

ID_NAMES = (
    *("id", "question_id", "qid", "query_id", "example_id", "instance_id", "sample_id"),
    *("task_id", "uid", "key", "idx", "index"),
)
"""Fields that may name the question. `key` is the name of a prediction inside a JSON object."""

QUESTION_NAMES = ("question", "question_en", "utterance", "nl_question", "nlq")
DATABASE_NAMES = ("db_id", "db_name", "database_id", "database_name", "database", "db")
OTHER_NAMES = ("split", "gold", "hardness", "difficulty", "evidence", "raw")
_OPTIONAL = {*ID_NAMES, *QUESTION_NAMES, *DATABASE_NAMES, *OTHER_NAMES}
_KNOWN = {*ANSWER_NAMES, *ID_NAMES, *QUESTION_NAMES, *DATABASE_NAMES}

_BIRD = re.compile(r"\s*-----\s*bird\s*-----\s*")
_UNFINISHED = re.compile(
    r"(?:\b(?:from|join|as|by|and|or|on|select|distinct|where|having|in|like|not|limit|union|all"
    r"|between|is)|[,.(=<>+*/-])\s*\Z",
    re.IGNORECASE,
)
"""The end of SQL after which a word belongs to the query, whatever database is called so."""


_QUERY = re.compile(r"\s*(?:\(|--|/\*|;|(?:select|with|values)\b)", re.IGNORECASE)
_PREFIX = re.compile(
    r"\s*(?:(?:[*#>]+\s*)?[a-z][\w ]{0,30}:\**\s*|\d{1,6}[.):]\s+)"
    r"(?=(?:\(|select\b|with\b|values\b))",
    re.IGNORECASE,
)
"""Words and a colon before a query, such as `SQL:`, or its number in a list."""


@dataclass(frozen=True)
class PredictionsFile:
    """The records of a file by their place in it, such as `line 3`, and what was guessed of it.

    Each record has `predicted`; `db_id` and `question` have these names whatever the file calls
    them. `unit` is what the file counts: lines, entries or statements.
    """

    path: Path
    unit: str
    records: dict[str, Record]
    notes: tuple[str, ...] = ()


def read(path: Path, expected: int, databases: Collection[str]) -> PredictionsFile:
    """Read a file of predictions for `expected` questions on databases of these names.

    Raises `DataError` with the place that cannot be read.
    """
    if path.is_dir():
        return _folder(path)
    form = formats.form(path)
    if form in (".parquet", ".xlsx"):
        records = next(iter(data.read_file(path).values()))
        rows = {f"row {one.row}": one.values for one in records}
        return _named(path, "rows", rows, [])
    text = _text(path)
    if not text.strip():
        raise DataError(f"--predictions_file {path}: is empty; give one prediction a line")
    if form in (".csv", ".tsv"):
        return _named(path, "lines", _table(path, text), [])
    if text.lstrip()[0] in '{["':
        return _json(path, text)
    return _plain(path, text, expected, databases)


def _text(path: Path) -> str:
    return data.read_text(path, f"--predictions_file {path}")


def _folder(path: Path) -> PredictionsFile:
    """Read a folder of `<id>.sql` files, as Spider 2 takes them."""
    files = sorted(path.glob("*.sql"))
    if not files:
        raise DataError(f"--predictions_file {path}: holds no file <id>.sql; give a file")
    fields = {file.name: {"id": file.stem, "predicted": _text(file)} for file in files}
    return _named(path, "files", fields, [])


def _named(
    path: Path, unit: str, values: Mapping[str, Any], notes: Sequence[str]
) -> PredictionsFile:
    """Give the fields of all records the names that the rest of the program knows."""
    for place, value in values.items():
        if not isinstance(value, dict):
            found = type(value).__name__
            raise DataError(f"{path}, {place}: no field 'predicted'; found {found}")
    if not values:
        raise DataError(f"--predictions_file {path}: holds no prediction; give one a question")
    records = {place: _spelled(value) for place, value in values.items()}
    answer = _answer_name(records.values())
    for place, record in records.items():
        if answer not in record:
            raise DataError(
                f"{path}, {place}: no field {answer!r}; found {', '.join(sorted(record))}"
            )
        is_nan = record[answer] != record[answer]
        record["predicted"] = None if is_nan else record[answer]
        for ours, names in (("db_id", DATABASE_NAMES), ("question", QUESTION_NAMES)):
            theirs = next((name for name in names if record.get(name) not in (None, "")), None)
            if theirs:
                record[ours] = record[theirs]
    said = [] if answer == "predicted" else [f"predictions are read from {answer!r}"]
    return PredictionsFile(path, unit, records, (*notes, *said))


def _spelled(record: Mapping[str, Any]) -> Record:
    """Return a record with its names in lower case and with underscores."""
    return {_spell(name): value for name, value in record.items()}


def _spell(name: Any) -> str:
    return re.sub(r"[\s-]+", "_", str(name).strip().lower())


def _answer_name(records: Iterable[Record]) -> str:
    """Return the field of the predictions: a known name, or the only field that is left."""
    names = list(dict.fromkeys(name for record in records for name in record))
    known = [name for name in ANSWER_NAMES if name in names]
    if known:
        return known[0]
    left = [name for name in names if name and name not in {*_KNOWN, *OTHER_NAMES}]
    return left[0] if len(left) == 1 and len(names) > 1 else "predicted"


def looks_like_sql(text: str) -> bool:
    """Tell whether a text begins like a query."""
    return bool(_QUERY.match(text))


def sql_in(answer: str) -> str:
    """Return the SQL in code fences, behind thoughts or behind `SQL:`; else the text as it is."""
    if looks_like_sql(answer):
        sql = answer.rstrip().removesuffix("```")
        return answer if sql == answer.rstrip() else sql.rstrip()
    return _PREFIX.sub("", unwrap_sql(answer), count=1)


def _table(path: Path, text: str) -> dict[str, Record]:
    """Read CSV or TSV with a header; cells that are empty count as not given."""
    rows: dict[str, Record] = {}
    for row in tables.read(path, text):
        if row.fault:
            raise DataError(f"{path}, line {row.line}: {row.fault}")
        rows[f"line {row.line}"] = {
            name: cell for name, cell in row.values.items() if cell or _spell(name) not in _OPTIONAL
        }
    return rows


def _json(path: Path, text: str) -> PredictionsFile:
    """Read JSON lines, or one JSON value: a list, an object of predictions, or a wrapped list."""
    first, _, rest = text.strip().partition("\n")
    if rest.strip() and _is_json(first):
        lines = {f"line {line}": value for line, value in data.parse_lines(path, text).items()}
        return _named(path, "lines", _records(lines), [])
    parse_json(object, text, str(path), "correct the line or remove it")
    try:  # again, for pydantic keeps the last of two keys
        value = json.loads(text, object_pairs_hook=_without_twins)
    except _TwinError as error:
        raise DataError(f"{path}: key {error} is there twice; keep one of the two") from None
    notes = []
    if isinstance(value, dict) and not _KNOWN & set(_spelled(value)):
        lists = [name for name, item in value.items() if isinstance(item, list)]
        if len(lists) != 1:
            return _keyed(path, value)
        notes = [f"predictions are read from the list {lists[0]!r}"]
        value = value[lists[0]]
    entries = value if isinstance(value, list) else [value]
    unit, name = ("entries", "entry") if isinstance(value, list) else ("lines", "line")
    places = {f"{name} {number}": entry for number, entry in enumerate(entries, 1)}
    return _named(path, unit, _records(places), notes)


def _keyed(path: Path, value: Mapping[str, Any]) -> PredictionsFile:
    """Read an object whose keys name questions, as BIRD writes it."""
    places = {f"key {name!r}": {"key": name} | _record(item) for name, item in value.items()}
    return _named(path, "keys", places, [])


def _records(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return values with a record for each that is text alone, or the answer of a request."""
    return {
        place: _record(value) if isinstance(value, str | dict) else value
        for place, value in values.items()
    }


def _record(value: Any) -> Record:
    """Return a prediction of an object; BIRD's text ends in the name of its database."""
    if isinstance(value, dict):
        return _batch_record(value)
    if not isinstance(value, str) or not _BIRD.search(value):
        return {"predicted": value}
    sql, database = _BIRD.split(value, maxsplit=1)
    return {"predicted": sql, "db_id": database.strip()}


def _batch_record(value: Record) -> Record:
    """Return the answer to a request of a batch, by its own id; other records stay as they are.

    OpenAI and Anthropic write the lines of a batch in any order. A request that failed has no
    answer.
    """
    if "custom_id" not in value or not {"response", "result"} & value.keys():
        return value
    content = _inside(value, "response", "body", "choices", 0, "message", "content")
    content = content or _inside(value, "result", "message", "content")
    if isinstance(content, list):
        content = "".join(str(_inside(part, "text") or "") for part in content)
    is_done = _inside(value, "response", "status_code") == 200
    if content is None and (is_done or _inside(value, "result", "type") == "succeeded"):
        return value  # of another shape
    return {"id": value["custom_id"], "predicted": content}


def _inside(value: Any, *steps: str | int) -> Any:
    """Return what lies in nested objects and lists, None where a step leads nowhere."""
    for step in steps:
        try:
            value = value[step]
        except (KeyError, IndexError, TypeError):
            return None
    return value


class _TwinError(Exception):
    """A key that an object has twice."""


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        raise _TwinError(repr(next(name for name in names if names.count(name) > 1)))
    return value


def _is_json(text: str) -> bool:
    try:
        parse_json(object, text, "", "")
    except DamagedFile:
        return False
    return True


def _plain(path: Path, text: str, expected: int, databases: Collection[str]) -> PredictionsFile:
    """Read SQL: a query a line, or what else gives as many queries as there are questions."""
    lines = dict(enumerate(text.removesuffix("\n").split("\n"), 1))
    queries = {f"line {line}": query for line, query in lines.items()}
    unit, notes = "lines", []
    while len(queries) > expected and not lines[len(queries)].strip():
        queries.popitem()
    filled = {place: query for place, query in queries.items() if query.strip()}
    if len(filled) > expected:
        filled = {place: sql for place, sql in filled.items() if not sql.lstrip().startswith("--")}
    if len(queries) != expected or not all(map(looks_like_sql, filled.values())):
        statements = [sql.strip() for sql in sqlparse.split(text) if sql.strip(" \t\n;")]
        if len(queries) == expected:
            is_split = len(statements) == expected and all(map(looks_like_sql, statements))
        else:
            is_split = len(filled) != expected == len(statements)
        if is_split:
            queries = {f"statement {number}": sql for number, sql in enumerate(statements, 1)}
            unit = "statements"
            notes = [f"{len(lines)} lines are read as {expected} statements that end with ;"]
        elif len(filled) == expected:
            notes = ["lines without a query are passed over"] if filled != queries else []
            queries = filled
    fields = {place: _split_database(query, databases) for place, query in queries.items()}
    _check_databases(path, queries, fields)
    return _named(path, unit, fields, notes)


def _split_database(query: str, databases: Collection[str]) -> Record:
    """Return a query, and the database that stands behind it after a tab.

    Any other tab is white space, as in a query that was written over several lines.
    """
    if _BIRD.search(query):
        return _record(query)
    sql, tab, name = query.rstrip().rpartition("\t")
    if tab and name.strip() in databases and not _UNFINISHED.search(sql):
        return {"predicted": sql.rstrip(), "db_id": name.strip()}
    return {"predicted": query}


def _check_databases(path: Path, queries: Mapping[str, str], fields: Mapping[str, Record]) -> None:
    """Refuse a file whose every line ends in a tab and a name, some of them no database.

    Read as white space, the name would be an alias, and the query would run on another database.
    """
    ends = [query.rstrip().rpartition("\t") for query in queries.values() if query.strip()]
    if not all(tab and re.fullmatch(r"\w+", end) for _, tab, end in ends):
        return
    if any(_UNFINISHED.search(sql) or end.lower() in ("asc", "desc") for sql, _, end in ends):
        return
    for place, record in fields.items():
        if "db_id" not in record and queries[place].strip():
            end = queries[place].rstrip().rpartition("\t")[2]
            raise DataError(
                f"{path}, {place}: unknown db_id {end!r} after the tab; the dataset has no "
                "database of that name. Where it belongs to the query, write a blank for the tab"
            )
