"""Figures show what the rows hold, and are left out where there is nothing to show."""

from typing import Any

import pytest

from ray_sql.evaluate import results
from ray_sql.metrics import wilson_interval
from ray_sql.report import figures
from ray_sql.tasks import SQL


def rows(verdicts: str, **changes: Any) -> list[dict[str, Any]]:
    """`c` correct, `w` wrong, `g` gold error; two databases, prompts of 100 tokens and more."""
    names = {
        "c": ("correct", "none"),
        "w": ("wrong", "wrong rows"),
        "g": ("gold_error", "gold error"),
    }
    return [
        {
            "id": str(n), "split": "dev", "db_id": f"db{n % 2}", "hardness": "easy",
            "verdict": names[letter][0], "error_kind": names[letter][1],
            "prompt_tokens": 100 + n, "error": "", **changes,
        }
        for n, letter in enumerate(verdicts)
    ]  # fmt: skip


def drawn(measured: dict[str, list[dict[str, Any]]], make_config: Any) -> dict[str, Any]:
    return figures.figures(
        {"task_type": "sql", **results.summarise(measured, SQL, make_config().evaluate)}, measured
    )


def test_every_figure_of_a_run_with_two_models(make_config: Any) -> None:
    found = drawn({"base": rows("w" * 30), "tuned": rows("cw" * 15)}, make_config)
    assert list(found) == [
        "accuracy_dev.png",
        "databases_dev.png",
        "prompt_tokens.png",
        "errors.png",
    ]
    for figure in found.values():
        (axes,) = figure.axes
        assert axes.get_title() and [text.get_text() for text in axes.get_legend().get_texts()] == [
            "base",
            "tuned",
        ]


def test_databases_show_their_share_and_interval_and_leave_failing_gold_out(
    make_config: Any,
) -> None:
    (axes,) = drawn({"file": rows("cwcwccgg")}, make_config)["databases_dev.png"].axes
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        "db0  (n = 3)",
        "db1  (n = 3)",
    ]
    points, _, (bars,) = axes.containers[0]
    assert points.get_xdata() == pytest.approx([100, 100 / 3])
    interval = wilson_interval(1, 3)
    assert bars.get_segments()[1][:, 0] == pytest.approx([100 * interval.low, 100 * interval.high])


def test_of_many_databases_those_with_most_questions_are_shown(make_config: Any) -> None:
    many = [
        one | {"db_id": f"db{n // 2 if n < 20 else n}"} for n, one in enumerate(rows("cw" * 50))
    ]
    (axes,) = drawn({"file": many}, make_config)["databases_dev.png"].axes
    assert (
        len(axes.get_yticklabels()) == figures.MOST_DATABASES
        and "the 40 of 90 with most" in axes.get_title()
    )
    assert {f"db{n}  (n = 2)" for n in range(10)} <= {
        label.get_text() for label in axes.get_yticklabels()
    }


def test_prompt_lengths_fall_into_bins_that_hold_every_question(make_config: Any) -> None:
    (axes,) = drawn({"file": rows("cw" * 30 + "g")}, make_config)["prompt_tokens.png"].axes
    labels = [label.get_text() for label in axes.get_xticklabels()]
    assert labels[0] == "100–109\nn = 10" and labels[-1] == "150–159\nn = 10" and len(labels) == 6
    assert figures.length_edges([]) == [] and figures.length_edges([5] * 50) == [5]
    assert figures.length_edges([5] * 45 + [6] * 5) == [5], "equal lengths stay together"


def test_what_there_is_nothing_of_is_not_drawn(make_config: Any) -> None:
    assert list(drawn({"file": rows("cw", db_id="one", prompt_tokens=None)}, make_config)) == [
        "accuracy_dev.png",
        "errors.png",
    ]
    assert list(drawn({"file": rows("gg")}, make_config)) == ["accuracy_dev.png", "errors.png"]
    assert list(drawn({"file": rows("cc")}, make_config)) == [
        "accuracy_dev.png",
        "databases_dev.png",
    ]
