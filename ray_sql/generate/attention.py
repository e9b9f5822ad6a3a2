"""Attention of questions that are answered together: each sees the schema of its database, kept once, and its own tokens.

A cache of transformers holds every question's whole prompt. Here the prefix that a group of questions shares is held once
(`Prefix`), and each question has only what is its own (`OwnTokens`). All questions of a group are rows of one matrix product with the
prefix's keys; the scores of prefix and own tokens meet in one softmax, so the result is that of the whole prompt.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import Cache

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "ray_sql_shared_prefix"
"""The attention implementation's name in transformers' registry."""
SEEN = "shared_prefixes"
"""The keyword argument of a model's forward that carries `Seen`."""
GROW = 64
"""Columns by which the questions' own tokens get more room."""


@dataclass(frozen=True)
class Prefix:
    """Keys and values of a shared prefix, by layer, `[key heads, tokens, head size]` each."""

    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    length: int


@dataclass(frozen=True)
class Seen:
    """Which prefix the rows of a forward pass see, as (row numbers or all, prefix).

    `bias` `[rows, 1, tokens, own]` is added to the scores of their own tokens; no sequence will be longer than `limit`.
    """

    groups: Sequence[tuple[torch.Tensor | slice, Prefix]]
    bias: torch.Tensor
    limit: int

    @property
    def longest(self) -> int:
        """Tokens of the longest prefix."""
        return max((prefix.length for _, prefix in self.groups), default=0)


class OwnTokens(Cache):  # type: ignore[misc]  # transformers is not followed by mypy
    """Keys and values of the rows' own tokens, by layer `[rows, key heads, columns, head size]`, with room to grow.

    `at` says where the next forward pass writes, and thereby which rows it computes.
    """

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []
        self._first = 0
        self._rows = torch.zeros(0)
        self._columns = torch.zeros(0)
        self._width = 0

    def at(self, first: int, columns: torch.Tensor, width: int) -> None:
        """Write the next pass's tokens to these columns, `[rows, tokens]`, all below `width`, of the rows from `first` on."""
        self._first, self._columns, self._width = first, columns, width
        self._rows = torch.arange(first, first + len(columns), device=columns.device)[:, None]
        for kept in (self.keys, self.values):
            for layer, old in enumerate(kept):
                if old.shape[0] < first + len(columns) or old.shape[2] < self._width:
                    kept[layer] = self._room(old)
                    kept[layer][: old.shape[0], :, : old.shape[2]] = old

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *_: Any, **__: Any) -> Any:
        """Keep `[rows, heads, tokens, size]` of a layer; returns all own keys and values of these rows."""
        for kept, new in ((self.keys, keys), (self.values, values)):
            if layer_idx == len(kept):
                kept.append(self._room(new[:0, :, :0]))
            kept[layer_idx][self._rows, :, self._columns] = new.transpose(1, 2)
        here = slice(self._first, self._first + len(keys))
        return self.keys[layer_idx][here, :, : self._width], self.values[layer_idx][here, :, : self._width]

    def move(self, source: int, target: int) -> None:
        """Overwrite a row with another one."""
        for whole in (*self.keys, *self.values):
            whole[target] = whole[source]

    @property
    def room(self) -> tuple[int, int]:
        """Rows and columns that memory is held for."""
        return (self.keys[0].shape[0], self.keys[0].shape[2]) if self.keys else (0, 0)

    def get_seq_length(self, *_: Any) -> int:
        """Not asked for by models that are given positions."""
        return self._width

    def _room(self, like: torch.Tensor) -> torch.Tensor:
        rows = max(like.shape[0], self._first + len(self._columns))
        columns = max(like.shape[2], -(-self._width // GROW) * GROW)
        return like.new_zeros(
            rows, like.shape[1], columns, like.shape[3]
        )  # zeros: what is masked must still be a number


@contextmanager
def installed(model: PreTrainedModel) -> Iterator[None]:
    """Let `model` compute attention this way wherever a forward pass is given `SEEN`, and as PyTorch's (SDPA) elsewhere."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    before = model.config._attn_implementation
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention function: `[rows, heads, tokens, head size]` in, `[rows, tokens, heads, head size]` out."""
    seen: Seen | None = options.pop(SEEN, None)
    if seen is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)  # type: ignore[no-any-return]
    _refuse(options, seen.limit)
    batch, heads, tokens, size = query.shape
    kv_heads, own, longest = key.shape[1], key.shape[2], seen.longest
    scale = options.get("scaling") or size**-0.5
    # heads that share a key are rows of one product, so that keys need not be repeated
    query = (query * scale).to(key.dtype).reshape(batch, kv_heads, -1, size)
    scores = query.new_full((batch, kv_heads, query.shape[2], longest + own), torch.finfo(key.dtype).min)
    mine = (query @ key.transpose(2, 3)).view(batch, kv_heads, -1, tokens, own)
    scores[..., longest:] = (mine + seen.bias[:, :, None]).view(batch, kv_heads, -1, own)
    layer = int(module.layer_idx)
    for rows, prefix in seen.groups:
        asking = query[rows].transpose(0, 1)
        found = asking.reshape(kv_heads, -1, size) @ prefix.keys[layer].transpose(1, 2)
        scores[rows, :, :, : prefix.length] = found.view(*asking.shape[:3], -1).transpose(0, 1)
    weights = scores.softmax(-1).to(value.dtype)
    output = weights[..., longest:] @ value
    for rows, prefix in seen.groups:
        weighing = weights[rows, :, :, : prefix.length].transpose(0, 1)
        found = weighing.reshape(kv_heads, -1, prefix.length) @ prefix.values[layer]
        output[rows] += found.view(*weighing.shape[:3], -1).transpose(0, 1)
    return output.view(batch, heads, tokens, -1).transpose(1, 2), None


def _refuse(options: dict[str, Any], limit: int) -> None:
    """Raise `NotImplementedError` for attention that is more than a softmax over all that came before."""
    window = options.get("sliding_window")
    if window is not None and window < limit:
        raise NotImplementedError(f"its attention slides over a window of {window} tokens, but sequences reach {limit}")
    for name in ("softcap", "s_aux", "position_bias"):
        if options.get(name) is not None:
            raise NotImplementedError(f"its attention has {name}")
