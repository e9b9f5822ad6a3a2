"""Guesses at an answer's next tokens: those that followed the same tokens before.

SQL repeats the names of its schema, and a small model that rambles repeats itself. A guess costs
little to check: a pass over a few tokens of a question takes about as long as over one. So several
are computed at once, and those that greedy decoding would have chosen are kept. Source: prompt
lookup decoding (Saxena 2023), after LLMA (Yang et al., arXiv 2304.04487).
"""

from __future__ import annotations

from collections.abc import Sequence

SIZES = (3, 2, 1)
"""Lengths of the token sequences that are looked up, tried in this order."""


class Draft:
    """The tokens of a question and its answer so far, and the last place of each short sequence."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self._tokens: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}
        for token in tokens:
            self.add(token)

    def copy(self) -> Draft:
        """Return a draft of its own with the same tokens."""
        draft = Draft([])
        draft._tokens, draft._after = list(self._tokens), dict(self._after)
        return draft

    def add(self, token: int) -> None:
        """Add the next token."""
        for size in SIZES:  # the sequences that end with the last token are followed by this one
            if len(self._tokens) >= size:
                self._after[tuple(self._tokens[-size:])] = len(self._tokens)
        self._tokens.append(token)

    def guess(self, most: int) -> list[int]:
        """Return up to `most` tokens that may come next, repeated if need be, or none."""
        for size in SIZES:
            place = self._after.get(tuple(self._tokens[-size:]))
            if place is not None:
                period = len(self._tokens) - place
                return [self._tokens[place + offset % period] for offset in range(most)]
        return []
