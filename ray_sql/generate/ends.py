"""The end of an answer: that of the turn, or of its first code block, for which a prompt asks.

`data.answers` says what a code block is, and that none counts in a model's thoughts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ray_sql.data import answers

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PROMPT_END = 32
"""Tokens at the end of a prompt in which a template begins the model's thoughts."""


class Ends:
    """The ends of one model's answers; remembers which tokens may close a code block.

    `prompt` is one of the prompts: an answer begins in its thoughts if a prompt ends in them.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int]
    ) -> None:
        self._tokenizer = tokenizer
        self._may_close: dict[int, bool] = {}
        own = model.generation_config.eos_token_id if model.generation_config else None
        named = own if isinstance(own, list) else [own]
        stops = {tokenizer.eos_token_id, *named} - {None}
        self.stops = sorted(stops)
        """Tokens that end an answer: the tokenizer's, and others of the generation config."""
        self._begun = answers.thoughts_begun(str(tokenizer.decode(list(prompt[-PROMPT_END:]))))

    def __call__(self, tokens: Sequence[int]) -> bool:
        """Tell whether an answer is complete with its last token."""
        return tokens[-1] in self.stops or (self.may_close(tokens[-1]) and self.closed(tokens))

    def may_close(self, token: int) -> bool:
        """Tell whether a token has part of a fence in it."""
        if token not in self._may_close:
            text = self._tokenizer.decode([token])
            self._may_close[token] = any(sign in text for sign in answers.FENCE_SIGNS)
        return self._may_close[token]

    def closed(self, tokens: Sequence[int]) -> bool:
        """Tell whether a code block was opened and closed, behind the thoughts."""
        return answers.is_complete(self._begun + str(self._tokenizer.decode(list(tokens))))

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
        """Return an answer as text, with the marks of thoughts, special tokens or not."""
        whole = self._begun + str(self._tokenizer.decode(list(tokens)))
        if answers.has_thoughts(whole):
            return whole
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=True))
