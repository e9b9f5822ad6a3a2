"""How far to trust a score: an interval for one accuracy, a test for two on the same questions."""

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


def mcnemar(only_a: int, only_b: int) -> float:
    """Two-sided p of "a and b are equally good", from the questions that only one of them got right.

    Exact: the binomial chance of a split at least as uneven as this one. Source: McNemar 1947.
    """
    if only_a < 0 or only_b < 0:
        raise ValueError(f"counts of questions: {only_a}, {only_b}")
    total = only_a + only_b
    tail = sum(comb(total, count) for count in range(min(only_a, only_b) + 1))
    return min(1.0, 2 * tail / (1 << total))
