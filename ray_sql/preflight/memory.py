"""Estimate the memory that a worker needs, and the largest forward pass that a device holds."""

from __future__ import annotations

from pathlib import Path

from ray_sql import models
from ray_sql.config import Config


def memory_estimate(
    config: Config, model_folder: str, tokens: int, gpu: bool, rows_in_pass: int = 1
) -> float:
    """Estimate the bytes that one worker needs for a pass of `tokens` in `rows_in_pass` equal rows.

    The sum covers weights, the adapter with its gradient and two Adam moments, activations and
    logits. Activations follow Korthikanti et al., arXiv 2205.05198: about 34 bytes per token, layer
    and hidden unit in 16 bits. SDPA does not keep the attention matrix. With
    checkpointing, one layer's worth and every layer's input stay.
    """
    shape = models.read_shape(model_folder)
    hidden, layers, vocabulary = shape.hidden_size, shape.num_hidden_layers, shape.vocab_size
    inner = models.inner_size(shape)
    linear = layers * (4 * hidden * hidden + 3 * hidden * inner)
    itemsize = _itemsize(config.train.bf16, gpu, model_folder, config.cache)
    weights = linear * _bytes_per_weight(config.quantization.load_in_4bit, gpu, itemsize)
    weights += 2 * itemsize * vocabulary * hidden
    checkpointed = config.train.gradient_checkpointing
    if checkpointed is None:
        checkpointed = gpu
    kept_layers = 1 if checkpointed else layers
    per_token = hidden * (34 + 2 * layers if checkpointed else 34 * layers)
    attention = 0.0
    if not gpu and config.rows.examples_per_row != 1:
        # on a CPU the attention of shared rows keeps its matrix (models/packed_attention.py): at
        # most every pair of a row's tokens
        pairs = tokens**2 / rows_in_pass
        attention = kept_layers * shape.num_attention_heads * pairs * itemsize
    # the share of places with a logit, which is where any row of a pass has a label: assumed
    with_logits = min(1.0, 0.05 + 0.15 * rows_in_pass)
    trained = 16 * adapter_weights(config.lora.r, model_folder)
    logits = with_logits * tokens * vocabulary * 6
    return float(weights + trained + tokens * per_token + attention + logits)


def _bytes_per_weight(load_in_4bit: bool, gpu: bool, itemsize: int) -> float:
    if not load_in_4bit:
        return itemsize
    stored = 0.56  # 4 bits, and a 32-bit scale for every 64 weights
    if gpu:
        return stored
    # a CPU expands the weights once, and holds them a second time, with the adapter added, while
    # questions are answered
    return stored + 2 * itemsize


def _itemsize(bf16: bool | None, gpu: bool, model_folder: str, cache: Path) -> int:
    """Return the bytes of a number of the type that is computed with."""
    import torch

    if gpu and bf16 is None and not torch.cuda.is_available():
        return 2  # a head without a GPU cannot ask its workers' GPUs: all sold today have bfloat16
    return int(models.compute_dtype(bf16, model_folder, cache, gpu).itemsize)


def adapter_weights(r: int, model_folder: str) -> int:
    """Return the number of weights of an adapter of rank `r` on all linear layers."""
    shape = models.read_shape(model_folder)
    hidden = shape.hidden_size
    inner = models.inner_size(shape)
    return int(shape.num_hidden_layers * r * (8 * hidden + 3 * (hidden + inner)))


def largest_pass(
    config: Config, model_folder: str, have: float, gpu: bool, rows_in_pass: int = 1
) -> int:
    """Return the tokens of the largest forward pass that fits into `have` bytes.

    0 means that not even the model fits.
    """

    def holds(tokens: int) -> bool:
        return memory_estimate(config, model_folder, tokens, gpu, rows_in_pass) <= have

    fits, beyond = 0, 1
    while beyond < 2**24 and holds(beyond):
        fits, beyond = beyond, 2 * beyond
    while beyond - fits > 1:
        middle = (fits + beyond) // 2
        fits, beyond = (middle, beyond) if holds(middle) else (fits, middle)
    return fits
