"""Attention of questions that are answered together: each sees the schema of its database, kept once, and its own tokens.

A cache of transformers holds every question's whole prompt. Here the prefix that a group of questions shares is held once
(`Prefix`), and each question has only what is its own (`OwnTokens`). All questions of a group are rows of one matrix product with the
prefix's keys. Attention to the prefix and to own tokens is computed apart and weighted by the sums of their exponentials, as
FlashAttention joins its blocks (arXiv 2205.14135), so the result is that of the whole prompt.
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
    """Which prefix the rows of a forward pass see, as runs (how many rows, prefix or None) in the order of the rows.

    `bias` `[rows, 1, tokens, own]` is added to the scores of their own tokens; no sequence will be longer than `limit`.
    """

    runs: Sequence[tuple[int, Prefix | None]]
    bias: torch.Tensor
    limit: int


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

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> Any:
        """Keep `[rows, heads, tokens, size]` of a layer; returns all own keys and values of these rows."""
        for kept, new in ((self.keys, keys), (self.values, values)):
            if layer_idx == len(kept):
                kept.append(self._room(new[:0, :, :0]))
            kept[layer_idx][self._rows, :, self._columns] = new.transpose(1, 2)
        here = slice(self._first, self._first + len(keys))
        return self.keys[layer_idx][here, :, : self._width], self.values[layer_idx][
            here, :, : self._width
        ]

    def keep(self, rows: Sequence[int], width: int) -> None:
        """Let the first rows be these, of which none comes before its own place; they have their tokens in columns below `width`."""
        first = next((place for place, row in enumerate(rows) if place != row), len(rows))
        moved = torch.tensor(rows[first:], dtype=torch.long, device=self._columns.device)
        for whole in (*self.keys, *self.values):
            whole[first : len(rows), :, :width] = whole[moved, :, :width]

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
    rows, heads, tokens, size = query.shape
    scale = options.get("scaling") or size**-0.5
    # heads that share a key are rows of one product, so that keys need not be repeated
    query = query.to(key.dtype).reshape(rows, key.shape[1], -1, size)
    bias = seen.bias.expand(-1, heads // key.shape[1], -1, -1).reshape(rows, 1, query.shape[2], -1)
    attend = _flash if query.device.type == "cpu" else _plain
    output, total = attend(query, key, value, bias, scale)
    if any(prefix for _, prefix in seen.runs):
        others, totals = zip(
            *_to_prefixes(query, seen.runs, int(module.layer_idx), scale), strict=True
        )
        share = torch.sigmoid(torch.cat(totals) - total)[..., None]
        output = torch.lerp(output.float(), torch.cat(others).float(), share)
    return output.to(value.dtype).view(rows, heads, tokens, -1).transpose(1, 2), None


def _to_prefixes(
    query: torch.Tensor, runs: Sequence[tuple[int, Prefix | None]], layer: int, scale: float
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """What the rows of every run see of their prefix, as `_flash` says it; nothing has the weight 0."""
    attend = _flash if query.device.type == "cpu" else _plain
    for (count, prefix), asking in zip(
        runs, query.split([count for count, _ in runs]), strict=True
    ):
        if prefix is None:
            yield (
                torch.zeros_like(asking),
                asking.new_full(asking.shape[:3], float("-inf"), dtype=torch.float32),
            )
            continue
        together = asking.transpose(0, 1).flatten(1, 2)[None]
        output, total = attend(
            together, prefix.keys[layer][None], prefix.values[layer][None], None, scale
        )
        shape = (asking.shape[1], count, asking.shape[2])
        yield output.view(*shape, -1).transpose(0, 1), total.view(shape).transpose(0, 1)


def _flash(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of `[rows, heads, asking, size]`, and the logarithm of the sum of its exponentials, `[rows, heads, asking]`.

    PyTorch's own kernel for CPUs, called by its name because the public function keeps the second result to itself.
    """
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    output, total = kernel(query, key, value, attn_mask=bias, scale=scale)
    return output, total


def _plain(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same as `_flash`, on any device, for queries that see anything at all."""
    scores = ((query * scale) @ key.transpose(2, 3)).float()
    if bias is not None:
        scores += bias
    total = scores.logsumexp(-1)
    return scores.sub_(total[..., None]).exp_().to(value.dtype) @ value, total


def _refuse(options: dict[str, Any], limit: int) -> None:
    """Raise `NotImplementedError` for attention that is more than a softmax over all that came before."""
    window = options.get("sliding_window")
    if window is not None and window < limit:
        raise NotImplementedError(
            f"its attention slides over a window of {window} tokens, but sequences reach {limit}"
        )
    for name in ("softcap", "s_aux", "position_bias"):
        if options.get(name) is not None:
            raise NotImplementedError(f"its attention has {name}")
