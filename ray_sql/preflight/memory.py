"""How much memory a worker needs, and the largest forward pass that a device holds."""

from __future__ import annotations

from ray_sql import models
from ray_sql.config import Config


def memory_estimate(
    config: Config, model_folder: str, tokens: int, gpu: bool, rows_in_pass: int = 1
) -> float:
    """Bytes one worker needs: weights, adapter with gradient and two Adam moments, activations and logits of a pass of `tokens` in
    `rows_in_pass` rows of one length.

    Activations follow Korthikanti et al., arXiv 2205.05198: about 34 bytes per token, layer and hidden unit in 16 bits, without the
    attention matrix, which SDPA does not keep. With checkpointing one layer's worth and every layer's input stay.
    """
    from transformers import AutoConfig

    shape = AutoConfig.from_pretrained(model_folder).get_text_config()
    hidden, layers, vocabulary = shape.hidden_size, shape.num_hidden_layers, shape.vocab_size
    inner = getattr(shape, "intermediate_size", None) or 4 * hidden
    linear = layers * (4 * hidden * hidden + 3 * hidden * inner)
    each = _itemsize(config, gpu)
    stored = (
        0.56 if config.quantization.load_in_4bit else 0.0
    )  # 4 bits, and a 32-bit scale for every 64 weights
    expanded = (
        0 if config.quantization.load_in_4bit and gpu else each
    )  # on a CPU they are expanded once,
    if config.quantization.load_in_4bit and not gpu:
        expanded += each  # and stand there a second time, with the adapter added, while questions are answered
    weights = linear * (stored + expanded) + 2 * each * vocabulary * hidden
    given = config.train.gradient_checkpointing
    checkpointed = gpu if given is None else given
    per_token = hidden * (34 + 2 * layers if checkpointed else 34 * layers)
    # on a CPU the attention of shared rows keeps its matrix (models/packed_attention.py): at most every pair of a row's tokens
    matrices = (
        0 if gpu or config.batching.examples_per_row == 1 else (1 if checkpointed else layers)
    )
    attention = matrices * shape.num_attention_heads * tokens**2 / rows_in_pass * each
    kept = min(
        1.0, 0.05 + 0.15 * rows_in_pass
    )  # places with a logit, where any of a pass's rows has a label: assumed
    trained = 16 * adapter_weights(config, model_folder)
    return float(
        weights + trained + tokens * per_token + attention + kept * tokens * vocabulary * 6
    )


def _itemsize(config: Config, gpu: bool) -> int:
    """Bytes of a number that is computed with."""
    import torch

    if gpu and config.train.bf16 is None and not torch.cuda.is_available():
        return 2  # a head without a GPU says nothing of its workers': all that are sold today have bfloat16
    return int(models.compute_dtype(config.train.bf16).itemsize)


def adapter_weights(config: Config, model_folder: str) -> int:
    """How many weights an adapter on all linear layers has."""
    from transformers import AutoConfig

    shape = AutoConfig.from_pretrained(model_folder).get_text_config()
    hidden, inner = (
        shape.hidden_size,
        getattr(shape, "intermediate_size", None) or 4 * shape.hidden_size,
    )
    return int(shape.num_hidden_layers * config.lora.r * (8 * hidden + 3 * (hidden + inner)))


def largest_pass(
    config: Config, model_folder: str, have: float, gpu: bool, rows_in_pass: int = 1
) -> int:
    """Tokens of the largest forward pass that fits into `have` bytes; 0 where not even the model does."""

    def holds(tokens: int) -> bool:
        return memory_estimate(config, model_folder, tokens, gpu, rows_in_pass) <= have

    fits, beyond = 0, 1
    while beyond < 2**24 and holds(beyond):
        fits, beyond = beyond, 2 * beyond
    while beyond - fits > 1:
        middle = (fits + beyond) // 2
        fits, beyond = (middle, beyond) if holds(middle) else (fits, middle)
    return fits
