"""Guesses at an answer's next tokens: what followed the same tokens before, in the prompt or in the answer itself.

SQL repeats the names of its schema, and a small model that rambles repeats itself. A guess costs little to check: a pass over a few
tokens of a question takes about as long as over one, so several are computed at once, and those that greedy decoding would have chosen
are kept. Source: prompt lookup decoding (Saxena 2023), after LLMA (Yang et al., arXiv 2304.04487).
"""

from __future__ import annotations

from collections.abc import Sequence

SIZES = (3, 2, 1)
"""Lengths of what has to be the same, tried in this order."""


class Draft:
    """The tokens of a question and its answer so far, and where each short sequence of them last occurred."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self._tokens: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}
        for token in tokens:
            self.add(token)

    def add(self, token: int) -> None:
        """One more token."""
        for size in SIZES:  # what ended with the last one is followed by this one
            if len(self._tokens) >= size:
                self._after[tuple(self._tokens[-size:])] = len(self._tokens)
        self._tokens.append(token)

    def guess(self, most: int) -> list[int]:
        """Up to `most` tokens that may come next: what came last time, again and again if need be; none if nothing was alike."""
        for size in SIZES:
            place = self._after.get(tuple(self._tokens[-size:]))
            if place is not None:
                period = len(self._tokens) - place
                return [self._tokens[place + number % period] for number in range(most)]
        return []
