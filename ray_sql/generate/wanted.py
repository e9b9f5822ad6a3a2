"""The answers that a question gets: greedy, greedy among names that exist, and samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain

import torch

from ray_sql.generate.sampling import Sampling, log_probabilities

Allows = Callable[[int, Sequence[int]], bool]
"""Tells whether the answer to a question, by its index, may begin with these tokens."""
LIKELIEST = 256
"""Tokens that are tried where the likeliest one is not allowed."""
TRIES = 64
"""Draws of a token that is allowed, before the likeliest one is taken."""


@dataclass(frozen=True)
class Wanted:
    """The answers to each question, in this order.

    The first is greedy. With `allows`, the second is greedy among what is allowed, and all samples
    are drawn among it.
    """

    sampling: Sampling | None = None
    allows: Allows | None = None
    letters: Sequence[int] = ()
    """Tokens of one character, by which a name can go on where no likelier token is allowed."""

    @property
    def answers(self) -> int:
        """Return the number of answers to a question."""
        return self._greedy + (self.sampling.samples if self.sampling else 0)

    @property
    def _greedy(self) -> int:
        return 1 if self.allows is None else 2

    @property
    def scores(self) -> bool:
        """Tell whether log-probabilities are computed; a greedy answer alone needs none."""
        return self.answers > 1

    def numbers(self, prompt: Sequence[int], length: int) -> torch.Tensor:
        """Return the random numbers of a prompt, `[length, samples]`."""
        if self.sampling is None:
            return torch.zeros(length, 0, dtype=torch.float64)
        return self.sampling.numbers(prompt, length)

    def choose(
        self, logits: torch.Tensor, numbers: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the next token of each answer, were all allowed, and its log-probability.

        Takes logits `[rows, vocabulary]` and numbers `[rows, samples]`; returns `[rows, answers]`.
        """
        tokens = logits.argmax(-1, keepdim=True)
        if not self.scores:
            return tokens, torch.zeros(tokens.shape)
        tokens = tokens.expand(-1, self._greedy)
        if self.sampling:
            tokens = torch.cat([tokens, self.sampling.draw(logits, numbers)], -1)
        return tokens, log_probabilities(logits, tokens)

    def allowed(
        self,
        question: int,
        answer: int,
        begun: Sequence[int],
        token: int,
        logits: torch.Tensor,
        prompt: Sequence[int],
    ) -> int:
        """Return a token that an answer may go on with: `token`, if it may.

        Takes the answer's place among the question's answers, its tokens so far, and the logits
        `[vocabulary]` behind them. Where nothing likely is allowed, `token` is returned, and the
        answer is free from there on.
        """
        allows = self.allows
        if allows is None or answer == 0 or allows(question, [*begun, token]):
            return token
        if begun and not allows(question, begun):
            return token
        if self.sampling and answer >= self._greedy:
            drawn = self._draw_allowed(question, answer, begun, token, logits, prompt)
            if drawn is not None:
                return drawn
        for other in chain(self._likeliest(logits), self._likeliest_letters(logits)):
            if allows(question, [*begun, other]):
                return other
        return token

    def _likeliest(self, logits: torch.Tensor) -> list[int]:
        likeliest: list[int] = logits.topk(min(LIKELIEST, len(logits))).indices.tolist()
        return likeliest

    def _likeliest_letters(self, logits: torch.Tensor) -> list[int]:
        letters = logits[torch.tensor(self.letters, dtype=torch.long, device=logits.device)]
        places = letters.topk(min(LIKELIEST, len(letters))).indices.tolist()
        return [self.letters[place] for place in places]

    def _draw_allowed(
        self,
        question: int,
        answer: int,
        begun: Sequence[int],
        token: int,
        logits: torch.Tensor,
        prompt: Sequence[int],
    ) -> int | None:
        """Draw until a token is allowed, each time among those that were not drawn yet.

        That is a draw from the allowed tokens by their probabilities.
        """
        assert self.sampling is not None and self.allows is not None
        sample = answer - self._greedy
        numbers = self.sampling.more_numbers(prompt, sample, len(begun), TRIES)
        left = logits.float().clone()
        for number in numbers:
            left[token] = float("-inf")
            token = int(self.sampling.draw(left[None], number.view(1, 1)))
            if self.allows(question, [*begun, token]):
                return token
        return None
