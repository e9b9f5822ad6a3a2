"""Account for two stages: one generator's answers over full schemas, predicted links and gold ones.

A question is lost to linking where a name that its gold SQL needs is not in the prompt and the
answer is wrong. It is lost to generation where all names are there and the answer is wrong. It is
saved by linking where only the answer over the full schema is wrong.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from statistics import fmean
from typing import Any

from ray_sql.config.sections import LinkedForm
from ray_sql.data import linking
from ray_sql.data.shown import ORACLE
from ray_sql.database import Schema, restrict
from ray_sql.evaluate.shares import interval, share
from ray_sql.metrics.judged import JudgedRow, is_right
from ray_sql.metrics.linking import score_links
from ray_sql.metrics.paired import paired_test

FULL, PREDICTED, GOLD = "full schema", "predicted links", "oracle (gold links)"
"""The ways in which a generator is asked, as people read them."""
Key = tuple[str, str]


def account(
    answers: Mapping[str, Sequence[JudgedRow]], schemas: Mapping[str, Schema], form: LinkedForm
) -> dict[str, Any]:
    """Return the scores of each way, their paired tests, and what linking costs and saves.

    Only questions that were judged in all ways count.
    """
    by_way = {way: _counted(rows) for way, rows in answers.items()}
    keys = [key for key in by_way[FULL] if all(key in rows for rows in by_way.values())]
    right = {way: [is_right(rows[key]) for key in keys] for way, rows in by_way.items()}
    return {
        "n": len(keys),
        "ways": {way: _scores([by_way[way][key] for key in keys]) for way in by_way},
        "tests": {
            f"{a} / {b}": paired_test(zip(right[a], right[b], strict=True)).named("first", "second")
            for a, b in combinations(right, 2)
        },
        "loss": _loss([(by_way[FULL][key], by_way[PREDICTED][key]) for key in keys], schemas, form),
    }


def _counted(rows: Sequence[JudgedRow]) -> dict[Key, JudgedRow]:
    """Return the rows whose gold runs, by split and id."""
    return {
        (row["split"].removesuffix(ORACLE), row["id"]): row
        for row in rows
        if row["verdict"] != "gold_error"
    }


def _scores(rows: Sequence[JudgedRow]) -> dict[str, Any]:
    correct, n = sum(map(is_right, rows)), len(rows)
    return {
        "execution_accuracy": share(correct, n),
        "interval": interval(correct, n),
        "correct": correct,
        "prompt_tokens": round(fmean([row["prompt_tokens"] for row in rows] or [0]), 1),
        "seconds": round(fmean([row["generation_seconds"] for row in rows] or [0]), 3),
        "full_schema": sum("full_schema" in row for row in rows),
    }


def _loss(
    pairs: Sequence[tuple[JudgedRow, JudgedRow]], schemas: Mapping[str, Schema], form: LinkedForm
) -> dict[str, int]:
    """Count what predicted links cost and save beside the full schema."""
    missing = [lacks_a_name(linked, schemas, form) for _, linked in pairs]
    wrong = [not is_right(linked) for _, linked in pairs]
    return {
        "needed_name_missing": sum(missing),
        "lost_to_linking": sum(a and b for a, b in zip(missing, wrong, strict=True)),
        "lost_to_generation": sum(b and not a for a, b in zip(missing, wrong, strict=True)),
        "saved_by_linking": sum(is_right(linked) and not is_right(full) for full, linked in pairs),
        "spoiled_by_linking": sum(
            is_right(full) and not is_right(linked) for full, linked in pairs
        ),
    }


def lacks_a_name(row: JudgedRow, schemas: Mapping[str, Schema], form: LinkedForm) -> bool:
    """Tell whether a name that the gold SQL needs is not in the prompt of a judged question.

    A gold query that cannot be linked lacks none that is known.
    """
    schema = schemas.get(row["db_id"])
    if "links" not in row or schema is None:
        return False
    try:
        needed = linking.gold_links(row["gold"], schema)
    except linking.LinkError:
        return False
    links = linking.parse_links(row["links"]) or {}
    shown = restrict(schema, links, form)
    return not score_links(
        needed, {one.name: one.column_names for one in shown.tables}
    ).strict_recall
