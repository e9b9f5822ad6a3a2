"""Figures people look at: accuracy by hardness with intervals, and what goes wrong."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {"base": "#9aa5b1", "tuned": "#2f6fb2", "file": "#2f6fb2"}


def figures(metrics: Mapping[str, Any], measured: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Figure]:
    """Figures by file name: one of accuracy per split (task sql), and one of the errors of all models."""
    made = {}
    if metrics["task_type"] == "sql":
        splits = next(metrics[name] for name in measured)
        made = {f"accuracy_{split}.png": accuracy(metrics, list(measured), split) for split in splits}
    return made | {"errors.png": errors(measured)}


def accuracy(metrics: Mapping[str, Any], names: Sequence[str], split: str) -> Figure:
    """Execution accuracy of each model, in all and by hardness, with 95 % intervals."""
    figure, axes = _axes(7, 4)
    levels = list(metrics[names[-1]][split]["by_hardness"])
    width = 0.8 / len(names)
    for index, name in enumerate(names):
        scores = metrics[name][split]
        groups = [scores, *(scores["by_hardness"][level] for level in levels)]
        heights = [100 * group["execution_accuracy"] for group in groups]
        low = [max(0.0, h - 100 * group["interval"][0]) for h, group in zip(heights, groups, strict=True)]
        high = [max(0.0, 100 * group["interval"][1] - h) for h, group in zip(heights, groups, strict=True)]
        places = [place + index * width for place in range(len(groups))]
        axes.bar(places, heights, width, yerr=[low, high], capsize=3, label=name, color=COLOURS.get(name))
    counts = [
        metrics[names[-1]][split]["n"],
        *(metrics[names[-1]][split]["by_hardness"][level]["n"] for level in levels),
    ]
    labels = [f"{level}\nn = {count}" for level, count in zip(["all", *levels], counts, strict=True)]
    axes.set_xticks([place + 0.4 - width / 2 for place in range(len(labels))], labels)
    axes.set_ylabel("execution accuracy, %")
    axes.set_ylim(0, 100)
    axes.set_title(f"{split}: execution accuracy ({metrics[names[-1]][split]['semantics']}), 95 % intervals")
    axes.legend(frameon=False)
    return figure


def errors(measured: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure:
    """How often each kind of error occurs, as a share of each model's questions."""
    counts = {
        name: Counter(row["error_kind"] for row in rows if row["error_kind"] != "none")
        for name, rows in measured.items()
    }
    kinds = [kind for kind, _ in sum(counts.values(), Counter()).most_common()]
    figure, axes = _axes(7, 1.4 + 0.4 * max(1, len(kinds)))
    height = 0.8 / len(counts)
    for index, (name, found) in enumerate(counts.items()):
        shares = [100 * found[kind] / max(1, len(measured[name])) for kind in kinds]
        axes.barh(
            [place + index * height for place in range(len(kinds))], shares, height, label=name, color=COLOURS.get(name)
        )
    axes.set_yticks([place + 0.4 - height / 2 for place in range(len(kinds))], kinds)
    axes.invert_yaxis()
    axes.set_xlabel("questions, %")
    axes.set_title("What goes wrong")
    axes.legend(frameon=False)
    return figure


def _axes(width: float, height: float) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes
