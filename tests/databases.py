"""Share what tests of every kind of database ask: hostile statements, kinds of errors, files."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from ray_sql.database import Executor, QueryResult
from ray_sql.metrics import Pair, classify_error, judge

ERROR_KINDS = {
    "SELECT nom FROM customer": "no such column",
    "SELECT name FROM client": "no such table",
    "SELECT name FRM customer x y": "syntax",
    "DROP TABLE customer": "refused",
    "SELECT name FROM customer WHERE id > 99": "empty",
    "SELECT DISTINCT name FROM customer": "none",
}
"""Queries on the shop, and the kinds of their errors where the names of all customers are asked."""


def error_kinds(executor: Executor, mall: Path | str, queries: Iterable[str]) -> dict[str, str]:
    """Return the kind of error of each query on a database of the shop."""
    pairs = [Pair(mall, "SELECT name FROM customer", sql) for sql in queries]
    return {
        pair.predicted: classify_error(judge(executor, pair, semantics="spider")) for pair in pairs
    }


def ends_as(result: QueryResult, outcome: str) -> bool:
    """Tell whether a statement gave no row, but one line: it is refused, stopped, or failed."""
    error = result.error or ""
    as_asked = {
        "refused": error.startswith("refused: "),
        "stopped": result.status == "timeout" or error.startswith("too large: "),
        "failed": result.status == "error",
    }
    return not result.rows and bool(error) and "\n" not in error and as_asked[outcome]


def hashes(folder: Path) -> dict[str, str]:
    """Return every file below a folder, and a hash of its bytes."""
    files = (path for path in folder.rglob("*") if not path.is_dir())
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
