"""Read CSV and TSV as people's programs write them.

They differ in the mark between values, in Excel's line above the names, and in quotes. In CSV a
value may stand in quotes, and a quote in it is written twice. A file of tabs is often written
without any such rule.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ray_sql.errors import DataError

_MARKS = ",;\t"
_EXCEL = re.compile(r"\s*\"?sep=.\"?\s*")
"""Excel's own first line, which names the mark."""


@dataclass(frozen=True)
class TableRow:
    """A row by the names of its columns; `fault` says why it cannot be used.

    `line` is where it begins, for a value in quotes may hold line breaks.
    """

    line: int
    values: dict[str, str]
    fault: str = ""


def read(path: Path, text: str) -> list[TableRow]:
    """Return the rows of a table; its first line, divided by the mark it has most of, names them.

    Raises:
        DataError: two columns have the same name, or a quote takes in several lines and does not
            end there.
    """
    lines = text.split("\n", 1)
    skipped = int(len(lines) == 2 and bool(_EXCEL.fullmatch(lines[0])))
    text = "\n".join(lines[skipped:])
    header = re.sub('"[^"]*"', "", text.partition("\n")[0])
    mark = max(_MARKS, key=header.count)
    if mark != "\t":
        return list(_rows(path, text, mark, skipped))
    try:
        quoted = list(_rows(path, text, mark, skipped))
    except DataError:
        return list(_rows(path, text, mark, skipped, csv.QUOTE_NONE))
    if not any(row.fault for row in quoted):
        return quoted
    plain = list(_rows(path, text, mark, skipped, csv.QUOTE_NONE))
    return min(quoted, plain, key=lambda rows: sum(bool(row.fault) for row in rows))


def _rows(
    path: Path, text: str, mark: str, skipped: int, quoting: Literal[0, 3] = csv.QUOTE_MINIMAL
) -> Iterator[TableRow]:
    csv.field_size_limit(max(csv.field_size_limit(), len(text) + 1))  # of the whole process
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=mark, quoting=quoting, strict=True)
    names: list[str] | None = None
    while True:
        line, before = reader.line_num + 1 + skipped, reader.line_num
        fault = ""
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if names is None or reader.line_num > before + 1:
                raise DataError(
                    f"{path}, line {line}: a quote that opens there does not end the value where "
                    f"it closes ({error}); write a quote inside a value twice, and put the value "
                    "in quotes"
                ) from None
            fields, fault = [], f"is no row of the table ({error}); write a quote in it twice"
        if names is None:
            names = column_names(path, fields)
            continue
        if not fault and not (fields if len(names) == 1 else any(map(str.strip, fields))):
            continue
        if not fault and len(fields) != len(names):
            fault = (
                f"has {len(fields)} fields where the first line has {len(names)}: a value with "
                f"{mark!r} in it needs double quotes"
            )
        yield TableRow(line, dict(zip(names, fields, strict=False)), fault)


def column_names(path: Path, fields: list[str]) -> list[str]:
    """Return the names of the columns; those without a name hold what nobody asks for.

    Raises `DataError` where two columns have the same name.
    """
    names = [name.strip() for name in fields]
    twice = next((name for name in names if name and names.count(name) > 1), None)
    if twice:
        raise DataError(f"{path}: column {twice!r} is there twice; rename or remove one of them")
    return names
