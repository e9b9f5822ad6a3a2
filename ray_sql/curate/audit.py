"""Judge a query by running it: does its result say what it is asked, and is it the only one?

A gold query that is open counts against every model. `examine` finds out by tests, not by words.
The query runs on copies of its database with rows and indexes in another order, and its sort keys
are looked at. Words decide only where nothing can be run: clock, random, and columns selected
twice.
"""

from __future__ import annotations

import math
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from sqlglot import exp

from ray_sql.curate import parsed
from ray_sql.curate.flags import Flag
from ray_sql.curate.reordered import Copies, copies
from ray_sql.data.linking import sqlglot_dialect
from ray_sql.database import Executor, Place, QueryResult, ResultRow, Rows, Schema
from ray_sql.database.pool import Progress

MOST_SORTED = 1000
"""Rows that are looked at to judge an order."""
COPY_SECONDS = 5.0
"""Seconds for a query on a copy, beyond ten times as long as it took before."""
MISSING = frozenset(("", "-", "--", "?", ".", "null", "none", "nan", "na", "n/a", "unknown"))
"""Texts that stand for a missing number."""
NUMBER = re.compile(r"\s*[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?\s*")


@dataclass(frozen=True)
class Subject:
    """A query to be judged, and its database with its schema."""

    database: Place
    sql: str
    schema: Schema

    @property
    def dialect(self) -> str:
        """The dialect as sqlglot names it."""
        return sqlglot_dialect(self.schema.dialect)


@dataclass(frozen=True)
class Bench:
    """The executor and the copies, by database, that queries are tried on."""

    executor: Executor
    copies: Mapping[str, Copies] = field(default_factory=dict)

    def copies_of(self, database: Place) -> Copies:
        """Return the copies of a database; none of one on a server."""
        return self.copies.get(str(database), Copies())


@contextmanager
def bench(executor: Executor, databases: Sequence[Place], progress: Progress) -> Iterator[Bench]:
    """Yield the databases' copies, in a temporary folder that is removed at the end."""
    files = [place for place in dict.fromkeys(map(str, databases)) if "://" not in place]
    with tempfile.TemporaryDirectory(prefix="ray_sql-audit-") as scratch:
        made = {}
        for number, file in enumerate(files):
            folder = Path(scratch) / str(number)
            folder.mkdir()
            made[file] = copies(Path(file), folder)
            progress(number + 1, len(files))
        yield Bench(executor, made)


def examine_all(
    bench: Bench, subjects: Sequence[Subject], progress: Progress | None = None
) -> list[list[Flag]]:
    """Return the flags of each query, in their order."""
    return bench.executor.map(lambda subject: examine(bench, subject), subjects, progress)


def examine(bench: Bench, subject: Subject) -> list[Flag]:
    """Return what is to be said against a query; nothing for a sound one."""
    result = bench.executor.run(subject.database, subject.sql)
    if result.status != "ok":
        return [Flag("does_not_run", result.error or result.status)]
    query = parsed.tree(subject.sql, subject.dialect)
    flags = [*_empty(bench, subject, query, result), *_twice(query, result)]
    if parsed.reads_clock(subject.sql):
        return [*flags, Flag("clock", "reads the clock, or draws at random")]
    flags += _by_keys(bench, subject, query)
    if not any(flag.kind == "limit_tie" for flag in flags):
        flags += _by_order(bench, subject, query, result)
    flags += _text_compared(bench, subject, query)
    by_kind = {flag.kind: flag for flag in reversed(flags)}
    return list(reversed(by_kind.values()))


def _empty(
    bench: Bench, subject: Subject, query: exp.Query | None, result: QueryResult
) -> Iterator[Flag]:
    cells = [cell for row in result.rows for cell in row]
    if not result.rows:
        yield Flag("empty", "gives no row")
    elif all(cell is None for cell in cells):
        yield Flag("empty", "gives nothing but NULL")
    elif query is not None and not query.find(exp.Table):
        yield Flag("constant", "reads no table")
    else:
        empty = bench.copies_of(subject.database).empty
        if empty is not None and not parsed.names_rows(subject.sql):
            without = bench.executor.run(empty, subject.sql)
            if without.status == "ok" and without.rows == result.rows:
                yield Flag("constant", f"gives {_short(result.rows[0])} on empty tables too")


def _twice(query: exp.Query | None, result: QueryResult) -> Iterator[Flag]:
    twice = parsed.selected_twice(query) if query is not None else None
    if twice is None and len(result.rows) > 1:
        columns = list(zip(result.columns, zip(*result.rows, strict=True), strict=True))
        alike = [
            name for place, (name, cells) in enumerate(columns) if (name, cells) in columns[:place]
        ]
        twice = alike[0] if alike else None
    if twice is not None:
        yield Flag("duplicate_columns", f"selects {twice} twice")


# Rows in another order


def _by_order(
    bench: Bench, subject: Subject, query: exp.Query | None, result: QueryResult
) -> Iterator[Flag]:
    """Yield how the result changes where rows and indexes come in another order."""
    is_sorted = query is not None and parsed.is_sorted(query)
    may_cut = query is not None and not _cuts_no_tie(bench, subject, query)
    for other, how in _runs(bench, subject, result):
        if other.rows == result.rows:
            continue
        if _bag(other.rows) == _bag(result.rows):
            if is_sorted:
                yield Flag("tie_order", f"with {how}, equal rows come in another order")
        elif _same_but_digits(other.rows, result.rows):
            yield Flag("float_sum", f"with {how}, fractions differ in their last digits")
        elif may_cut:
            yield Flag("limit_tie", f"with {how}, LIMIT leaves other rows: {_apart(result, other)}")
        else:
            yield Flag(
                "row_order", f"with {how}, the result is another one: {_apart(result, other)}"
            )


def _runs(bench: Bench, subject: Subject, result: QueryResult) -> Iterator[tuple[QueryResult, str]]:
    """Yield the results in other orders that could be had, and how each was."""
    if subject.schema.dialect != "sqlite":
        return
    executor, limits = bench.executor, bench.executor.limits
    seconds = min(limits.seconds, COPY_SECONDS + 10 * result.seconds)
    short = replace(limits, seconds=seconds)
    runs = [(subject.database, replace(short, reverse=True), "rows read in reverse")]
    if not parsed.names_rows(subject.sql):
        found = bench.copies_of(subject.database)
        runs += [(copy, short, f"rows {copy.stem}") for copy in found.reordered]
    for database, limit, how in runs:
        other = executor.run(database, subject.sql, limit)
        if other.status == "ok":
            yield other, how


def _bag(rows: Rows) -> list[tuple[str, ...]]:
    return sorted(tuple(map(repr, row)) for row in rows)


def _same_but_digits(left: Rows, right: Rows) -> bool:
    """Tell whether rows are the same but for the last digits of fractions."""
    if len(left) != len(right):
        return False
    pairs = zip(sorted(left, key=_rounded), sorted(right, key=_rounded), strict=True)
    return all(all(map(_near, a, b)) for a, b in pairs)


def _rounded(row: ResultRow) -> tuple[str, ...]:
    return tuple(f"{cell:.6g}" if isinstance(cell, float) else repr(cell) for cell in row)


def _near(left: Any, right: Any) -> bool:
    if isinstance(left, float) and isinstance(right, float):
        return math.isclose(left, right, rel_tol=1e-6, abs_tol=1e-9)
    return bool(left == right)


def _apart(one: QueryResult, other: QueryResult) -> str:
    """Show the first row in which two results differ."""
    known = set(map(repr, other.rows))
    mine = [row for row in one.rows if repr(row) not in known]
    known = set(map(repr, one.rows))
    theirs = [row for row in other.rows if repr(row) not in known]
    shown = [_short(rows[0]) for rows in (mine, theirs) if rows]
    return " or ".join(shown) or f"{len(one.rows)} rows or {len(other.rows)}"


def _short(row: ResultRow) -> str:
    text = ", ".join("NULL" if cell is None else str(cell) for cell in row)
    return text if len(text) <= 60 else f"{text[:60]}…"


# What a query sorts by


def _by_keys(bench: Bench, subject: Subject, query: exp.Query | None) -> Iterator[Flag]:
    """Yield ties that LIMIT cuts, NULL in front, and text that should sort as numbers."""
    if query is None:
        return
    for sort in parsed.sorts(query, subject.dialect, MOST_SORTED):
        result = bench.executor.run(subject.database, sort.sql)
        if result.status != "ok" or not result.rows:
            continue
        tied = _cut_tie(sort, result.rows)
        if tied is not None and (sort.is_whole or _matters(bench, subject, sort)):
            yield Flag("limit_tie", f"{len(tied)} rows have one key, as {_short(tied[0])}")
        elif sort.is_whole and subject.schema.dialect != "sqlite":  # files are tried, by copies
            for row in _tied_in_order(sort, result.rows)[:1]:
                yield Flag("tie_order", f"rows with equal keys may change places, as {_short(row)}")
        first = [row[sort.keys[0]] for row in result.rows]
        if first[0] is None and any(value is not None for value in first):
            yield Flag("nulls_first", f"{first.count(None)} rows with NULL come first")
        if _sorts_wrongly(first):
            shown = next(value for value in first if value and NUMBER.fullmatch(value))
            yield Flag("text_numbers", f"sorts by text such as {shown!r}")


def _cut_tie(sort: parsed.Sorted, rows: Rows) -> list[ResultRow] | None:
    """Return rows that share a key which LIMIT or OFFSET cuts, if it matters which are kept."""
    keys = _keys(sort, rows)
    cuts = (sort.offset, sort.offset + sort.limit) if sort.limit else ()
    for cut in cuts:
        if 0 < cut < len(rows) and keys[cut - 1] == keys[cut]:
            tied = [
                row[: sort.width] for row, key in zip(rows, keys, strict=True) if key == keys[cut]
            ]
            if len(set(map(repr, tied))) > 1:
                return tied
    return None


def _tied_in_order(sort: parsed.Sorted, rows: Rows) -> list[ResultRow]:
    """Return the rows of a result that have the key of the row before, and are not like it."""
    kept = slice(sort.offset, sort.offset + sort.limit if sort.limit is not None else None)
    shown = [(key, row[: sort.width]) for key, row in zip(_keys(sort, rows), rows, strict=True)]
    pairs = pairwise(shown[kept])
    return [row for (key, before), (other, row) in pairs if key == other and before != row]


def _keys(sort: parsed.Sorted, rows: Rows) -> list[tuple[Any, ...]]:
    return [tuple(row[place] for place in sort.keys) for row in rows]


def _matters(bench: Bench, subject: Subject, sort: parsed.Sorted) -> bool:
    """Tell whether the result changes with the rows that are kept of a tie inside the query.

    Where that cannot be tried, copies of a file tell it later, and a server's tie counts.
    """
    up, down = (bench.executor.run(subject.database, sql) for sql in sort.decided)
    if up.status != "ok" or down.status != "ok":
        return subject.schema.dialect != "sqlite"
    return _bag(up.rows) != _bag(down.rows)


def _cuts_no_tie(bench: Bench, subject: Subject, query: exp.Query) -> bool:
    """Tell whether no LIMIT of a query cuts a tie, as far as its keys show."""
    sorts = [one for one in parsed.sorts(query, subject.dialect, MOST_SORTED) if one.limit]
    found = [bench.executor.run(subject.database, one.sql) for one in sorts]
    return len(sorts) == parsed.limits(query) and all(
        one.status == "ok" and _cut_tie(sort, one.rows) is None
        for sort, one in zip(sorts, found, strict=True)
    )


def _sorts_wrongly(values: Sequence[Any]) -> bool:
    """Tell whether values are numbers as text, and sort otherwise than as numbers.

    Words for a missing number, such as `null`, are let pass.
    """
    known = {value for value in values if value is not None}
    if not all(isinstance(value, str) for value in known):
        return False
    known = {value for value in known if value.strip().lower() not in MISSING}
    if len(known) < 2 or not all(map(NUMBER.fullmatch, known)):
        return False
    return sorted(known) != sorted(known, key=float)


COMPARING = (exp.Min, exp.Max, exp.GT, exp.LT, exp.GTE, exp.LTE, exp.Between)


def _text_compared(bench: Bench, subject: Subject, query: exp.Query | None) -> Iterator[Flag]:
    """Yield columns of numbers stored as text whose smallest, largest or greater is asked for."""
    if query is None:
        return
    compared = dict.fromkeys(
        column for node in query.find_all(*COMPARING) for column in _compared(node)
    )
    for column in compared:
        table = _table_of(column, query, subject.schema)
        if table is None:
            continue
        name, source = (exp.to_identifier(part, quoted=True).sql(subject.dialect) for part in table)
        sql = f"SELECT DISTINCT {source} FROM {name} LIMIT {MOST_SORTED}"
        result = bench.executor.run(subject.database, sql)
        if result.status == "ok" and _sorts_wrongly([row[0] for row in result.rows]):
            yield Flag("text_numbers", f"{table[0]}.{table[1]} holds numbers as text")


def _compared(node: exp.Expr) -> Iterator[exp.Column]:
    """Yield the columns that are compared as they are, without a CAST."""
    for part in (node.this, node.args.get("expression")):
        other = node.args.get("expression") if part is node.this else node.this
        is_text = (
            isinstance(other, exp.Literal) and other.is_string and not NUMBER.fullmatch(other.this)
        )
        if isinstance(part, exp.Column) and not is_text:
            yield part


def _table_of(column: exp.Column, query: exp.Query, schema: Schema) -> tuple[str, str] | None:
    """Return the table and the column that a name means, where only one of the query's has it."""
    found = set()
    for source in query.find_all(exp.Table):
        table = schema.table(source.name)
        known = table.column(column.name) if table else None
        if table and known and column.table.lower() in ("", source.alias_or_name.lower()):
            found.add((table.name, known.name))
    return found.pop() if len(found) == 1 else None
