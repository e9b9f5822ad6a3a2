"""Read a corpus from any form: a file, a folder in a known layout, the Hub, or the demo.

`layouts` finds the files of a place, `formats` reads them, and `columns` makes examples of their
rows. Here they meet the databases. A row that cannot be used is left out, with its place.
"""

from __future__ import annotations

import hashlib
import itertools
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path

from ray_sql.config import absolute
from ray_sql.data import databases, formats, layouts
from ray_sql.data.columns import Source, read_rows, require_known_fields
from ray_sql.data.corpus import Corpus, Example, LeftOut, Splits, join_some
from ray_sql.data.formats import Record
from ray_sql.database import Schema, read_tables_json
from ray_sql.database.places import dialect_of
from ray_sql.errors import DataError
from ray_sql.store import dataset_folder
from ray_sql.store.storage import write_to_cache

WRITTEN_BY_DATASETS = ("dataset_dict.json", "state.json")
"""Files in a folder of `save_to_disk`, of the `datasets` library."""

VALIDATION = ("validation", "valid", "val")
"""Names of the split that is scored, where there is no `dev`."""


def read_corpus(source: Source) -> Corpus:
    """Return all splits and databases; `schemas` holds only the schemas of tables.json files.

    Raises:
        DataError: no such dataset, no known form, a file without a row that can be used, or an
            unknown field in `data.columns`.
    """
    require_known_fields(source)
    if source.dataset_id == "demo":
        return _read_demo(source)
    place = absolute(source.dataset_id)
    if not place.exists():
        is_path = source.dataset_id.count("/") != 1 or source.dataset_id.startswith((".", "/", "~"))
        if is_path or formats.form(place):
            raise DataError(
                f"{source.flag}: no such file or folder; give a path, a Hub id (owner/name), or "
                "demo"
            )
        return _read_by_datasets(source, source.dataset_id)
    if any((place / name).is_file() for name in WRITTEN_BY_DATASETS):
        return _read_by_datasets(source, str(place))
    server = dataset_folder.server_of(place)
    if server and not source.section.databases:
        section = source.section.model_copy(update={"databases": server})
        source = replace(source, section=section)
    where = source.section.databases or ""
    layout = layouts.find(place, dialect_of(where) or "sqlite")
    reading = _Reading(source)
    for split, files in layout.files.items():
        reading.add_files(split, files)
    schemas: dict[str, Schema] = {}
    for tables in [*layout.tables, *layouts.tables_beside(where)]:
        schemas = read_tables_json(tables) | schemas
    return _corpus(reading, schemas, layout.databases, layout.notes)


def _read_demo(source: Source) -> Corpus:
    """Read the data that ships with the package; its databases are built once, in the cache."""
    folder = Path(str(resources.files("ray_sql") / "demo_data"))
    scripts = sorted((folder / "database").glob("*/schema.sql"))
    places = {script.parent.name: _build_database(script, source.cache) for script in scripts}
    reading = _Reading(source)
    for split in ("train", "seen", "unseen"):
        reading.add_files(split, [folder / f"{split}.json"])
    demo = replace(source, section=source.section.model_copy(update={"databases": None}))
    return _corpus(replace(reading, source=demo), {}, places, [])


def _build_database(script: Path, cache: Path) -> str:
    """Return the SQLite file that `script` makes, complete or absent; its path hashes the text."""
    text = script.read_text(encoding="utf-8")
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    target = cache / "demo" / digest / f"{script.parent.name}.sqlite"
    if not target.exists():
        with write_to_cache(target) as part:
            connection = sqlite3.connect(part)
            connection.executescript(text)
            connection.close()
    return str(target)


def _read_by_datasets(source: Source, name: str) -> Corpus:
    """Read a dataset of the Hub, or a folder of `save_to_disk`, by the `datasets` library."""
    import datasets

    place = Path(name)
    try:
        if place.is_dir():
            loaded = datasets.load_from_disk(name)
        else:
            loaded = datasets.load_dataset(name, token=source.token)
    # The library raises many kinds of errors, from requests' to pyarrow's, for the same mistakes.
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        if place.is_dir():
            raise DataError(
                f"{source.flag}: the folder that save_to_disk wrote cannot be read ({reason})"
            ) from None
        raise DataError(
            f"{source.flag}: neither a local folder nor a Hub dataset that can be read ({reason}); "
            "check the name, the network and --read_token"
        ) from None
    reading = _Reading(source)
    splits = loaded if isinstance(loaded, dict) else {"train": loaded}
    for split, rows in splits.items():
        where = f"{source.dataset_id}[{split}]"
        records = [
            Record(f"{where}, row {row}", row, dict(values)) for row, values in enumerate(rows)
        ]
        if list(splits) == ["train"]:
            reading.add_unsplit(records, where)
        else:
            reading.add(str(split), records, where)
    return _corpus(reading, {}, {}, [])


@dataclass(frozen=True)
class _Reading:
    """The rows of a dataset, collected file by file."""

    source: Source
    splits: dict[str, list[Example]] = field(default_factory=dict)
    left_out: list[LeftOut] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add_files(self, split: str, files: Sequence[Path]) -> None:
        """Read the files of one split; under "" a file may name splits itself."""
        for file in files:
            try:
                for own_split, records in formats.read_file(file, self.say).items():
                    if split or own_split:
                        self.add(split or own_split, records, str(file))
                    else:
                        self.add_unsplit(records, str(file))
            except DataError as error:
                # a file of another name beside the known ones may hold anything
                if split in ("", *layouts.SPLITS, *VALIDATION):
                    raise
                self.notes.append(f"not read: {error}")

    def say(self, note: str) -> None:
        """Keep a guess, to be said aloud."""
        self.notes.append(note)

    def examples(self) -> Iterator[Example]:
        """Yield the examples of all splits."""
        return itertools.chain.from_iterable(self.splits.values())

    def add_unsplit(self, records: Sequence[Record], file: str) -> None:
        """Read the rows of a place without splits, each in the split that its own column names."""
        parts = by_column(records)
        if len(parts) > 1 and "split" not in self.source.section.columns.values():
            self.notes.append(f"splits ← column split: {', '.join(parts)}")
            for split, rows in parts.items():
                self.add(split, rows, file)
        else:
            self.add("train", records, file)

    def add(self, split: str, records: Sequence[Record], file: str) -> None:
        """Read the rows of a file; those without an id are counted across a split's files."""
        examples = self.splits.setdefault(split, [])
        known = len(examples) + sum(row.split == split for row in self.left_out)
        rows = read_rows(self.source, records, file, split, known)
        examples += rows.examples
        self.left_out.extend(rows.left_out)
        self.notes.extend(note for note in rows.notes if note not in self.notes)


def _corpus(
    reading: _Reading, schemas: dict[str, Schema], beside: dict[str, str], notes: Iterable[str]
) -> Corpus:
    """Return the corpus, each example with the database that it is about."""
    found = _Databases.find(reading, beside, schemas)
    left_out, said = reading.left_out, [*notes, *reading.notes]
    splits: Splits = {}
    for split, examples in reading.splits.items():
        named = [found.named(example) for example in examples]
        usable = [example for example in named if example.db_id]
        if not usable and examples:
            raise DataError(f"{reading.source.flag}: {found.missing()}")
        left_out += [
            LeftOut(split, example.id, example.place, f"has no db_id, {found.how_many()}")
            for example in named
            if not example.db_id
        ]
        splits[split] = _with_unique_ids(usable)
    said += found.renamed(reading)
    nameless = any(not example.db_id for example in reading.examples())
    if nameless and found.only in found.places:
        said.append(f"database {found.only} for all questions that name none")
    everything = [example for rows in splits.values() for example in rows]
    if not found.places and not schemas and not all(one.schema_text for one in everything):
        raise DataError(f"{reading.source.flag}: {found.missing()}")
    name = _taken_for_dev(splits, reading.source)
    splits = {"dev" if split == name else split: rows for split, rows in splits.items()}
    left_out = [replace(row, split="dev") if row.split == name else row for row in left_out]
    return Corpus(splits, schemas, found.places, left_out=tuple(left_out), notes=tuple(said))


@dataclass(frozen=True)
class _Databases:
    """The databases of a dataset, and the one that questions are about which name none."""

    places: dict[str, str]
    only: str | None
    asked_for: bool
    """True if `data.databases` names them."""
    known: Sequence[str] = ()
    """The names of all databases, and of those that only tables.json has."""

    @classmethod
    def find(cls, reading: _Reading, beside: dict[str, str], schemas: Iterable[str]) -> _Databases:
        """Return the databases that the settings name, or else those beside the questions."""
        where = reading.source.section.databases
        if where and "://" in where:
            only = databases.only_name(where)
            named = {example.db_id or only or "" for example in reading.examples()}
            return cls(databases.on_server(where, named), only, True)
        places = databases.find(where) if where else beside
        named = {example.db_id for example in reading.examples() if example.db_id}
        if where and len(named) == 1 and absolute(where).is_file():
            places = dict.fromkeys(named, *places.values())
        only = next(iter(places)) if len(places) == 1 else None
        return cls(places, only, bool(where), tuple(dict.fromkeys([*places, *schemas])))

    def named(self, example: Example) -> Example:
        """Return the example with a database's name, where it has none and there is one for it.

        A schema text is a database of its own, unless the settings name one.
        """
        if example.db_id and not example.schema_text:
            return replace(example, db_id=databases.called(example.db_id, self.known))
        if example.db_id:
            return example
        if example.schema_text and not (self.asked_for and self.only):
            digest = hashlib.sha256(example.schema_text.encode()).hexdigest()[:8]
            return replace(example, db_id=f"schema-{digest}")
        return replace(example, db_id=self.only or "")

    def renamed(self, reading: _Reading) -> list[str]:
        """Say which databases the questions call by another name, such as that of the file."""
        given = {e.db_id: self.named(e).db_id for e in reading.examples() if e.db_id}
        others = [f"{name} for {theirs}" for theirs, name in given.items() if name != theirs]
        return [f"databases: {join_some(others)}"] if others else []

    def how_many(self) -> str:
        """Say which databases there are to choose from."""
        names = f": {join_some(self.places)}" if self.places else ""
        return f"and there are {len(self.places)} databases{names}"

    def missing(self) -> str:
        """Say why no example has a database, and the way out."""
        if self.places:
            return (
                f"the questions name no database (no column db_id), {self.how_many()}; map their "
                "column with --data.columns db_id=THEIR_COLUMN, or name one file with "
                "--data.databases"
            )
        return (
            "no databases found beside it; name them with --data.databases "
            f"({databases.LAYOUTS}), or give each line its own `schema` text (CREATE TABLE …)"
        )


def _taken_for_dev(splits: Splits, source: Source) -> str:
    """Return the split that is scored as `dev`, "" where there is one or it keeps its name."""
    name = next((name for name in VALIDATION if name in splits and "dev" not in splits), "")
    if name == "validation" and name in source.asked:
        raise DataError(
            f"--split {name}: {source.flag} has a split of this name, which is called dev here, "
            f"for {name} is what training sets aside to choose by; give --split dev"
        )
    return "" if name in source.asked else name


def by_column(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Return the records by the split that their column `split` names, if it names a known one.

    A row without a name is a bad row. Without such a column the only key is "".
    """
    names = [record.values.get("split", record.values.get("Split")) for record in records]
    words = [name.strip().lower() if isinstance(name, str) else "" for name in names]
    if not {*layouts.SPLITS, *VALIDATION} & set(words):
        return {"": list(records)}
    parts: dict[str, list[Record]] = {word: [] for word in dict.fromkeys(words) if word}
    for record, name, word in zip(records, names, words, strict=True):
        if word:
            parts[word].append(record)
        else:
            is_empty = name is None or isinstance(name, str)
            fault = "its split is empty" if is_empty else f"its split is no text: {name}"
            bad = record if record.fault else replace(record, fault=fault)
            next(iter(parts.values())).append(bad)
    return parts


def _with_unique_ids(examples: Sequence[Example]) -> tuple[Example, ...]:
    """Return the examples of a split; raise `DataError` where two have the same id."""
    first: dict[str, Example] = {}
    for example in examples:
        before = first.setdefault(example.id, example)
        if before is not example:
            raise DataError(
                f"{before.place} and {example.place}: both have id {example.id!r}; give each its "
                "own, or leave the ids out"
            )
    return tuple(examples)
