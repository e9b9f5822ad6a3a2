"""Judged questions, the rows of `predictions.jsonl`: which count as right, and how they are grouped."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

HARDNESS = ("easy", "medium", "hard", "extra", "unknown")
"""Spider's levels, in the order that people read them."""

JudgedRow = dict[str, Any]
"""One question with its answer and verdict; docs/evaluation.md lists the fields."""


Evaluation = dict[str, list[JudgedRow]]
"""The judged rows of all splits by model: `base`, `default`, `tuned`, `merged` or `file`."""


def is_right(row: Mapping[str, Any]) -> bool:
    """Tell whether a judged row counts for its task's main score.

    That is a correct answer; in schema linking also one that has all of gold and spare names beside it (strict recall).
    """
    return bool(row["verdict"] == "correct" or row.get("error_kind") == "extra names")


def grouped(
    rows: Iterable[JudgedRow], key: str, order: Sequence[str] = ()
) -> dict[str, list[JudgedRow]]:
    """Group rows by a field: the groups named in `order` first, then the others by name."""
    groups: dict[str, list[JudgedRow]] = defaultdict(list)
    for row in rows:
        groups[str(row[key])].append(row)
    named = [name for name in order if name in groups]
    return {name: groups[name] for name in [*named, *sorted(set(groups) - set(named))]}
