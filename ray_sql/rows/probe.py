"""Ask a model whether it computes shared rows as it computes separate ones."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ray_sql.errors import out_of_memory
from ray_sql.models import packed_attention, recurrent
from ray_sql.models.seen import why_length_matters
from ray_sql.rows import verdicts
from ray_sql.rows.batch import collate, model_inputs
from ray_sql.rows.encoder import TokenizedExample
from ray_sql.rows.share import SharedRow

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOLERANCE = 0.05
"""Relative difference of logits that arithmetic explains.

A question that sees another one is off by ten times as much.
"""
OWN = 8
"""Tokens of each question's own in a probe."""


def why_not_share(
    model: PreTrainedModel, longest: int, row: int, cache: Path | None = None
) -> str | None:
    """Return why rows of several questions would be wrong for `model`; None if they are right.

    Examples have up to `longest` tokens and rows up to `row`. Windows that only our attention
    counts in positions, and positions that change with the length, are read from the config. A
    comparison finds all else: state-space layers,
    windows of places in the row, attention that takes no mask, positions that are counted and not
    given. It takes a shared row and a separate one, of random tokens and of these lengths, through
    the attention that training will use. A model that is wrong with the fast one
    (`packed_attention`) is left with a mask. On a CPU a try takes about a second, and one that was
    right before is not made again, where `cache` is given.
    """
    config = model.config.get_text_config()
    packed_attention.install(model)
    if "flash" in str(config._attn_implementation):
        return "FlashAttention takes no mask of who sees whom"
    if unknown := recurrent.unknown_layer(model):
        return f"its layers of the kind {unknown} carry a state that is not handed on to questions"
    if reason := why_length_matters(config, longest):
        return reason
    window, implementation = _window(config), model.config._attn_implementation
    ours = implementation in (packed_attention.NAME, packed_attention.MASKED)
    if window and longest > window and not ours:
        return (
            f"its attention ({implementation}) slides over a window of {window} tokens, "
            f"but the longest example has {longest}"
        )
    if cache is None or model.device.type != "cpu":
        return _tried(model, longest, row)
    place = verdicts.place_of(model, longest, row, cache)
    known = verdicts.read(place)
    if known is None:
        fault = _tried(model, longest, row)
        if fault is None:
            masked = model.config._attn_implementation == packed_attention.MASKED
            verdicts.keep(place, verdicts.Verdict(masked))
        return fault
    if known.masked:
        packed_attention.use_mask(model)
    return None


def _tried(model: PreTrainedModel, longest: int, row: int) -> str | None:
    """Return the fault that a try finds; a model that is right with a mask only is left with it."""
    fault = _fault(model, longest, row)
    if fault and model.config._attn_implementation == packed_attention.NAME:
        packed_attention.use_mask(model)
        fault = _fault(model, longest, row)
    return fault


def _fault(model: PreTrainedModel, longest: int, row: int) -> str | None:
    try:
        difference = _difference(model, longest, row)
    # each architecture fails in its own way; a row of one example is right for all
    except Exception as error:
        if out_of_memory(error):
            raise
        first_line = (str(error).splitlines() or [""])[0][:120]
        return f"it does not take a shared row ({type(error).__name__}: {first_line})"
    if not difference < TOLERANCE:
        return (
            "a shared row gives other logits than a separate one "
            f"(relative difference {difference:.2g}): not attention by a mask"
        )
    return None


def _window(config: Any) -> int | None:
    """Return the tokens that attention slides over; None where it sees all."""
    kinds = getattr(config, "layer_types", None)
    if kinds is None and not getattr(config, "use_sliding_window", True):
        return None
    if kinds is not None and all("full" in kind for kind in kinds):
        return None
    return getattr(config, "sliding_window", None) or getattr(config, "attention_chunk_size", None)


def _difference(model: PreTrainedModel, longest: int, row: int) -> float:
    """Return the relative difference of a question's logits in a shared row and in its own.

    It is the last question of the row.
    """
    vocabulary = model.config.get_text_config().vocab_size
    draw = torch.Generator().manual_seed(0)
    prefix = torch.randint(vocabulary, (max(OWN, longest - OWN),), generator=draw).tolist()
    # others have an example's length each: positions are those of examples
    others = max(1, (row - len(prefix)) // OWN - 1)
    own = torch.randint(vocabulary, (others + 1, OWN), generator=draw).tolist()
    examples = tuple(TokenizedExample("", "", prefix + tokens, len(prefix) + 1) for tokens in own)
    bf16 = model.dtype == torch.bfloat16
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
            shared = _logits(model, SharedRow(examples, len(prefix)))
            alone = _logits(model, SharedRow(examples[-1:], 0))
    finally:
        model.train(training)
    return float((shared - alone).norm() / alone.norm())


def _logits(model: PreTrainedModel, row: SharedRow) -> torch.Tensor:
    """Return the logits of a row's last question, `[tokens, vocabulary]` in float32."""
    inputs = model_inputs(collate([row], pad=0), model)
    # places, not their number, which makes some models leave out tokens inside their layers
    last = torch.arange(row.tokens - OWN, row.tokens, device=model.device)
    return model(**inputs, use_cache=False, logits_to_keep=last).logits[0].float()
