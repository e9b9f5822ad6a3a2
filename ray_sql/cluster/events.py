"""What workers tell their driver, and what they are given: a type for each.

A receiver matches on the type. A new message is a class here, a member of `Event`, and a case in each receiver that shows it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Note:
    """A line for people."""

    text: str


@dataclass(frozen=True)
class StageEnded:
    """A stage of starting up ended `at` (seconds since the epoch)."""

    stage: str
    at: float


@dataclass(frozen=True)
class TrainPoint:
    """What was logged at an optimizer step of `steps`."""

    step: int
    steps: int
    values: Mapping[str, float]


@dataclass(frozen=True)
class CheckpointSaved:
    """A checkpoint is complete; `objective` and `tie_break` order it where it was evaluated."""

    step: int
    values: Mapping[str, float]
    objective: float | None
    tie_break: float | None


@dataclass(frozen=True)
class Resumed:
    """Training goes on from a checkpoint; `points` are (step, values) that were logged up to it."""

    step: int
    points: Sequence[tuple[int, Mapping[str, float]]]


@dataclass(frozen=True)
class RowsChosen:
    """How many questions share a row, after the model was tried."""

    examples_per_row: int


@dataclass(frozen=True)
class AnswerGiven:
    """An answer of a model to the question at a place among those asked."""

    model: str
    question: int
    answer: Any
    """A `generate.Answer`."""


@dataclass(frozen=True)
class AnswersCounted:
    """How many questions a model has answered."""

    model: str
    done: int
    total: int


@dataclass(frozen=True)
class TrialEvent:
    """What a trial of a sweep says."""

    trial: int
    event: Event


@dataclass(frozen=True)
class ChannelClosed:
    """The last event of a channel."""


Event = (
    Note
    | StageEnded
    | TrainPoint
    | CheckpointSaved
    | Resumed
    | RowsChosen
    | AnswerGiven
    | AnswersCounted
    | TrialEvent
    | ChannelClosed
)
OnEvent = Callable[[Event], bool | None]
"""Receives an event. False, for a saved checkpoint, stops training there."""


@dataclass(frozen=True)
class DriverLink:
    """A worker's line to its driver."""

    emit: OnEvent
    stopping: Callable[[], bool]
    """Tells whether the driver was told to stop."""


@dataclass(frozen=True)
class TrainJob:
    """What a training worker is given. `settings` are those of `Config.for_workers`."""

    settings: Mapping[str, Any]
    model_folder: str
    start_from: str | None
    """The checkpoint that `prev_checkpoint` names, as a URI."""
    driver: str
    """The driver that the run belongs to."""
    halvings: int = 0
    """How often forward passes were halved to fit into memory."""


@dataclass(frozen=True)
class AnswerJob:
    """What an answering worker is given."""

    settings: Mapping[str, Any]
    model_folder: str
    adapter: str | None
    models: Sequence[str]
    """`base`, `tuned`, or both in this order."""
    questions: str
    """The questions as JSON lines."""
    known: Mapping[str, Mapping[int, Any]]
    """Answers of an earlier attempt, by model and place of the question."""
    caches: Mapping[str, str]
    """Files that keep answers, by model."""
