"""Memory for keys and values: what a token takes, and what there is."""

from __future__ import annotations

from typing import TYPE_CHECKING

import psutil
import torch

from ray_sql.models.plain_attention import head_sizes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

STATEFUL = ("linear_attention", "conv", "mamba")
"""Kinds of layer that keep a state of one size, and no keys."""


def bytes_per_token(model: PreTrainedModel) -> int:
    """Return the bytes that the keys and values of one token take."""
    shape = model.config.get_text_config()
    kinds = getattr(shape, "layer_types", None) or ["full_attention"] * shape.num_hidden_layers
    layers = zip(kinds, head_sizes(shape), strict=False)
    numbers = sum(2 * heads * size for kind, (_, heads, size) in layers if kind not in STATEFUL)
    return max(1, int(numbers * model.dtype.itemsize))


def free_memory(model: PreTrainedModel) -> int:
    """Return the bytes for keys and values: half of what a GPU has free, a quarter on a CPU."""
    if model.device.type == "cuda":
        return int(torch.cuda.mem_get_info(model.device)[0] // 2)
    return int(psutil.virtual_memory().available // 4)
