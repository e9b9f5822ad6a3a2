"""Figures people look at: accuracy by hardness, database and length of prompt, with intervals, and what goes wrong."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ray_sql.metrics import wilson_interval
from ray_sql.metrics.judged import grouped, is_right
from ray_sql.tasks import TASKS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {"base": "#9aa5b1", "default": "#d49a3a", "tuned": "#2f6fb2", "file": "#2f6fb2"}
MOST_DATABASES = 40
"""Databases in one figure; more cannot be read."""

Rows = Sequence[dict[str, Any]]


def figures(metrics: Mapping[str, Any], measured: Mapping[str, Rows]) -> dict[str, Figure]:
    """Figures by file name: accuracy and databases per split, prompt lengths, and the errors of all models."""
    splits = next(metrics[name] for name in measured)
    what = f"{TASKS[metrics['task_type']].label}, %"
    made = {f"accuracy_{split}.png": accuracy(metrics, list(measured), split) for split in splits}
    for split in splits:
        counted = {
            name: [row for row in _counted(rows) if row["split"] == split]
            for name, rows in measured.items()
        }
        if len({row["db_id"] for rows in counted.values() for row in rows}) > 1:
            made[f"databases_{split}.png"] = databases(counted, split, what)
    asked = {
        name: [r for r in _counted(rows) if r.get("prompt_tokens")]
        for name, rows in measured.items()
    }
    edges = length_edges([row["prompt_tokens"] for rows in asked.values() for row in rows])
    if len(edges) > 1:
        made["prompt_tokens.png"] = prompt_tokens(asked, edges, what)
    return made | {"errors.png": errors(measured)}


def accuracy(metrics: Mapping[str, Any], names: Sequence[str], split: str) -> Figure:
    """Execution accuracy or strict recall of each model, in all and by hardness, with 95 % intervals."""
    figure, axes = _axes(7, 4)
    task = TASKS[metrics["task_type"]]
    rule = task.rule(metrics[names[-1]][split])
    levels = list(metrics[names[-1]][split]["by_hardness"])
    width = 0.8 / len(names)
    for index, name in enumerate(names):
        scores = metrics[name][split]
        groups = [scores, *(scores["by_hardness"][level] for level in levels)]
        heights = [100 * group[task.metric] for group in groups]
        low = [
            max(0.0, h - 100 * group["interval"][0])
            for h, group in zip(heights, groups, strict=True)
        ]
        high = [
            max(0.0, 100 * group["interval"][1] - h)
            for h, group in zip(heights, groups, strict=True)
        ]
        places = [place + index * width for place in range(len(groups))]
        axes.bar(
            places, heights, width, yerr=[low, high], capsize=3, label=name, color=COLOURS.get(name)
        )
    counts = [
        metrics[names[-1]][split]["n"],
        *(metrics[names[-1]][split]["by_hardness"][level]["n"] for level in levels),
    ]
    labels = [
        f"{_name(level)}\nn = {count}"
        for level, count in zip(["all", *levels], counts, strict=True)
    ]
    axes.set_xticks([place + 0.4 - width / 2 for place in range(len(labels))], labels)
    axes.set_ylabel(f"{task.label}, %")
    axes.set_ylim(0, 100)
    axes.set_title(f"{_name(split)}: {task.label}{rule}, 95 % intervals")
    _legend(axes)
    return figure


def databases(counted: Mapping[str, Rows], split: str, what: str) -> Figure:
    """Correct answers of each model on each database, with 95 % intervals: what its questions alone say of it, the best first."""
    groups = {name: grouped(rows, "db_id") for name, rows in counted.items()}
    last = list(groups.values())[-1]
    most = sorted(last, key=lambda name: -len(last[name]))[:MOST_DATABASES]
    shown = sorted(most, key=lambda name: (-_share(last[name])[0], name))
    figure, axes = _axes(7, 1.4 + 0.28 * len(shown))
    height = 0.5 / len(groups)
    for index, (name, found) in enumerate(groups.items()):
        shares = [_share(found.get(database, [])) for database in shown]
        places = [place + (index - (len(groups) - 1) / 2) * height for place in range(len(shown))]
        axes.errorbar(
            [s[0] for s in shares],
            places,
            xerr=_reaches(shares),
            fmt="o",
            capsize=2,
            label=name,
            color=COLOURS.get(name),
        )
    axes.set_ylim(-0.6, len(shown) - 0.4)
    axes.set_yticks(
        range(len(shown)), [f"{_name(database)}  (n = {len(last[database])})" for database in shown]
    )
    axes.invert_yaxis()
    axes.set_xlim(-2, 102)
    axes.set_xlabel(what)
    some = (
        f", the {len(shown)} of {len(last)} with most questions" if len(shown) < len(last) else ""
    )
    axes.set_title(f"{_name(split)}: by database, 95 % intervals{some}")
    _legend(axes)
    return figure


def prompt_tokens(asked: Mapping[str, Rows], edges: Sequence[int], what: str) -> Figure:
    """Correct answers of each model by the length of the prompt, with 95 % intervals."""
    figure, axes = _axes(7, 4)
    binned = {name: _binned(rows, edges) for name, rows in asked.items()}
    for index, (name, bins) in enumerate(binned.items()):
        shares = [_share(rows) for rows in bins]
        places = [place + 0.1 * (index - (len(binned) - 1) / 2) for place in range(len(edges))]
        axes.errorbar(
            places,
            [s[0] for s in shares],
            yerr=_reaches(shares),
            fmt="o-",
            capsize=3,
            label=name,
            color=COLOURS.get(name),
        )
    labels = []
    for bins in zip(*binned.values(), strict=True):
        lengths = [row["prompt_tokens"] for rows in bins for row in rows]
        labels.append(f"{min(lengths)}–{max(lengths)}\nn = {len(bins[-1])}")
    axes.set_xticks(range(len(edges)), labels)
    axes.set_xlabel("tokens in the prompt")
    axes.set_ylabel(what)
    axes.set_ylim(-2, 102)
    axes.set_title("By length of the prompt, 95 % intervals")
    _legend(axes)
    return figure


def length_edges(lengths: Sequence[int], bins: int = 6, least: int = 10) -> list[int]:
    """Where bins of about equally many prompts begin: at most `bins`, of `least` prompts or so; equal lengths stay together."""
    ordered = sorted(lengths)
    count = min(bins, len(ordered) // least)
    return sorted({ordered[index * len(ordered) // count] for index in range(count)})


def sweep(trials: Rows, axes: Sequence[tuple[str, str]], what: str) -> Figure:
    """The best objective of every trial over the first two axes of a sweep, or over its only one.

    A trial has its values by axis, `objective` (None where nothing was measured) and `stopped`; the first is the default one. An axis is
    (name, `log`, `linear` or `category`).
    """
    figure, plane = _axes(7, 4.4)
    (across, across_kind), (up, up_kind) = (
        axes[0],
        axes[1] if len(axes) > 1 else ("objective", "linear"),
    )
    shown = [trial for trial in trials if trial["objective"] is not None]
    places = {
        name: _places(trials, name, kind) for name, kind in ((across, across_kind), (up, up_kind))
    }
    first = [trial for trial in shown if trial["trial"] == 0]
    for group, marker in ((False, "o"), (True, "v")):
        some = [trial for trial in shown if trial["stopped"] == group]
        points = plane.scatter(
            [places[across][trial["trial"]] for trial in some],
            [places[up][trial["trial"]] for trial in some],
            c=[trial["objective"] for trial in some],
            vmin=min((trial["objective"] for trial in shown), default=0),
            vmax=max((trial["objective"] for trial in shown), default=1),
            marker=marker,
            s=70,
            edgecolors="white",
            label="stopped early" if group else "trained to the end",
        )
    ring_x, ring_y = ([places[name][trial["trial"]] for trial in first] for name in (across, up))
    plane.scatter(
        ring_x,
        ring_y,
        s=210,
        facecolors="none",
        edgecolors="#c0392b",
        linewidths=1.6,
        label="the default settings",
    )
    for name, kind, set_scale, set_ticks in (
        (across, across_kind, plane.set_xscale, plane.set_xticks),
        (up, up_kind, plane.set_yscale, plane.set_yticks),
    ):
        if kind == "log":
            set_scale("log")
        elif kind == "category":
            values = sorted({trial[name] for trial in trials}, key=_by_value)
            set_ticks(range(len(values)), [_name(str(value)) for value in values])
    plane.set_xlabel(across)
    plane.set_ylabel(what if up == "objective" else up)
    plane.set_title("Every trial's best")
    _legend(plane)
    if len(axes) > 1:
        figure.colorbar(points, ax=plane, label=what)
    return figure


def learning_curves(
    curves: Mapping[str, Sequence[tuple[int, float]]], best: str, what: str
) -> Figure:
    """The objective of every trial by step, as (step, objective); the best trial's stands out."""
    figure, axes = _axes(7, 4)
    for name, points in curves.items():
        chief = name == best
        axes.plot(
            *zip(*points, strict=True),
            marker="o",
            markersize=4,
            color=COLOURS["tuned" if chief else "base"],
            linewidth=2 if chief else 1,
            zorder=3 if chief else 2,
            label=name if chief else None,
        )
    axes.set_xlabel("optimizer steps")
    axes.set_ylabel(what)
    axes.set_title("The objective while training")
    _legend(axes)
    return figure


def _places(trials: Rows, name: str, kind: str) -> dict[int, float]:
    """Where each trial is on an axis; a category's values stand side by side."""
    if kind != "category":
        return {trial["trial"]: trial[name] for trial in trials}
    values = sorted({trial[name] for trial in trials}, key=_by_value)
    return {trial["trial"]: float(values.index(trial[name])) for trial in trials}


def _by_value(value: Any) -> tuple[bool, float, str]:
    number = isinstance(value, int | float)
    return not number, float(value) if number else 0.0, str(value)


def errors(measured: Mapping[str, Rows]) -> Figure:
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
        places = [place + index * height for place in range(len(kinds))]
        bars = axes.barh(places, shares, height, label=name, color=COLOURS.get(name))
        axes.bar_label(
            bars, [found[kind] or "" for kind in kinds], padding=3, fontsize=8, color="#5d6875"
        )
    axes.set_yticks([place + 0.4 - height / 2 for place in range(len(kinds))], kinds)
    axes.invert_yaxis()
    axes.set_xlabel("questions, % (and how many)")
    axes.margins(x=0.08)
    axes.set_title("What goes wrong")
    _legend(axes)
    return figure


def _counted(rows: Rows) -> list[dict[str, Any]]:
    return [row for row in rows if row["verdict"] != "gold_error"]


def _share(rows: Rows) -> tuple[float, float, float]:
    """The per cent of correct rows, and its interval."""
    correct = sum(map(is_right, rows))
    interval = wilson_interval(correct, len(rows))
    return 100 * correct / max(1, len(rows)), 100 * interval.low, 100 * interval.high


def _reaches(shares: Sequence[tuple[float, float, float]]) -> list[list[float]]:
    """How far intervals reach down and up, as matplotlib takes them."""
    return [
        [max(0.0, s - low) for s, low, _ in shares],
        [max(0.0, high - s) for s, _, high in shares],
    ]


def _binned(rows: Rows, edges: Sequence[int]) -> list[list[dict[str, Any]]]:
    bins: list[list[dict[str, Any]]] = [[] for _ in edges]
    for row in rows:
        bins[bisect_right(edges, row["prompt_tokens"]) - 1].append(row)
    return bins


def _name(text: str) -> str:
    """A dataset's own word as a label: short, and never read as a formula, which a `$` would begin."""
    return (text if len(text) <= 28 else f"{text[:27]}…").replace("$", r"\$")


def _legend(axes: Axes) -> None:
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))


def _axes(width: float, height: float) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes
