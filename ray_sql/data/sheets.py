"""Read Excel's files (.xlsx) as tables: sheets, rows and the names of columns."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Callable, Iterator, Sequence
from datetime import date, datetime, time
from itertools import islice
from pathlib import Path
from typing import Any

from ray_sql.config import files
from ray_sql.data.tables import TableRow, column_names
from ray_sql.errors import DamagedFile, DataError

MOST_ROWS = 1_000_000
"""Rows of a sheet that are read: Excel itself holds no more."""
TITLE_ROWS = 20
"""Rows in which the names of columns are looked for, below a title."""

QUERY = re.compile(r"\W*(?:select|with)\b.*\bfrom\b", re.IGNORECASE | re.DOTALL)

Say = Callable[[str], None]


def read(path: Path, say: Say) -> dict[str, list[TableRow]]:
    """Return sheet → its rows, for the sheets that hold a table; `line` is Excel's row number.

    Hidden sheets are left aside, and said.

    Raises:
        DataError: openpyxl is missing, or the file is none of Excel's.
    """
    try:
        from openpyxl import load_workbook
    except ModuleNotFoundError:
        raise DataError(
            f"{path}: reading Excel's files needs openpyxl: pip install -e '.[excel]', or save the "
            "sheet as CSV"
        ) from None
    _check_size(path)
    try:
        book = load_workbook(path, read_only=True, data_only=True)
        hidden = [sheet.title for sheet in book.worksheets if sheet.sheet_state != "visible"]
        found = {
            sheet.title: list(_rows(path, sheet.iter_rows(values_only=True)))
            for sheet in book.worksheets
            if sheet.title not in hidden
        }
        book.close()
    # openpyxl passes on whatever its parsers raise over a damaged file
    except (OSError, KeyError, ValueError, TypeError, AttributeError, IndexError) as error:
        raise _unreadable(path, f"{type(error).__name__}: {error}") from None
    except Exception as error:
        if type(error).__module__.split(".")[0] in ("openpyxl", "xml", "zipfile", "zlib"):
            raise _unreadable(path, str(error)) from None
        raise
    if hidden:
        say(f"{path.name}: hidden sheets are not read: {', '.join(hidden)}")
    return {title: rows for title, rows in found.items() if rows}


def _check_size(path: Path) -> None:
    """Raise `DamagedFile` for no archive, or for one that memory would not hold unpacked."""
    try:
        files.read_bytes(path)
        with zipfile.ZipFile(path) as archive:
            size = sum(part.file_size for part in archive.infolist())
    except (OSError, zipfile.BadZipFile) as error:
        raise _unreadable(path, str(error)) from None
    if size > files.LARGEST:
        raise DamagedFile(f"{path}: unpacks to {size:,} bytes, over {files.LARGEST:,}; divide it")


def _unreadable(path: Path, reason: str) -> DamagedFile:
    short = " ".join(reason.split())[:200]
    return DamagedFile(
        f"{path}: cannot be read as an Excel file ({short}); save it anew as .xlsx, or as CSV"
    )


def _rows(path: Path, rows: Iterator[Sequence[Any]]) -> Iterator[TableRow]:
    """Yield the rows below the one that names the columns."""
    texts = [[_text(cell) for cell in cells] for cells in islice(rows, MOST_ROWS + 1)]
    if len(texts) > MOST_ROWS:
        raise DataError(f"{path}: has more than {MOST_ROWS:,} rows; divide it")
    head = _head(texts)
    if head is None:
        return
    names = column_names(path, texts[head])
    for line, cells in enumerate(texts[head + 1 :], head + 2):
        if any(cells):
            yield TableRow(line, dict(zip(names, cells, strict=False)))


def _head(rows: Sequence[Sequence[str]]) -> int | None:
    """Return the place of the row that names two columns or more, below titles.

    Where a query comes below, that is the first row that names the query's column.
    """
    heads = [place for place, cells in enumerate(rows[:TITLE_ROWS]) if sum(map(bool, cells)) > 1]
    queries = (
        (place, column)
        for place, cells in enumerate(rows)
        for column, cell in enumerate(cells)
        if is_query(cell)
    )
    first, column = next(queries, (len(rows), 0))
    named = (place for place in heads if place < first and any(rows[place][column : column + 1]))
    return next(named, next(iter(heads), None))


def is_query(text: str) -> bool:
    """Tell whether a cell looks like a query, right or wrong."""
    return QUERY.match(text) is not None


def _text(cell: Any) -> str:
    """Return a cell as text, as CSV would hold it; dates in ISO form."""
    if cell is None:
        return ""
    if isinstance(cell, datetime) and cell.time() == time():
        cell = cell.date()
    if isinstance(cell, date | time):
        return cell.isoformat()
    return str(cell).replace("_x000D_", "").replace("\r\n", "\n").strip()
