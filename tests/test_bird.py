"""BIRD's R-VES and soft F1: worked by hand, and by their definitions on tables drawn at random."""

from math import isclose, sqrt

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_sql.database import Rows
from ray_sql.metrics import bird_match, r_ves, soft_f1, ves_reward

cells = st.sampled_from([None, 0, 1, 1.0, 2.5, "a", "b", b"a"])


@st.composite
def tables(draw: st.DrawFn, least_rows: int = 0) -> Rows:
    width = draw(st.integers(1, 3))
    return tuple(draw(st.lists(st.tuples(*[cells] * width), min_size=least_rows, max_size=5)))


@pytest.mark.parametrize(
    ("ratio", "reward"),
    [
        (50, 1.25),
        (2, 1.25),
        (1.99, 1),
        (1, 1),
        (0.99, 0.75),
        (0.5, 0.75),
        (0.49, 0.5),
        (0.25, 0.5),
        (0.24, 0.25),
    ],
)
def test_the_reward_is_a_grade_of_how_much_faster_than_gold(ratio: float, reward: float) -> None:
    assert ves_reward([ratio, ratio], [1, 1]) == ves_reward([ratio], [1]) == reward


def test_the_ratios_are_averaged_and_not_the_times() -> None:
    # By total time the prediction is slower (6 s against 5 s). By the mean of the ratios 4 and 0.25
    # it is twice as fast.
    assert ves_reward([4, 1], [1, 4]) == 1.25
    assert ves_reward([1, 4], [1, 5]) == 0.75


def test_an_outlier_is_left_out() -> None:
    # Mean 1.89, standard deviation 9.9: one ratio of 100 is over three deviations away.
    often, once = [0.9] * 99, [100.0]
    assert ves_reward(often + once, [1] * 100) == 0.75
    # One of two is never an outlier: both lie exactly one deviation from the mean.
    assert ves_reward([0.9, 100], [1, 1]) == 1.25


@pytest.mark.parametrize(
    "times", [([], []), ([1], [1, 1]), ([0], [1]), ([1], [0]), ([1], [-1]), ([float("nan")], [1])]
)
def test_times_that_cannot_be_compared_are_a_mistake_of_the_caller(
    times: tuple[list[float], list[float]],
) -> None:
    with pytest.raises(ValueError, match="time"):
        ves_reward(*times)


def test_the_score_is_the_mean_root_of_the_rewards_in_per_cent() -> None:
    assert r_ves([1, 1]) == 100
    assert r_ves([1, 0]) == 50
    assert r_ves([0.25, 0.25]) == 50
    assert isclose(r_ves([1.25]), 111.803, abs_tol=0.001)
    assert isclose(r_ves([1.25, 1, 0.75, 0]), 25 * (sqrt(1.25) + 1 + sqrt(0.75)))
    with pytest.raises(ValueError, match="no question"):
        r_ves([])


@pytest.mark.parametrize(
    ("gold", "predicted", "score"),
    [
        ((), (), 1),
        ((), ((1,),), 0),
        (((1,),), (), 0),
        (((1,),), ((1,),), 1),
        (((1,),), ((2,),), 0),
        (((1, "a"),), (("a", 1),), 1),  # columns in any order
        (((1,), (2,)), ((2,), (1,)), 0),  # rows in this order only
        (((1,), (1,), (2,)), ((1,), (2,), (2,)), 1),  # duplicates are dropped
        (
            ((1, "a"),),
            ((1, "b"),),
            1 / 2,
        ),  # half found, half added, half missed: precision and recall 1/2
        (
            ((1, "a"),),
            ((1,),),
            2 / 3,
        ),  # half found, nothing added, half missed: precision 1, recall 1/2
        (((1,),), ((1, "a"),), 2 / 3),  # one found, one added: precision 1/2, recall 1
        (((1,), (2,)), ((1,),), 2 / 3),  # a row missed
        (((1,),), ((1,), (2,)), 2 / 3),  # a row too many
        (
            ((1,),),
            ((1, 1.0),),
            1,
        ),  # a value found twice counts twice: 2 of 1, nothing added, nothing missed
        # 1 + 1 + 1/2 found, nothing added, 1/2 missed, a last row of each: recall 2.5 / 3
        (
            (("pen", 3), ("ink", 5), ("nib", 7)),
            ((3, "pen"), (5, "ink"), ("nib",)),
            2 * (2.5 / 3) / (1 + 2.5 / 3),
        ),
    ],
)
def test_soft_f1_by_hand(gold: Rows, predicted: Rows, score: float) -> None:
    assert isclose(soft_f1(gold, predicted), score)


def soft_f1_by_counting(gold: Rows, predicted: Rows) -> float:
    """The same from whole counts, row by row, as 2 tp / (2 tp + fp + fn)."""
    distinct = [
        [row for place, row in enumerate(rows) if row not in rows[:place]]
        for rows in (gold, predicted)
    ]
    tp = fp = fn = 0.0
    for place in range(max(map(len, distinct))):
        ours, theirs = (rows[place] if place < len(rows) else None for rows in distinct)
        if ours is None:
            fp += 1
        elif theirs is None:
            fn += 1
        else:
            width = len(ours)
            tp += len([cell for cell in theirs if cell in ours]) / width
            fp += len([cell for cell in theirs if cell not in ours]) / width
            fn += len([cell for cell in ours if cell not in theirs]) / width
    return 2 * tp / (2 * tp + fp + fn) if tp else 0.0


@given(tables(least_rows=1), tables())
def test_soft_f1_is_the_f1_of_cells(gold: Rows, predicted: Rows) -> None:
    assert isclose(soft_f1(gold, predicted), soft_f1_by_counting(gold, predicted))
    assert 0 <= soft_f1(gold, predicted) <= 1


@given(tables())
def test_equal_results_have_full_soft_f1(rows: Rows) -> None:
    assert bird_match(rows, rows) and soft_f1(rows, rows) == 1
    assert soft_f1(rows, rows + rows) == 1
