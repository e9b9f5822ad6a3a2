"""Models of today's hybrid shapes, cut in depth, with random weights, for measuring speed.

A layer has the widths of the published model. The vocabulary is the tokenizer's of the demo: it is
to these few layers about what the published one is to all of its layers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ray_sql import models

HYBRIDS: dict[str, dict[str, Any]] = {
    "qwen3.5": {
        "model_type": "qwen3_5_text",
        "hidden_size": 1024,
        "intermediate_size": 3584,
        "num_hidden_layers": 4,
        "layer_types": ["linear_attention"] * 3 + ["full_attention"],
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 256,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 16,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "linear_conv_kernel_dim": 4,
        "tie_word_embeddings": True,
    },
    "lfm2": {
        "model_type": "lfm2",
        "hidden_size": 1024,
        "intermediate_size": 6656,
        "num_hidden_layers": 6,
        "layer_types": ["conv", "conv", "full_attention"] * 2,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
    },
}
"""Qwen3.5-0.8B has 24 layers, three with a state to one of attention; LFM2-350M has 16."""


def make_hybrid(name: str, tokenizer_folder: str, folder: Path) -> str:
    """Save a random model of `HYBRIDS` in `folder`, with the tokenizer of another model."""
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = models.load_tokenizer(tokenizer_folder)
    tokenizer.save_pretrained(folder)
    shape = dict(HYBRIDS[name])
    config = AutoConfig.for_model(
        shape.pop("model_type"),
        vocab_size=len(tokenizer),
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **shape,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for weight_name, weight in model.named_parameters():
        # States that fade to a ten-millionth with a token, as transformers draws some, cost float32
        # four digits of a gradient, whether rows are shared or not.
        if weight_name.endswith("A_log"):
            weight.data = torch.linspace(0.01, 0.5, len(weight)).log()
    model.save_pretrained(folder)
    return str(folder)
