"""Read a corpus from whatever form the user has it in: Spider, BIRD, JSONL, the Hub, or the demo.

The forms are told apart by what lies in the place named by `dataset_id`. Every record becomes an `Example`; a field that must be
there and is not is named with the file, the row and the columns found.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ray_sql.config import Config, absolute
from ray_sql.data.corpus import Corpus, Example
from ray_sql.database import Schema, read_tables_json
from ray_sql.errors import DataError

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
"""Our field → the column names that are understood without a column map, first match wins."""

TASK_COLUMNS = {
    "sql": {"schema": ("schema", "schema_SQLDatabase")},
    "schema": {
        "schema": ("schema", "schema_SQLDatabase_min"),
        "links": ("links", "selector_correct"),
    },
}
"""The columns that depend on the task: ready-made schema text, and ready-made links."""


def read_corpus(config: Config) -> Corpus:
    """All splits and databases of the dataset; `schemas` holds only what a tables.json says."""
    if config.dataset_id == "demo":
        return _read_demo(config)
    place = absolute(config.dataset_id)
    if (place / "tables.json").is_file():
        return _read_folder(config, place, SPIDER_FILES)
    if place.is_dir() and _bird_files(place):
        return _read_bird(config, place)
    if place.suffix in (".jsonl", ".json") or (place.is_dir() and list(place.glob("*.jsonl"))):
        return _read_jsonl(config, place)
    looks_local = config.dataset_id.count("/") != 1 or config.dataset_id.startswith((".", "/", "~"))
    if place.is_dir() and not list(place.glob("**/*.parquet")):
        raise DataError(
            f"--dataset_id {config.dataset_id}: the folder is in no known form; expected Spider's (tables.json, train_spider.json, "
            "dev.json, database/), BIRD's (dev.json, dev_tables.json, dev_databases/), or *.jsonl"
        )
    if looks_local and not place.exists():
        raise DataError(
            f"--dataset_id {config.dataset_id}: no such file or folder; give a path, a Hub id (owner/name), or demo"
        )
    return _read_hub(config)


def read_records(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON list or of a JSONL file; a malformed one is named by file and line."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text ({error})") from None
    records = (
        list(parse_lines(path, text).values()) if path.suffix == ".jsonl" else _parse(path, text, 1)
    )
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise DataError(f"{path}: must hold JSON objects, one example each")
    return records


def parse_lines(path: Path | str, text: str) -> dict[int, Any]:
    """Line number → the JSON value on it, blank lines left out; `path` serves the error message."""
    # not splitlines: it also splits at U+2028 and others, which JSON allows inside a string
    return {
        number: _parse(path, line, number)
        for number, line in enumerate(text.split("\n"), 1)
        if line.strip()
    }


def _parse(path: Path | str, text: str, first_line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise DataError(
            f"{path}, line {line}: not valid JSON ({error.msg}); correct the line or remove it"
        ) from None


def _read_demo(config: Config) -> Corpus:
    """The data that ships with the package; its databases are built from SQL text once, in the cache."""
    source = Path(str(resources.files("ray_sql") / "demo_data"))
    databases = {
        folder.name: _build_database(folder / "schema.sql", config.cache)
        for folder in _folders(source / "database")
    }
    files = {split: (f"{split}.json",) for split in ("train", "seen", "unseen")}
    splits = {
        split: _examples(config, [source / file for file in names])
        for split, names in files.items()
    }
    return Corpus(splits, {}, databases)


def _build_database(script: Path, cache: Path) -> str:
    """The SQLite file that `script` makes, under a name that changes with its text; complete or absent."""
    text = script.read_text(encoding="utf-8")
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    target = cache / "demo" / digest / f"{script.parent.name}.sqlite"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        half = target.with_suffix(f".{os.getpid()}")
        half.unlink(missing_ok=True)
        connection = sqlite3.connect(half)
        connection.executescript(text)
        connection.close()
        os.replace(half, target)
    return str(target)


def _read_folder(config: Config, place: Path, files: Mapping[str, Sequence[str]]) -> Corpus:
    """A Spider folder: question files, `tables.json`, and databases that may be missing for some."""
    splits = {}
    for split, names in files.items():
        present = [place / name for name in names if (place / name).is_file()]
        if present:
            splits[split] = _examples(config, present)
    schemas = read_tables_json(place / "tables.json")
    databases = _databases(config.data.databases or str(place / "database"), splits, config)
    return Corpus(splits, schemas, databases)


def _bird_files(place: Path) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for split in ("train", "dev"):
        for path in [place / f"{split}.json", *sorted(place.glob(f"{split}*/{split}.json"))]:
            if path.is_file() and list(path.parent.glob("*_tables.json")):
                found.setdefault(split, path)
    return found


def _read_bird(config: Config, place: Path) -> Corpus:
    """BIRD's release: per split a question file, `<split>_tables.json` and `<split>_databases/`, together or in folders."""
    splits: dict[str, tuple[Example, ...]] = {}
    schemas: dict[str, Schema] = {}
    databases: dict[str, str] = {}
    for split, file in _bird_files(place).items():
        splits[split] = _examples(config, [file])
        for tables in sorted(file.parent.glob("*_tables.json")):
            schemas |= read_tables_json(tables)
        for folder in sorted(file.parent.glob("*_databases")):
            databases |= _database_files(folder, config)
    if config.data.databases:
        databases = _databases(config.data.databases, splits, config)
    return Corpus(splits, schemas, databases)


def _read_jsonl(config: Config, place: Path) -> Corpus:
    """One file (split here), or a folder of `<split>.jsonl` files; databases in `data.databases` or `database/` beside them."""
    if not place.exists():
        raise DataError(f"--dataset_id {config.dataset_id}: no such file")
    folder = place if place.is_dir() else place.parent
    files = (
        {path.stem: path for path in sorted(place.glob("*.jsonl"))}
        if place.is_dir()
        else {"train": place}
    )
    splits = _with_dev({split: _examples(config, [path]) for split, path in files.items()})
    where = config.data.databases or next(
        (str(folder / n) for n in ("database", "databases") if (folder / n).is_dir()), None
    )
    if where is None and not all(
        example.schema_text for examples in splits.values() for example in examples
    ):
        raise DataError(
            f"--dataset_id {config.dataset_id}: no databases found beside it; name their folder with --data.databases, or give "
            "each line its own `schema` text"
        )
    databases = {} if where is None else _databases(where, splits, config)
    return Corpus(splits, {}, databases)


def _read_hub(config: Config) -> Corpus:
    """A dataset of the Hub (or a local folder in the same form), read by the `datasets` library."""
    import datasets

    token = config.read_token.get_secret_value() if config.read_token else None
    try:
        place = absolute(config.dataset_id)
        loaded = datasets.load_dataset(
            str(place) if place.is_dir() else config.dataset_id, token=token
        )
    except Exception as error:  # the library raises many kinds, from requests' to pyarrow's; all mean the same to the user
        raise DataError(
            f"--dataset_id {config.dataset_id}: neither a local folder nor a Hub dataset that can be read "
            f"({type(error).__name__}: {' '.join(str(error).split())[:200]}); check the name, the network and --read_token"
        ) from None
    splits = {
        str(split): _distinct(
            [
                _example(config, row, f"{config.dataset_id}[{split}]", number)
                for number, row in enumerate(rows)
            ],
            f"{config.dataset_id}[{split}]",
        )
        for split, rows in loaded.items()
    }
    splits = _with_dev(splits)
    databases = _databases(config.data.databases, splits, config) if config.data.databases else {}
    return Corpus(splits, {}, databases)


def _with_dev(splits: dict[str, tuple[Example, ...]]) -> dict[str, tuple[Example, ...]]:
    """`validation`, the Hub's usual name, as `dev`: our `validation` is what is set aside from train."""
    return {
        "dev" if name == "validation" and "dev" not in splits else name: rows
        for name, rows in splits.items()
    }


def _folders(place: Path) -> list[Path]:
    if not place.is_dir():
        raise DataError(f"{place}: no such folder of databases; name it with --data.databases")
    return sorted(path for path in place.iterdir() if path.is_dir())


def _database_files(place: Path, config: Config) -> dict[str, str]:
    files = {folder.name: folder / f"{folder.name}.sqlite" for folder in _folders(place)}
    return {db_id: str(path) for db_id, path in files.items() if path.is_file()}


def _databases(
    where: str, splits: Mapping[str, Iterable[Example]], config: Config
) -> dict[str, str]:
    if "://" in where:
        used = {example.db_id for examples in splits.values() for example in examples}
        return {db_id: where.replace("{db_id}", quote(db_id, safe="")) for db_id in sorted(used)}
    return _database_files(absolute(where), config)


def _examples(config: Config, files: Sequence[Path]) -> tuple[Example, ...]:
    examples: list[Example] = []
    for path in files:
        for number, record in enumerate(read_records(path)):
            examples.append(
                _example(config, record, str(path), number, first=len(examples) - number)
            )
    return _distinct(examples, ", ".join(map(str, files)))


def _distinct(examples: Sequence[Example], where: str) -> tuple[Example, ...]:
    """The examples of a split, whose ids tell them apart in every file that is written about them."""
    first: dict[str, int] = {}
    for number, example in enumerate(examples):
        if (before := first.setdefault(example.id, number)) != number:
            raise DataError(
                f"{where}, rows {before} and {number}: both have id {example.id!r}; give each its own, or leave the ids out"
            )
    return tuple(examples)


def _example(
    config: Config, record: Mapping[str, Any], file: str, number: int, first: int = 0
) -> Example:
    """One record as an `Example`; a field that must be there and is not is named with the columns found."""
    columns = {**COLUMNS, **TASK_COLUMNS[config.task_type]}

    def value(name: str, required: bool = False) -> str | None:
        mapped = config.data.columns.get(name)
        candidates = (mapped,) if mapped else columns.get(name, (name,))
        found = next((column for column in candidates if record.get(column) is not None), None)
        if found is None and (required or (mapped and mapped not in record)):
            raise DataError(
                f"{file}, row {number}: no column {' or '.join(map(repr, candidates))} for {name}; found "
                f"{', '.join(sorted(record))}. Map it with --data.columns {name}=THEIR_COLUMN"
            )
        return None if found is None else str(record[found]).strip()

    unknown = set(config.data.columns) - set(columns)
    if unknown:
        raise DataError(
            f"--data.columns {unknown.pop()}: no such field; fields are {', '.join(columns)}"
        )
    return Example(
        id=value("id") or str(first + number),
        db_id=value("db_id", required=True) or "",
        question=value("question", required=True) or "",
        gold=value("query", required=True) or "",
        evidence=value("evidence") or "",
        hardness=value("hardness"),
        schema_text=value("schema"),
        links_text=value("links") if "links" in columns else None,
    )
