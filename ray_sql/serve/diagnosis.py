"""Tell from an endpoint's answers whether it is the model that was measured, and if not, why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ray_sql.metrics.paired import PairedTest, paired_test

Verdict = Literal[
    "equal",
    "within rounding",
    "sampling is on",
    "another template",
    "truncated prompt",
    "no adapter",
    "another base",
    "another quantization",
    "another rank",
    "another adapter",
    "other weights",
]
Said = tuple[Verdict, str] | None
"""A part that the endpoint says to have otherwise than measured, and the evidence."""
FINE: set[Verdict] = {"equal", "within rounding"}
SAME_SHARE = {"float32": 0.9, "bfloat16": 0.75}
"""The share of answers that rounding leaves as they were, by the type that computed them."""
MOST_UNSTEADY = 2
"""Questions whose second answer may differ before the cause is looked for."""


@dataclass(frozen=True)
class Compared:
    """One question: the measured answers of the adapter and its base, and the endpoint's.

    Answers are SQL or links, empty where none was found; `base` is None where it was not measured.
    `again` is a second answer of the endpoint, beside other questions. `alone` are two more with
    nothing beside them. Both are None where they were not asked for.
    """

    id: str
    question: str
    measured: str
    base: str | None
    served: str
    again: str | None
    alone: tuple[str, str] | None
    measured_right: bool
    served_right: bool
    measured_prompt: int
    served_prompt: int

    @property
    def is_same(self) -> bool:
        """Tell whether the endpoint's answer is the measured one."""
        return self.served == self.measured

    @property
    def is_unsteady(self) -> bool:
        """Tell whether a second answer differs: it was drawn, or rounded otherwise."""
        return self.again not in (None, self.served)

    @property
    def is_sampled(self) -> bool:
        """Tell whether two answers differ that were computed alike."""
        return self.alone is not None and self.alone[0] != self.alone[1]


@dataclass(frozen=True)
class Diagnosis:
    """The verdict on an endpoint, with the evidence in sentences and in numbers."""

    verdict: Verdict
    evidence: list[str]
    numbers: dict[str, Any]

    @property
    def is_fine(self) -> bool:
        """Tell whether the endpoint is the model that was measured."""
        return self.verdict in FINE


def diagnose(
    compared: Sequence[Compared], said: Said = None, compute_type: str = "float32"
) -> Diagnosis:
    """Return what all questions together, and its own description, say about an endpoint.

    The answers were measured in `compute_type`, `float32` or `bfloat16`.
    """
    same = sum(one.is_same for one in compared)
    differing = [one for one in compared if one.base not in (None, one.measured)]
    as_base = sum(one.served == one.base for one in differing)
    as_tuned = sum(one.is_same for one in differing)
    alone = sum(one.alone is not None for one in compared)
    drawn = sum(one.is_sampled for one in compared)
    offsets = [one.served_prompt - one.measured_prompt for one in compared]
    test = paired_test((one.measured_right, one.served_right) for one in compared)
    numbers = {
        "questions": len(compared),
        "same": same,
        "base_and_adapter_differ": len(differing),
        "as_base": as_base,
        "repeated": sum(one.again is not None for one in compared),
        "unsteady": sum(one.is_unsteady for one in compared),
        "repeated_alone": alone,
        "unsteady_alone": drawn,
        "prompts_of_other_length": sum(offset != 0 for offset in offsets),
        **test.named("measured", "served"),
    }
    share = SAME_SHARE.get(compute_type, min(SAME_SHARE.values()))
    evidence = [f"{same} of {len(compared)} answers are the measured ones"]
    verdict: Verdict
    if drawn > alone / 4:
        verdict = "sampling is on"
        evidence.append(f"{drawn} of {alone} questions got two answers, with nothing beside them")
    elif same < len(compared) and any(offsets):
        verdict, reason = _prompt_verdict(compared, offsets)
        evidence.append(reason)
    elif as_base > as_tuned:
        verdict = "no adapter"
        evidence.append(
            f"where base and adapter differ, {as_base} of {len(differing)} answers are the base's"
        )
    elif said is not None:
        verdict, reason = said
        evidence.append(reason)
    elif same == len(compared):
        verdict = "equal"
    elif same >= share * len(compared) and not test.a_is_better:
        verdict = "within rounding"
    else:
        verdict = "other weights"
        evidence.append(
            "the prompts have the measured lengths, and answers alone do not tell which: look for "
            "an older adapter, another base, another rank or another quantization"
        )
    evidence.append(_accuracy(compared, test))
    return Diagnosis(verdict, evidence, numbers)


def _prompt_verdict(compared: Sequence[Compared], offsets: Sequence[int]) -> tuple[Verdict, str]:
    """Tell a prompt that is cut where it is long from one that is written otherwise."""
    cut = {one.served_prompt for one, offset in zip(compared, offsets, strict=True) if offset < 0}
    others = sum(offset != 0 for offset in offsets)
    if max(offsets) <= 0 and len(cut) == 1:
        return "truncated prompt", (
            f"{others} of {len(compared)} prompts are longer than {cut.pop()} tokens, and the "
            "endpoint read no more of them"
        )
    return "another template", (
        f"{others} of {len(compared)} prompts have another length (from {min(offsets):+d} to "
        f"{max(offsets):+d} tokens)"
    )


def _accuracy(compared: Sequence[Compared], test: PairedTest) -> str:
    right = sum(one.served_right for one in compared)
    before = sum(one.measured_right for one in compared)
    return f"right: {right} of {len(compared)}, measured {before} (McNemar p = {test.p:.2g})"
