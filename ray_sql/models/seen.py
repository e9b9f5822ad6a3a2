"""Who sees whom in a pass of shared rows, for every window that a model's layers slide over.

A question sees the prefix and itself. A window counts positions, not places in the row: a question
goes on from the prefix's end, however many questions lie between the two.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

QUESTIONS_PER_PART = 8
"""Questions computed together on a CPU.

Fewer make many small products, more compute pairs of tokens that do not see each other.
"""


@dataclass(frozen=True)
class Spans:
    """A row's parts without padding: the prefix (or a plain row), then a few questions each.

    `lengths` are tokens. `biases` `[own, seen]` are added to a part's scores: 0 where a token sees
    another, -inf where not. The tokens seen are the prefix's, then the part's own.
    """

    lengths: list[int]
    biases: list[torch.Tensor]


class Seen:
    """Who sees whom in the rows of a pass; each form of the answer is made once.

    `segments` and `positions` are `[rows, length]`, on the model's device. `window` is the number
    of positions that a layer slides over, itself included; None where it sees all.
    """

    def __init__(self, segments: torch.Tensor, positions: torch.Tensor, dtype: torch.dtype) -> None:
        self.segments, self.positions, self._dtype = segments, positions, dtype
        self._made: dict[tuple[str, int | None], Any] = {}

    @cached_property
    def longest(self) -> int:
        """Return the tokens of the longest example."""
        return int(self.positions.max()) + 1

    def mask(self, window: int | None = None) -> torch.Tensor:
        """Return a bool `[rows, 1, length, length]`; the last two dimensions are query and key."""

        def make() -> torch.Tensor:
            return visible(self.segments, self.positions, window)[:, None]

        made: torch.Tensor = self._once("mask", window, make)
        return made

    def spans(self, window: int | None = None) -> list[Spans]:
        """Return the parts of every row."""

        def make() -> list[Spans]:
            pairs = zip(self.segments, self.mask(window)[:, 0], strict=True)
            return [spans(*row, self._dtype) for row in pairs]

        made: list[Spans] = self._once("spans", window, make)
        return made

    def block_mask(self, window: int | None = None) -> BlockMask:
        """Return the mask for FlexAttention."""
        return self._once(
            "blocks", window, lambda: block_mask(self.segments, self.positions, window)
        )

    def _once(self, form: str, window: int | None, make: Callable[[], Any]) -> Any:
        if (form, window) not in self._made:
            self._made[form, window] = make()
        return self._made[form, window]


def visible(
    segments: torch.Tensor, positions: torch.Tensor, window: int | None = None
) -> torch.Tensor:
    """Return who sees whom: bool `[rows, length, length]`, query and key.

    Takes `segments` and `positions`, `[rows, length]` each.
    """
    query, key = segments[:, :, None], segments[:, None, :]
    seen = ((key == 0) | (key == query)).tril()
    if window is not None:
        seen &= positions[:, :, None] - positions[:, None, :] < window
    return seen


def spans(segments: torch.Tensor, seen: torch.Tensor, dtype: torch.dtype) -> Spans:
    """Return the parts of one row.

    `segments` is `[length]`, `seen` (query, key) is bool `[length, length]`.
    """
    prefix, *questions = torch.bincount(segments[segments >= 0]).tolist()
    starts = range(0, len(questions), QUESTIONS_PER_PART)
    lengths = [prefix, *(sum(questions[start : start + QUESTIONS_PER_PART]) for start in starts)]
    ends = torch.tensor(lengths).cumsum(0).tolist()
    bias = torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, float("-inf"))
    biases = [bias[:prefix, :prefix]]
    for start, end in pairwise(ends):
        own = bias[start:end]
        biases.append(torch.cat([own[:, :prefix], own[:, start:end]], dim=1))
    return Spans(lengths, biases)


def block_mask(
    segments: torch.Tensor, positions: torch.Tensor, window: int | None = None
) -> BlockMask:
    """Return who sees whom, for FlexAttention on the device of `segments` `[rows, length]`."""

    def sees(
        row: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor
    ) -> torch.Tensor:
        segment = segments[row, key]
        seen = (query >= key) & ((segment == 0) | (segment == segments[row, query]))
        if window is not None:
            seen = seen & (positions[row, query] - positions[row, key] < window)
        return seen

    rows, length = segments.shape
    return create_block_mask(
        sees, B=rows, H=None, Q_LEN=length, KV_LEN=length, device=segments.device
    )


def window_of(module: torch.nn.Module, told: int | None, longest: Callable[[], int]) -> int | None:
    """Return the window that an attention layer slides over; None where it sees all.

    `told` is the one that the layer named when it was called. Raises `NotImplementedError` if
    sequences reach `longest` and the layer's config has a shorter one that was not named, or cuts
    attention into chunks.
    """
    config = getattr(module, "config", None)
    kinds = getattr(config, "layer_types", None)
    kind = str(kinds[int(module.layer_idx)]) if kinds else ""
    chunk = getattr(config, "attention_chunk_size", None)
    if chunk and "full" not in kind and chunk < longest():
        raise NotImplementedError(f"its attention is cut into chunks of {chunk} tokens")
    window = getattr(config, "sliding_window", None)
    slides = "sliding" in kind if kinds else getattr(config, "use_sliding_window", True)
    if told is None and window and slides and window < longest():
        raise NotImplementedError(f"its layers do not say that they slide over {window} tokens")
    return told


def why_length_matters(config: Any, longest: int) -> str | None:
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
