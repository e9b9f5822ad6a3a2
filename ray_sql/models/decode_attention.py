"""Attention of questions that are answered together over the schemas that they share.

A cache of transformers holds every question's whole prompt. Here the prefix of a group of questions
is held once (`Prefix`), and each question has only its own tokens (`OwnTokens`). All questions of a
group are rows of one matrix product with the prefix's keys. Attention to the prefix and to own
tokens is computed apart. The two are weighted by the sums of their exponentials, as FlashAttention
joins its blocks (arXiv 2205.14135). So the result is that of the whole prompt. A layer that slides
over a window sees of both what lies less than the window before a token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from transformers import Cache
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from ray_sql.models import recurrent
from ray_sql.models.decode_states import RowStates
from ray_sql.models.plain_attention import attend_plainly, capped, scale_of
from ray_sql.models.recurrent import State
from ray_sql.models.seen import window_of

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
    """Keys and values of a shared prefix, by layer, `[key heads, tokens, head size]` each.

    Layers that carry a state have their state after the prefix instead, of one row.
    """

    keys: Mapping[int, torch.Tensor]
    values: Mapping[int, torch.Tensor]
    length: int
    states: Mapping[int, State] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """Return the bytes of all keys, values and states."""
        tensors = (*self.keys.values(), *self.values.values())
        return self.state_bytes + sum(int(tensor.nbytes) for tensor in tensors)

    @property
    def state_bytes(self) -> int:
        """Return the bytes of the states, which every question needs for itself."""
        return sum(state.bytes for state in self.states.values())


def read_cache(cache: Cache, length: int) -> Prefix:
    """Return what a pass over a prefix of `length` tokens has left in transformers' cache.

    Raises `NotImplementedError` if a layer kept less.
    """
    keys, values, states = {}, {}, {}
    for number, layer in enumerate(cache.layers):
        if isinstance(layer, LinearAttentionCacheLayerMixin):
            states[number] = State(layer.conv_states[0], layer.recurrent_states[0])
        if getattr(layer, "keys", None) is not None:
            if layer.keys.shape[2] != length:
                raise NotImplementedError("beside states it has layers that slide over a window")
            keys[number], values[number] = layer.keys[0], layer.values[0]
    return Prefix(keys, values, length, states)


@dataclass(frozen=True)
class PrefixRuns:
    """The prefix that each row of a forward pass sees, as runs of rows in the order `rows`.

    A run is (number of rows, prefix or None). `bias` `[rows, 1, tokens, own]` is added to the
    scores of their own tokens, which lie in `columns` and have `positions`, `[rows, tokens]` each.
    No sequence will be longer than `limit`.
    """

    runs: Sequence[tuple[int, Prefix | None]]
    rows: torch.Tensor
    bias: torch.Tensor
    columns: torch.Tensor
    positions: torch.Tensor
    own: OwnTokens
    limit: int

    def own_bias(self, window: int | None) -> torch.Tensor:
        """Return `bias`, with the lowest number where a token lies before the window of another."""
        if window is None:
            return self.bias
        own = torch.arange(self.bias.shape[-1], device=self.bias.device)
        before = self.columns[:, None, :, None] - own >= window
        return self.bias.masked_fill(before, torch.finfo(self.bias.dtype).min)


class OwnTokens(Cache):  # type: ignore[misc]  # transformers is not followed by mypy
    """Keys and values of the rows' own tokens, by layer `[rows, key heads, columns, head size]`.

    `write_to` says where the next forward pass writes, and thereby which rows it computes.
    """

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.keys: dict[int, torch.Tensor] = {}
        self.values: dict[int, torch.Tensor] = {}
        self.states = RowStates()
        self._handed_out: dict[int, torch.Tensor] = {}
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
            for layer, old in tensors.items():
                tensors[layer] = self._room(old, first + len(columns))

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keep `[rows, heads, tokens, size]` of a layer; return all own tokens of these rows."""
        for tensors, new in ((self.keys, keys), (self.values, values)):
            if layer_idx not in tensors:
                tensors[layer_idx] = self._room(new[:0, :, :0], self._first + len(keys))
            tensors[layer_idx][self._rows, :, self._columns] = new.transpose(1, 2)
        rows, columns = slice(self._first, self._first + len(keys)), slice(self._width)
        self._handed_out[layer_idx] = self.keys[layer_idx][rows, :, columns]
        return self._handed_out[layer_idx], self.values[layer_idx][rows, :, columns]

    def layer_of(self, keys: torch.Tensor, layer_idx: int) -> int:
        """Return the layer that computed `keys` of this pass: another than `layer_idx`, if shared.

        Gemma 4's last layers attend to the keys of earlier ones.
        """
        handed_out = (layer for layer, handed in self._handed_out.items() if handed is keys)
        return next(handed_out, layer_idx)

    def append(self, sources: Sequence[int], first: int, width: int) -> None:
        """Copy rows to the rows from `first` on. Their tokens are in columns below `width`."""
        copied = torch.tensor(sources, dtype=torch.long, device=self._columns.device)
        self.states.copy(copied, first)
        for tensors in (self.keys, self.values):
            for layer, old in tensors.items():
                tensors[layer] = self._room(old, first + len(sources))
                tensors[layer][first : first + len(sources), :, :width] = old[copied, :, :width]

    def compact(self, rows: Sequence[int], width: int) -> None:
        """Keep these rows as the first ones, in this order; none moves down.

        Their tokens are in columns below `width`.
        """
        first = next((place for place, row in enumerate(rows) if place != row), len(rows))
        moved = torch.tensor(rows[first:], dtype=torch.long, device=self._columns.device)
        self.states.copy(moved, first)
        for tensor in (*self.keys.values(), *self.values.values()):
            tensor[first : len(rows), :, :width] = tensor[moved, :, :width]

    @property
    def allocated(self) -> tuple[int, int]:
        """Rows and columns that memory is held for."""
        held = next(iter(self.keys.values()), torch.zeros(0, 0, 0))
        return held.shape[0], held.shape[2]

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

    recurrent.install(model)
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
        return attend_plainly(module, query, key, value, attention_mask, **options)
    for name in ("s_aux", "position_bias"):
        if options.get(name) is not None:
            raise NotImplementedError(f"its attention has {name}")
    window = window_of(module, options.get("sliding_window"), lambda: shared.limit)
    window = window if window is not None and window < shared.limit else None
    rows, heads, tokens, size = query.shape
    layer = shared.own.layer_of(key, int(module.layer_idx))
    attend_some = partial(attend, scale=scale_of(query, options), cap=options.get("softcap"))
    # heads that share a key are rows of one product, so that keys need not be repeated
    query = query.to(key.dtype).reshape(rows, key.shape[1], -1, size)
    groups = heads // key.shape[1]
    bias = shared.own_bias(window).expand(-1, groups, -1, -1)
    bias = bias.reshape(rows, 1, query.shape[2], -1)
    output, total = attend_some(query, key, value, bias)
    if any(prefix for _, prefix in shared.runs):
        positions = shared.positions.repeat(1, groups)[shared.rows]
        by_run = list(
            _attend_to_prefixes(
                query[shared.rows], positions, shared.runs, layer, window, attend_some
            )
        )
        back = shared.rows.argsort()
        prefix_output = torch.cat([outputs for outputs, _ in by_run])[back]
        prefix_total = torch.cat([totals for _, totals in by_run])[back]
        share = torch.sigmoid(prefix_total - total)[..., None]
        output = torch.lerp(output.float(), prefix_output.float(), share)
    return output.to(value.dtype).view(rows, heads, tokens, -1).transpose(1, 2), None


Attend = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None],
    tuple[torch.Tensor, torch.Tensor],
]
"""`attend`, with a layer's scale and cap."""


def _attend_to_prefixes(
    query: torch.Tensor,
    positions: torch.Tensor,
    runs: Sequence[tuple[int, Prefix | None]],
    layer: int,
    window: int | None,
    attend_some: Attend,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield the result of `attend` for every run and its prefix; no prefix has the weight 0.

    Takes queries `[rows, key heads, queries, size]` with their positions `[rows, queries]`.
    """
    counts = [rows for rows, _ in runs]
    parts = zip(runs, query.split(counts), positions.split(counts), strict=True)
    for (rows, prefix), own, places in parts:
        first = 0 if window is None else max(0, int(places.min()) - window + 1)
        if prefix is None or first >= prefix.length:
            nothing = own.new_full(own.shape[:3], float("-inf"), dtype=torch.float32)
            yield torch.zeros_like(own), nothing
            continue
        merged = own.transpose(0, 1).flatten(1, 2)[None]
        keys, values = prefix.keys[layer][None, :, first:], prefix.values[layer][None, :, first:]
        bias = None
        if window is not None:
            seen = torch.arange(first, prefix.length, device=places.device)
            before = places.flatten()[:, None] - seen >= window
            bias = torch.zeros(before.shape, dtype=keys.dtype, device=keys.device)
            bias = bias.masked_fill_(before, torch.finfo(keys.dtype).min)[None, None]
        output, total = attend_some(merged, keys, values, bias)
        if window is not None:
            # a token that sees none of the prefix gives it no weight
            total = total.masked_fill(before.all(-1), float("-inf"))
        shape = (own.shape[1], rows, own.shape[2])
        yield output.view(*shape, -1).transpose(0, 1), total.view(shape).transpose(0, 1)


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None,
    scale: float,
    cap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return attention, and the logarithm of the sum of its exponentials.

    They are `[rows, heads, queries, size]` and `[rows, heads, queries]`. Each query sees a token.
    """
    if query.device.type == "cpu" and cap is None:
        return attend_by_kernel(query, key, value, bias, scale)
    return attend_by_products(query, key, value, bias, scale, cap)


def attend_by_kernel(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute `attend` by PyTorch's own kernel for CPUs, which knows no cap.

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
    cap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute `attend` by matrix products, on any device."""
    scores = capped(((query * scale) @ key.transpose(2, 3)).float(), cap)
    if bias is not None:
        scores += bias
    total = scores.logsumexp(-1)
    return scores.sub_(total[..., None]).exp_().to(value.dtype) @ value, total
