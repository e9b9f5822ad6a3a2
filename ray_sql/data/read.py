"""Read a corpus from any form: Spider, BIRD, JSONL, a dataset of the Hub, or the demo.

The form is recognised by the files at the place that `dataset_id` names. Every record becomes an
`Example`. A missing field is reported with the file, the row and the columns found there.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ray_sql.config import absolute
from ray_sql.config.sections import DataSection
from ray_sql.data.corpus import Corpus, Example, Splits
from ray_sql.database import Schema, read_tables_json
from ray_sql.errors import DataError
from ray_sql.store.storage import write_atomically
from ray_sql.tasks import TaskName

SPIDER_FILES = {
    "train": ("train_spider.json", "train_others.json"),
    "dev": ("dev.json",),
    "test": ("test.json",),
}

COLUMNS = {
    "id": ("id", "question_id"),
    "db_id": ("db_id",),
    "question": ("question", "question_en"),
    "query": ("query", "SQL", "sql"),
    "evidence": ("evidence",),
    "hardness": ("hardness", "difficulty"),
}
"""Our field → the column names understood without a column map; the first match wins."""

TASK_COLUMNS = {
    "sql": {"schema": ("schema", "schema_SQLDatabase")},
    "schema": {
        "schema": ("schema", "schema_SQLDatabase_min"),
        "links": ("links", "selector_correct"),
    },
}
"""Columns that depend on the task: ready-made schema text and ready-made links."""

REQUIRED = ("db_id", "question", "query")


@dataclass(frozen=True)
class Source:
    """A dataset as the settings name it."""

    dataset_id: str
    task: TaskName
    section: DataSection
    cache: Path
    """Where the demo's databases are built."""
    token: str | None
    """The Hub's read token."""

    @property
    def flag(self) -> str:
        """Return the flag that names the dataset, for messages."""
        return f"--dataset_id {self.dataset_id}"

    @property
    def columns(self) -> dict[str, tuple[str, ...]]:
        """Return our field → the columns that may hold it, without the user's own map."""
        return COLUMNS | TASK_COLUMNS[self.task]


def read_corpus(source: Source) -> Corpus:
    """Return all splits and databases; `schemas` holds only the schemas of a tables.json.

    Raises:
        DataError: no such dataset, no known form, a malformed record, or an unknown field in
            `data.columns`.
    """
    for field in source.section.columns:
        if field not in source.columns:
            raise DataError(
                f"--data.columns {field}: no such field; fields are {', '.join(source.columns)}"
            )
    if source.dataset_id == "demo":
        return _read_demo(source)
    place = absolute(source.dataset_id)
    if (place / "tables.json").is_file():
        return _read_spider(source, place)
    if place.is_dir() and _bird_files(place):
        return _read_bird(source, place)
    if place.suffix in (".jsonl", ".json") or (place.is_dir() and list(place.glob("*.jsonl"))):
        return _read_jsonl(source, place)
    if place.is_dir() and not list(place.glob("**/*.parquet")):
        raise DataError(
            f"{source.flag}: the folder is in no known form; expected Spider's (tables.json, "
            "train_spider.json, dev.json, database/), BIRD's (dev.json, dev_tables.json, "
            "dev_databases/), or *.jsonl"
        )
    is_path = source.dataset_id.count("/") != 1 or source.dataset_id.startswith((".", "/", "~"))
    if is_path and not place.exists():
        raise DataError(
            f"{source.flag}: no such file or folder; give a path, a Hub id (owner/name), or demo"
        )
    return _read_hub(source)


def read_records(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a JSON list or of a JSONL file.

    Raises:
        DataError: names the file and the malformed line.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text ({error})") from None
    if path.suffix == ".jsonl":
        records: Any = list(parse_lines(path, text).values())
    else:
        records = _parse(path, text, 1)
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise DataError(f"{path}: must hold JSON objects, one example each")
    return records


def parse_lines(path: Path | str, text: str) -> dict[int, Any]:
    """Return line number → the JSON value on it, without blank lines.

    `path` serves the error message only.
    """
    # splitlines would also split at U+2028 and others, which JSON allows inside a string.
    lines = dict(enumerate(text.split("\n"), 1))
    return {row: _parse(path, line, row) for row, line in lines.items() if line.strip()}


def _parse(path: Path | str, text: str, first_line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise DataError(
            f"{path}, line {line}: not valid JSON ({error.msg}); correct the line or remove it"
        ) from None


def _read_demo(source: Source) -> Corpus:
    """Read the data that ships with the package; its databases are built once, in the cache."""
    folder = Path(str(resources.files("ray_sql") / "demo_data"))
    databases = {
        database.name: _build_database(database / "schema.sql", source.cache)
        for database in _folders(folder / "database")
    }
    names = ("train", "seen", "unseen")
    splits = {split: _examples(source, [folder / f"{split}.json"]) for split in names}
    return Corpus(splits, {}, databases)


def _build_database(script: Path, cache: Path) -> str:
    """Return the SQLite file that `script` makes, complete or absent; its path hashes the text."""
    text = script.read_text(encoding="utf-8")
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    target = cache / "demo" / digest / f"{script.parent.name}.sqlite"
    if not target.exists():
        with write_atomically(target) as part:
            connection = sqlite3.connect(part)
            connection.executescript(text)
            connection.close()
    return str(target)


def _read_spider(source: Source, place: Path) -> Corpus:
    """Read Spider's question files, `tables.json`, and the databases, of which some may lack."""
    splits = {}
    for split, names in SPIDER_FILES.items():
        files = [place / name for name in names if (place / name).is_file()]
        if files:
            splits[split] = _examples(source, files)
    schemas = read_tables_json(place / "tables.json")
    return Corpus(
        splits, schemas, _databases(source.section.databases or str(place / "database"), splits)
    )


def _bird_files(place: Path) -> dict[str, Path]:
    """Return split → its question file, the first that has a tables file beside it."""
    files: dict[str, Path] = {}
    for split in ("train", "dev"):
        for path in [place / f"{split}.json", *sorted(place.glob(f"{split}*/{split}.json"))]:
            if path.is_file() and list(path.parent.glob("*_tables.json")):
                files.setdefault(split, path)
    return files


def _read_bird(source: Source, place: Path) -> Corpus:
    """Read BIRD's release, whose splits lie in one folder or in a folder each.

    Each split has a question file, `<split>_tables.json` and `<split>_databases/`.
    """
    splits: Splits = {}
    schemas: dict[str, Schema] = {}
    databases: dict[str, str] = {}
    for split, file in _bird_files(place).items():
        splits[split] = _examples(source, [file])
        for tables in sorted(file.parent.glob("*_tables.json")):
            schemas |= read_tables_json(tables)
        for folder in sorted(file.parent.glob("*_databases")):
            databases |= _database_files(folder)
    if source.section.databases:
        databases = _databases(source.section.databases, splits)
    return Corpus(splits, schemas, databases)


def _read_jsonl(source: Source, place: Path) -> Corpus:
    """Read one file, which is split later, or a folder of `<split>.jsonl` files.

    The databases are those of `data.databases`, or lie beside the file in `database/`.
    """
    if not place.exists():
        raise DataError(f"{source.flag}: no such file")
    folder, files = place.parent, {"train": place}
    if place.is_dir():
        folder, files = place, {path.stem: path for path in sorted(place.glob("*.jsonl"))}
    splits = _with_dev({split: _examples(source, [path]) for split, path in files.items()})
    where = source.section.databases
    for name in ("database", "databases"):
        if where is None and (folder / name).is_dir():
            where = str(folder / name)
    if where is not None:
        return Corpus(splits, {}, _databases(where, splits))
    if not all(example.schema_text for examples in splits.values() for example in examples):
        raise DataError(
            f"{source.flag}: no databases found beside it; name their folder with "
            "--data.databases, or give each line its own `schema` text"
        )
    return Corpus(splits)


def _read_hub(source: Source) -> Corpus:
    """Read a dataset of the Hub, or a local folder in the same form, by the `datasets` library."""
    import datasets

    place = absolute(source.dataset_id)
    name = str(place) if place.is_dir() else source.dataset_id
    try:
        loaded = datasets.load_dataset(name, token=source.token)
    # The library raises many kinds of errors, from requests' to pyarrow's, for the same mistakes.
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise DataError(
            f"{source.flag}: neither a local folder nor a Hub dataset that can be read ({reason}); "
            "check the name, the network and --read_token"
        ) from None
    splits = {}
    for split, records in loaded.items():
        where = f"{source.dataset_id}[{split}]"
        examples = [
            _example(source, record, f"{where}, row {row}", row)
            for row, record in enumerate(records)
        ]
        splits[str(split)] = _with_unique_ids(examples, where)
    splits = _with_dev(splits)
    if not source.section.databases:
        return Corpus(splits)
    return Corpus(splits, {}, _databases(source.section.databases, splits))


def _with_dev(splits: Splits) -> Splits:
    """Rename `validation`, the Hub's usual name, to `dev`: ours is set aside from train."""
    if "validation" not in splits or "dev" in splits:
        return splits
    return {"dev" if name == "validation" else name: rows for name, rows in splits.items()}


def _folders(place: Path) -> list[Path]:
    if not place.is_dir():
        raise DataError(f"{place}: no such folder of databases; name it with --data.databases")
    return sorted(path for path in place.iterdir() if path.is_dir())


def _database_files(place: Path) -> dict[str, str]:
    files = {folder.name: folder / f"{folder.name}.sqlite" for folder in _folders(place)}
    return {db_id: str(path) for db_id, path in files.items() if path.is_file()}


def _databases(where: str, splits: Mapping[str, Iterable[Example]]) -> dict[str, str]:
    """Return the database of each db_id: a file in the folder, or the URL with the id in it."""
    if "://" not in where:
        return _database_files(absolute(where))
    used = {example.db_id for examples in splits.values() for example in examples}
    return {db_id: where.replace("{db_id}", quote(db_id, safe="")) for db_id in sorted(used)}


def _examples(source: Source, files: Sequence[Path]) -> tuple[Example, ...]:
    """Return the examples of one split; those without an id are counted across its files."""
    examples: list[Example] = []
    for path in files:
        for row, record in enumerate(read_records(path)):
            examples.append(_example(source, record, f"{path}, row {row}", len(examples)))
    return _with_unique_ids(examples, ", ".join(map(str, files)))


def _with_unique_ids(examples: Sequence[Example], where: str) -> tuple[Example, ...]:
    """Return the examples of a split; raise `DataError` where two have the same id."""
    first: dict[str, int] = {}
    for row, example in enumerate(examples):
        before = first.setdefault(example.id, row)
        if before != row:
            raise DataError(
                f"{where}, rows {before} and {row}: both have id {example.id!r}; give each its "
                "own, or leave the ids out"
            )
    return tuple(examples)


def _example(source: Source, record: Mapping[str, Any], where: str, default_id: int) -> Example:
    """Return one record as an `Example`; `where` names it in errors."""
    fields = {field: _value(source, record, where, field) for field in source.columns}
    return Example(
        id=fields["id"] or str(default_id),
        db_id=fields["db_id"] or "",
        question=fields["question"] or "",
        gold=fields["query"] or "",
        evidence=fields["evidence"] or "",
        hardness=fields["hardness"],
        schema_text=fields["schema"],
        links_text=fields.get("links"),
    )


def _value(source: Source, record: Mapping[str, Any], where: str, field: str) -> str | None:
    """Return a field of a record, None where it is empty; raise `DataError` where it must not."""
    mapped = source.section.columns.get(field)
    columns = (mapped,) if mapped else source.columns[field]
    for column in columns:
        if record.get(column) is not None:
            return str(record[column]).strip()
    if field in REQUIRED or (mapped and mapped not in record):
        raise DataError(
            f"{where}: no column {' or '.join(map(repr, columns))} for {field}; found "
            f"{', '.join(sorted(record))}. Map it with --data.columns {field}=THEIR_COLUMN"
        )
    return None
