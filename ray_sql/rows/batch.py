"""Rows as tensors: what one rank computes in an optimizer step, and the model's inputs for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch

from ray_sql.config import Batching
from ray_sql.models import packed_attention, recurrent
from ray_sql.models.recurrent import SharedStates
from ray_sql.models.seen import Seen
from ray_sql.rows.encoder import IGNORED, TokenizedExample
from ray_sql.rows.share import SharedRow, passes, step_order

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PADDING = -1
"""The segment of a token that only fills a batch."""


@dataclass(frozen=True)
class Pass:
    """One forward pass: rows, shared or plain, padded to one length.

    All four tensors are `[rows, length]`, int64. `segments` is 0 for a prefix or a plain row, 1, 2,
    … for the questions after a prefix, and `PADDING`. `labels` are `IGNORED` except on answers.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    segments: torch.Tensor
    labels: torch.Tensor

    def to(self, device: torch.device) -> Pass:
        """Return the same tensors on `device`."""
        tensors = (getattr(self, field.name) for field in fields(self))
        return Pass(*(tensor.to(device, non_blocking=True) for tensor in tensors))


@dataclass(frozen=True)
class Step:
    """One rank's part of an optimizer step; `labels` counts those of all ranks."""

    passes: tuple[Pass, ...]
    labels: int


class Steps:
    """One rank's part of every optimizer step of a run; each is laid out when it is asked for."""

    def __init__(
        self,
        examples: Sequence[TokenizedExample],
        batching: Batching,
        rank: int,
        world: int,
        pad: int,
    ) -> None:
        self._examples, self._batching = examples, batching
        self._rank, self._world, self._pad = rank, world, pad
        self._order = step_order(examples, batching)

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: int) -> Step:
        examples = [self._examples[place] for place in self._order[index]]
        own = passes(examples, self._batching, self._rank, self._world)
        tensors = tuple(collate(rows, self._pad) for rows in own) or (self._idle(examples[0]),)
        labels = sum(len(example.input_ids) - example.prompt_length for example in examples)
        return Step(tensors, labels)

    def _idle(self, example: TokenizedExample) -> Pass:
        """Return a pass without labels, for a rank that has no example in this step.

        The rank takes part in the exchange of gradients, with none of its own.
        """
        plain = collate([SharedRow((example,), 0)], self._pad)
        return replace(plain, labels=torch.full_like(plain.labels, IGNORED))


def collate(rows: Sequence[SharedRow], pad: int) -> Pass:
    """Return rows as the tensors of one forward pass, padded on the right."""
    lines = [_line(row) for row in rows]
    width = max(len(line[0]) for line in lines)
    columns = []
    for column, fill in enumerate((pad, 0, PADDING, IGNORED)):
        values = (line[column] for line in lines)
        columns.append(torch.tensor([row + [fill] * (width - len(row)) for row in values]))
    return Pass(*columns)


def model_inputs(batch: Pass, model: PreTrainedModel) -> dict[str, Any]:
    """Return the arguments, on its device, with which `model` computes the rows of a pass."""
    # asked before the pass is moved: a GPU's answer would have to be waited for
    shared = bool((batch.segments > 0).any())
    unpadded = bool((batch.segments == 0).all())
    states = None
    if shared and recurrent.has_layers(model):
        states = SharedStates.of(batch.segments, model.device)
    batch = batch.to(model.device)
    if not shared:  # plain rows need causal order and, where there is any, the padding
        plain = {"input_ids": batch.input_ids}
        return plain if unpadded else plain | {"attention_mask": (batch.segments == 0).long()}
    seen = Seen(batch.segments, batch.position_ids, model.dtype)
    inputs: dict[str, Any] = {"input_ids": batch.input_ids, "position_ids": batch.position_ids}
    implementation = model.config._attn_implementation
    if implementation in (packed_attention.NAME, packed_attention.MASKED):
        inputs[packed_attention.SEEN] = seen
    if states is not None:
        inputs[recurrent.CARRIED] = states
    if implementation == packed_attention.NAME and batch.segments.is_cuda:
        # Every attention is handed `seen`. A mask of all pairs would take memory for nothing.
        return inputs | {"attention_mask": batch.segments.new_ones(1, 1, 1, 1, dtype=torch.bool)}
    mask = seen.mask()
    if implementation == "eager":  # it adds the mask to the scores
        lowest = torch.finfo(model.dtype).min
        mask = torch.zeros_like(mask, dtype=model.dtype).masked_fill(~mask, lowest)
    return inputs | {"attention_mask": mask}


def _line(row: SharedRow) -> tuple[list[int], list[int], list[int], list[int]]:
    """Return token, position, segment and label of every place in a row."""
    ids = list(row.examples[0].input_ids[: row.prefix])
    positions, segments, labels = list(range(row.prefix)), [0] * row.prefix, [IGNORED] * row.prefix
    for segment, example in enumerate(row.examples, start=1 if row.prefix else 0):
        own = example.input_ids[row.prefix :]
        unlearned = example.prompt_length - row.prefix
        ids += own
        positions += range(row.prefix, row.prefix + len(own))
        segments += [segment] * len(own)
        labels += [IGNORED] * unlearned + own[unlearned:]
    return ids, positions, segments, labels
