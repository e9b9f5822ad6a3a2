"""Answers by transformers' own `generate`, prompts in padded batches.

It serves beams, and models that cannot share a prefix.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from ray_sql.generate.decoded import Decoded, make_answer
from ray_sql.generate.ends import Ends
from ray_sql.generate.questions import Answer, Candidate
from ray_sql.generate.sampling import log_probabilities
from ray_sql.generate.wanted import Wanted

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def answer_batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    max_new_tokens: int,
    num_beams: int = 1,
    wanted: Wanted | None = None,
    places: Sequence[int] = (),
) -> list[Answer]:
    """Return the answers to prompts computed together, padded on the left.

    With beams, an answer is the best one, and all are its `candidates`, best first. With `wanted`,
    an answer is the greedy one, with others beside it; `places` are the prompts' indices in it.
    """
    from transformers import GenerationConfig

    started = time.monotonic()
    width = max(map(len, prompts))
    ends = Ends(model, tokenizer, prompts[0])
    draws, copies = None, 1
    if wanted and wanted.answers > 1:
        draws = _Draws(wanted, ends, prompts, places, width, max_new_tokens)
        copies = wanted.answers
    ids, mask = _padded(prompts, copies, tokenizer.pad_token_id, model.device)
    # a config of our own: a model's own may sample, which would make two evaluations differ
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=num_beams,
        num_return_sequences=num_beams,
        eos_token_id=ends.stops,
        pad_token_id=tokenizer.pad_token_id,
    )
    with inference(model):
        output = model.generate(
            input_ids=ids,
            attention_mask=mask,
            generation_config=settings,
            stopping_criteria=[_FencesClosed(ends, width)],
            logits_processor=[draws] if draws else [],
        )
    seconds = (time.monotonic() - started) / len(prompts)
    rows = output[:, width:].tolist()
    scores = [draws.logprob(row, tokens) if draws else None for row, tokens in enumerate(rows)]
    every = [Decoded(tokens, score) for tokens, score in zip(rows, scores, strict=True)]
    each = copies * num_beams
    answers = []
    for index, prompt in enumerate(prompts):
        decoded = every[index * each : (index + 1) * each]
        constrained = bool(wanted and wanted.allows)
        answer = make_answer(ends, len(prompt), decoded, seconds, constrained)
        if num_beams > 1:
            best = Candidate(answer.raw, answer.new_tokens)
            answer = replace(answer, candidates=[best, *answer.candidates])
        answers.append(answer)
    return answers


def _padded(
    prompts: Sequence[Sequence[int]], copies: int, pad: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and mask `[prompts x copies, width]`, padded on the left; copies lie together."""
    width = max(map(len, prompts))
    ids = [[pad] * (width - len(prompt)) + [*prompt] for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    both = (torch.tensor(values, device=device) for values in (ids, mask))
    padded_ids, padded_mask = (values.repeat_interleave(copies, 0) for values in both)
    return padded_ids, padded_mask


class _Draws:
    """Leaves each row the token that its answer goes on with; rows are answers within prompts."""

    def __init__(
        self,
        wanted: Wanted,
        ends: Ends,
        prompts: Sequence[Sequence[int]],
        places: Sequence[int],
        width: int,
        max_new_tokens: int,
    ) -> None:
        self._wanted, self._ends, self._start = wanted, ends, width
        self._prompts, self._places = prompts, places
        numbers = [wanted.numbers(prompt, max_new_tokens) for prompt in prompts]
        self._numbers = torch.stack(numbers)
        self._logprobs: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        place, each = input_ids.shape[1] - self._start, self._wanted.answers
        numbers = self._numbers[:, place].repeat_interleave(each, 0)
        tokens = self._wanted.choose(scores, numbers)[0]
        rows = torch.arange(len(scores))
        chosen = tokens[rows, rows % each].tolist()
        begun = input_ids[:, self._start :].tolist()
        for row, token in enumerate(chosen):
            prompt = row // each
            chosen[row] = self._wanted.allowed(
                self._places[prompt],
                row % each,
                begun[row],
                token,
                scores[row],
                self._prompts[prompt],
            )
        tokens = torch.tensor(chosen, device=scores.device)[:, None]
        self._logprobs.append(log_probabilities(scores, tokens))
        return torch.full_like(scores, float("-inf")).scatter_(1, tokens, 0.0)

    def logprob(self, row: int, tokens: Sequence[int]) -> float:
        """Return the log-probability of a row's answer, its end included and padding left out."""
        length = len(self._ends.cut(tokens))
        stopped = length < len(tokens) and tokens[length] in self._ends.stops
        if stopped and not self._ends.closed(tokens[:length]):
            length += 1
        return float(sum(logprobs[row, 0] for logprobs in self._logprobs[:length]))


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
