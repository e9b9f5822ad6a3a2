"""Names of what MLflow shows: groups of metrics, tags of scores, and a list of runs with scores.

MLflow draws a section of charts for each group, in the order of the alphabet. So final scores in
`score/` come before the curves in `time/`, `train/` and `validation/`. `system/` has a tab of its
own. Counts are tags, or stand in the run's description and its table.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

SCORE = "score"
"""The group of final scores: few, and the main one first."""
VALIDATED = f"{SCORE}/validation"
"""The best validation objective so far: of a run's chosen checkpoint, and all that a trial has."""
SCORED, GAIN = "scored", "over_base"
"""Tags: how many questions were answered rightly, and how many points that is over the base model.

MLflow's list shows some ten letters of a name and of a value, so what matters stands first.
"""
VIEW = "scores"
"""The key of an experiment's view of its runs, in an address: `?viewStateShareKey=scores`."""
THIS_RUN = "#this-run"
"""Stands in a description for the page of its run, whose address only the store knows."""
_COUNTS = {"epoch", "validation/n"}


def named(values: Mapping[str, float]) -> dict[str, float]:
    """Return a point's values by MLflow's names: `loss` becomes `train/loss`, a group is kept.

    Counts are left out.
    """
    return {
        name if "/" in name else f"train/{name}": value
        for name, value in values.items()
        if name not in _COUNTS
    }


def final(metric: str, split: str = "", model: str = "") -> str:
    """Return the name of a final score: of the first split and the tuned model unless given."""
    return "/".join(filter(None, (SCORE, split, f"{metric}_{model}" if model else metric)))


def split_of(key: str) -> str:
    """Return the split that a final score is of; empty for the first one, which none names."""
    if key == VALIDATED:
        return "validation"
    return key.removeprefix(f"{SCORE}/").rpartition("/")[0]


def view(metric: str, earlier: str | None = None) -> str:
    """Return a state of MLflow's list of runs: sorted by a final score, with scores as columns.

    Columns of an `earlier` state stay behind them: those of runs of another task.
    """
    columns = [f"metrics.`{name}`" for name in (final(metric), VALIDATED)]
    columns += [f"tags.`{name}`" for name in (SCORED, GAIN)]
    others = json.loads(earlier)["selectedColumns"] if earlier else []
    shown = list(dict.fromkeys([*columns, *others]))
    return json.dumps({"selectedColumns": shown, "orderByKey": columns[0], "orderByAsc": False})
