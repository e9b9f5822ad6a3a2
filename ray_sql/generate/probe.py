"""Try on a model whether it can answer over a prefix that questions share."""

from __future__ import annotations

from statistics import median
from typing import TYPE_CHECKING, Any

import torch

from ray_sql.generate.decoder import Decoder
from ray_sql.generate.groups import Group
from ray_sql.generate.hf_generate import inference
from ray_sql.models import decode_attention

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOLERANCE = 0.05
"""Relative difference of logits that arithmetic explains, in the middle of `PROBES` tries.

A question that misses its prefix is off by five times as much. A tuned model in bfloat16 was at
0.018, and at 0.5 without the prefix; a single try reached 0.07.
"""
PROBES = 5


def why_not_share(model: PreTrainedModel, longest: int) -> str | None:
    """Return why `model` cannot answer over a prefix that questions share; None if it can.

    Prompt and answer have up to `longest` tokens. Pairs of short prompts of random tokens are
    computed both ways. The attention itself finds sliding windows, softcaps and the like. The
    model's config is asked for effects that only long prompts have.
    """
    if reason := _why_length_matters(model.config.get_text_config(), longest):
        return reason
    try:
        with decode_attention.installed(model), inference(model):
            difference = median(_difference(model, longest, seed) for seed in range(PROBES))
    # each architecture fails in its own way; whole prompts are right for all
    except Exception as error:
        first_line = (str(error).splitlines() or [""])[0][:120]
        return f"it does not take a shared prefix ({type(error).__name__}: {first_line})"
    if not difference < TOLERANCE:
        return (
            "a shared prefix gives other logits than whole prompts "
            f"(relative difference {difference:.2g})"
        )
    return None


def _difference(model: PreTrainedModel, longest: int, seed: int) -> float:
    """Return the relative difference of the first logits of two answers, computed both ways."""
    vocabulary = model.config.get_text_config().vocab_size
    draw = torch.Generator().manual_seed(seed)
    prefix, *own = (
        torch.randint(vocabulary, (length,), generator=draw).tolist() for length in (8, 4, 2)
    )
    prompts = [prefix + tokens for tokens in own]
    decoder = Decoder(model, prompts, [Group([0, 1], len(prefix))], longest)
    shared = decoder.first_logits()
    alone = []
    for prompt in prompts:
        logits = model(torch.tensor([prompt], device=model.device)).logits
        alone.append(logits[0, -1].float())
    expected = torch.stack(alone)
    return float((shared - expected).norm() / expected.norm())


def _why_length_matters(config: Any, longest: int) -> str | None:
    """Return what sets in after some length, so that a probe of short prompts cannot see it."""
    chunk = getattr(config, "attention_chunk_size", None)
    if chunk and chunk < longest:
        return f"its attention is cut into chunks of {chunk} tokens, but sequences reach {longest}"
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") not in ("dynamic", "longrope"):
        return None
    short = (
        rope.get("original_max_position_embeddings")
        or getattr(config, "max_position_embeddings", None)
        or longest
    )
    if int(short) < longest:
        return (
            f"its positions change with a sequence's length after {short} tokens, "
            f"but sequences reach {longest}"
        )
    return None
