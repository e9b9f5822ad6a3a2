"""Schemas that rows bring as text: their statements, a `Schema` of them, and a database of them.

The text is anybody's. Its CREATE TABLE, CREATE VIEW and INSERT statements are executed in a child
process of the executor, in memory and under its limits. The bytes of the database come back and
are kept in the cache under a hash of the text.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sqlglot import exp, parse_one
from sqlglot.errors import SqlglotError

from ray_sql.data.corpus import Corpus, join_some
from ray_sql.database import MOST_NODES, MOST_SQL, Column, Executor, ForeignKey, Schema, Table
from ray_sql.store.storage import write_to_cache

CREATES = re.compile(r"\bcreate\s+(?:temp\w*\s+)?table\b", re.IGNORECASE)
_STARTS = re.compile(
    r"\bcreate\s+(?:temp(?:orary)?\s+)?(?:(?P<table>table)|view)\b|\binsert\s+into\b", re.IGNORECASE
)
_PIECE = re.compile(
    r"""'[^']*'|"[^"]*"|`[^`]*`|--[^\n]*|/\*.*?(?:\*/|\Z)|(?P<open>\()|(?P<close>\))|(?P<end>;)""",
    re.DOTALL,
)
_INSERTS = re.compile(r"\binsert\s+into\b", re.IGNORECASE)
MOST_PROCESSES = 4
MOST_TRAINED = 5_000
"""Texts of training examples that are built: a file of two pages each."""
_DIALECTS = ("sqlite", "mysql", "postgres", "tsql")

Span = tuple[int, int]


def statement_spans(text: str) -> list[Span]:
    """Return where the CREATE and INSERT statements of a text begin and end, in its order.

    A table ends with its closing bracket, for its semicolon is often missing. Other statements end
    at their semicolon, or with the last bracket before the next one.
    """
    spans: list[Span] = []
    while start := _STARTS.search(text, spans[-1][1] if spans else 0):
        spans.append((start.start(), _end(text, start)))
    return spans


def _end(text: str, start: re.Match[str]) -> int:
    depth, last = 0, start.end()
    for piece in _PIECE.finditer(text, start.end()):
        if piece["open"]:
            depth += 1
        elif piece["close"]:
            depth -= 1
            last = piece.end()
            if depth == 0 and start["table"]:
                return last
        elif piece["end"] and depth <= 0:
            return piece.end()
    return last if last > start.end() else len(text)


def script(text: str) -> str:
    """Return the statements of a text as one script; "" for a text without any."""
    statements = [text[start:end].rstrip("; \n") for start, end in statement_spans(text)]
    return "".join(f"{statement};\n" for statement in statements)


def read_schema(text: str, db_id: str) -> Schema | None:
    """Return the tables that a text creates; None where it creates none that can be read."""
    tables = []
    for start, end in statement_spans(text):
        tree = _create(text[start:end].rstrip("; \n"))
        if tree is not None and tree.args.get("kind") == "TABLE":
            tables.append(_table(tree))
    return Schema(db_id, _with_known_keys(tables)) if tables else None


def _create(statement: str) -> exp.Create | None:
    if len(statement) > MOST_SQL:
        return None
    for dialect in _DIALECTS:
        try:
            tree = parse_one(statement, read=dialect, max_nodes=MOST_NODES)
        except (SqlglotError, RecursionError):
            continue
        return tree if isinstance(tree, exp.Create) else None
    return None


def _table(tree: exp.Create) -> Table:
    """Return a CREATE TABLE statement as a table."""
    body = tree.this
    definitions = body.expressions if isinstance(body, exp.Schema) else []
    columns, primary = list[Column](), list[str]()
    for definition in definitions:
        if isinstance(definition, exp.ColumnDef):
            kind = definition.args.get("kind")
            columns.append(Column(definition.name, kind.sql() if kind else ""))
        for key in definition.find_all(exp.PrimaryKeyColumnConstraint, exp.PrimaryKey):
            primary += [part.name for part in key.expressions] or [definition.name]
    keys = [_foreign_key(reference) for reference in body.find_all(exp.Reference)]
    name = body.this.name if isinstance(body, exp.Schema) else body.name
    return Table(name, tuple(columns), tuple(primary), tuple(keys))


def _foreign_key(reference: exp.Reference) -> ForeignKey:
    """Return the key of a REFERENCES clause, of a column or of the table."""
    key = reference.find_ancestor(exp.ForeignKey, exp.ColumnDef)
    names = [key.name] if isinstance(key, exp.ColumnDef) else []
    if isinstance(key, exp.ForeignKey):
        names = [column.name for column in key.expressions]
    target = reference.this
    refs = tuple(column.name for column in target.expressions)
    return ForeignKey(tuple(names), target.this.name if refs else target.name, refs)


def _with_known_keys(tables: Sequence[Table]) -> tuple[Table, ...]:
    """Keep the foreign keys that lead to columns of the text's own tables."""
    schema = Schema("", tuple(tables))
    kept = []
    for table in tables:
        keys = []
        for key in table.foreign_keys:
            target = schema.table(key.ref_table)
            refs = key.ref_columns or (target.primary_key if target else ())
            if target and len(refs) == len(key.columns) and all(map(target.column, refs)):
                keys.append(ForeignKey(key.columns, target.name, refs))
        kept.append(replace(table, foreign_keys=tuple(keys)))
    return tuple(kept)


@dataclass(frozen=True)
class Built:
    """The database of a text: its SQLite file, or the reason why there is none."""

    file: str | None
    error: str = ""


def add_to(corpus: Corpus, cache: Path, finds_links: bool) -> Corpus:
    """Return the corpus with a schema and a database for each text that its examples bring.

    A database of the data comes before a text. Texts of `train` alone are built up to
    `MOST_TRAINED`, for only their gold runs there, and read beyond that if links are found in them.
    A text without rows makes an empty database.
    """
    texts: dict[str, dict[str, None]] = {}
    scored = set()
    for split, examples in corpus.splits.items():
        for example in examples:
            if example.schema_text and example.db_id not in corpus.databases:
                texts.setdefault(example.db_id, {})[example.schema_text] = None
                scored |= {example.db_id} if split != "train" else set()
    single = {db_id: next(iter(found)) for db_id, found in texts.items() if len(found) == 1}
    worth = single.keys() if len(single.keys() - scored) <= MOST_TRAINED else single.keys() & scored
    read = {
        db_id: read_schema(text, db_id)
        for db_id, text in single.items()
        if finds_links or db_id in worth
    }
    schemas = {db_id: schema for db_id, schema in read.items() if schema}
    built = build({single[db_id] for db_id in worth if db_id in schemas}, cache)
    files = {db_id: built[single[db_id]] for db_id in worth if db_id in schemas}
    return replace(
        corpus,
        schemas=schemas | corpus.schemas,
        databases={db_id: one.file for db_id, one in files.items() if one.file} | corpus.databases,
        empty=corpus.empty | {db_id for db_id in files if not _INSERTS.search(single[db_id])},
        notes=corpus.notes + tuple(_notes(texts, len(read) - len(schemas), files)),
    )


def _notes(
    texts: Mapping[str, Collection[str]], unread: int, files: Mapping[str, Built]
) -> Iterator[str]:
    """Say what the texts are good for, where it is less than all."""
    several = [db_id for db_id, found in texts.items() if len(found) > 1]
    if several:
        yield (
            f"{len(several)} of {len(texts)} databases have several schema texts "
            f"({join_some(several)}): no links are found in them, and nothing is executed"
        )
    if unread:
        yield f"{unread} of {len(texts)} schema texts have no CREATE TABLE that can be read"
    failed = [one.error for one in files.values() if one.error]
    if failed:
        yield f"{len(failed)} of {len(texts)} schema texts do not run, the first: {failed[0]}"


def build(texts: Iterable[str], cache: Path) -> dict[str, Built]:
    """Return text → the database of its statements, made only where the cache has none."""
    files = {text: _file(text, cache) for text in texts}
    missing = [text for text, file in files.items() if not file.exists()]
    errors: dict[str, str] = {}
    if missing:
        with Executor(min(MOST_PROCESSES, os.cpu_count() or 1)) as executor:
            results = executor.map(executor.build, [script(text) for text in missing])
        for text, result in zip(missing, results, strict=True):
            if result.status != "ok":
                errors[text] = result.error or result.status
                continue
            with write_to_cache(files[text]) as part:
                part.write_bytes(result.rows[0][0])
    return {
        text: Built(None, errors[text]) if text in errors else Built(str(file))
        for text, file in files.items()
    }


def is_built(place: str, cache: Path) -> bool:
    """Tell a database that was made of a schema's text from one that was given."""
    return Path(place).is_relative_to(_folder(cache))


def _folder(cache: Path) -> Path:
    return cache / "schema_texts"


def _file(text: str, cache: Path) -> Path:
    digest = hashlib.sha256(script(text).encode()).hexdigest()[:24]
    return _folder(cache) / digest[:2] / f"{digest}.sqlite"
