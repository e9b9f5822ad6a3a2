"""Read a file of records as people have it: JSON, JSON lines, CSV, TSV, Excel, Parquet.

All but Excel's are read with .gz behind, too.
JSON is recognised by its content, for `.json` files hold JSON lines and `.jsonl` files hold lists.
Every record knows the file and the line (or the row) that it comes from.
"""

from __future__ import annotations

import codecs
import gzip
import io
import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray_sql.config import files
from ray_sql.data import sheets, tables
from ray_sql.data.tables import TableRow
from ray_sql.errors import DamagedFile, DataError, NotUtf8

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".xlsx", ".parquet")
"""The forms that are read; all but Excel's may end in `.gz` besides."""

GZIP = b"\x1f\x8b"
"""Bytes that a packed file begins with."""
_WRAPPED_SPLITS = ("train", "dev", "validation", "test")
_WRAPPERS = {"data", "examples", "questions", "rows", "records", "items", "samples", "dataset"}
_TURNS = {"messages", "conversations", "interaction"}
"""Lists of objects that belong to one example."""


@dataclass(frozen=True)
class Record:
    """One object of a file; `place` names file and line, and `row` counts from 0.

    `fault` says why the line holds no object, where it does not.
    """

    place: str
    row: int
    values: dict[str, Any]
    fault: str = ""


Records = dict[str, list[Record]]
"""Split → its records; the split is "" where a file does not name any."""


def form(path: Path) -> str:
    """Return the suffix that tells how a file is read, "" for one that is not read here."""
    name = path.name.lower().removesuffix(".gz")
    return next((suffix for suffix in SUFFIXES if name.endswith(suffix)), "")


def stem(path: Path) -> str:
    """Return the name of a file without the suffixes of its form."""
    name = path.name[:-3] if path.name.lower().endswith(".gz") else path.name
    return name[: len(name) - len(form(path))]


def _silent(_: str) -> None:
    """Say nothing of a guess."""


def read_file(path: Path, say: Callable[[str], None] = _silent) -> Records:
    """Return the records of a file by split; `say` gets what was guessed, in words.

    Raises:
        DataError: names the file, the malformed line, and what would be read.
    """
    match form(path):
        case ".parquet":
            found = enumerate(_parquet_rows(path))
            return {"": [Record(f"{path}, row {row}", row, values) for row, values in found]}
        case ".csv" | ".tsv":
            return {"": _of_table(f"{path}, line", tables.read(path, _table_text(path, say)))}
        case ".xlsx":
            return _sheets(path, say)
        case "":
            raise DataError(
                f"{path}: is there, but in no form that is read here; those are "
                f"{', '.join(SUFFIXES)}, all but .xlsx also with .gz"
            )
        case _:
            return _json_records(path, read_text(path))


def _of_table(place: str, rows: Sequence[TableRow]) -> list[Record]:
    return [
        Record(f"{place} {one.line}", row, dict(one.values), one.fault)
        for row, one in enumerate(rows)
    ]


def _sheets(path: Path, say: Callable[[str], None]) -> Records:
    """Return the sheets that are called after splits, or else one with a table.

    It is the one with the most queries, or the first of all.
    """
    found = sheets.read(path, say)
    places = {title: f"{path}[{title}], row" for title in found}
    splits = [title for title in found if title.strip().lower() in _WRAPPED_SPLITS]
    if splits:
        return _split_sheets(path, found, splits, say)
    if not found:
        return {"": []}
    first = max(found, key=lambda title: _queries_in(found[title]))
    others = [title for title in found if title != first]
    if others:
        say(f"{path.name}: sheet {first} is read, not {', '.join(others)}")
    return {"": _of_table(places[first], found[first])}


def _split_sheets(
    path: Path,
    found: Mapping[str, Sequence[TableRow]],
    splits: Sequence[str],
    say: Callable[[str], None],
) -> Records:
    """Return the sheets that are called after splits; where none is train, the fullest other is.

    Sheets with queries that are not read are named.
    """
    titles = {title.strip().lower(): title for title in splits}
    others = [title for title in found if title not in splits and _queries_in(found[title])]
    if others and "train" not in titles:
        titles = {"train": max(others, key=lambda title: _queries_in(found[title])), **titles}
        say(f"{path.name}: sheet {titles['train']} is read as train")
    if unread := [title for title in others if title not in titles.values()]:
        say(f"{path.name}: sheets {', '.join(titles.values())} are read, not {', '.join(unread)}")
    return {
        split: _of_table(f"{path}[{title}], row", found[title]) for split, title in titles.items()
    }


def _queries_in(rows: Sequence[TableRow]) -> int:
    return sum(sheets.is_query(cell) for row in rows for cell in row.values.values())


def _table_text(path: Path, say: Callable[[str], None]) -> str:
    """Return the text of a table, in Windows-1252 where it is not UTF-8: Excel writes it so."""
    try:
        return read_text(path)
    except NotUtf8:
        raw = files.read_bytes(path)
        raw = _unpacked(raw, path) if raw.startswith(GZIP) else raw
        text = raw.decode("cp1252", errors="replace")
        if "\0" in text or "\ufffd" in text:
            raise
        say(f"{path.name}: is not UTF-8 and is read as Windows-1252; save it as UTF-8 to be sure")
        return text.replace("\r\n", "\n")


def read_text(path: Path, name: str = "") -> str:
    """Return the text of a file: UTF-8, or UTF-16 with its mark; unpacked where it is gzip.

    Line ends and a mark at the beginning are taken off, whatever wrote them. `name` is what the
    user knows the file by, if not its path.
    """
    name = name or str(path)
    try:
        raw = files.read_bytes(path)
        if raw.startswith(GZIP):
            raw = _unpacked(raw, path)
        if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raw = raw.decode("utf-16").encode()
    # gzip has errors of its own for a file that was cut off
    except (OSError, EOFError, zlib.error, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise DamagedFile(f"{name}: cannot be read ({reason}); give a whole file") from None
    return files.decode(raw, name, "save it as UTF-8 text").replace("\r\n", "\n")


def _unpacked(raw: bytes, path: Path) -> bytes:
    """Return what gzip packed. Raises `DamagedFile` for more than memory would hold."""
    with gzip.GzipFile(fileobj=io.BytesIO(raw)) as packed:
        content = packed.read(files.LARGEST + 1)
    if len(content) > files.LARGEST:
        raise DamagedFile(
            f"{path}: unpacks to over {files.LARGEST:,} bytes; divide it into files that fit into "
            "memory"
        )
    return content


def parse_lines(path: Path | str, text: str) -> dict[int, Any]:
    """Return line number → the JSON value on it, without blank lines.

    `path` serves the error message only.
    """
    # splitlines would also split at U+2028 and others, which JSON allows inside a string.
    lines = dict(enumerate(text.split("\n"), 1))
    return {row: _parse(path, line, row) for row, line in lines.items() if line.strip()}


def _json_records(path: Path, text: str) -> Records:
    if not text.strip():
        return {"": []}
    if _is_lines(path, text):
        lines = parse_lines(path, text)
        values = list(lines.values())
        if len(values) != 1 or not _unwrap(values[0]):
            places = [f"{path}, line {line}" for line in lines]
            return {"": _records(places, values)}
        value = values[0]
    else:
        value = _parse(path, text)
    unwrapped = {"": value} if isinstance(value, list) else _unwrap(value)
    if not unwrapped:
        raise DataError(
            f"{path}: must hold JSON objects, one example each: one a line, in a list, or in lists "
            f"by split; found {_shape(value)}"
        )
    records = {}
    for split, rows in unwrapped.items():
        name = f"{path}[{split}]" if split else str(path)
        records[split] = _records([f"{name}, row {row}" for row in range(len(rows))], rows)
    return records


def _records(places: Sequence[str], values: Sequence[Any]) -> list[Record]:
    records = []
    for row, (place, value) in enumerate(zip(places, values, strict=True)):
        if isinstance(value, dict):
            records.append(Record(place, row, value))
        else:
            records.append(Record(place, row, {}, f"is no JSON object but {_shape(value)}"))
    return records


def _is_lines(path: Path, text: str) -> bool:
    """Tell JSON lines by the file's name, or by a first line that is a whole object."""
    start = text.lstrip()
    if form(path) in (".jsonl", ".ndjson"):
        return not start.startswith("[")
    if not start.startswith("{"):
        return False
    first, _, rest = start.partition("\n")
    try:
        files.parse_json(object, first, str(path), "")
    except DamagedFile:
        return False
    return bool(rest.strip())


def _unwrap(value: Any) -> dict[str, list[Any]]:
    """Return split → the records that an object wraps; empty where it wraps none.

    Known are lists by split, and others beside them with the same fields; and one list alone or
    under a common name. Known are the forms that pandas writes, too: an object a row, or a list or
    an object a column.
    """
    if not isinstance(value, dict):
        return {}
    lists = {name: item for name, item in value.items() if _is_list_of_objects(item)}
    splits = {name: item for name, item in lists.items() if name in _WRAPPED_SPLITS}
    if splits:
        fields = {name for item in splits.values() for name in item[0]}
        return {
            name: item for name, item in lists.items() if name in splits or fields == {*item[0]}
        }
    objects = [item for item in value.values() if isinstance(item, dict)]
    if len(lists) == 1 and (lists.keys() & _WRAPPERS or value.keys() == lists.keys() - _TURNS):
        return {"": next(iter(lists.values()))}
    if objects and len(objects) == len(value):
        if all(name.isdigit() for name in value):
            return {"": objects}
        if all(item and list(item) == list(objects[0]) for item in objects):
            rows = [{name: value[name][row] for name in value} for row in objects[0]]
            return {"": rows} if all(row.isdigit() for row in objects[0]) else {}
    columns = [item for item in value.values() if isinstance(item, list)]
    if len(columns) == len(value) > 1 and len({len(column) for column in columns}) == 1:
        return {"": [dict(zip(value, row, strict=True)) for row in zip(*columns, strict=True)]}
    return {}


def _is_list_of_objects(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(one, dict) for one in value)


def _shape(value: Any) -> str:
    """Name the shape of a JSON value in a message."""
    if isinstance(value, dict):
        return f"an object of {', '.join(map(str, list(value)[:5])) or 'nothing'}"
    return "a list" if isinstance(value, list) else json.dumps(value)[:40]


def _parse(path: Path | str, text: str, line: int | None = None) -> Any:
    return files.parse_json(object, text, str(path), "correct the line or remove it", line)


def _parquet_rows(path: Path) -> list[dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return list(pq.read_table(path).to_pylist())
    except (pa.ArrowException, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise DataError(f"{path}: cannot be read as Parquet ({reason})") from None
