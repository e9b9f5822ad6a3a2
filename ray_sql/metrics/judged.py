"""Judged questions, the rows of `predictions.jsonl`: count them as right, and group them."""

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

    A correct answer counts. In schema linking, an answer with spare names beside all of gold counts
    too (strict recall).
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
