"""Shares of questions with their intervals, as `metrics.json` keeps them."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

from ray_sql.metrics import clustered_interval, wilson_interval
from ray_sql.metrics.judged import JudgedRow


def share(part: int, total: int) -> float:
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
    """Return the 95 % interval of a mean or ratio, from one (part, total) per question."""
    bounds = clustered_interval(ratios)
    return {f"{name}_interval": [bounds.low, bounds.high]} if bounds else {}


def without_gold_errors(rows: Sequence[JudgedRow]) -> list[JudgedRow]:
    """Return the rows that count: those whose gold could be judged against."""
    return [row for row in rows if row["verdict"] != "gold_error"]


def error_counts(rows: Sequence[JudgedRow]) -> dict[str, int]:
    """Count the kinds of error, the most frequent first."""
    kinds = Counter(row["error_kind"] for row in rows if row["verdict"] != "correct")
    return dict(kinds.most_common())
