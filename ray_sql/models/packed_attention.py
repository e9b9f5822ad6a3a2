"""Attention over a shared row without the places that no question sees: by its parts on a CPU, by FlexAttention on a GPU.

A mask says who sees whom, and is what a model gets; but a kernel computes every pair and throws the masked ones away.

On a CPU the prefix is computed by itself, and a few questions at a time with the prefix and themselves, as plain matrix products:
PyTorch's own kernel for CPUs (2.13, bfloat16) takes 2 to 2.6 times as long, most of it in its backward. Where a model's layers do
not hand `SPANS` on to their attention, the mask is used: slower, and equal.

On a GPU a `BlockMask` takes the mask's place, made on the device from the segments of each row: FlexAttention skips blocks of 128 by
128 tokens that nobody sees. It is compiled where it runs, so `install` tries it first, gradients included, and keeps the mask where
it fails. Rows of one example, and generation, go through PyTorch's SDPA as before.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.attention.flex_attention import (
    BlockMask,
    create_block_mask,
    create_mask,
    flex_attention,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

NAME = "ray_sql_shared_rows"
"""The attention implementation's name in transformers' registry."""
MASKED = "ray_sql_masked_rows"
"""The name of SDPA with a mask, for a model on a GPU whose shared rows FlexAttention cannot compute."""
SPANS = "shared_spans"
"""The keyword argument of a model's forward that carries each row's `Spans`."""
AT_ONCE = 8
"""Questions computed together on a CPU: fewer make many small products, more compute pairs of tokens that do not see each other."""
KEPT = 2**24
"""Attention weights of a part and layer that are kept for the backward pass on a CPU; where there are more, as of a schema of 2,000
tokens, they are computed again: those of a schema of 4,000 and 32 questions would be 14 GiB over SmolLM2's 30 layers, by count."""
TRIED = ((1, 200), (1, 328), (2, 328), (3, 200))
"""Rows, and their length, that FlexAttention is tried on: the second length makes it compile for any, and so do three rows for any
number of several."""
TOLERANCE = 0.05
"""Relative difference of attention, and of its gradients, that arithmetic explains."""
RECOMPILE_LIMIT = 64
"""Kernels that PyTorch may compile for one function (its own limit is 8): with and without gradients, in several types."""


@dataclass(frozen=True)
class Spans:
    """A row's parts: `lengths` in tokens, the prefix (or the whole of a plain row) first, then a few questions each, without padding;
    `biases` `[own, seen]` are added to a part's scores, 0 where a token sees another and -inf where not (the tokens seen are the
    prefix's, then the part's own)."""

    lengths: list[int]
    biases: list[torch.Tensor]


def spans(segments: torch.Tensor, visible: torch.Tensor, dtype: torch.dtype) -> Spans:
    """The parts of one row, from its `segments` `[length]` and who sees whom in it, `[length, length]`."""
    counts = torch.bincount(segments[segments >= 0]).tolist()
    prefix, questions = counts[0], counts[1:]
    lengths = [
        prefix,
        *(sum(questions[start : start + AT_ONCE]) for start in range(0, len(questions), AT_ONCE)),
    ]
    ends = torch.tensor(lengths).cumsum(0).tolist()
    bias = torch.zeros(visible.shape, dtype=dtype).masked_fill_(~visible, float("-inf"))
    biases = [
        torch.cat([bias[start:end, :prefix], bias[start:end, start:end]], dim=1)
        for start, end in pairwise(ends)
    ]
    return Spans(lengths, [bias[:prefix, :prefix], *biases])


def block_mask(segments: torch.Tensor) -> BlockMask:
    """Who sees whom in rows of `segments` `[rows, length]`, as FlexAttention takes it, on their device."""

    def seen(
        row: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor
    ) -> torch.Tensor:
        segment = segments[row, key]
        return (query >= key) & ((segment == 0) | (segment == segments[row, query]))

    rows, length = segments.shape
    return create_block_mask(
        seen, B=rows, H=None, Q_LEN=length, KV_LEN=length, device=segments.device
    )


def install(model: PreTrainedModel) -> None:
    """Let `model` compute shared rows this way if its attention is PyTorch's (SDPA); all else is computed as before.

    A GPU on which FlexAttention does not work, or not rightly, gets the mask, and the log says why.
    """
    if model.config._attn_implementation != "sdpa" or model.device.type not in ("cpu", "cuda"):
        return
    if model.device.type == "cuda" and not _flex_fits(model):
        use_mask(model)
    else:
        _register(model, NAME)


def use_mask(model: PreTrainedModel) -> None:
    """Let `model` compute shared rows by SDPA and a mask, whatever `install` would choose."""
    _register(model, MASKED)


def _register(model: PreTrainedModel, name: str) -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(name, _attention)
    AttentionMaskInterface.register(name, sdpa_mask)
    model.set_attn_implementation(name)


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | BlockMask | None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention function: `[rows, heads, tokens, head size]` in, `[rows, tokens, heads, head size]` out."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    parts: list[Spans] | None = options.pop(SPANS, None)
    plain = not options.get("dropout") and options.get("position_bias") is None
    if plain and isinstance(attention_mask, BlockMask):
        return _flex(query, key, value, attention_mask, options.get("scaling")).transpose(
            1, 2
        ).contiguous(), None
    if plain and parts is not None:
        rows = zip(query, key, value, parts, strict=True)
        return torch.stack([_by_parts(*row, options.get("scaling")) for row in rows]), None
    if isinstance(attention_mask, BlockMask):
        attention_mask = create_mask(
            attention_mask.mask_mod, len(query), 1, query.shape[2], key.shape[2], query.device
        )
    return sdpa_attention_forward(module, query, key, value, attention_mask, **options)  # type: ignore[no-any-return]


def _by_parts(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, parts: Spans, scaling: float | None
) -> torch.Tensor:
    """One row's attention: `[heads, tokens, head size]` in, `[tokens, heads, head size]` out, 0 where it is padded."""
    scale = scaling or query.shape[-1] ** -0.5
    dtype, tokens = parts.biases[0].dtype, sum(parts.lengths)
    queries, keys, values = (
        whole[:, :tokens].to(dtype).split(parts.lengths, dim=1)
        for whole in (query * scale, key, value)
    )
    outputs = []
    for number, bias in enumerate(parts.biases):
        seen = [
            torch.cat([whole[0], whole[number]], dim=1) if number else whole[0]
            for whole in (keys, values)
        ]
        # heads that share a key are rows of one product, so that keys need not be repeated
        grouped = queries[number].reshape(len(seen[0]), -1, query.shape[-1])
        outputs.append(_Attend.apply(grouped, *seen, bias).reshape(*queries[number].shape[:2], -1))
    out = torch.cat(outputs, dim=1).transpose(0, 1)
    return torch.nn.functional.pad(out, (0, 0, 0, 0, 0, query.shape[1] - tokens))


def _flex(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: BlockMask,
    scaling: float | None,
) -> torch.Tensor:
    # uncompiled it computes every pair, which is for tests on a CPU; inside a compiled model it is compiled with the rest
    kernel = _compiled() if query.is_cuda and not torch.compiler.is_compiling() else _kernel
    # autocast, which SDPA obeys, does not reach it
    out: torch.Tensor = kernel(query.to(value.dtype), key.to(value.dtype), value, mask, scaling)
    return out


def _kernel(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: BlockMask,
    scaling: float | None,
) -> Any:
    """FlexAttention; a function of our own, so that nobody else's calls decide for which sizes it is compiled."""
    return flex_attention(
        query,
        key,
        value,
        block_mask=mask,
        scale=scaling,
        enable_gqa=key.shape[1] != query.shape[1],
        # there is another kernel for short rows, which needs compiling too and takes fewer numbers of heads
        kernel_options={"FORCE_USE_FLEX_ATTENTION": True},
    )


@lru_cache(maxsize=1)
def _compiled() -> Any:
    torch._dynamo.config.recompile_limit = max(
        torch._dynamo.config.recompile_limit, RECOMPILE_LIMIT
    )
    return torch.compile(_kernel)


def _flex_fits(model: PreTrainedModel) -> bool:
    """Whether FlexAttention works for the model's number and size of heads; FlexAttention knows no dropout."""
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    shared = getattr(config, "num_key_value_heads", None) or heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return not getattr(config, "attention_dropout", 0) and _flex_works(
        heads, shared, size, model.dtype, model.device
    )


@lru_cache
def _flex_works(
    heads: int, shared: int, size: int, dtype: torch.dtype, device: torch.device
) -> bool:
    """Whether FlexAttention compiles on `device` and gives what SDPA gives, gradients included."""
    try:
        difference = max(_difference(*tried, heads, shared, size, dtype, device) for tried in TRIED)
    except (
        Exception
    ) as error:  # no compiler, no kernel for this head size, an old GPU: each fails in its own way
        log.warning(
            "shared rows are computed with a mask: FlexAttention failed (%s: %.300s)",
            type(error).__name__,
            error,
        )
        return False
    if not difference < TOLERANCE:
        log.warning(
            "shared rows are computed with a mask: FlexAttention is off by %.2g here", difference
        )
    return difference < TOLERANCE


def _difference(
    rows: int,
    length: int,
    heads: int,
    shared: int,
    size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> float:
    """Largest relative difference between FlexAttention and SDPA with a mask, of outputs and gradients, on random rows."""
    draw = torch.Generator(device).manual_seed(0)

    def some(
        count: int,
    ) -> torch.Tensor:  # laid out as layers lay it out, for a kernel is compiled for a layout
        made = torch.randn(rows, length, count, size, generator=draw, device=device, dtype=dtype)
        return made.transpose(1, 2).requires_grad_()

    given, upstream = [some(heads), some(shared), some(shared)], some(heads).detach()
    prefixes = torch.arange(rows, device=device)[:, None] * 7 + length // 2  # another in every row
    segments = (
        (torch.arange(length, device=device) - prefixes).clamp(min=0).div(9, rounding_mode="floor")
    )
    mask = block_mask(segments)
    dense = create_mask(mask.mask_mod, rows, 1, length, length, device)
    with torch.enable_grad(), torch.autocast(device.type, enabled=False):
        key, value = (each.repeat_interleave(heads // shared, dim=1) for each in given[1:])
        wanted = torch.nn.functional.scaled_dot_product_attention(
            given[0], key, value, attn_mask=dense
        )
        found = _flex(given[0], given[1], given[2], mask, None)
        pairs = [(found, wanted)]
        pairs += zip(
            *(torch.autograd.grad(out, given, upstream) for out in (found, wanted)), strict=True
        )
    return max(
        float((one - other).detach().float().norm() / other.detach().float().norm())
        for one, other in pairs
    )


class _Attend(torch.autograd.Function):  # type: ignore[misc]  # torch is not followed by mypy
    """softmax(query key' + bias) value, for `[heads, groups * own, size]`, twice `[heads, seen, size]`, and `[own, seen]`."""

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor
    ) -> torch.Tensor:
        weights = _weights(query, key, bias)
        ctx.save_for_backward(query, key, value, bias, None if weights.numel() > KEPT else weights)
        return weights @ value

    @staticmethod
    def backward(
        ctx: Any, gradient: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None]:
        query, key, value, bias, weights = ctx.saved_tensors
        if weights is None:
            weights = _weights(query, key, bias)
        for_weights = gradient @ value.transpose(1, 2)
        for_scores = torch.ops.aten._softmax_backward_data(for_weights, weights, -1, weights.dtype)
        return (
            for_scores @ key,
            for_scores.transpose(1, 2) @ query,
            weights.transpose(1, 2) @ gradient,
            None,
        )


def _weights(query: torch.Tensor, key: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    scores = query @ key.transpose(1, 2)
    scores.view(len(key), -1, *bias.shape).add_(bias)
    return scores.softmax(-1)
