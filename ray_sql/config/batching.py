"""The layout of examples in optimizer steps and forward passes.

An optimizer step always sees the same number of examples, however they are laid out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

AUTO_EXAMPLES_PER_ROW = 8
"""Largest number of questions that share a row where `rows.examples_per_row` is `auto`."""
FEW_IN_A_ROW = 4
"""Questions of a row, of which two a step mix databases enough."""


@dataclass(frozen=True)
class Batching:
    """The layout of a run's optimizer steps and of the forward passes in them."""

    global_batch_size: int
    """Examples per optimizer step, with any number of workers."""
    train_batch_size: int
    """Maximum examples in a forward pass of several rows."""
    examples_per_row: int
    """Maximum examples of one database in a row. It is 1 for a model that cannot share rows."""
    row_length: int
    """Maximum tokens of a shared row."""
    num_epochs: float
    max_steps: int
    """Optimizer steps of the run; -1 follows `num_epochs`."""
    seed: int
    microbatch_halvings: int = 0
    """The number of times that forward passes were halved to fit into memory.

    Optimizer steps do not change.
    """

    @property
    def examples_per_pass(self) -> int:
        """Maximum examples in a forward pass, in one row or several."""
        largest = max(self.examples_per_row, self.train_batch_size)
        return max(1, largest >> self.microbatch_halvings)

    def steps_per_epoch(self, examples: int) -> int:
        """Return the optimizer steps of one pass over the examples; a smaller last one counts."""
        return math.ceil(examples / self.global_batch_size)

    def steps(self, examples: int) -> int:
        """Return the optimizer steps of the whole run."""
        if self.max_steps > 0:
            return self.max_steps
        return max(1, math.ceil(self.steps_per_epoch(examples) * self.num_epochs))


def choose_examples_per_row(setting: int | Literal["auto"], global_batch_size: int) -> int:
    """Return how many examples share a row, at most as many as an optimizer step has.

    `auto` leaves a step at least two rows. Rows of more than 4 are as many as a row has examples.
    Rows of 4 answered about as many new questions as plain rows after as many examples, and rows
    of 8 fewer (`benchmarks.shared_rows_quality`). After as many seconds, rows of 4 in steps of 8
    had learnt more than rows of 2 (`benchmarks.by_the_clock`). The result divides the step where a
    number above 1 does. So the end of a step cuts no group of a database in two.
    """
    if setting != "auto":
        return min(setting, global_batch_size)
    mixing = [1]
    for count in range(2, AUTO_EXAMPLES_PER_ROW + 1):
        rows = 2 if count <= FEW_IN_A_ROW else count
        if count * rows <= global_batch_size:
            mixing.append(count)
    dividing = [count for count in mixing if count > 1 and global_batch_size % count == 0]
    return max(dividing or mixing)


def examples_per_row_of_one_database(global_batch_size: int, workers: int) -> int:
    """Return how many examples share a row where `auto` has no databases to mix.

    A step meets the same examples however they are laid out, so it is as many as are cheap. Every
    worker has a row.
    """
    most = max(1, min(AUTO_EXAMPLES_PER_ROW, global_batch_size // workers))
    return max(count for count in range(1, most + 1) if global_batch_size % count == 0)
