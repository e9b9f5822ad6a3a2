"""Example values of columns: the most frequent short ones, read in bounded time.

Queries run through an executor, as those of a model do. A generated column, or a view, may compute
for hours; it loses its examples, and is named.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from ray_sql.database.bounded import BoundedReader
from ray_sql.database.schema import Column, Schema, Table
from ray_sql.database.serialize import Names

EXAMPLE_ROWS = 10_000
"""Rows read for example values: a table's first ones, so that a large table costs no more."""

EXAMPLE_LENGTH = 40
"""Longest example value in characters: longer ones cost tokens, and no question quotes them."""

CELLS = {
    # No character takes more than four bytes. `length` would stop at a NUL.
    "sqlite": (
        "CASE WHEN typeof({0}) = 'blob' THEN NULL WHEN typeof({0}) <> 'text' "
        f"OR length(CAST({{0}} AS BLOB)) <= {4 * EXAMPLE_LENGTH} THEN {{0}} END"
    ),
    # Text, as the server writes it: Python has no date of `infinity`, and other words for `true`.
    "postgresql": f"left(({{0}})::text, {EXAMPLE_LENGTH + 1})",
    "duckdb": f"left(CAST({{0}} AS VARCHAR), {EXAMPLE_LENGTH + 1})",
    **dict.fromkeys(("mysql", "mariadb"), f"left(CAST({{0}} AS CHAR), {EXAMPLE_LENGTH + 1})"),
}
"""The value of a column in SQL, without what is too long to be an example."""
BYTES = ("BYTEA", "BLOB", "TINYBLOB", "MEDIUMBLOB", "LONGBLOB", "BINARY", "VARBINARY")
"""Types of bytes, which are never examples."""


def with_examples(schema: Schema, reader: BoundedReader, count: int) -> Schema:
    """Return the schema with at most `count` example values for each column."""
    names, left_out = Names(schema), list(schema.left_out)
    tables = [_with_values(table, names, reader, count, left_out) for table in schema.tables]
    return replace(schema, tables=tuple(tables), left_out=tuple(left_out))


def _with_values(
    table: Table, names: Names, reader: BoundedReader, count: int, left_out: list[str]
) -> Table:
    cell = CELLS[names.dialect]

    def query(columns: Sequence[Column]) -> str:
        cells = ", ".join(cell.format(names.quoted(column.name)) for column in columns)
        return f"SELECT {cells} FROM {names.table(table.name)} LIMIT {EXAMPLE_ROWS}"

    readable = [column for column in table.columns if column.type.upper() not in BYTES]
    examples: dict[str, tuple[str, ...]] = {}
    for columns, result in reader.run_on(readable, query) if readable else ():
        if result.status != "ok":
            left_out.append(f"{table.name}.{columns[0].name} has no example values: {result.error}")
        counters = count_examples(result.rows, len(columns))
        for column, counter in zip(columns, counters, strict=True):
            examples[column.name] = most_frequent(counter, count)
    return table_with(table, examples)


def table_with(table: Table, examples: dict[str, tuple[str, ...]]) -> Table:
    """Return the table with the examples of its columns."""
    columns = [replace(c, examples=examples.get(c.name, ())) for c in table.columns]
    return replace(table, columns=tuple(columns))


def count_examples(rows: Sequence[Sequence[object]], width: int) -> list[Counter[str]]:
    """Count for each column the values that may be examples."""
    counters: list[Counter[str]] = [Counter() for _ in range(width)]
    for row in rows:
        for counter, value in zip(counters, row, strict=True):
            if _is_example(value):
                counter[str(value)] += 1
    return counters


def _is_example(value: object) -> bool:
    if value is None or isinstance(value, (bytes, memoryview)):
        return False
    text = str(value)
    return 0 < len(text) <= EXAMPLE_LENGTH and text.isprintable()


def most_frequent(counter: Counter[str], count: int) -> tuple[str, ...]:
    """Sort by falling frequency, then by value: `Counter.most_common` leaves ties in row order."""
    return tuple(sorted(counter, key=lambda value: (-counter[value], value))[:count])
