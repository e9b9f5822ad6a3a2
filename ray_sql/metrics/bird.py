"""BIRD's two scores beside execution accuracy: how fast a right query is (R-VES), and how nearly right a wrong one (soft F1).

Both follow the evaluation code of BIRD mini-dev (github.com/bird-bench/mini_dev, `evaluation/evaluation_ves.py` and
`evaluation_f1.py`), reproduced to the letter but for what each docstring names.
"""

from collections.abc import Sequence
from math import isfinite, sqrt
from statistics import fmean, pstdev

from ray_sql.database import ResultRow, Rows

REWARDS = ((2.0, 1.25), (1.0, 1.0), (0.5, 0.75), (0.25, 0.5))
"""Least ratio of the gold's time to the prediction's -> reward of a right prediction, the best first."""
LEAST_REWARD = 0.25
OUTLIER_DEVIATIONS = 3


def ves_reward(gold_seconds: Sequence[float], predicted_seconds: Sequence[float]) -> float:
    """What a *right* prediction earns for its speed, from 0.25 (over four times slower than gold) to 1.25 (twice as fast).

    Seconds of repeated runs of both queries, taken in pairs, one right after the other (officially 100 pairs). The ratios
    gold / predicted lose their outliers (three standard deviations or more from their mean), and the mean of the rest is
    graded. A wrong prediction, or one that fails, earns 0 and needs no call. Where all ratios are equal, as with a single
    pair, the official code drops them all, fails and gives 0; here they count.

    Needs an idle machine: another process that takes its turn during one of the two runs moves the ratio, and the same
    prediction then earns another reward. Source: BIRD mini-dev, R-VES.
    """
    if not gold_seconds or len(gold_seconds) != len(predicted_seconds):
        raise ValueError(
            f"{len(gold_seconds)} times of gold and {len(predicted_seconds)} of the prediction: need pairs"
        )
    if not all(
        seconds > 0 and isfinite(seconds) for seconds in (*gold_seconds, *predicted_seconds)
    ):
        raise ValueError("a time that is not a positive number of seconds")
    ratio = fmean(
        _without_outliers(
            [gold / ours for gold, ours in zip(gold_seconds, predicted_seconds, strict=True)]
        )
    )
    return next((reward for least, reward in REWARDS if ratio >= least), LEAST_REWARD)


def r_ves(rewards: Sequence[float]) -> float:
    """The reward-based valid efficiency score of all questions: the mean of sqrt(reward) in per cent, 0 to 111.8.

    One reward a question, right or wrong: `ves_reward` if the prediction is right under BIRD's execution accuracy, else 0.
    Above 100 means faster than gold. As the rewards do, it needs an idle machine, and runs on another machine give another
    figure. Source: BIRD mini-dev, R-VES.
    """
    if not rewards:
        raise ValueError("no reward: the score of no question is undefined")
    return 100 * fmean(sqrt(reward) for reward in rewards)


def soft_f1(gold: Rows, predicted: Rows) -> float:
    """How much of the gold result a prediction holds and how little else, 0 to 1; two empty results are 1.

    Both lose their duplicate rows, and the first row of one is compared with the first of the other, and so on, so the
    order of rows matters though duplicates do not. In a pair of rows a cell counts as found wherever in the other row its
    value stands, so the order of columns does not matter. Shares are of the gold row's width, so a wider prediction
    can count for more than one whole row. A row without a partner counts as one whole row missed, or one too many.
    The score of many questions is the mean, with 0 for a prediction that fails.

    Source: BIRD mini-dev, soft F1. Its first release kept rows in the arbitrary order of a Python set, so that scores
    differed from run to run; this is the corrected one, which keeps the order of the result.
    """
    if not gold and not predicted:
        return 1.0
    gold, predicted = tuple(dict.fromkeys(gold)), tuple(dict.fromkeys(predicted))
    # the longer one's rest has no partner
    shares = [_row_shares(*rows) for rows in zip(gold, predicted, strict=False)]
    found = sum(share[0] for share in shares)
    added = sum(share[1] for share in shares) + max(0, len(predicted) - len(gold))
    missed = sum(share[2] for share in shares) + max(0, len(gold) - len(predicted))
    if not found:
        return 0.0
    precision, recall = found / (found + added), found / (found + missed)
    return 2 * precision * recall / (precision + recall)


def _row_shares(gold: ResultRow, predicted: ResultRow) -> tuple[float, float, float]:
    """Cells of the prediction found in gold, cells of it not found there, and cells of gold missed, by gold's width."""
    found = sum(cell in gold for cell in predicted)
    missed = sum(cell not in predicted for cell in gold)
    return found / len(gold), (len(predicted) - found) / len(gold), missed / len(gold)


def _without_outliers(ratios: list[float]) -> list[float]:
    mean, reach = fmean(ratios), OUTLIER_DEVIATIONS * pstdev(ratios)
    return [ratio for ratio in ratios if abs(ratio - mean) < reach] or ratios
