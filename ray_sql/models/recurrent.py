"""Layers that carry a state from token to token: a prefix goes through one once for all questions.

Such are Gated DeltaNet (Qwen3.5), short convolutions (LFM2) and Mamba-2 (Granite 4). The state is a
matrix a head, a convolution's last inputs, or both, and a question needs nothing else of its
prefix. So a layer's forward is called for the prefix, and again for all questions as a batch that
begins with the prefix's state. Both calls are transformers' own code, with its fused kernels where
it uses them. It asks a cache for the state and hands back the new one; `State` answers in the
cache's place.

Gradients of the questions flow through the state into the prefix. Questions are padded at the end,
where no token looks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, groupby
from math import ceil
from typing import Any, Protocol

import torch

from ray_sql.models.triangular import InvertedOnce

LAYERS = {
    "BambaMixer": "cache_params",
    "FalconH1Mixer": "cache_params",
    "GraniteMoeHybridMambaLayer": "cache_params",
    "Lfm2MoeShortConv": "past_key_values",
    "Lfm2ShortConv": "past_key_values",
    "NemotronHMamba2Mixer": "cache_params",
    "OlmoHybridGatedDeltaNet": "cache_params",
    "Qwen3NextGatedDeltaNet": "cache_params",
    "Qwen3_5GatedDeltaNet": "cache_params",
    "Qwen3_5MoeGatedDeltaNet": "cache_params",
}
"""The argument that takes a cache, by class of layer. Another that asks a cache so is a line."""
CARRIED = "carried_states"
"""The keyword argument of a model's forward that carries a `Pass`."""
CHUNK = 64
"""Tokens of a chunk, about, in which a layer on a CPU computes."""
LEAST = 0.7
"""The share of a group's longest question that others in it have on a CPU; the rest is padding.

A GPU computes all questions in one call, for it waits longer for a call than for its padding.
"""
OURS = (CARRIED, "shared_rows_seen", "prefix_runs")
"""Arguments that attention is told and that a layer's kernels do not know."""
FEWEST = 2
"""Tokens of a call that goes on from a state, padding included.

Of a single one, layers write the state in place, which gradients do not survive.
"""


class State:
    """A layer's state, asked and told as transformers asks and tells a cache.

    `conv` are a convolution's last inputs, `[rows, channels, kernel]`, and `recurrent` is
    `[rows, ...]`. None is the state before the first token, or that of a layer without.
    """

    def __init__(
        self, conv: torch.Tensor | None = None, recurrent: torch.Tensor | None = None
    ) -> None:
        self.conv, self.recurrent = conv, recurrent

    def rows(self, rows: torch.Tensor | slice) -> State:
        """Return the states of `rows`, each as often as it is named."""
        return State(*(None if part is None else part[rows] for part in self.parts))

    @property
    def parts(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Return both parts."""
        return self.conv, self.recurrent

    @property
    def bytes(self) -> int:
        """Return the bytes of both parts."""
        return sum(int(part.nbytes) for part in self.parts if part is not None)

    def get_conv_state(self, *_: Any, **__: Any) -> torch.Tensor | None:
        """Return the convolution's last inputs."""
        return self.conv

    def get_recurrent_state(self, *_: Any, **__: Any) -> torch.Tensor | None:
        """Return the recurrent state."""
        return self.recurrent

    def is_recording_past(self, *_: Any) -> bool:
        """Tell the layer not to change the convolution's inputs in place."""
        return True

    def update_conv_state(
        self, inputs: torch.Tensor, *_: Any, conv_kernel_size: int, **__: Any
    ) -> torch.Tensor:
        """Keep the last of the inputs `[rows, channels, tokens]`; return those before, and them."""
        before = self.conv
        if before is None:
            before = inputs.new_zeros(*inputs.shape[:2], conv_kernel_size)
        all_inputs = torch.cat([before.to(inputs.dtype), inputs], dim=-1)
        self.conv = all_inputs[..., -conv_kernel_size:]
        return all_inputs

    def update_recurrent_state(self, state: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """Keep the state after the last token."""
        self.recurrent = state
        return state


def join(states: Sequence[State]) -> State:
    """Return states, all of one layer, as the rows of one."""
    by_part = zip(*(state.parts for state in states), strict=True)
    return State(*(None if parts[0] is None else torch.cat(parts) for parts in by_part))


def has_layers(model: torch.nn.Module) -> bool:
    """Tell whether a model has layers that carry a state."""
    return any(type(module).__name__ in LAYERS for module in model.modules())


def unknown_layer(model: torch.nn.Module) -> str | None:
    """Return the class of a layer that looks back by a convolution of its own and is no `LAYERS`.

    It would take the last tokens of a question for those before the next one.
    """
    for module in model.modules():
        name = type(module).__name__
        looks_back = any(isinstance(child, torch.nn.Conv1d) for child in module.children())
        if looks_back and hasattr(module, "layer_idx") and name not in LAYERS:
            return name
    return None


def install(model: torch.nn.Module) -> None:
    """Let the layers of `model` that carry a state heed `CARRIED`; all else is as before."""
    for module in model.modules():
        name = LAYERS.get(type(module).__name__)
        if name and not isinstance(module.forward, partial):
            module.forward = partial(_forward, module, module.forward, name)


def _forward(
    module: torch.nn.Module,
    forward: Callable[..., torch.Tensor],
    cache: str,
    hidden_states: torch.Tensor,
    **given: Any,
) -> torch.Tensor:
    """Serve as a layer's forward."""
    carried: Pass | None = given.pop(CARRIED, None)
    if carried is None:
        return forward(hidden_states, **given)
    options = {name: value for name, value in given.items() if name not in OURS}
    options["attention_mask"] = None

    def call(hidden: torch.Tensor, state: State) -> torch.Tensor:
        with _equal_chunks(module, hidden) as chunks:
            return forward(hidden, **options | chunks | {cache: state})

    return carried.compute(int(module.layer_idx), call, hidden_states)


@contextmanager
def _equal_chunks(module: torch.nn.Module, hidden: torch.Tensor) -> Iterator[dict[str, int]]:
    """Have a layer on a CPU cut its tokens into equal chunks; yield what it takes as arguments.

    It computes chunk by chunk, and pads the last one: 70 tokens become 128, or 256. One of 70 is
    less work. Kernels of a GPU have sizes of their own.
    """
    tokens = hidden.shape[1]
    size = ceil(tokens / max(1, round(tokens / CHUNK)))
    own = getattr(module, "chunk_size", None)  # of Mamba-2
    if hidden.device.type != "cpu":
        yield {}
    elif type(module).__name__.endswith("GatedDeltaNet"):
        with InvertedOnce():
            yield {"chunk_size": size}
    elif own is None:
        yield {}
    else:
        module.chunk_size = size
        try:
            yield {}
        finally:
            module.chunk_size = own


Call = Callable[[torch.Tensor, State], torch.Tensor]
"""A layer's forward: `[rows, tokens, size]` to the same shape, from a state that it changes."""


class Pass(Protocol):
    """A pass of which layers must know more than its rows, because states go on in it."""

    def compute(self, layer: int, call: Call, hidden: torch.Tensor) -> torch.Tensor:
        """Return a layer's output for its input, `[rows, length, size]` each."""


@dataclass(frozen=True)
class SharedStates:
    """Shared rows, as places in a pass whose rows lie one after the other; one at least is shared.

    `prefixes` are `[rows, tokens]`, for every length that a prefix (or a plain row) has.
    `questions` are `[questions, tokens]`, those of like length together, padded with places of any
    value. `owners` says which prefix, counted through all of `prefixes`, each of them goes on from.
    `back` `[rows x length]` says where each place's result lies, prefixes first, then questions,
    then one zero.
    """

    prefixes: list[torch.Tensor]
    questions: list[torch.Tensor]
    owners: list[torch.Tensor]
    back: torch.Tensor

    @classmethod
    def of(cls, segments: torch.Tensor, device: torch.device) -> SharedStates:
        """Return the layout of a pass with `segments` `[rows, length]`, which lie on the CPU."""
        rows, length = segments.shape
        counts = [torch.bincount(line[line >= 0]).tolist() for line in segments]
        order = sorted(range(rows), key=lambda row: int(counts[row][0]))
        prefixes = [
            torch.tensor(list(alike))[:, None] * length + torch.arange(tokens)
            for tokens, alike in groupby(order, key=lambda row: int(counts[row][0]))
        ]
        owners = [place for place, row in enumerate(order) for _ in counts[row][1:]]
        starts = [row * length + start for row in order for start in _starts(counts[row])]
        tokens = [tokens for row in order for tokens in counts[row][1:]]
        groups = of_like_length(tokens, LEAST if device.type == "cpu" else 0.0)
        questions, kept = [], [torch.ones(sum(each.numel() for each in prefixes), dtype=torch.bool)]
        for group in groups:
            own = torch.tensor([tokens[place] for place in group])
            offsets = torch.arange(max(FEWEST, int(own.max())))
            questions.append(torch.tensor([starts[place] for place in group])[:, None] + offsets)
            kept.append((offsets < own[:, None]).flatten())
        computed = torch.cat([each.flatten() for each in (*prefixes, *questions)])
        real = torch.cat(kept)
        back = torch.full((segments.numel(),), len(computed))
        back[computed[real]] = real.nonzero().flatten()
        return cls(
            [each.to(device) for each in prefixes],
            [each.clamp(max=segments.numel() - 1).to(device) for each in questions],
            [torch.tensor([owners[place] for place in group], device=device) for group in groups],
            back.to(device),
        )

    def compute(self, layer: int, call: Call, hidden: torch.Tensor) -> torch.Tensor:
        """Return a layer's output for its input, `[rows, length, size]` each; 0 for padding."""
        flat = hidden.flatten(0, 1)
        states = [State() for _ in self.prefixes]
        outputs = [
            call(flat[places], state) for places, state in zip(self.prefixes, states, strict=True)
        ]
        joined = join(states)
        outputs += [
            call(flat[places], joined.rows(owners))
            for places, owners in zip(self.questions, self.owners, strict=True)
        ]
        zero = outputs[0].new_zeros(1, outputs[0].shape[-1])
        every = torch.cat([*(output.flatten(0, 1) for output in outputs), zero])
        return every[self.back].view(*hidden.shape[:2], -1)


def of_like_length(tokens: Sequence[int], least: float) -> list[list[int]]:
    """Return the places of questions in groups, the longest first.

    Each has at least the share `least` of the tokens of its group's longest one.
    """
    groups: list[list[int]] = []
    for place in sorted(range(len(tokens)), key=lambda place: -tokens[place]):
        if not groups or tokens[place] < least * tokens[groups[-1][0]]:
            groups.append([])
        groups[-1].append(place)
    return groups


def _starts(counts: Sequence[int]) -> list[int]:
    """Return where a row's questions begin, from the tokens of its prefix and of each question."""
    return list(accumulate(counts))[:-1]
