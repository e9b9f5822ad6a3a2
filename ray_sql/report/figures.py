"""Draw figures: accuracy by hardness, database and prompt length, errors, and a sweep's trials."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ray_sql.data.shown import ORACLE
from ray_sql.display import printable
from ray_sql.metrics import wilson_interval
from ray_sql.metrics.judged import JudgedRow, grouped, is_right
from ray_sql.tasks import TASKS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {"base": "#9aa5b1", "default": "#d49a3a", "tuned": "#2f6fb2", "file": "#2f6fb2"}
MOST_DATABASES = 40
"""Databases in one figure; more cannot be read."""

Rows = Sequence[JudgedRow]
Share = tuple[float, float, float]
"""A share and the ends of its 95 % interval, in per cent."""


def figures(metrics: Mapping[str, Any], evaluation: Mapping[str, Rows]) -> dict[str, Figure]:
    """Return figures by file name: scores and databases per split, prompt lengths, and errors."""
    models = list(evaluation)
    splits = list(metrics[models[0]])
    by = " by oracle links" if any(split.endswith(ORACLE) for split in splits) else ""
    label = f"{TASKS[metrics['task_type']].label}{by}, %"
    counted = {
        model: [row for row in rows if row["verdict"] != "gold_error"]
        for model, rows in evaluation.items()
    }
    drawn = {f"accuracy_{split}.png": accuracy(metrics, models, split) for split in splits}
    for split in splits:
        in_split = {
            model: [row for row in rows if row["split"] == split] for model, rows in counted.items()
        }
        if len({row["db_id"] for rows in in_split.values() for row in rows}) > 1:
            drawn[f"databases_{split}.png"] = databases(in_split, split, label)
    prompted = {
        model: [row for row in rows if row.get("prompt_tokens")] for model, rows in counted.items()
    }
    edges = length_edges([row["prompt_tokens"] for rows in prompted.values() for row in rows])
    if len(edges) > 1:
        drawn["prompt_tokens.png"] = prompt_tokens(prompted, edges, label)
    if any(row["error_kind"] != "none" for rows in evaluation.values() for row in rows):
        drawn["errors.png"] = errors(evaluation, by)
    return drawn


def accuracy(metrics: Mapping[str, Any], models: Sequence[str], split: str) -> Figure:
    """Draw the main score of each model, in all and by hardness, with 95 % intervals."""
    task, last = TASKS[metrics["task_type"]], metrics[models[-1]][split]
    levels = list(last["by_hardness"])
    figure, axes = _axes(7, 4)
    width = 0.8 / len(models)
    for index, model in enumerate(models):
        scores = metrics[model][split]
        groups = [scores, *(scores["by_hardness"][level] for level in levels)]
        shares = [_of_scores(group, task.metric) for group in groups]
        axes.bar(
            [place + index * width for place in range(len(groups))],
            [share for share, _, _ in shares],
            width,
            yerr=_reaches(shares),
            capsize=3,
            label=model,
            color=COLOURS.get(model),
        )
    labels = [f"all\nn = {last['n']}"]
    labels += [f"{_name(level)}\nn = {last['by_hardness'][level]['n']}" for level in levels]
    axes.set_xticks([place + 0.4 - width / 2 for place in range(len(labels))], labels)
    axes.set_ylabel(f"{task.label}, %")
    axes.set_ylim(0, 100)
    axes.set_title(f"{_name(split)}: {task.label}{task.rule(last)}, 95 % intervals")
    _legend(axes)
    return figure


def databases(counted: Mapping[str, Rows], split: str, label: str) -> Figure:
    """Draw each model's share of right answers on each database, with 95 % intervals.

    An interval is that of the database's questions alone. The best databases come first.
    """
    groups = {model: grouped(rows, "db_id") for model, rows in counted.items()}
    last = list(groups.values())[-1]
    largest = sorted(last, key=lambda name: -len(last[name]))[:MOST_DATABASES]
    shown = sorted(largest, key=lambda name: (-_share(last[name])[0], name))
    figure, axes = _axes(7, 1.4 + 0.28 * len(shown))
    height = 0.5 / len(groups)
    for index, (model, by_database) in enumerate(groups.items()):
        shares = [_share(by_database.get(database, [])) for database in shown]
        offset = (index - (len(groups) - 1) / 2) * height
        axes.errorbar(
            [share for share, _, _ in shares],
            [place + offset for place in range(len(shown))],
            xerr=_reaches(shares),
            fmt="o",
            capsize=2,
            label=model,
            color=COLOURS.get(model),
        )
    axes.set_ylim(-0.6, len(shown) - 0.4)
    names = [f"{_name(database)}  (n = {len(last[database])})" for database in shown]
    axes.set_yticks(range(len(shown)), names)
    axes.invert_yaxis()
    axes.set_xlim(-2, 102)
    axes.set_xlabel(label)
    title = f"{_name(split)}: by database, 95 % intervals"
    if len(shown) < len(last):
        title += f", the {len(shown)} of {len(last)} with most questions"
    axes.set_title(title)
    _legend(axes)
    return figure


def prompt_tokens(prompted: Mapping[str, Rows], edges: Sequence[int], label: str) -> Figure:
    """Draw each model's share of right answers by prompt length, with 95 % intervals."""
    figure, axes = _axes(7, 4)
    binned = {model: _binned(rows, edges) for model, rows in prompted.items()}
    for index, (model, bins) in enumerate(binned.items()):
        shares = [_share(rows) for rows in bins]
        offset = 0.1 * (index - (len(binned) - 1) / 2)
        axes.errorbar(
            [place + offset for place in range(len(edges))],
            [share for share, _, _ in shares],
            yerr=_reaches(shares),
            fmt="o-",
            capsize=3,
            label=model,
            color=COLOURS.get(model),
        )
    labels = []
    for groups in zip(*binned.values(), strict=True):
        lengths = [row["prompt_tokens"] for rows in groups for row in rows]
        labels.append(f"{min(lengths)}–{max(lengths)}\nn = {len(groups[-1])}")
    axes.set_xticks(range(len(edges)), labels)
    axes.set_xlabel("tokens in the prompt")
    axes.set_ylabel(label)
    axes.set_ylim(-2, 102)
    axes.set_title("By length of the prompt, 95 % intervals")
    _legend(axes)
    return figure


def length_edges(lengths: Sequence[int], bins: int = 6, least: int = 10) -> list[int]:
    """Return where bins of about equally many prompts begin.

    There are at most `bins`, of about `least` prompts or more. Equal lengths share a bin.
    """
    ordered = sorted(lengths)
    count = min(bins, len(ordered) // least)
    return sorted({ordered[index * len(ordered) // count] for index in range(count)})


def sweep(trials: Rows, axes: Sequence[tuple[str, str]], label: str) -> Figure:
    """Draw the best objective of every trial over the first two axes of a sweep, or its only one.

    A trial has its values by axis, `trial`, `objective` (None where nothing was measured) and
    `stopped`; trial 0 has the default settings. An axis is (name, `log`, `linear` or `category`).
    """
    figure, plane = _axes(7, 4.4)
    (across, across_kind), (up, up_kind) = [*axes, ("objective", "linear")][:2]
    shown = [trial for trial in trials if _is_number(trial["objective"])]
    objectives = [trial["objective"] for trial in shown]
    x, y = _places(trials, across, across_kind), _places(trials, up, up_kind)
    low = min(objectives, default=0)
    for name, stopped, marker in (("trained to the end", False, "o"), ("stopped early", True, "v")):
        group = [trial for trial in shown if trial["stopped"] == stopped]
        if not group:
            continue
        points = plane.scatter(
            [x[trial["trial"]] for trial in group],
            [y[trial["trial"]] for trial in group],
            c=[trial["objective"] for trial in group],
            vmin=low,
            vmax=max(objectives) if max(objectives) > low else low + 1,  # trials all alike
            marker=marker,
            s=70,
            edgecolors="white",
            label=name,
        )
    default = [trial["trial"] for trial in shown if trial["trial"] == 0]
    if default:
        plane.scatter(
            [x[trial] for trial in default],
            [y[trial] for trial in default],
            s=210,
            facecolors="none",
            edgecolors="#c0392b",
            linewidths=1.6,
            label="the default settings",
        )
    if shown:  # matplotlib draws no logarithmic axis without a point
        plane.set(**_scale("x", trials, across, across_kind))
        plane.set(**_scale("y", trials, up, up_kind))
    plane.set_xlabel(across)
    plane.set_ylabel(up if len(axes) > 1 else label)
    plane.set_title("Every trial's best")
    _legend(plane)
    if shown and len(axes) > 1:
        figure.colorbar(points, ax=plane, label=label)
    return figure


def learning_curves(
    curves: Mapping[str, Sequence[tuple[int, float]]], best: str, label: str
) -> Figure:
    """Draw every trial's objective by step, from (step, objective); the best one stands out."""
    figure, axes = _axes(7, 4)
    highlight: dict[str, Any] = {
        "color": COLOURS["tuned"],
        "linewidth": 2,
        "zorder": 3,
        "label": best,
    }
    for name, points in curves.items():
        style: dict[str, Any] = {"color": COLOURS["base"], "linewidth": 1, "zorder": 2}
        if name == best:
            style = highlight
        axes.plot(*zip(*points, strict=True), marker="o", markersize=4, **style)
    axes.set_xlabel("optimizer steps")
    axes.set_ylabel(label)
    axes.set_title("The objective while training")
    _legend(axes)
    return figure


def _scale(side: str, trials: Rows, name: str, kind: str) -> dict[str, Any]:
    """Return the properties that a kind of axis gives the plane; `side` is x or y."""
    if kind == "log":
        return {f"{side}scale": "log"}
    if kind == "category":
        names = [_name(str(value)) for value in _categories(trials, name)]
        return {f"{side}ticks": range(len(names)), f"{side}ticklabels": names}
    return {}


def _places(trials: Rows, name: str, kind: str) -> dict[int, float]:
    """Return each trial's place on an axis; the values of a category stand side by side."""
    if kind != "category":
        return {trial["trial"]: trial[name] for trial in trials}
    values = _categories(trials, name)
    return {trial["trial"]: float(values.index(trial[name])) for trial in trials}


def _categories(trials: Rows, name: str) -> list[Any]:
    """Return the values of a category, numbers first."""
    values = {trial[name] for trial in trials}
    numbers = {value for value in values if isinstance(value, int | float)}
    return [*sorted(numbers), *sorted(values - numbers, key=str)]


def errors(evaluation: Mapping[str, Rows], by: str = "") -> Figure:
    """Draw each kind of error as a share of each model's questions; `by` ends the title."""
    counts = {
        model: Counter(row["error_kind"] for row in rows if row["error_kind"] != "none")
        for model, rows in evaluation.items()
    }
    kinds = [kind for kind, _ in sum(counts.values(), Counter()).most_common()]
    figure, axes = _axes(7, 1.4 + 0.4 * max(1, len(kinds)))
    height = 0.8 / len(counts)
    for index, (model, by_kind) in enumerate(counts.items()):
        n = max(1, len(evaluation[model]))
        bars = axes.barh(
            [place + index * height for place in range(len(kinds))],
            [100 * by_kind[kind] / n for kind in kinds],
            height,
            label=model,
            color=COLOURS.get(model),
        )
        numbers = [by_kind[kind] or "" for kind in kinds]
        axes.bar_label(bars, numbers, padding=3, fontsize=8, color="#5d6875")
    axes.set_yticks([place + 0.4 - height / 2 for place in range(len(kinds))], kinds)
    axes.invert_yaxis()
    axes.set_xlabel("questions, % (and how many)")
    axes.margins(x=0.08)
    axes.set_title(f"What goes wrong{by}")
    _legend(axes)
    return figure


def _share(rows: Rows) -> Share:
    """Return the share of right answers."""
    right = sum(map(is_right, rows))
    interval = wilson_interval(right, len(rows))
    return 100 * right / max(1, len(rows)), 100 * interval.low, 100 * interval.high


def _of_scores(scores: Mapping[str, Any], metric: str) -> Share:
    """Return a score of `metrics.json`."""
    low, high = scores["interval"]
    return 100 * scores[metric], 100 * low, 100 * high


def _reaches(shares: Sequence[Share]) -> list[list[float]]:
    """Return the lengths of intervals below and above their shares, as matplotlib takes them."""
    return [
        [max(0.0, share - low) for share, low, _ in shares],
        [max(0.0, high - share) for share, _, high in shares],
    ]


def _binned(rows: Rows, edges: Sequence[int]) -> list[list[JudgedRow]]:
    bins: list[list[JudgedRow]] = [[] for _ in edges]
    for row in rows:
        bins[bisect_right(edges, row["prompt_tokens"]) - 1].append(row)
    return bins


def _name(text: str) -> str:
    """Return a dataset's own word as a short label in which `$` begins no formula."""
    text = printable(text)
    if len(text) > 28:
        text = f"{text[:27]}…"
    return text.replace("$", r"\$")


def _is_number(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _legend(axes: Axes) -> None:
    if axes.get_legend_handles_labels()[0]:  # matplotlib warns of a legend of nothing
        axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))


def _axes(width: float, height: float) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes
