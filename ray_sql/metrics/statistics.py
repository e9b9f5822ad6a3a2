"""Say how far to trust a score: intervals of one accuracy, and a paired test of two.

scipy is imported inside the functions, because it takes seconds and most jobs need no statistics.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import NormalDist

FEW_QUESTIONS = 100
"""Fewer questions than this tell a share to 10 points at best."""


@dataclass(frozen=True)
class Interval:
    """Two shares between 0 and 1."""

    low: float
    high: float


def how_little_is_known(questions: int) -> str:
    """Return to how many points, up and down, a score of so few questions is known.

    It is that of one half of them. Empty for no question, and for `FEW_QUESTIONS` or more.
    """
    if not 0 < questions < FEW_QUESTIONS:
        return ""
    interval = wilson_interval(questions // 2, questions)
    points, plural = 50 * (interval.high - interval.low), "s" * (questions > 1)
    return f"a score of {questions} question{plural} is known to ±{points:.0f} points"


def wilson_interval(successes: int, total: int, confidence: float = 0.95) -> Interval:
    """Return the true rates under which `successes` of `total` is no surprise.

    Unlike the textbook interval around the mean, it stays within 0 and 1. It is honest for few
    trials and for rates near the ends. Without any trial it is (0, 1). Source: Wilson 1927.

    Raises:
        ValueError: counts or a confidence that cannot be.
    """
    if not 0 <= successes <= total:
        raise ValueError(f"{successes} successes of {total} trials")
    _check_confidence(confidence)
    if total == 0:
        return Interval(0.0, 1.0)
    from scipy.stats import binomtest

    low, high = binomtest(successes, total).proportion_ci(confidence, method="wilson")
    return Interval(float(low), float(high))


def clustered_interval(
    groups: Sequence[tuple[float, int]],
    confidence: float = 0.95,
    draws: int = 5_000,
    seed: int = 14,
) -> Interval | None:
    """Return the interval of a mean over questions that come in groups, one group per database.

    Questions on one database succeed and fail together. An interval that counts questions alone
    is therefore too narrow for new databases. Here whole databases are drawn with replacement,
    and the interval holds the middle 95 % of the means. With fewer than about 20 groups it is
    still too narrow (Cameron, Gelbach and Miller 2008).

    Sources: Efron and Tibshirani 1993, chapter 13 (percentile interval) and chapter 8 (the unit
    to resample); Miller 2024, "Adding Error Bars to Evals" (arXiv 2411.00640).

    Args:
        groups: (sum, number of questions) of each database.

    Returns:
        None where nothing can be resampled: fewer than two groups, or the same mean in all.
    """
    _check_confidence(confidence)
    groups = [(total, size) for total, size in groups if size]
    if len({total / size for total, size in groups}) < 2:
        return None
    import numpy as np

    # How often each group is drawn, one row per draw.
    drawn = np.random.default_rng(seed).multinomial(
        len(groups), [1 / len(groups)] * len(groups), size=draws
    )
    totals, sizes = (drawn @ np.array(column) for column in zip(*groups, strict=True))
    low, high = np.quantile(totals / sizes, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(low), float(high))


def mcnemar(only_a: int, only_b: int) -> float:
    """Return the two-sided p of "a and b are equally good".

    It is the exact binomial chance of a split at least as uneven. Source: McNemar 1947.

    Args:
        only_a: questions that only a got right.
        only_b: questions that only b got right.
    """
    if only_a < 0 or only_b < 0:
        raise ValueError(f"counts of questions: {only_a}, {only_b}")
    if only_a + only_b == 0:
        return 1.0
    from scipy.stats import binomtest

    return float(binomtest(min(only_a, only_b), only_a + only_b).pvalue)


def resolvable_difference(
    questions: int, discordant: int, alpha: float = 0.05, power: float = 0.8
) -> float:
    """Return the difference in accuracy that a paired test finds with `power`, a share of 0 to 1.

    Let psi be the share of questions that only one of the two got right, as observed. Then n
    questions find a difference d where n d^2 = (z_alpha sqrt(psi) + z_power sqrt(psi - d^2))^2,
    z_alpha two-sided. The equation is solved for d. Source: Connor 1987, Biometrics 43, 207-211.

    With few discordant questions d would exceed psi, which is impossible. The answer is then the
    d at which all discordant questions favour one side, (z_alpha + z_power)^2 / n. This is an
    approximation: the exact test needs slightly more. 1.0 means that nothing can be resolved.
    """
    if not 0 <= discordant <= questions or questions == 0:
        raise ValueError(f"{discordant} discordant of {questions} questions")
    z_alpha, z_power = NormalDist().inv_cdf(1 - alpha / 2), NormalDist().inv_cdf(power)
    root = z_alpha * sqrt(questions) + z_power * sqrt(max(0.0, questions + z_power**2 - z_alpha**2))
    difference = sqrt(discordant / questions) * root / (questions + z_power**2)
    return min(1.0, max(difference, (z_alpha + z_power) ** 2 / questions))


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence {confidence}: a share between 0 and 1")
