"""Compare two models on the same questions: the paired test, and its significance level."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ray_sql.metrics.statistics import mcnemar

ALPHA = 0.05
"""The largest p at which a difference counts."""


@dataclass(frozen=True)
class PairedTest:
    """The questions that only one of two models gets right; `p` is McNemar's, exact, two-sided."""

    only_a: int
    only_b: int

    @property
    def p(self) -> float:
        """Return the chance of a split at least as uneven, were both models equally good."""
        return mcnemar(self.only_a, self.only_b)

    @property
    def a_is_better(self) -> bool:
        """Tell whether the first model is significantly better."""
        return self.only_a > self.only_b and self.p <= ALPHA

    @property
    def b_is_better(self) -> bool:
        """Tell whether the second model is significantly better."""
        return self.only_b > self.only_a and self.p <= ALPHA

    def named(self, a: str, b: str) -> dict[str, float]:
        """Return the test as `metrics.json` keeps it, with the models' names in its keys."""
        return {f"only_{a}": self.only_a, f"only_{b}": self.only_b, "mcnemar_p": self.p}


def paired_test(pairs: Iterable[tuple[bool, bool]]) -> PairedTest:
    """Compare two models by (right in a, right in b) of each question that both were judged on."""
    marks = list(pairs)
    return PairedTest(sum(a and not b for a, b in marks), sum(b and not a for a, b in marks))
