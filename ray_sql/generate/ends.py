"""The end of an answer: that of the turn, or of its code block, for the rest would be ignored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

FENCE = "```"


class Ends:
    """The ends of one model's answers; remembers which tokens may close a code block."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._has_tick: dict[int, bool] = {}
        own = model.generation_config.eos_token_id if model.generation_config else None
        named = own if isinstance(own, list) else [own]
        stops = {tokenizer.eos_token_id, *named} - {None}
        self.stops = sorted(stops)
        """Tokens that end an answer: the tokenizer's, and others of the generation config."""

    def __call__(self, tokens: Sequence[int]) -> bool:
        """Tell whether an answer is complete with its last token."""
        return tokens[-1] in self.stops or (self.may_close(tokens[-1]) and self.closed(tokens))

    def may_close(self, token: int) -> bool:
        """Tell whether a token has part of a fence in it."""
        if token not in self._has_tick:
            self._has_tick[token] = "`" in self._tokenizer.decode([token])
        return self._has_tick[token]

    def closed(self, tokens: Sequence[int]) -> bool:
        """Tell whether a code block was opened and closed."""
        return str(self._tokenizer.decode(list(tokens))).count(FENCE) >= 2

    def cut(self, tokens: Sequence[int]) -> list[int]:
        """Return the tokens before the end of the turn, without padding."""
        end = len(tokens)
        for index, token in enumerate(tokens):
            if token in self.stops:
                end = index
                break
        # an answer that ended before the longest of its batch is padded
        while end and tokens[end - 1] == self._tokenizer.pad_token_id:
            end -= 1
        return list(tokens[:end])

    def text(self, tokens: Sequence[int]) -> str:
        """Return an answer as text."""
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=True))
