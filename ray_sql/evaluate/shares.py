"""Shares of questions with their intervals, as `metrics.json` keeps them."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

from ray_sql.metrics import clustered_interval, wilson_interval
from ray_sql.metrics.judged import JudgedRow

NAMED = 20
"""Left-out questions that `metrics.json` names at most; `predictions.jsonl` has them all."""


def share(part: float, total: int) -> float:
    """Return `part` of `total` between 0 and 1; 0 of nothing."""
    return part / total if total else 0.0


def interval(part: int, total: int) -> list[float]:
    """Return Wilson's 95 % interval of a share, as [low, high]."""
    bounds = wilson_interval(part, total)
    return [bounds.low, bounds.high]


def clustered(rows: Sequence[JudgedRow], values: Sequence[float]) -> dict[str, list[float]]:
    """Return the 95 % interval of the rows' mean value, resampling whole databases.

    Empty where there are no two databases that differ.
    """
    groups: dict[str, list[float]] = defaultdict(list)
    for row, value in zip(rows, values, strict=True):
        groups[row["db_id"]].append(value)
    bounds = clustered_interval([(sum(group), len(group)) for _, group in sorted(groups.items())])
    return {"clustered_interval": [bounds.low, bounds.high]} if bounds else {}


def resampled(name: str, ratios: Sequence[tuple[float, int]]) -> dict[str, list[float]]:
    """Return the 95 % interval of a mean or ratio, from one (part, total) per question.

    Where all questions agree, there is nothing to resample. The interval is then Wilson's, of as
    many questions with the mean rounded to whole ones.
    """
    bounds = clustered_interval(ratios)
    if bounds:
        return {f"{name}_interval": [bounds.low, bounds.high]}
    counted = [(part, total) for part, total in ratios if total]
    mean = share(sum(part for part, _ in counted), sum(total for _, total in counted))
    low, high = interval(round(min(mean, 1) * len(counted)), len(counted))
    return {f"{name}_interval": [min(low, mean), max(high, mean)]}


def without_gold_errors(rows: Sequence[JudgedRow]) -> list[JudgedRow]:
    """Return the rows that count: those whose gold could be judged against."""
    return [row for row in rows if row["verdict"] != "gold_error"]


def gold_counts(rows: Sequence[JudgedRow]) -> dict[str, Any]:
    """Count the rows that are left out for their gold, those over a limit apart, and name some."""
    left_out = [row for row in rows if row["verdict"] == "gold_error"]
    over = sum(row["error_kind"] == "gold over a limit" for row in left_out)
    counts: dict[str, Any] = {"gold_errors": len(left_out)}
    if over:
        counts["gold_over_limits"] = over
    if left_out:
        counts["gold_left_out"] = [
            {name: row.get(name) for name in ("id", "error")} for row in left_out[:NAMED]
        ]
    return counts


def error_counts(rows: Sequence[JudgedRow]) -> dict[str, int]:
    """Count the kinds of error, the most frequent first."""
    kinds = Counter(row["error_kind"] for row in rows if row["verdict"] != "correct")
    return dict(kinds.most_common())
