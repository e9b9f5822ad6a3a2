"""Where an answer ends: at the end of the turn, or when its code block is closed, for all that follows would be ignored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

FENCE = "```"


class Ends:
    """The ends of one model's answers; what a token may close is remembered."""

    def __init__(self, model: PreTrainedModel | None, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._ticks: dict[int, bool] = {}
        own = model.generation_config.eos_token_id if model and model.generation_config else None
        named = own if isinstance(own, list) else [own]
        self.stops = sorted(
            {token for token in [tokenizer.eos_token_id, *named] if token is not None}
        )
        """Tokens that end an answer: the tokenizer's and whatever else the model's own generation config names."""

    def __call__(self, question: int, said: Sequence[int]) -> bool:
        """Whether an answer is complete with its last token."""
        return said[-1] in self.stops or (self.may_close(said[-1]) and self.closed(said))

    def may_close(self, token: int) -> bool:
        """Whether a token has part of a fence in it."""
        if token not in self._ticks:
            self._ticks[token] = "`" in self._tokenizer.decode([token])
        return self._ticks[token]

    def closed(self, said: Sequence[int]) -> bool:
        """Whether a code block was opened and closed."""
        return str(self._tokenizer.decode(list(said))).count(FENCE) >= 2

    def cut(self, said: Sequence[int]) -> list[int]:
        """The tokens before the end of the turn, without padding."""
        end = next(
            (position for position, token in enumerate(said) if token in self.stops), len(said)
        )
        while (
            end and said[end - 1] == self._tokenizer.pad_token_id
        ):  # an answer that ended before the longest of its batch
            end -= 1
        return list(said[:end])

    def text(self, said: Sequence[int]) -> str:
        """An answer as text."""
        return str(self._tokenizer.decode(list(said), skip_special_tokens=True))
