"""Attention of questions that are answered together over the schemas that they share.

A cache of transformers holds every question's whole prompt. Here the prefix of a group of questions
is held once (`Prefix`), and each question has only its own tokens (`OwnTokens`). All questions of a
group are rows of one matrix product with the prefix's keys. Attention to the prefix and to own
tokens is computed apart. The two are weighted by the sums of their exponentials, as FlashAttention
joins its blocks (arXiv 2205.14135). So the result is that of the whole prompt.
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
RUNS = "prefix_runs"
"""The keyword argument of a model's forward that carries `PrefixRuns`."""
ROW_STEP, COLUMN_STEP = 8, 64
"""Rows and columns by which the questions' own tokens get more memory."""


@dataclass(frozen=True)
class Prefix:
    """Keys and values of a shared prefix, by layer, `[key heads, tokens, head size]` each."""

    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    length: int

    @property
    def bytes(self) -> int:
        """Return the bytes of all keys and values."""
        return sum(tensor.nbytes for tensor in (*self.keys, *self.values))


@dataclass(frozen=True)
class PrefixRuns:
    """The prefix that each row of a forward pass sees, as runs of rows in the order `rows`.

    A run is (number of rows, prefix or None). `bias` `[rows, 1, tokens, own]` is added to the
    scores of their own tokens. No sequence will be longer than `limit`.
    """

    runs: Sequence[tuple[int, Prefix | None]]
    rows: torch.Tensor
    bias: torch.Tensor
    limit: int


class OwnTokens(Cache):  # type: ignore[misc]  # transformers is not followed by mypy
    """Keys and values of the rows' own tokens, by layer `[rows, key heads, columns, head size]`.

    `write_to` says where the next forward pass writes, and thereby which rows it computes.
    """

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []
        self._first = 0
        self._rows = torch.zeros(0)
        self._columns = torch.zeros(0)
        self._width = 0

    def write_to(self, first: int, columns: torch.Tensor, width: int) -> None:
        """Write the next pass's tokens to `columns` `[rows, tokens]` of the rows from `first` on.

        All columns are below `width`.
        """
        self._first, self._columns, self._width = first, columns, width
        self._rows = torch.arange(first, first + len(columns), device=columns.device)[:, None]
        for tensors in (self.keys, self.values):
            for layer, old in enumerate(tensors):
                tensors[layer] = self._room(old, first + len(columns))

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keep `[rows, heads, tokens, size]` of a layer; return all own tokens of these rows."""
        for tensors, new in ((self.keys, keys), (self.values, values)):
            if layer_idx == len(tensors):
                tensors.append(self._room(new[:0, :, :0], self._first + len(keys)))
            tensors[layer_idx][self._rows, :, self._columns] = new.transpose(1, 2)
        rows, columns = slice(self._first, self._first + len(keys)), slice(self._width)
        return self.keys[layer_idx][rows, :, columns], self.values[layer_idx][rows, :, columns]

    def append(self, sources: Sequence[int], first: int, width: int) -> None:
        """Copy rows to the rows from `first` on. Their tokens are in columns below `width`."""
        copied = torch.tensor(sources, dtype=torch.long, device=self._columns.device)
        for tensors in (self.keys, self.values):
            for layer, old in enumerate(tensors):
                tensors[layer] = self._room(old, first + len(sources))
                tensors[layer][first : first + len(sources), :, :width] = old[copied, :, :width]

    def compact(self, rows: Sequence[int], width: int) -> None:
        """Keep these rows as the first ones, in this order; none moves down.

        Their tokens are in columns below `width`.
        """
        first = next((place for place, row in enumerate(rows) if place != row), len(rows))
        moved = torch.tensor(rows[first:], dtype=torch.long, device=self._columns.device)
        for tensor in (*self.keys, *self.values):
            tensor[first : len(rows), :, :width] = tensor[moved, :, :width]

    @property
    def allocated(self) -> tuple[int, int]:
        """Rows and columns that memory is held for."""
        return (self.keys[0].shape[0], self.keys[0].shape[2]) if self.keys else (0, 0)

    def get_seq_length(self, *_: Any) -> int:
        """Return the width. Models that are given positions do not ask for it."""
        return self._width

    def _room(self, old: torch.Tensor, rows: int) -> torch.Tensor:
        """Return a tensor with what `old` holds, and room for `rows` and the width."""
        if old.shape[0] >= rows and old.shape[2] >= self._width:
            return old
        rows = max(old.shape[0], -(-rows // ROW_STEP) * ROW_STEP)
        columns = max(old.shape[2], -(-self._width // COLUMN_STEP) * COLUMN_STEP)
        # zeros: what is masked must still be a number
        new = old.new_zeros(rows, old.shape[1], columns, old.shape[3])
        new[: old.shape[0], :, : old.shape[2]] = old
        return new


@contextmanager
def installed(model: PreTrainedModel) -> Iterator[None]:
    """Let `model` compute attention this way in passes that are given `RUNS`, else by SDPA."""
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
    """Serve as transformers' attention function.

    It takes `[rows, heads, tokens, head size]` and returns `[rows, tokens, heads, head size]`.
    """
    shared: PrefixRuns | None = options.pop(RUNS, None)
    if shared is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)  # type: ignore[no-any-return]
    _refuse(options, shared.limit)
    rows, heads, tokens, size = query.shape
    scale = options.get("scaling") or size**-0.5
    # heads that share a key are rows of one product, so that keys need not be repeated
    query = query.to(key.dtype).reshape(rows, key.shape[1], -1, size)
    bias = shared.bias.expand(-1, heads // key.shape[1], -1, -1)
    bias = bias.reshape(rows, 1, query.shape[2], -1)
    output, total = attend(query, key, value, bias, scale)
    if any(prefix for _, prefix in shared.runs):
        by_run = list(
            _attend_to_prefixes(query[shared.rows], shared.runs, int(module.layer_idx), scale)
        )
        back = shared.rows.argsort()
        prefix_output = torch.cat([outputs for outputs, _ in by_run])[back]
        prefix_total = torch.cat([totals for _, totals in by_run])[back]
        share = torch.sigmoid(prefix_total - total)[..., None]
        output = torch.lerp(output.float(), prefix_output.float(), share)
    return output.to(value.dtype).view(rows, heads, tokens, -1).transpose(1, 2), None


def _attend_to_prefixes(
    query: torch.Tensor, runs: Sequence[tuple[int, Prefix | None]], layer: int, scale: float
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield the result of `attend` for every run and its prefix; no prefix has the weight 0."""
    queries = query.split([rows for rows, _ in runs])
    for (rows, prefix), own in zip(runs, queries, strict=True):
        if prefix is None:
            nothing = own.new_full(own.shape[:3], float("-inf"), dtype=torch.float32)
            yield torch.zeros_like(own), nothing
            continue
        merged = own.transpose(0, 1).flatten(1, 2)[None]
        keys, values = prefix.keys[layer][None], prefix.values[layer][None]
        output, total = attend(merged, keys, values, None, scale)
        shape = (own.shape[1], rows, own.shape[2])
        yield output.view(*shape, -1).transpose(0, 1), total.view(shape).transpose(0, 1)


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return attention, and the logarithm of the sum of its exponentials.

    They are `[rows, heads, queries, size]` and `[rows, heads, queries]`. Each query sees a token.
    """
    attend_on_device = attend_by_kernel if query.device.type == "cpu" else attend_by_products
    return attend_on_device(query, key, value, bias, scale)


def attend_by_kernel(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute `attend` by PyTorch's own kernel for CPUs.

    It is called by its private name, because the public function keeps the second result to itself.
    """
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    output, total = kernel(query, key, value, attn_mask=bias, scale=scale)
    return output, total


def attend_by_products(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute `attend` by matrix products, on any device."""
    scores = ((query * scale) @ key.transpose(2, 3)).float()
    if bias is not None:
        scores += bias
    total = scores.logsumexp(-1)
    return scores.sub_(total[..., None]).exp_().to(value.dtype) @ value, total


def _refuse(options: dict[str, Any], limit: int) -> None:
    """Raise `NotImplementedError` for attention that is more than a softmax over all before."""
    window = options.get("sliding_window")
    if window is not None and window < limit:
        raise NotImplementedError(
            f"its attention slides over a window of {window} tokens, but sequences reach {limit}"
        )
    for name in ("softcap", "s_aux", "position_bias"):
        if options.get(name) is not None:
            raise NotImplementedError(f"its attention has {name}")
