"""Describe tables and columns: by `descriptions.yaml`, BIRD's CSV files, or a server's comments.

The words of a person in `descriptions.yaml` come before the CSV files, and these before comments.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, TypeAdapter, ValidationError

from ray_sql.config import absolute
from ray_sql.config.files import read_bytes, read_text
from ray_sql.data.words import name_words, words
from ray_sql.database import Schema, Table
from ray_sql.errors import DataError

FILE = "descriptions.yaml"
"""The file of a dataset's folder, or of a folder of databases, that people fill."""
BIRD_FOLDER = "database_description"
"""BIRD's folder of CSV files beside a database, one for each table."""
HEADER = """\
# What tables and columns mean, for the prompt (--prompt.description_chars). Fill in what a stranger
# to this database must know: units, codes, what a row stands for. Leave "" where the name says it.
"""
_ELLIPSIS = "…"


_EMPTY = BeforeValidator(lambda given: given or None)
"""Take a place where nothing is written for nothing."""


class TableWords(BaseModel):
    """A table in words, and its columns."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    description: str = ""
    columns: Annotated[dict[str, str] | None, _EMPTY] = None


Described = Mapping[str, TableWords]
"""Tables in words, by name."""
Texts = dict[tuple[str, str], str]
"""Descriptions by table and column, in lower case; "" for the table itself."""


@dataclass(frozen=True)
class Sources:
    """The files that describe a database, the first before the others; there or not."""

    files: tuple[Path, ...]
    folders: tuple[Path, ...]

    @classmethod
    def of(cls, database: str | None, dataset: str) -> Sources:
        """Return the files beside a database, a path or a URL, and beside a dataset."""
        places = [absolute(dataset)]
        folders: list[Path] = []
        if database and "://" not in database:
            own = Path(database).parent
            places += [own, own.parent]
            folders.append(own / BIRD_FOLDER)
        files = [(place if place.is_dir() else place.parent) / FILE for place in places]
        return cls(tuple(dict.fromkeys(files)), tuple(folders))


def describe(schema: Schema, sources: Sources, chars: int) -> tuple[Schema, list[str]]:
    """Return a schema with its descriptions, at most `chars` characters, and notes for the plan.

    Long descriptions are cut, all at the same length. Zero characters leave the schema as it is.

    Raises:
        DataError: a file of descriptions cannot be read.
    """
    if not chars:
        return schema, []
    notes: list[str] = []
    found = [_comments(schema)]
    found += [_read_bird(folder, notes) for folder in sources.folders]
    found += [_read_yaml(file, schema, notes) for file in reversed(sources.files)]
    merged: Texts = {}
    for described in found:
        merged |= _flat(described)
    whole = _with(schema, merged)
    texts = [text for table in whole.tables for text in _texts(table)]
    length = _fair_length([len(text) for text in texts], chars)
    cut = sum(len(text) > length for text in texts)
    if cut:
        notes.append(
            f"database {schema.db_id}: {cut} of {len(texts)} descriptions are cut to "
            f"{length} characters (--prompt.description_chars {chars})"
        )
    return _with(schema, {key: _cut(text, length) for key, text in merged.items()}), notes


def template(schemas: Iterable[Schema]) -> str:
    """Return a `descriptions.yaml` for schemas, with what is known filled in, to be completed."""
    content = {schema.db_id: dict(_template_of(schema)) for schema in schemas}
    return HEADER + yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=100)


def _template_of(schema: Schema) -> Iterator[tuple[str, dict[str, Any]]]:
    for table in schema.tables:
        columns = {column.name: column.description for column in table.columns}
        yield table.name, {"description": table.description, "columns": columns}


def _comments(schema: Schema) -> Described:
    return {
        table.name: TableWords(
            description=table.description,
            columns={column.name: column.description for column in table.columns},
        )
        for table in schema.tables
    }


def _read_yaml(file: Path, schema: Schema, notes: list[str]) -> Described:
    """Return the descriptions of one database, and note those of names that it lacks."""
    if not file.exists():
        return {}
    way_out = "correct it, or remove it"
    try:
        # all is text, for `yes` and `1` are names of columns as others are
        content = yaml.load(read_text(file, way_out), Loader=yaml.BaseLoader)
        known = _SHAPE.validate_python(content) or {}
    except (yaml.YAMLError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{file}: is no YAML ({reason}); {way_out}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = " → ".join(str(part) for part in first["loc"])
        raise DataError(
            f"{file}: {where or 'the file'}: {first['msg'].lower()}; expected database → table → "
            "description and columns, all in words"
        ) from None
    tables = known.get(schema.db_id) or {}
    described = {name: table for name, table in tables.items() if table is not None}
    unknown = [".".join(key).strip(".") for key in _flat(described) if not _is_known(schema, *key)]
    if unknown:
        notes.append(f"{file}: {schema.db_id} has no {', '.join(unknown[:5])}")
    return described


_Tables = Annotated[dict[str, Annotated[TableWords | None, _EMPTY]] | None, _EMPTY]
_SHAPE: TypeAdapter[dict[str, _Tables] | None] = TypeAdapter(
    Annotated[dict[str, _Tables] | None, _EMPTY]
)


def _is_known(schema: Schema, table: str, column: str) -> bool:
    found = schema.table(table)
    return found is not None and (not column or found.column(column) is not None)


def _read_bird(folder: Path, notes: list[str]) -> Described:
    """Return the descriptions of BIRD's CSV files. One that cannot be read is noted."""
    described: dict[str, TableWords] = {}
    for file in sorted(folder.glob("*.csv")):
        columns = {}
        try:
            for row in csv.DictReader(io.StringIO(_decoded(file), newline="")):
                name = (row.get("original_column_name") or "").strip()
                columns[name] = _bird_words(row)
        except (csv.Error, OSError, ValueError) as error:
            notes.append(f"{file}: descriptions are not read ({error})")
            continue
        described[file.stem] = TableWords(columns=columns)
    return described


def _decoded(file: Path) -> str:
    """Return the text of a file in UTF-8, or else in Windows' Western encoding."""
    content = read_bytes(file)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return content.decode("cp1252", errors="replace")


def _bird_words(row: Mapping[str, str | None]) -> str:
    """Return what a row says: the description, or else the long name, and what values mean."""
    name, said, values = (
        " ".join((row.get(key) or "").split())
        for key in ("column_name", "column_description", "value_description")
    )
    return "; ".join(part for part in (said or name, values) if part)


def _flat(described: Described) -> Texts:
    """Return the descriptions that say something, each on one line."""
    flat: Texts = {}
    for table, said in described.items():
        for column, text in [("", said.description), *(said.columns or {}).items()]:
            if line := " ".join(text.split()):
                flat[table.lower(), column.lower()] = line
    return flat


def _texts(table: Table) -> Iterator[str]:
    yield from filter(None, [table.description, *(one.description for one in table.columns)])


def _with(schema: Schema, texts: Texts) -> Schema:
    """Return the schema with these descriptions, but for those that repeat a name."""
    tables = []
    for table in schema.tables:
        name = table.name.lower()
        columns = [
            replace(one, description=_unless_named(texts.get((name, one.name.lower())), one.name))
            for one in table.columns
        ]
        own = _unless_named(texts.get((name, "")), table.name)
        tables.append(replace(table, description=own, columns=tuple(columns)))
    return replace(schema, tables=tuple(tables))


def _unless_named(text: str | None, name: str) -> str:
    """Return a text that has a word which the name lacks, or else nothing."""
    return text if text and not set(words(text)) <= set(name_words(name)) else ""


def _fair_length(lengths: Sequence[int], most: int) -> int:
    """Return the length to cut texts to, so that together they have at most `most` characters."""
    left = most
    for place, length in enumerate(ordered := sorted(lengths)):
        share = left // (len(ordered) - place)
        if length > share:
            return share
        left -= length
    return max(lengths, default=0)


def _cut(text: str, length: int) -> str:
    """Return a text of at most `length` characters, cut between words."""
    if len(text) <= length:
        return text
    kept = text[: max(0, length - len(_ELLIPSIS))]
    return f"{kept.rpartition(' ')[0] or kept}{_ELLIPSIS}" if kept else ""
