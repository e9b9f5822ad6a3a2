"""Gold queries of one database in the SQL of another, kept where both give the same rows."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import sqlglot
from sqlglot.errors import ErrorLevel, SqlglotError

from ray_sql.data import databases
from ray_sql.data.corpus import Corpus, Example, LeftOut
from ray_sql.data.linking import sqlglot_dialect
from ray_sql.database import MOST_ANALYSED, MOST_NODES, Executor
from ray_sql.database.places import dialect_of
from ray_sql.errors import DataError
from ray_sql.metrics.match import is_ordered, spider_match


@dataclass(frozen=True)
class Translated:
    """A query before and after its translation."""

    split: str
    id: str
    before: str
    now: str


def translate(
    corpus: Corpus, source: str, executor: Executor
) -> tuple[Corpus, tuple[Translated, ...]]:
    """Return the corpus with each query as its database writes it, and what reads otherwise now.

    `source` is a file, a folder or a URL of the databases that the queries are written for. A query
    is left out, and named, where the two databases give other rows. Raises `DataError` where there
    is no source.
    """
    examples = [(split, one) for split, rows in corpus.splits.items() for one in rows]
    sources = _sources(source, {one.db_id for _, one in examples})
    written = executor.map(lambda row: _translated(row[1], corpus, sources, executor), examples)
    changed, left_out = list[Translated](), list(corpus.left_out)
    splits: dict[str, list[Example]] = {split: [] for split in corpus.splits}
    for (split, one), (sql, fault) in zip(examples, written, strict=True):
        if fault:
            left_out.append(LeftOut(split, one.id, one.place, f"not translated: {fault}"))
            continue
        splits[split].append(replace(one, gold=sql))
        if sql != one.gold:
            changed.append(Translated(split, one.id, one.gold, sql))
    kept = {split: tuple(rows) for split, rows in splits.items()}
    return replace(corpus, splits=kept, left_out=tuple(left_out)), tuple(changed)


def _sources(where: str, db_ids: Iterable[str]) -> dict[str, str]:
    """Return the database that the queries on each database are written for."""
    if "://" in where:
        return databases.on_server(where, db_ids)
    try:
        found = databases.find(where)
    except DataError as error:
        message = str(error).replace("--data.databases", "--translate_from")
        raise DataError(message) from None
    if len(found) == 1:
        return dict.fromkeys(db_ids, *found.values())
    return found


def _translated(
    example: Example, corpus: Corpus, sources: dict[str, str], executor: Executor
) -> tuple[str, str]:
    """Return the query as its database writes it, and why it cannot be used, if so."""
    source, target = sources.get(example.db_id), corpus.trial(example.db_id)
    if source is None or target is None:
        return "", f"database {example.db_id} is not at both places"
    if example.other_golds:
        return "", "has several queries"
    before = executor.run(source, example.gold)
    if before.status != "ok":
        return "", f"does not run where it is written for: {before.error}"
    sql = _written(example.gold, str(dialect_of(source)), str(dialect_of(target)))
    if sql is None:
        return "", "cannot be read"
    after = executor.run(target, sql)
    if after.status != "ok":
        return "", f"{after.error}, as {sql}"
    if not spider_match(before.rows, after.rows, ordered=is_ordered(example.gold)):
        return "", f"gives other rows, as {sql}"
    return sql, ""


def _written(sql: str, read: str, write: str) -> str | None:
    if read == write:
        return sql
    if len(sql) > MOST_ANALYSED:
        return None
    source, target = sqlglot_dialect(read), sqlglot_dialect(write)
    try:
        found = sqlglot.parse(sql, read=source, max_nodes=MOST_NODES)
        if len(found) != 1 or found[0] is None:
            return None
        return found[0].sql(dialect=target, unsupported_level=ErrorLevel.IGNORE)
    except (SqlglotError, RecursionError, ValueError):
        return None
