"""Databases that are asked about: a file, a server, or those of the dataset of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ray_sql import data
from ray_sql.config import Config, absolute
from ray_sql.config.sections import PromptSection
from ray_sql.data import Corpus, databases
from ray_sql.data.descriptions import Sources, describe
from ray_sql.database import Schema, reflect
from ray_sql.errors import DataError


@dataclass(frozen=True)
class Database:
    """A database as prompts show it. Its `place`, a path or a URL, is None where no SQL runs."""

    name: str
    schema: Schema
    place: str | None


def find(where: str | None, config: Config) -> Database:
    """Return the database at a path or URL, or the run's own of this name, or its only one."""
    if where and ("://" in where or absolute(where).is_file()):
        return at(where, config.prompt, config.dataset_id)
    corpus = data.read_databases(config)
    known = corpus.databases
    name = where or next(iter(known), "")
    if name not in known or (where is None and len(known) > 1):
        given = f"--database {where}: no such file, and no such database of the run"
        raise DataError(
            f"{given if where else '--database is missing'}; give a database file, a URL, or one "
            f"of {', '.join(sorted(known)) or 'a run that has databases'}"
        )
    return _database(data.add_schema(corpus, name, config), name)


def at(where: str, prompt: PromptSection, dataset_id: str, name: str | None = None) -> Database:
    """Return the database of a file or of an SQLAlchemy URL.

    It is described as in training: by files beside it, and beside the dataset.
    """
    place = where
    if "://" in where:
        own = databases.only_name(where) or ""
        place = databases.on_server(where, [own])[own]
    else:
        own, place = Path(where).stem, str(absolute(where))
    chars = prompt.description_chars
    schema = reflect(place, name or own, prompt.example_values, comments=bool(chars))
    schema, _ = describe(schema, Sources.of(place, dataset_id), chars)
    return _database(Corpus({}, {schema.db_id: schema}, {schema.db_id: place}), schema.db_id)


def registered(places: Mapping[str, str], config: Config) -> dict[str, Database]:
    """Return databases by name: those at `places`, or all of the run's own where none is given."""
    if places:
        return {
            name: at(place, config.prompt, config.dataset_id, name)
            for name, place in places.items()
        }
    corpus = data.read_databases(config)
    return {
        name: _database(data.add_schema(corpus, name, config), name)
        for name in sorted(corpus.databases)
    }


def _database(corpus: Corpus, name: str) -> Database:
    return Database(name, corpus.schemas[name], corpus.trial(name))
