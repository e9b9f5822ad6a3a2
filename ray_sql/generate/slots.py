"""Answers on their way: those of a question that have the same tokens so far share a slot."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from ray_sql.generate.draft import Draft

Ended = Callable[[Sequence[int]], bool]
"""Tells whether an answer is complete, given its tokens so far."""


Pick = Callable[[int, int, list[int]], tuple[int, float]]
"""Returns the token, and its log-probability, by which an answer goes on.

Takes the place in the pass, the answer, and its tokens so far.
"""


@dataclass(frozen=True)
class Branch:
    """Tokens by which some answers of a slot go on alike, with their log-probabilities."""

    answers: list[int]
    tokens: list[int]
    logprobs: list[float]


@dataclass
class Slot:
    """Answers to a question that have been alike so far, by their places in `Wanted`.

    Their own tokens have the columns from `start` to before `end`; `tokens` are those they answer.
    """

    question: int
    group: int
    answers: list[int]
    draft: Draft
    start: int = 0
    end: int = 0
    tokens: list[int] = field(default_factory=list)
    logprob: float = 0.0
    """The sum of the log-probabilities of `tokens`."""

    def branches(self, guesses: Sequence[int], pick: Pick) -> list[Branch]:
        """Return how the answers go on, after the last token and after each guess that is right."""
        branches = []
        following = self.answers
        tokens: list[int] = []
        scores: list[float] = []
        for place, guess in enumerate([*guesses, None]):
            by_token: dict[int, list[int]] = defaultdict(list)
            score_of = {}
            for answer in following:
                token, score_of[token] = pick(place, answer, [*self.tokens, *tokens])
                by_token[token].append(answer)
            for token, answers in by_token.items():
                if token != guess:
                    branches.append(Branch(answers, [*tokens, token], [*scores, score_of[token]]))
            if guess not in by_token:
                break
            following = by_token[guess]
            tokens.append(guess)
            scores.append(score_of[guess])
        return branches

    def copy(self) -> Slot:
        """Return a slot of its own with the same tokens."""
        return replace(self, tokens=list(self.tokens), draft=self.draft.copy())

    def follow(self, branch: Branch, max_new_tokens: int, ended: Ended) -> bool:
        """Go on by a branch, up to the end of the answer; tell whether it is complete."""
        self.answers = branch.answers
        self.end += len(branch.tokens)
        for token, logprob in zip(branch.tokens, branch.logprobs, strict=True):
            self.tokens.append(token)
            self.logprob += logprob
            self.draft.add(token)
            if len(self.tokens) >= max_new_tokens or ended(self.tokens):
                return True
        return False
