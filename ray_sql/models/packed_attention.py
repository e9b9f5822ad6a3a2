"""Attention over a shared row without the pairs of tokens that do not see each other.

A model gets a mask that says who sees whom. But a kernel computes every pair and throws the masked
ones away.

On a CPU the prefix is computed by itself, then a few questions at a time with the prefix and
themselves, as plain matrix products. PyTorch's own kernel for CPUs (2.13, bfloat16) takes 2 to 2.6
times as long, most of it in its backward. Where a model's layers do not hand `SEEN` on to their
attention, the mask is used. It is slower, and knows no window.

On a GPU a `BlockMask` takes the mask's place, made on the device from the segments of each row.
FlexAttention skips blocks of 128 by 128 tokens that nobody sees. It is compiled where it runs, so
`install` tries it first, gradients included, and keeps the mask where it fails. Rows of one
example, and generation, go through PyTorch's SDPA as before.

A layer says the window that it slides over, and a cap of its scores, at every call.
"""

from __future__ import annotations

import logging
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from ray_sql.models import recurrent
from ray_sql.models.plain_attention import attend_plainly, capped, head_sizes, scale_of
from ray_sql.models.seen import Seen, Spans, window_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

NAME = "ray_sql_shared_rows"
"""The attention implementation's name in transformers' registry."""
MASKED = "ray_sql_masked_rows"
"""The name of SDPA with a mask, for a GPU on which FlexAttention cannot compute shared rows."""
SEEN = "shared_rows_seen"
"""The keyword argument of a model's forward that carries `Seen`."""
MAX_SAVED_WEIGHTS = 2**24
"""Maximum attention weights of a part and layer that are saved for the backward pass on a CPU.

More, as of a schema of 2,000 tokens, are computed again. Those of a schema of 4,000 tokens and 32
questions would be 14 GiB over SmolLM2's 30 layers, by count.
"""
TRIAL_SHAPES = ((1, 200), (1, 328), (2, 328), (3, 200))
"""(rows, length) that FlexAttention is tried on.

The second length makes it compile for any, and three rows make it compile for any number of them.
"""
TOLERANCE = 0.05
"""Relative difference of attention, and of its gradients, that arithmetic explains."""
RECOMPILE_LIMIT = 64
"""Kernels that PyTorch may compile for one function, with and without gradients, in several types.

Its own limit is 8.
"""


def install(model: PreTrainedModel) -> None:
    """Let `model` compute shared rows this way if its attention is PyTorch's (SDPA).

    So does a model that has products in SDPA's place because its scores are capped. All else is
    computed as before. A GPU on which FlexAttention fails, or computes something else, gets the
    mask, and the log says why. Layers that carry a state are told of shared rows, too.
    """
    recurrent.install(model)
    implementation, caps = model.config._attn_implementation, _caps(model)
    known = implementation == "sdpa" or (implementation == "eager" and caps)
    if not known or model.device.type not in ("cpu", "cuda"):
        return
    if model.device.type == "cuda" and (caps or not _flex_fits(model)):
        use_mask(model)
    else:
        _register(model, NAME, _attention)


def use_mask(model: PreTrainedModel) -> None:
    """Let `model` compute shared rows by SDPA and a mask, even where `install` would not."""
    _register(model, MASKED, _masked)


def _caps(model: PreTrainedModel) -> bool:
    """Tell whether the scores of a model's attention are capped."""
    config = model.config.get_text_config()
    return getattr(config, "attn_logit_softcapping", None) is not None


def _register(model: PreTrainedModel, name: str, attention: Any) -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, sdpa_mask)
    model.set_attn_implementation(name)


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
    seen: Seen | None = options.get(SEEN)
    special = (options.get(name) is not None for name in ("position_bias", "s_aux"))
    if seen is None or options.get("dropout") or any(special):
        return _masked(module, query, key, value, attention_mask, **options)
    window = window_of(module, options.get("sliding_window"), lambda: seen.longest)
    scale = scale_of(query, options)
    if query.is_cuda:
        output = flex(query, key, value, seen.block_mask(window), scale)
        return output.transpose(1, 2).contiguous(), None
    rows = zip(query, key, value, seen.spans(window), strict=True)
    return torch.stack([_by_parts(*row, scale, options.get("softcap")) for row in rows]), None


def _masked(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Serve as `_attention` does, with a mask for shared rows."""
    seen: Seen | None = options.pop(SEEN, None)
    if seen is not None:
        window = window_of(module, options.get("sliding_window"), lambda: seen.longest)
        attention_mask = seen.mask(window)
    return attend_plainly(module, query, key, value, attention_mask, **options)


def _by_parts(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    parts: Spans,
    scale: float,
    cap: float | None,
) -> torch.Tensor:
    """Compute one row's attention from `[heads, tokens, head size]`.

    The result is `[tokens, heads, head size]`, and 0 in padding.
    """
    dtype, tokens = parts.biases[0].dtype, sum(parts.lengths)
    queries, keys, values = (
        tensor[:, :tokens].to(dtype).split(parts.lengths, dim=1)
        for tensor in (query * scale, key, value)
    )
    outputs = []
    for part, bias in enumerate(parts.biases):
        seen_keys, seen_values = keys[0], values[0]
        if part > 0:
            seen_keys = torch.cat([keys[0], keys[part]], dim=1)
            seen_values = torch.cat([values[0], values[part]], dim=1)
        # heads that share a key are rows of one product, so that keys need not be repeated
        grouped = queries[part].reshape(len(seen_keys), -1, query.shape[-1])
        attend = _Attend.apply if cap is None else partial(_attend_capped, cap)
        output = attend(grouped, seen_keys, seen_values, bias)
        outputs.append(output.reshape(*queries[part].shape[:2], -1))
    joined = torch.cat(outputs, dim=1).transpose(0, 1)
    return torch.nn.functional.pad(joined, (0, 0, 0, 0, 0, query.shape[1] - tokens))


def flex(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: BlockMask,
    scaling: float | None,
) -> torch.Tensor:
    """Return attention `[rows, heads, tokens, head size]` by FlexAttention."""
    # Uncompiled it computes every pair, which is for tests on a CPU. Inside a compiled model it is
    # compiled with the rest.
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
    """Call FlexAttention.

    A function of our own, so that nobody else's calls decide for which sizes it is compiled.
    """
    return flex_attention(
        query,
        key,
        value,
        block_mask=mask,
        scale=scaling,
        enable_gqa=key.shape[1] != query.shape[1],
        # The other kernel, for short rows, needs compiling too and takes fewer numbers of heads.
        kernel_options={"FORCE_USE_FLEX_ATTENTION": True},
    )


@lru_cache(maxsize=1)
def _compiled() -> Any:
    torch._dynamo.config.recompile_limit = max(
        torch._dynamo.config.recompile_limit, RECOMPILE_LIMIT
    )
    return torch.compile(_kernel)


def _flex_fits(model: PreTrainedModel) -> bool:
    """Tell whether FlexAttention works for a model's heads. It knows no dropout."""
    config = model.config.get_text_config()
    return not getattr(config, "attention_dropout", 0) and all(
        flex_works(*sizes, model.dtype, model.device) for sizes in set(head_sizes(config))
    )


@lru_cache
def flex_works(
    heads: int, shared: int, size: int, dtype: torch.dtype, device: torch.device
) -> bool:
    """Tell whether FlexAttention compiles on `device` and gives SDPA's outputs and gradients."""
    try:
        difference = max(
            _difference(*shape, heads, shared, size, dtype, device) for shape in TRIAL_SHAPES
        )
    # no compiler, no kernel for this head size, an old GPU: each fails in its own way
    except Exception as error:
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
    """Return the largest relative difference between FlexAttention and SDPA with a mask.

    Outputs and gradients of random rows are compared.
    """
    generator = torch.Generator(device).manual_seed(0)

    def draw(count: int) -> torch.Tensor:
        # laid out as layers lay it out, for a kernel is compiled for a layout
        shape = (rows, length, count, size)
        tensor = torch.randn(*shape, generator=generator, device=device, dtype=dtype)
        return tensor.transpose(1, 2).requires_grad_()

    query, key, value = draw(heads), draw(shared), draw(shared)
    upstream = draw(heads).detach()
    prefixes = torch.arange(rows, device=device)[:, None] * 7 + length // 2  # another in every row
    places = torch.arange(length, device=device) - prefixes
    segments = places.clamp(min=0).div(9, rounding_mode="floor")
    seen = Seen(segments, places, dtype)
    with torch.enable_grad(), torch.autocast(device.type, enabled=False):
        repeated = [tensor.repeat_interleave(heads // shared, dim=1) for tensor in (key, value)]
        expected = torch.nn.functional.scaled_dot_product_attention(
            query, *repeated, attn_mask=seen.mask()
        )
        actual = flex(query, key, value, seen.block_mask(), None)
        inputs = [query, key, value]
        expected_grads = torch.autograd.grad(expected, inputs, upstream)
        actual_grads = torch.autograd.grad(actual, inputs, upstream)
    pairs = zip((actual, *actual_grads), (expected, *expected_grads), strict=True)
    return max(_relative(result, wanted) for result, wanted in pairs)


def _relative(result: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((result - wanted).detach().float().norm() / wanted.detach().float().norm())


class _Attend(torch.autograd.Function):  # type: ignore[misc]  # mypy does not follow torch
    """softmax(query key' + bias) value.

    Shapes: query `[heads, groups * own, size]`, key and value `[heads, seen, size]`, bias
    `[own, seen]`.
    """

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor
    ) -> torch.Tensor:
        weights = _weights(query, key, bias)
        saved = weights if weights.numel() <= MAX_SAVED_WEIGHTS else None
        ctx.save_for_backward(query, key, value, bias, saved)
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


def _attend_capped(
    cap: float, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    """Compute what `_Attend` does, with scores between -cap and cap."""
    scores = capped(query @ key.transpose(1, 2), cap)
    scores = scores.view(len(key), -1, *bias.shape) + bias
    return scores.softmax(-1).view(len(key), query.shape[1], -1) @ value


def _weights(query: torch.Tensor, key: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    scores = query @ key.transpose(1, 2)
    scores.view(len(key), -1, *bias.shape).add_(bias)
    return scores.softmax(-1)
