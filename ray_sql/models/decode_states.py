"""States of layers that carry one, for questions that are answered together.

Each row is an answer on its way. It begins with the state that its prefix has left, which is kept
once, and changes with every token.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch

from ray_sql.models.recurrent import Call, State, join

Rows: TypeAlias = "torch.Tensor | slice"
"""Rows by their numbers, or those next to each other."""
ROW_STEP = 8
"""Rows by which states get more memory."""


class RowStates:
    """The states of the rows that are answered together, by layer."""

    def __init__(self) -> None:
        self._layers: dict[int, State] = {}

    def get(self, layer: int, rows: Rows) -> State:
        """Return the states of `rows`: copies, or for a slice a view."""
        return self._layers[layer].rows(rows)

    def put(self, layer: int, rows: Rows, state: State) -> None:
        """Keep a state as that of `rows`, in their order."""
        held = self._layers.setdefault(layer, State())
        wanted = rows.stop if isinstance(rows, slice) else int(rows.max()) + 1
        held.conv = _put(held.conv, rows, state.conv, wanted)
        held.recurrent = _put(held.recurrent, rows, state.recurrent, wanted)

    def copy(self, sources: torch.Tensor, first: int) -> None:
        """Copy the states of rows to the rows from `first` on."""
        if not len(sources):
            return
        for layer in self._layers:
            self.put(layer, slice(first, first + len(sources)), self.get(layer, sources))


def _put(
    held: torch.Tensor | None, rows: Rows, new: torch.Tensor | None, wanted: int
) -> torch.Tensor | None:
    """Return `held` with `new` in `rows`, and room for `wanted` rows."""
    if new is None:
        return None
    if held is None or len(held) < wanted:
        grown = new.new_zeros(-(-wanted // ROW_STEP) * ROW_STEP, *new.shape[1:])
        if held is not None:
            grown[: len(held)] = held
        held = grown
    held[rows] = new
    return held


@dataclass(frozen=True)
class StatesPass:
    """A pass over rows that are being answered, from row `first` on.

    The last `lengths` tokens of each row are its own, the others padding. Rows that begin do so
    with the states of `begins`, by layer; None is a prompt without a prefix. `begins` is None where
    all rows go on.
    """

    states: RowStates
    first: int
    lengths: Sequence[int]
    begins: Sequence[Mapping[int, State] | None] | None

    def compute(self, layer: int, call: Call, hidden: torch.Tensor) -> torch.Tensor:
        """Return a layer's output for its input, `[rows, tokens, size]` each; 0 for padding.

        Rows of one length are computed together, so that no state meets padding.
        """
        output = torch.zeros_like(hidden)
        alike = self._alike()
        for (length, _), places in alike.items():
            chosen: Rows = slice(0, len(places))
            kept: Rows = slice(self.first, self.first + len(places))
            if len(alike) > 1:
                chosen = torch.tensor(places, device=hidden.device)
                kept = chosen + self.first
            state = self._state(layer, kept, places)
            output[chosen, -length:] = call(hidden[chosen, -length:], state).to(output.dtype)
            self.states.put(layer, kept, state)
        return output

    def _alike(self) -> dict[tuple[int, bool], list[int]]:
        """Return the rows by their tokens, and by whether they have a state to go on from."""
        alike: dict[tuple[int, bool], list[int]] = defaultdict(list)
        for place, length in enumerate(self.lengths):
            nothing = self.begins is not None and self.begins[place] is None
            alike[length, nothing].append(place)
        return alike

    def _state(self, layer: int, rows: Rows, places: Sequence[int]) -> State:
        """Return the states from which rows go on, for the layer to change."""
        if self.begins is None:
            return self.states.get(layer, rows)
        prefixes = [self.begins[place] for place in places]
        if prefixes[0] is None:
            return State()
        return join([prefix[layer] for prefix in prefixes if prefix is not None])
