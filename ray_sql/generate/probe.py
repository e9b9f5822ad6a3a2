"""Try on a model whether it can answer over a prefix that questions share."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch

from ray_sql.errors import out_of_memory
from ray_sql.generate.decoder import Decoder
from ray_sql.generate.groups import Group
from ray_sql.generate.hf_generate import inference
from ray_sql.models import decode_attention, recurrent
from ray_sql.models.seen import why_length_matters

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOLERANCE = 0.05
"""Relative difference of logits that arithmetic explains, in the middle of `PROBES` tries.

A question that misses its prefix is off by five times as much. A tuned model in bfloat16 was at
0.018, and at 0.5 without the prefix; a single try reached 0.07.
"""
PROBES = 5


@dataclass
class _Known:
    """The longest sequences over which a model shares, and the shortest over which it does not."""

    shares: int = 0
    fails: float = math.inf
    reason: str = ""


_KNOWN: WeakKeyDictionary[PreTrainedModel, _Known] = WeakKeyDictionary()


def why_not_share(model: PreTrainedModel, longest: int) -> str | None:
    """Return why `model` cannot answer over a prefix that questions share; None if it can.

    Prompt and answer have up to `longest` tokens. Pairs of short prompts of random tokens are
    computed both ways. The attention itself finds windows that layers do not say, sinks and the
    like. The model's config is asked for effects that only long prompts have. A finding is not
    tried again, for training changes a model's weights and not its layers.
    """
    if reason := why_length_matters(model.config.get_text_config(), longest):
        return reason
    known = _KNOWN.setdefault(model, _Known())
    if known.shares < longest < known.fails:
        if reason := _why_tries_differ(model, longest):
            known.fails, known.reason = longest, reason
        else:
            known.shares = longest
    return known.reason if longest >= known.fails else None


def _why_tries_differ(model: PreTrainedModel, longest: int) -> str | None:
    """Return why prompts over a prefix are computed otherwise than whole ones; None if alike."""
    if unknown := recurrent.unknown_layer(model):
        return f"its layers of the kind {unknown} carry a state that is not handed on to questions"
    try:
        with decode_attention.installed(model), inference(model):
            difference = median(_differences(model, longest))
    # each architecture fails in its own way; whole prompts are right for all
    except Exception as error:
        if out_of_memory(error):
            raise
        first_line = (str(error).splitlines() or [""])[0][:120]
        return f"it does not take a shared prefix ({type(error).__name__}: {first_line})"
    if difference < TOLERANCE:
        return None
    return (
        "a shared prefix gives other logits than whole prompts "
        f"(relative difference {difference:.2g})"
    )


def _differences(model: PreTrainedModel, longest: int) -> list[float]:
    """Return the relative difference of first logits computed both ways, by pair of prompts.

    All pairs are answered together, and whole prompts of one length in one pass. On a CPU a pass
    over few tokens costs about as much as one over many.
    """
    vocabulary = model.config.get_text_config().vocab_size
    draw = torch.Generator().manual_seed(0)
    prefixes, *ends = (
        torch.randint(vocabulary, (PROBES, length), generator=draw) for length in (8, 4, 2)
    )
    whole = [torch.cat([prefixes, end], 1) for end in ends]
    prompts = [prompt for ids in whole for prompt in ids.tolist()]
    groups = [Group([pair, pair + PROBES], prefixes.shape[1]) for pair in range(PROBES)]
    shared = Decoder(model, prompts, groups, longest).first_logits()
    alone = [model(ids.to(model.device)).logits[:, -1].float() for ids in whole]
    expected = torch.stack(alone, 1).flatten(0, 1)  # in the order of groups, as `shared`
    error, size = (logits.view(PROBES, -1).norm(dim=1) for logits in (shared - expected, expected))
    return [float(difference) for difference in error / size]
