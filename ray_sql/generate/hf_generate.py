"""Answers by transformers' own `generate`, whole prompts in padded batches: beams, and models that cannot share a prefix."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from ray_sql.generate.ends import Ends
from ray_sql.generate.questions import Answer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def answer_batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    max_new_tokens: int,
    num_beams: int = 1,
) -> list[Answer]:
    """Answers to prompts computed together, padded on the left; with beams, the best one and all as `candidates`, best first."""
    import torch
    from transformers import GenerationConfig

    started = time.monotonic()
    width = max(map(len, prompts))
    pad = tokenizer.pad_token_id
    ids = torch.tensor(
        [[pad] * (width - len(prompt)) + prompt for prompt in prompts], device=model.device
    )
    mask = torch.tensor(
        [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device
    )
    ends = Ends(model, tokenizer)
    # a config of our own: a model's own may sample, which would make two evaluations differ
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=num_beams,
        num_return_sequences=num_beams,
        eos_token_id=ends.stops,
        pad_token_id=pad,
    )
    # autocast as in training: LoRA weights are float32 there, and the same tensors must meet the same arithmetic
    autocast = torch.autocast(
        model.device.type, torch.bfloat16, enabled=model.dtype == torch.bfloat16
    )
    with torch.inference_mode(), autocast:
        out = model.generate(
            input_ids=ids,
            attention_mask=mask,
            generation_config=settings,
            stopping_criteria=[_FencesClosed(ends, width)],
        )
    seconds = (time.monotonic() - started) / len(prompts)
    rows = [ends.cut(row) for row in out[:, width:].tolist()]
    said = []
    for number, prompt in enumerate(prompts):
        texts = [ends.text(row) for row in rows[number * num_beams : (number + 1) * num_beams]]
        candidates = texts if num_beams > 1 else []
        said.append(
            Answer(texts[0], len(prompt), len(rows[number * num_beams]), seconds, candidates)
        )
    return said


class _FencesClosed:
    """Ends an answer, or a beam, once its code block is closed. Called by transformers after each token."""

    def __init__(self, ends: Ends, prompt_width: int) -> None:
        self._ends, self._start = ends, prompt_width

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        import torch

        last = input_ids[
            :, -1
        ].tolist()  # only a token with a fence's sign can close one, and few have it
        closed = [
            self._ends.may_close(token) and self._ends.closed(row[self._start :].tolist())
            for token, row in zip(last, input_ids, strict=True)
        ]
        return torch.tensor(closed, device=input_ids.device)
