"""BIRD's two scores beside execution accuracy: R-VES and soft F1.

R-VES says how fast a right query is, soft F1 how nearly right a wrong one is. Both follow the
evaluation code of BIRD mini-dev (github.com/bird-bench/mini_dev, `evaluation/evaluation_ves.py` and
`evaluation_f1.py`) to the letter, but for the differences that each docstring names.
"""

from collections.abc import Sequence
from math import isfinite, sqrt
from statistics import fmean, pstdev

from ray_sql.database import ResultRow, Rows

REWARDS = ((2.0, 1.25), (1.0, 1.0), (0.5, 0.75), (0.25, 0.5))
"""(least ratio of gold's time to the prediction's, reward of a right prediction), best first."""
LEAST_REWARD = 0.25
OUTLIER_DEVIATIONS = 3


def ves_reward(gold_seconds: Sequence[float], predicted_seconds: Sequence[float]) -> float:
    """Return the reward of a *right* prediction for its speed, 0.25 to 1.25.

    0.25 means over four times slower than gold, 1.25 twice as fast. The ratios gold / predicted
    lose their outliers, three standard deviations or more from their mean. The mean of the rest is
    graded. A wrong or failing prediction earns 0 and needs no call. Where all ratios are equal, as
    with a single pair, the official code drops them all, fails and gives 0. Here they count.

    Needs an idle machine: another process that runs in between moves the ratio, and the same
    prediction then earns another reward. Source: BIRD mini-dev, R-VES.

    Args:
        gold_seconds: seconds of repeated runs of gold, officially 100.
        predicted_seconds: seconds of the prediction, each run right beside the same one of gold.
    """
    if not gold_seconds or len(gold_seconds) != len(predicted_seconds):
        raise ValueError(
            f"{len(gold_seconds)} times of gold and {len(predicted_seconds)} of the prediction: "
            "need pairs"
        )
    if not all(time > 0 and isfinite(time) for time in (*gold_seconds, *predicted_seconds)):
        raise ValueError("a time that is not a positive number of seconds")
    pairs = zip(gold_seconds, predicted_seconds, strict=True)
    ratio = fmean(_without_outliers([gold / predicted for gold, predicted in pairs]))
    for least, reward in REWARDS:
        if ratio >= least:
            return reward
    return LEAST_REWARD


def r_ves(rewards: Sequence[float]) -> float:
    """Return the reward-based valid efficiency score of all questions, 0 to 111.8.

    It is the mean of sqrt(reward) in per cent, with one reward per question, right or wrong. The
    reward is `ves_reward` if the prediction is right under BIRD's execution accuracy, else 0. Above
    100 means faster than gold. It needs an idle machine, and another machine gives another figure.
    Source: BIRD mini-dev, R-VES.
    """
    if not rewards:
        raise ValueError("no reward: the score of no question is undefined")
    return 100 * fmean(sqrt(reward) for reward in rewards)


def soft_f1(gold: Rows, predicted: Rows) -> float:
    """Return the F1 of a prediction's cells against gold's, 0 to 1; two empty results are 1.

    Both results lose their duplicate rows. Then the first rows are compared, the second rows, and
    so on, so the order of rows matters and duplicates do not. A cell counts as found wherever its
    value stands in the other row, so the order of columns does not matter. Shares are of the gold
    row's width, so a wider prediction can count for more than one whole row. A row without a
    partner counts as one whole row missed, or one too many. The score of many questions is the
    mean, with 0 for a prediction that fails.

    Source: BIRD mini-dev, soft F1. Its first release kept rows in the arbitrary order of a Python
    set, so scores differed from run to run. This is the corrected one, which keeps the order.
    """
    if not gold and not predicted:
        return 1.0
    gold, predicted = tuple(dict.fromkeys(gold)), tuple(dict.fromkeys(predicted))
    # The rest of the longer result has no partner.
    shares = [_row_shares(*rows) for rows in zip(gold, predicted, strict=False)]
    shared = sum(share[0] for share in shares)
    spare = sum(share[1] for share in shares) + max(0, len(predicted) - len(gold))
    missed = sum(share[2] for share in shares) + max(0, len(gold) - len(predicted))
    if not shared:
        return 0.0
    precision, recall = shared / (shared + spare), shared / (shared + missed)
    return 2 * precision * recall / (precision + recall)


def _row_shares(gold: ResultRow, predicted: ResultRow) -> tuple[float, float, float]:
    """Return shares of the gold row's width: predicted cells in gold, others, and missed cells."""
    gold_cells, predicted_cells = set(gold), set(predicted)  # rows may have thousands of cells
    shared = sum(cell in gold_cells for cell in predicted)
    missed = sum(cell not in predicted_cells for cell in gold)
    return shared / len(gold), (len(predicted) - shared) / len(gold), missed / len(gold)


def _without_outliers(ratios: list[float]) -> list[float]:
    mean, reach = fmean(ratios), OUTLIER_DEVIATIONS * pstdev(ratios)
    return [ratio for ratio in ratios if abs(ratio - mean) < reach] or ratios
