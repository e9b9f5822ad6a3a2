"""Answers as tokens, and as text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ray_sql.generate.ends import Ends
from ray_sql.generate.questions import Answer, Candidate


@dataclass(frozen=True)
class Decoded:
    """The tokens of a complete answer, and the sum of their log-probabilities where it is known."""

    tokens: list[int]
    logprob: float | None = None


def make_answer(
    ends: Ends,
    prompt_tokens: int,
    decoded: Sequence[Decoded],
    seconds: float,
    constrained: bool = False,
) -> Answer:
    """Return a question's greedy answer with the others: the second may be constrained."""
    answers = []
    for answer in decoded:
        tokens = ends.cut(answer.tokens)
        answers.append(Candidate(ends.text(tokens), len(tokens), answer.logprob))
    greedy, *others = answers
    return Answer(
        raw=greedy.raw,
        prompt_tokens=prompt_tokens,
        new_tokens=greedy.new_tokens,
        seconds=seconds,
        logprob=greedy.logprob,
        constrained=others[0] if constrained else None,
        candidates=others[1:] if constrained else others,
    )
