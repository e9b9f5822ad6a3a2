"""Replies as the JSON that the service and `ray-sql ask --json` write."""

from __future__ import annotations

import json
import math
from typing import Any

from ray_sql.database import QueryResult
from ray_sql.serve.engine import Reply
from ray_sql.tasks import Task


def reply(answered: Reply, result: QueryResult | None, task: Task, model: str) -> dict[str, Any]:
    """Return a reply, with the rows of its query where it was run."""
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
        body |= rows(result)
        timings["query_seconds"] = round(result.seconds, 3)
    if answered.candidates:
        body |= {"chosen_by": answered.chosen_by, "candidates": answered.candidates}
    return body | {"timings": timings, "warnings": warnings}


def rows(result: QueryResult) -> dict[str, Any]:
    """Return the columns and rows of a result, or its error."""
    if result.status != "ok":
        return {"error": result.error}
    return {
        "columns": list(result.columns),
        "rows": [[cell(value) for value in row] for row in result.rows],
    }


def cell(value: Any) -> Any:
    """Return a cell as JSON has it: bytes as hex digits, infinity as text."""
    if isinstance(value, bytes):
        return f"0x{value.hex()}"
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
