"""Answers by transformers' own `generate`, prompts in padded batches.

It serves beams, and models that cannot share a prefix.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

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
    """Return the answers to prompts computed together, padded on the left.

    With beams, an answer is the best one, and all are its `candidates`, best first.
    """
    from transformers import GenerationConfig

    started = time.monotonic()
    width = max(map(len, prompts))
    pad = tokenizer.pad_token_id
    ids, mask = [], []
    for prompt in prompts:
        padding = width - len(prompt)
        ids.append([pad] * padding + prompt)
        mask.append([0] * padding + [1] * len(prompt))
    ends = Ends(model, tokenizer, prompts[0])
    # a config of our own: a model's own may sample, which would make two evaluations differ
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=num_beams,
        num_return_sequences=num_beams,
        eos_token_id=ends.stops,
        pad_token_id=pad,
    )
    with inference(model):
        output = model.generate(
            input_ids=torch.tensor(ids, device=model.device),
            attention_mask=torch.tensor(mask, device=model.device),
            generation_config=settings,
            stopping_criteria=[_FencesClosed(ends, width)],
        )
    seconds = (time.monotonic() - started) / len(prompts)
    beams = [ends.cut(tokens) for tokens in output[:, width:].tolist()]
    answers = []
    for index, prompt in enumerate(prompts):
        own = beams[index * num_beams : (index + 1) * num_beams]
        texts = [ends.text(tokens) for tokens in own]
        candidates = texts if num_beams > 1 else []
        answers.append(Answer(texts[0], len(prompt), len(own[0]), seconds, candidates))
    return answers


@contextmanager
def inference(model: PreTrainedModel) -> Iterator[None]:
    """Compute without gradients, and in the types of training.

    LoRA weights are float32 in training. Autocast lets the same tensors meet the same arithmetic.
    """
    bf16 = model.dtype == torch.bfloat16
    with torch.inference_mode(), torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
        yield


class _FencesClosed:
    """Ends an answer, or a beam, once its code block is closed. Asked after each token."""

    def __init__(self, ends: Ends, prompt_width: int) -> None:
        self._ends, self._start = ends, prompt_width

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        closed = []
        # only a token with a fence's sign can close one, and few have it
        for row, last in zip(input_ids, input_ids[:, -1].tolist(), strict=True):
            answer = row[self._start :]
            closed.append(self._ends.may_close(last) and self._ends.closed(answer.tolist()))
        return torch.tensor(closed, device=input_ids.device)
