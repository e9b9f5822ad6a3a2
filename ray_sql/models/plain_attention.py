"""Attention of rows that share nothing: PyTorch's SDPA, and plain products where scores are capped.

SDPA knows no cap. transformers computes models that have one (Gemma 2) with products, too.
"""

from __future__ import annotations

from typing import Any

import torch


def attend_plainly(
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
    cap = options.get("softcap")
    if cap is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)  # type: ignore[no-any-return]
    groups = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
    scores = capped(query @ key.transpose(2, 3) * scale_of(query, options), cap)
    if attention_mask is None:
        tokens, all_tokens = scores.shape[-2:]
        ones = torch.ones(tokens, all_tokens, dtype=torch.bool, device=scores.device)
        attention_mask = ones.tril(all_tokens - tokens)
    scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    weights = scores.softmax(-1, dtype=torch.float32).to(value.dtype)
    weights = torch.nn.functional.dropout(weights, options.get("dropout") or 0.0, module.training)
    return (weights @ value).transpose(1, 2).contiguous(), None


def capped(scores: torch.Tensor, cap: float | None) -> torch.Tensor:
    """Return scores that lie between -cap and cap; the same ones without a cap."""
    return scores if cap is None else torch.tanh(scores / cap) * cap


def scale_of(query: torch.Tensor, options: dict[str, Any]) -> float:
    """Return what scores are multiplied with, from an attention function's keyword arguments."""
    scaling: float | None = options.get("scaling")
    return query.shape[-1] ** -0.5 if scaling is None else scaling


def head_sizes(config: Any) -> list[tuple[int, int, int]]:
    """Return (heads, key heads, head size) of every layer, from the config of a model's text part.

    Layers without attention have those of the others.
    """
    layers = [config] * config.num_hidden_layers
    if getattr(config, "is_heterogeneous", False):
        layers = [config.per_layer_config[layer] for layer in range(config.num_hidden_layers)]
    sizes = []
    for layer in layers:
        heads = layer.num_attention_heads
        shared = getattr(layer, "num_key_value_heads", None) or heads
        size = getattr(layer, "head_dim", None) or layer.hidden_size // heads
        sizes.append((heads, shared, size))
    return sizes
