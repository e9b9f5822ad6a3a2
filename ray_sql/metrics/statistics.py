"""How far to trust a score: intervals for one accuracy, a test for two on the same questions, and what that test can see."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb, sqrt
from statistics import NormalDist


@dataclass(frozen=True)
class Interval:
    """Two shares between 0 and 1."""

    low: float
    high: float


def wilson_interval(successes: int, total: int, confidence: float = 0.95) -> Interval:
    """The range of true rates under which `successes` of `total` is no surprise; (0, 1) for no trial at all.

    Unlike the textbook interval around the mean it stays within 0 and 1 and is honest for few trials and for rates near
    the ends. Source: Wilson 1927.
    """
    if not 0 <= successes <= total:
        raise ValueError(f"{successes} successes of {total} trials")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence {confidence}: a share between 0 and 1")
    if total == 0:
        return Interval(0.0, 1.0)
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    rate = successes / total
    scale = 1 + z * z / total
    middle = (rate + z * z / (2 * total)) / scale
    reach = z / scale * sqrt(rate * (1 - rate) / total + z * z / (4 * total * total))
    # At the ends the formula gives exactly 0 and 1, floating point almost.
    low = 0.0 if successes == 0 else middle - reach
    high = 1.0 if successes == total else middle + reach
    return Interval(low, high)


def clustered_interval(
    groups: Sequence[tuple[float, int]],
    confidence: float = 0.95,
    draws: int = 5_000,
    seed: int = 14,
) -> Interval | None:
    """The range of a mean over questions that come in groups, one (sum, number of questions) a database.

    Questions on one database succeed and fail together, so that many of them say less than as many independent ones, and an
    interval that counts questions alone is too narrow for new databases. Here whole databases are drawn with replacement, and
    the interval holds the middle 95 % of the means so found. Sources: Efron and Tibshirani 1993, chapters 13 (percentile
    interval) and 8 (the unit to resample); Miller 2024, "Adding Error Bars to Evals" (arXiv 2411.00640), on questions in
    clusters. With few groups, below 20 or so, it is still too narrow (Cameron, Gelbach and Miller 2008).

    None where there is nothing to resample: fewer than two groups, or the same mean in all of them.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence {confidence}: a share between 0 and 1")
    groups = [(total, size) for total, size in groups if size]
    if len({total / size for total, size in groups}) < 2:
        return None
    import numpy as np

    # how often each group is drawn, one row a draw
    drawn = np.random.default_rng(seed).multinomial(
        len(groups), [1 / len(groups)] * len(groups), size=draws
    )
    totals, sizes = (drawn @ np.array(column) for column in zip(*groups, strict=True))
    low, high = np.quantile(totals / sizes, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(low), float(high))


def mcnemar(only_a: int, only_b: int) -> float:
    """Two-sided p of "a and b are equally good", from the questions that only one of them got right.

    Exact: the binomial chance of a split at least as uneven as this one. Source: McNemar 1947.
    """
    if only_a < 0 or only_b < 0:
        raise ValueError(f"counts of questions: {only_a}, {only_b}")
    total = only_a + only_b
    tail = sum(comb(total, count) for count in range(min(only_a, only_b) + 1))
    return min(1.0, 2 * tail / (1 << total))


def resolvable_difference(
    questions: int, discordant: int, alpha: float = 0.05, power: float = 0.8
) -> float:
    """The difference in accuracy that a paired test on so many questions finds with `power`, as a share between 0 and 1.

    With the share psi of questions that only one of the two got right, as observed, n questions find a difference d where
    n d^2 = (z_alpha sqrt(psi) + z_power sqrt(psi - d^2))^2, z_alpha two-sided; solved for d. Source: Connor 1987, Biometrics
    43, 207-211. Where so few questions are discordant that d would exceed psi, which it cannot, the answer is the d at which
    all discordant questions favour one side, (z_alpha + z_power)^2 / n. It is an approximation: the exact test asks a little
    more. 1.0 means that so few questions resolve nothing.
    """
    if not 0 <= discordant <= questions or questions == 0:
        raise ValueError(f"{discordant} discordant of {questions} questions")
    z_alpha, z_power = NormalDist().inv_cdf(1 - alpha / 2), NormalDist().inv_cdf(power)
    root = z_alpha * sqrt(questions) + z_power * sqrt(max(0.0, questions + z_power**2 - z_alpha**2))
    found = sqrt(discordant / questions) * root / (questions + z_power**2)
    return min(1.0, max(found, (z_alpha + z_power) ** 2 / questions))
