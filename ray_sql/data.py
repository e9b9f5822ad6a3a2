"""Questions with their gold SQL, and the databases they are about, from whatever form the user has them in.

Five forms are told apart by what lies in the place named by `dataset_id`: a Spider folder, a BIRD folder, JSONL, a dataset of
the Hub, and `demo`. All become a `Corpus`: named splits of `Example`s plus one `Schema` and one database per `db_id`. What is
set aside for validation is set aside by whole databases unless the user says otherwise, and overlap between splits is reported.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import sqlite3
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

from ray_sql.config import Config, absolute
from ray_sql.errors import DataError
from ray_sql.schema import Schema, read_tables_json, reflect

Item = TypeVar("Item")

SPIDER_FILES = {"train": ("train_spider.json", "train_others.json"), "dev": ("dev.json",), "test": ("test.json",)}

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
    "schema": {"schema": ("schema", "schema_SQLDatabase_min"), "links": ("links", "selector_correct")},
}
"""The columns that depend on the task: ready-made schema text, and ready-made links."""


@dataclass(frozen=True)
class Example:
    """One question about one database. `schema_text` and `links_text` are set where the dataset brings its own."""

    id: str
    db_id: str
    question: str
    gold: str
    evidence: str = ""
    hardness: str | None = None
    schema_text: str | None = None
    links_text: str | None = None


@dataclass(frozen=True)
class Corpus:
    """Splits by name, and per db_id its schema and where its database is (a path or a SQLAlchemy URL)."""

    splits: dict[str, tuple[Example, ...]]
    schemas: dict[str, Schema] = field(default_factory=dict)
    databases: dict[str, str] = field(default_factory=dict)

    def fingerprint(self) -> str:
        """16 hex digits of the content: examples of all splits and schemas, not where they lie."""
        digest = hashlib.sha256()
        for name in sorted(self.splits):
            for example in self.splits[name]:
                digest.update(json.dumps([name, asdict(example)], sort_keys=True).encode())
        for db_id in sorted(self.schemas):
            digest.update(json.dumps(self.schemas[db_id].to_dict(), sort_keys=True).encode())
        return digest.hexdigest()[:16]


def load(config: Config) -> Corpus:
    """The corpus that `config` names, split into `train`, `validation` and the splits to be scored.

    Raises `DataError` naming the file, the row and the field of whatever is missing or malformed.
    """
    for split in {"train", "validation"} & set(config.split):
        raise DataError(f"--split {split}: is trained or chosen on, so it cannot score a run; name a split that is not")
    corpus = _with_scored_splits(_read(config), config)
    train, validation = _set_aside(corpus.splits["train"], config.data.validation_fraction, config, "validation")
    if config.data.limit:
        train = sample(train, config.data.limit, config.seed)
    return replace(corpus, splits={"train": train, "validation": validation} | _scored(corpus, config))


def load_split(config: Config, splits: Sequence[str]) -> Corpus:
    """Only the named splits, whole, with the schemas and databases they need."""
    corpus = _read(config)
    if "validation" in splits or not all(split in corpus.splits for split in splits):
        scored = tuple(split for split in splits if split not in ("train", "validation"))
        # one unsplit file: training set its test part aside first, so the same is done here
        corpus = load(config.changed({"split": scored or (("dev",) if set(corpus.splits) == {"train"} else ())}))
    return replace(corpus, splits={split: corpus.splits[split] for split in splits})


def sample(examples: Sequence[Item], n: int | None, seed: int) -> tuple[Item, ...]:
    """At most `n` of the examples, drawn with `seed`, in their original order; all of them where `n` is None."""
    if n is None or n >= len(examples):
        return tuple(examples)
    chosen = sorted(random.Random(seed).sample(range(len(examples)), n))
    return tuple(examples[index] for index in chosen)


def leakage(corpus: Corpus) -> list[str]:
    """What other splits share with `train`, a line for each split: databases, and questions asked in both."""
    seen_questions = {_asked(example) for example in corpus.splits.get("train", ())}
    seen_databases = {example.db_id for example in corpus.splits.get("train", ())}
    lines = []
    for name, examples in corpus.splits.items():
        if name == "train" or not examples:
            continue
        databases = {example.db_id for example in examples}
        repeated = sum(_asked(example) in seen_questions for example in examples)
        shared = len(databases & seen_databases)
        lines.append(
            f"{name}: {len(examples)} questions on {len(databases)} databases, {shared} of them also in train; "
            f"{repeated} questions also in train"
        )
    return lines


def read_records(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON list or of a JSONL file; a malformed one is named by file and line."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text ({error})") from None
    records = list(parse_lines(path, text).values()) if path.suffix == ".jsonl" else _parse(path, text, 1)
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise DataError(f"{path}: must hold JSON objects, one example each")
    return records


def parse_lines(path: Path, text: str) -> dict[int, Any]:
    """Line number → the JSON value on it, blank lines left out; `path` serves the error message."""
    # not splitlines: it also splits at U+2028 and others, which JSON allows inside a string
    return {number: _parse(path, line, number) for number, line in enumerate(text.split("\n"), 1) if line.strip()}


def _parse(path: Path, text: str, first_line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise DataError(f"{path}, line {line}: not valid JSON ({error.msg}); correct the line or remove it") from None


def _read(config: Config) -> Corpus:
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


def _read_demo(config: Config) -> Corpus:
    """The data that ships with the package; its databases are built from SQL text once, in the cache."""
    source = Path(str(resources.files("ray_sql") / "demo_data"))
    databases = {
        folder.name: _build_database(folder / "schema.sql", config.cache) for folder in _folders(source / "database")
    }
    files = {split: (f"{split}.json",) for split in ("train", "seen", "unseen")}
    splits = {split: _examples(config, [source / file for file in names]) for split, names in files.items()}
    return _with_schemas(config, Corpus(splits, {}, databases))


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
    databases = _database_files(absolute(config.data.databases or place / "database"), config)
    return _with_schemas(config, Corpus(splits, schemas, databases))


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
        databases = _database_files(absolute(config.data.databases), config)
    return _with_schemas(config, Corpus(splits, schemas, databases))


def _read_jsonl(config: Config, place: Path) -> Corpus:
    """One file (split here), or a folder of `<split>.jsonl` files; databases in `data.databases` or `database/` beside them."""
    if not place.exists():
        raise DataError(f"--dataset_id {config.dataset_id}: no such file")
    folder = place if place.is_dir() else place.parent
    files = {path.stem: path for path in sorted(place.glob("*.jsonl"))} if place.is_dir() else {"train": place}
    splits = _with_dev({split: _examples(config, [path]) for split, path in files.items()})
    where = config.data.databases or next(
        (str(folder / n) for n in ("database", "databases") if (folder / n).is_dir()), None
    )
    if where is None and not all(example.schema_text for examples in splits.values() for example in examples):
        raise DataError(
            f"--dataset_id {config.dataset_id}: no databases found beside it; name their folder with --data.databases, or give "
            "each line its own `schema` text"
        )
    databases = {} if where is None else _databases(where, splits, config)
    return _with_schemas(config, Corpus(splits, {}, databases))


def _read_hub(config: Config) -> Corpus:
    """A dataset of the Hub (or a local folder in the same form), read by the `datasets` library."""
    import datasets

    token = config.read_token.get_secret_value() if config.read_token else None
    try:
        place = absolute(config.dataset_id)
        loaded = datasets.load_dataset(str(place) if place.is_dir() else config.dataset_id, token=token)
    except (
        Exception
    ) as error:  # the library raises many kinds, from requests' to pyarrow's; all mean the same to the user
        raise DataError(
            f"--dataset_id {config.dataset_id}: neither a local folder nor a Hub dataset that can be read "
            f"({type(error).__name__}: {' '.join(str(error).split())[:200]}); check the name, the network and --read_token"
        ) from None
    splits = {
        str(split): tuple(
            _example(config, row, f"{config.dataset_id}[{split}]", number) for number, row in enumerate(rows)
        )
        for split, rows in loaded.items()
    }
    splits = _with_dev(splits)
    databases = _databases(config.data.databases, splits, config) if config.data.databases else {}
    return _with_schemas(config, Corpus(splits, {}, databases))


def _with_dev(splits: dict[str, tuple[Example, ...]]) -> dict[str, tuple[Example, ...]]:
    """`validation`, the Hub's usual name, as `dev`: our `validation` is what is set aside from train."""
    return {"dev" if name == "validation" and "dev" not in splits else name: rows for name, rows in splits.items()}


def _folders(place: Path) -> list[Path]:
    if not place.is_dir():
        raise DataError(f"{place}: no such folder of databases; name it with --data.databases")
    return sorted(path for path in place.iterdir() if path.is_dir())


def _database_files(place: Path, config: Config) -> dict[str, str]:
    files = {folder.name: folder / f"{folder.name}.sqlite" for folder in _folders(place)}
    return {db_id: str(path) for db_id, path in files.items() if path.is_file()}


def _databases(where: str, splits: Mapping[str, Iterable[Example]], config: Config) -> dict[str, str]:
    if "://" in where:
        used = {example.db_id for examples in splits.values() for example in examples}
        return {db_id: where.replace("{db_id}", db_id) for db_id in sorted(used)}
    return _database_files(absolute(where), config)


def _examples(config: Config, files: Sequence[Path]) -> tuple[Example, ...]:
    examples: list[Example] = []
    for path in files:
        for number, record in enumerate(read_records(path)):
            examples.append(_example(config, record, str(path), number, first=len(examples) - number))
    return tuple(examples)


def _example(config: Config, record: Mapping[str, Any], file: str, number: int, first: int = 0) -> Example:
    """One record as an `Example`; a field that must be there and is not is named with the columns found."""
    columns = {**COLUMNS, **TASK_COLUMNS[config.task_type]}

    def value(name: str, required: bool = False) -> str | None:
        mapped = config.data.columns.get(name)
        candidates = (mapped,) if mapped else columns.get(name, (name,))
        found = next((column for column in candidates if record.get(column) is not None), None)
        if found is None and (required or mapped):
            raise DataError(
                f"{file}, row {number}: no column {' or '.join(map(repr, candidates))} for {name}; found "
                f"{', '.join(sorted(record))}. Map it with --data.columns {name}=THEIR_COLUMN"
            )
        return None if found is None else str(record[found]).strip()

    unknown = set(config.data.columns) - set(columns)
    if unknown:
        raise DataError(f"--data.columns {unknown.pop()}: no such field; fields are {', '.join(columns)}")
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


def _with_schemas(config: Config, corpus: Corpus) -> Corpus:
    """Add the schema of every database in use: from the live database where there is one, else from tables.json."""
    schemas = {}
    for split, examples in corpus.splits.items():
        for number, example in enumerate(examples):
            db_id = example.db_id
            if db_id in schemas or (example.schema_text and db_id not in corpus.databases):
                continue
            if db_id in corpus.databases:
                schemas[db_id] = reflect(corpus.databases[db_id], db_id, config.prompt.example_values)
            elif db_id in corpus.schemas:
                schemas[db_id] = corpus.schemas[db_id]
            else:
                raise DataError(
                    f"--dataset_id {config.dataset_id}, {split} row {number}: unknown db_id {db_id!r}: no database file "
                    f"{db_id}/{db_id}.sqlite and no entry in tables.json; have {_some(corpus.databases or corpus.schemas)}"
                )
    return replace(corpus, schemas=schemas)


def _some(names: Iterable[str]) -> str:
    listed = sorted(names)
    return ", ".join(listed[:5]) + (f" and {len(listed) - 5} more" if len(listed) > 5 else "") if listed else "none"


def _with_scored_splits(corpus: Corpus, config: Config) -> Corpus:
    """Make sure that there is a `train` split, and every split to be scored; one unsplit file is divided here."""
    if not corpus.splits.get("train"):
        raise DataError(f"--dataset_id {config.dataset_id}: no training examples; found splits {_some(corpus.splits)}")
    missing = [split for split in config.split if split not in corpus.splits]
    if missing and set(corpus.splits) == {"train"} and len(config.split) == 1:
        # drawn under one name whatever the user calls it, or `--split test` would score what `--split dev` trained on
        train, held_out = _set_aside(corpus.splits["train"], config.data.test_fraction, config, "held-out")
        return replace(corpus, splits={"train": train, missing[0]: held_out})
    if missing:
        raise DataError(
            f"--split {missing[0]}: --dataset_id {config.dataset_id} has no such split; it has {_some(corpus.splits)}"
        )
    return corpus


def _scored(corpus: Corpus, config: Config) -> dict[str, tuple[Example, ...]]:
    return {split: corpus.splits[split] for split in config.split}


def _set_aside(
    examples: tuple[Example, ...], fraction: float, config: Config, name: str
) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    """Divide examples into (kept, set aside): whole databases drawn with the seed until `fraction` is reached, or questions."""
    wanted = round(fraction * len(examples))
    if not wanted:
        return examples, ()
    by_database = Counter(example.db_id for example in examples)
    split_by = config.data.split_by or ("database" if len(by_database) > 1 else "question")
    generator = random.Random(f"{config.seed}-{name}")
    if split_by == "question":
        chosen = set(generator.sample(range(len(examples)), wanted))
        aside = [index in chosen for index in range(len(examples))]
    else:
        if len(by_database) < 2:
            raise DataError(
                f"--data.split_by database: all {len(examples)} examples are on one database ({_some(by_database)}), so none "
                "can be set aside whole; use --data.split_by question"
            )
        order = sorted(by_database)
        generator.shuffle(order)
        held: set[str] = set()
        while sum(by_database[db_id] for db_id in held) < wanted and len(held) < len(order) - 1:
            held.add(order[len(held)])
        aside = [example.db_id in held for example in examples]
    kept = tuple(example for example, out in zip(examples, aside, strict=True) if not out)
    return kept, tuple(example for example, out in zip(examples, aside, strict=True) if out)


def _asked(example: Example) -> tuple[str, str]:
    return example.db_id, " ".join(example.question.lower().split())
