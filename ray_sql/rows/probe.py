"""Whether a model computes shared rows as it computes separate ones: asked of its settings, then of the model itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ray_sql.errors import out_of_memory
from ray_sql.models import packed_attention
from ray_sql.rows.batch import collate, model_inputs
from ray_sql.rows.share import SharedRow
from ray_sql.rows.tokenise import TokenizedExample

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

TOLERANCE = 0.05
"""Relative difference of logits that arithmetic explains; a question that sees another one is off by ten times as much."""


OWN = 8
"""Tokens of each question's own."""


def why_not_share(model: PreTrainedModel, longest: int, row: int) -> str | None:
    """Why rows of several questions would be wrong for `model`, where examples have up to `longest` tokens and rows up to `row`; None:
    they are right.

    Sliding windows shorter than an example are found in its config. All else (state-space layers, windows of places in the row,
    attention that takes no mask, positions that are counted and not given) shows when a shared row and a separate one, of random
    tokens and of these lengths, are compared, through the attention that training will use; a model that is wrong with the fast one
    (see `attention`) is left with a mask.
    """
    config = model.config.get_text_config()
    packed_attention.install(model)
    window = (
        (getattr(config, "sliding_window", None) or getattr(config, "attention_chunk_size", None))
        if _slides(config)
        else None
    )
    if window and longest > window:
        return f"its attention slides over a window of {window} tokens, but the longest example has {longest}"
    if "flash" in str(config._attn_implementation):
        return "FlashAttention takes no mask of who sees whom"
    fault = _fault(model, longest, row)
    if fault and model.config._attn_implementation == packed_attention.NAME:
        packed_attention.use_mask(model)
        fault = _fault(model, longest, row)
    return fault


def _fault(model: PreTrainedModel, longest: int, row: int) -> str | None:
    try:
        difference = _difference(model, longest, row)
    except (
        Exception
    ) as error:  # each architecture fails in its own way; a row of one example is right for all
        if out_of_memory(error):
            raise
        return f"it does not take a shared row ({type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]})"
    if not difference < TOLERANCE:
        return f"a shared row gives other logits than a separate one (relative difference {difference:.2g}): not attention by a mask"
    return None


def _slides(config: object) -> bool:
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        return any("full" not in kind for kind in kinds)
    return bool(getattr(config, "use_sliding_window", True))


def _difference(model: PreTrainedModel, longest: int, row: int) -> float:
    """Relative difference of the last question's logits in a shared row from those in a row of its own."""
    import torch

    vocabulary = model.config.get_text_config().vocab_size
    draw = torch.Generator().manual_seed(0)
    prefix = torch.randint(vocabulary, (max(OWN, longest - OWN),), generator=draw).tolist()
    others = max(
        1, (row - len(prefix)) // OWN - 1
    )  # of an example's length each: positions are those of examples
    own = torch.randint(vocabulary, (others + 1, OWN), generator=draw).tolist()
    rows = tuple(TokenizedExample("", "", prefix + each, len(prefix) + 1) for each in own)
    training = model.training
    model.eval()
    try:
        with (
            torch.no_grad(),
            torch.autocast(
                model.device.type, torch.bfloat16, enabled=model.dtype == torch.bfloat16
            ),
        ):
            together, alone = (
                _logits(model, SharedRow(rows, len(prefix))),
                _logits(model, SharedRow(rows[-1:], 0)),
            )
    finally:
        model.train(training)
    return float((together - alone).norm() / alone.norm())


def _logits(model: PreTrainedModel, row: SharedRow) -> torch.Tensor:
    """Logits of a row's last question, `[tokens, vocabulary]` in float32."""
    inputs = model_inputs(collate([row], pad=0), model)
    return model(**inputs, use_cache=False, logits_to_keep=OWN).logits[0].float()
