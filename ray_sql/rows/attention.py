"""Attention over a shared row on a CPU, without the places that no question sees.

A mask says who sees whom, and is what a model gets; but a kernel computes every pair and throws the masked ones away. Here the prefix
is computed by itself, and a few questions at a time with the prefix and themselves, as plain matrix products: PyTorch's own kernel for
CPUs (2.13, bfloat16) takes 2 to 2.6 times as long, most of it in its backward. Where a model's layers do not hand `SPANS` on to
their attention, the mask is used: slower, and equal.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "ray_sql_shared_rows"
"""The attention implementation's name in transformers' registry."""
SPANS = "shared_spans"
"""The keyword argument of a model's forward that carries `Spans`."""
AT_ONCE = 8
"""Questions computed together: fewer make many small products, more compute pairs of tokens that do not see each other."""


@dataclass(frozen=True)
class Spans:
    """A shared row's parts: `lengths` in tokens, the prefix first, then a few questions each; `biases` `[own, seen]` are added to a
    part's scores, 0 where a token sees another and -inf where not (the tokens seen are the prefix's, then the part's own)."""

    lengths: list[int]
    biases: list[torch.Tensor]


def spans(segments: torch.Tensor, visible: torch.Tensor, dtype: torch.dtype) -> Spans:
    """The parts of one row, from its `segments` `[length]` and who sees whom in it, `[length, length]`."""
    counts = torch.bincount(segments).tolist()
    prefix, questions = counts[0], counts[1:]
    lengths = [prefix, *(sum(questions[start : start + AT_ONCE]) for start in range(0, len(questions), AT_ONCE))]
    ends = torch.tensor(lengths).cumsum(0).tolist()
    bias = torch.zeros(visible.shape, dtype=dtype).masked_fill_(~visible, float("-inf"))
    biases = [torch.cat([bias[start:end, :prefix], bias[start:end, start:end]], dim=1) for start, end in pairwise(ends)]
    return Spans(lengths, [bias[:prefix, :prefix], *biases])


def install(model: PreTrainedModel) -> None:
    """Let `model`, on a CPU, compute shared rows this way if its attention is PyTorch's (SDPA); all else is computed as before."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    if model.device.type == "cpu" and model.config._attn_implementation == "sdpa":
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
    """transformers' attention function: `[1, heads, tokens, head size]` in, `[1, tokens, heads, head size]` out."""
    parts: Spans | None = options.pop(SPANS, None)
    if parts is None or options.get("dropout") or options.get("position_bias") is not None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)  # type: ignore[no-any-return]
    scale = options.get("scaling") or query.shape[-1] ** -0.5
    dtype = parts.biases[0].dtype
    queries, keys, values = (
        whole.squeeze(0).to(dtype).split(parts.lengths, dim=1) for whole in (query * scale, key, value)
    )
    outputs = []
    for number, bias in enumerate(parts.biases):
        seen = [torch.cat([whole[0], whole[number]], dim=1) if number else whole[0] for whole in (keys, values)]
        # heads that share a key are rows of one product, so that keys need not be repeated
        grouped = queries[number].reshape(len(seen[0]), -1, query.shape[-1])
        outputs.append(_Attend.apply(grouped, *seen, bias).reshape(*queries[number].shape[:2], -1))
    return torch.cat(outputs, dim=1).transpose(0, 1).unsqueeze(0), None


class _Attend(torch.autograd.Function):  # type: ignore[misc]  # torch is not followed by mypy
    """softmax(query key' + bias) value, for `[heads, groups * own, size]`, twice `[heads, seen, size]`, and `[own, seen]`."""

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor
    ) -> torch.Tensor:
        scores = query @ key.transpose(1, 2)
        scores.view(len(key), -1, *bias.shape).add_(bias)
        weights = scores.softmax(-1)
        ctx.save_for_backward(query, key, value, weights)
        return weights @ value

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None]:
        query, key, value, weights = ctx.saved_tensors
        for_weights = gradient @ value.transpose(1, 2)
        for_scores = torch.ops.aten._softmax_backward_data(for_weights, weights, -1, weights.dtype)
        return for_scores @ key, for_scores.transpose(1, 2) @ query, weights.transpose(1, 2) @ gradient, None
