"""Find the query that was meant, for one that does not run: nearest names, the dialect's words.

Whatever is proposed was executed. Where nothing runs, the nearest name is given as a hint.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import sqlglot
from sqlglot.errors import ErrorLevel, SqlglotError

from ray_sql.curate.audit import Subject
from ray_sql.data.corpus import join_some
from ray_sql.data.repair import nearest, repair_sql
from ray_sql.database import MOST_ANALYSED, MOST_NODES, OVER_LIMITS, Executor
from ray_sql.errors import RaySqlError

OTHERS = ("tsql", "mysql", "postgres", "oracle", "snowflake", "bigquery", "sqlite")
"""Dialects in which a query may have been written, as sqlglot names them."""
_CURLED = str.maketrans({"“": '"', "”": '"', "„": '"', "‘": "'", "’": "'", "\xa0": " ", "–": "-"})
_MISSING = re.compile(
    r"no such (?P<what>table|column): (?:relation |column )?[\"']?(?:\w+\.)?(?P<name>[\w ]+?)[\"']?"
    r"(?: does not exist.*)?"
)


@dataclass(frozen=True)
class Fix:
    """A way out for a query that does not run.

    `sql` runs, and is "" for a mere hint. `is_clear` says that nothing else was as near.
    """

    how: str
    sql: str = ""
    is_clear: bool = False


def find(executor: Executor, subject: Subject, error: str) -> Fix | None:
    """Return the nearest query that runs, or a hint; None where there is none.

    A query that took too much is not looked at: each proposal would take as much.
    """
    if error.startswith(OVER_LIMITS):
        return None
    running: dict[str, str] = {}
    results, seen = [], {subject.sql}
    for how, sql in _proposals(subject):
        if sql in seen:
            continue
        seen.add(sql)
        result = executor.run(subject.database, sql)
        if result.status == "ok":
            running[sql] = how
            results.append(result.rows)
            if how in ("quotes", "names"):
                break
    if running:
        sql, how = next(iter(running.items()))
        return Fix(how, sql, all(rows == results[0] for rows in results))
    return _hint(subject, error)


def _proposals(subject: Subject) -> Iterator[tuple[str, str]]:
    """Yield (how, query) in the order of how little each changes."""
    straight = subject.sql.translate(_CURLED)
    yield "quotes", straight
    mended = _mended(straight, subject)
    yield "names", mended
    if len(straight) > MOST_ANALYSED:
        return
    for other in OTHERS:
        if other != subject.dialect:
            for written in _translated(straight, other, subject.dialect):
                yield f"written for {other}", written
                yield f"written for {other}, names", _mended(written, subject)


def _mended(sql: str, subject: Subject) -> str:
    try:
        return repair_sql(sql, subject.schema, subject.dialect)
    except (SqlglotError, RaySqlError):
        return sql


def _translated(sql: str, read: str, write: str) -> list[str]:
    try:
        found = sqlglot.parse(sql, read=read, max_nodes=MOST_NODES)
        if len(found) != 1 or found[0] is None:
            return []
        return [found[0].sql(dialect=write, unsupported_level=ErrorLevel.IGNORE)]
    except (SqlglotError, RecursionError, ValueError):
        return []


def _hint(subject: Subject, error: str) -> Fix | None:
    """Return the nearest name to one that an error names."""
    missing = _MISSING.match(error)
    if not missing:
        return None
    what, name = missing.group("what", "name")
    names = list(subject.schema.table_names)
    if what == "column":
        tables = subject.schema.tables
        names = sorted({column for table in tables for column in table.column_names})
    near = nearest(name, names)
    if near is None:
        return Fix(f"no {what} has a name like it; there are {join_some(names)}")
    return Fix(f"did you mean {near}?")
