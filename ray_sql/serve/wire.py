"""Replies as the JSON that the service and `ray-sql ask --json` write."""

from __future__ import annotations

import json
import math
from typing import Any

from ray_sql.database import QueryResult, Table
from ray_sql.serve.databases import Database
from ray_sql.serve.engine import Reply
from ray_sql.tasks import Task


def reply(
    answered: Reply, result: QueryResult | None, task: Task, model: str, most: int | None = None
) -> dict[str, Any]:
    """Return a reply; where its query was run, with its rows, of which `most` are sent."""
    body: dict[str, Any] = {"database": answered.database, "model": model}
    if task.executes_sql:
        body["sql"] = answered.predicted
    else:
        body["links"] = json.loads(answered.predicted or "null")
    warnings = list(answered.warnings)
    timings = {"answer_seconds": round(answered.seconds, 3)}
    if answered.predicted is None:
        warnings.append(f"the answer holds no {'SQL' if task.executes_sql else 'links'}")
    if result is not None:
        body |= rows(result, most)
        timings["query_seconds"] = round(result.seconds, 3)
    if answered.shown is not None:
        body["shown"] = answered.shown
    if answered.candidates:
        body |= {"chosen_by": answered.chosen_by, "candidates": answered.candidates}
    return body | {"timings": timings, "warnings": warnings}


def rows(result: QueryResult, most: int | None = None) -> dict[str, Any]:
    """Return the columns of a result, `most` of its rows, and their number; or its error."""
    if result.status != "ok":
        return {"error": result.error}
    return {
        "columns": list(result.columns),
        "rows": [[cell(value) for value in row] for row in result.rows[:most]],
        "row_count": len(result.rows),
    }


def schema(database: Database) -> dict[str, Any]:
    """Return a database as people look at it."""
    return {
        "name": database.name,
        "dialect": database.schema.dialect,
        "runs": database.place is not None,
        "tables": [_table(table) for table in database.schema.tables],
        "left_out": list(database.schema.left_out),
    }


def _table(table: Table) -> dict[str, Any]:
    return {
        "name": table.name,
        "is_view": table.is_view,
        "columns": [
            {
                "name": column.name,
                "type": column.type,
                "primary_key": column.name in table.primary_key,
                "references": _references(table, column.name),
            }
            for column in table.columns
        ],
    }


def _references(table: Table, column: str) -> list[str]:
    """Return the columns that a column refers to, as `table.column`."""
    return [
        f"{key.ref_table}.{target}"
        for key in table.foreign_keys
        for own, target in zip(key.columns, key.ref_columns, strict=True)
        if own == column
    ]


def cell(value: Any) -> Any:
    """Return a cell as JSON has it: bytes as hex digits, infinity as text."""
    if isinstance(value, bytes):
        return f"0x{value.hex()}"
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
