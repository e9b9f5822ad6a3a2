"""Attention over a shared row without the places that no question sees.

A mask says all of it, and is what a model gets; but an attention kernel computes every pair and throws the masked ones away, and in a row
of 32 questions those are nine of ten. Here the prefix is computed by itself, and every question with the prefix and itself. Where a
model's layers do not hand `SPANS` on to their attention, it falls back to the mask: slower, and equal.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "ray_sql_shared_rows"
"""The attention implementation's name in transformers' registry."""
SPANS = "shared_spans"
"""The keyword argument of a model's forward that carries `Spans`."""


@dataclass(frozen=True)
class Spans:
    """A shared row's parts: `lengths` in tokens, the prefix first, and for every question who sees whom, `[1, 1, own, prefix + own]`."""

    lengths: list[int]
    masks: list[torch.Tensor]


def spans(segments: torch.Tensor) -> Spans:
    """The parts of one row's `segments` `[length]`."""
    lengths = torch.bincount(segments).tolist()
    prefix = lengths[0]
    blank = torch.ones(max(lengths[1:]), prefix + max(lengths[1:]), dtype=torch.bool, device=segments.device)
    whole = blank.tril(prefix)[None, None]
    return Spans(lengths, [whole[:, :, :own, : prefix + own] for own in lengths[1:]])


def install(model: PreTrainedModel) -> None:
    """Let `model` compute shared rows this way, if its attention is PyTorch's (SDPA); all other input is computed as before."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    if model.config._attn_implementation == "sdpa":
        AttentionInterface.register(NAME, _attention)
        AttentionMaskInterface.register(NAME, sdpa_mask)
        model.set_attn_implementation(NAME)


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention function: tensors `[1, heads, tokens, head size]` in, `[1, tokens, heads, head size]` out."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    parts: Spans | None = options.pop(SPANS, None)
    if parts is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    options["is_causal"] = True  # read only where there is no mask: for the prefix
    queries, keys, values = (whole.split(parts.lengths, dim=2) for whole in (query, key, value))
    outputs = [sdpa_attention_forward(module, queries[0], keys[0], values[0], None, **options)[0]]
    for number, mask in enumerate(parts.masks, start=1):
        seen = (torch.cat([whole[0], whole[number]], dim=2) for whole in (keys, values))
        outputs.append(sdpa_attention_forward(module, queries[number], *seen, mask, **options)[0])
    return torch.cat(outputs, dim=1), None
