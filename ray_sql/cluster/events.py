"""The messages between workers and their driver, and the jobs that workers are given: a type each.

A receiver matches on the type. A new message is a class here, a member of `Event`, and a case in
each receiver that shows it. A receiver raises `UnknownEvent` in its last case.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Note:
    """A line for people."""

    text: str


@dataclass(frozen=True)
class StageEnded:
    """A stage of starting up ended `at` (seconds since the epoch)."""

    stage: str
    at: float = field(default_factory=time.time)


@dataclass(frozen=True)
class WorkersPlaced:
    """The workers run in a placement group of Ray; `run_workers` keeps it from its receiver."""

    group: Any


@dataclass(frozen=True)
class TrainPoint:
    """The values logged at an optimizer step, of `steps` in all."""

    step: int
    steps: int
    values: Mapping[str, float]


@dataclass(frozen=True)
class StepEnded:
    """An optimizer step ended, of `steps` in all; sent once a second at most."""

    step: int
    steps: int


@dataclass(frozen=True)
class NodeUsed:
    """Readings of how busy a node is at an optimizer step, by their names in MLflow."""

    step: int
    values: Mapping[str, float]


@dataclass(frozen=True)
class CheckpointSaved:
    """A checkpoint is complete.

    `objective` and `tie_break` order it among the others; None where it was not evaluated. `kept`
    are the steps of the checkpoints that are there now.
    """

    step: int
    values: Mapping[str, float] = field(default_factory=dict)
    objective: float | None = None
    tie_break: float | None = None
    kept: Sequence[int] = ()


@dataclass(frozen=True)
class Resumed:
    """Training goes on from a checkpoint; `points` are the (step, values) logged up to it.

    `kept` are the steps of the checkpoints that are there.
    """

    step: int
    points: Sequence[tuple[int, Mapping[str, float]]]
    kept: Sequence[int]


@dataclass(frozen=True)
class RowsChosen:
    """The number of examples that share a row, after the model was tried."""

    examples_per_row: int


@dataclass(frozen=True)
class AnswerGiven:
    """A model's answer to a question; `question` is its index among all questions of the job."""

    model: str
    question: int
    answer: Any
    """A `generate.Answer`."""


@dataclass(frozen=True)
class AnswersCounted:
    """A model has answered `done` of `total` questions."""

    model: str
    done: int
    total: int


@dataclass(frozen=True)
class TrialEvent:
    """An event of a sweep's trial."""

    trial: int
    event: Event


Event = (
    Note
    | StageEnded
    | WorkersPlaced
    | TrainPoint
    | StepEnded
    | NodeUsed
    | CheckpointSaved
    | Resumed
    | RowsChosen
    | AnswerGiven
    | AnswersCounted
    | TrialEvent
)
OnEvent = Callable[[Event], bool | None]
"""Receives an event. False, for a saved checkpoint, stops training there."""


class UnknownEvent(TypeError):
    """A receiver has no case for an event: a bug of ours."""

    def __init__(self, event: object) -> None:
        super().__init__(f"no case for an event of type {type(event).__name__}: {event!r}"[:300])


@dataclass(frozen=True)
class DriverLink:
    """A worker's line to its driver."""

    emit: OnEvent
    stopping: Callable[[], bool]
    """Tells whether the driver was told to stop."""
    in_process: bool = False
    """True where the driver is this process: asking it costs nothing."""


@dataclass(frozen=True)
class TrainJob:
    """The job of a training worker. `settings` are those of `Config.for_workers`."""

    settings: Mapping[str, Any]
    model_folder: str
    start_from: str | None
    """The checkpoint that `prev_checkpoint` names, as a URI."""
    driver: str | None
    """The driver that the run belongs to."""
    microbatch_halvings: int = 0
    """Number of times that forward passes were halved to fit into memory."""


@dataclass(frozen=True)
class TrainOutcome:
    """The end of a training; `failure` is the message for the user where the loss diverged."""

    step: int
    steps: int
    failure: str | None


@dataclass(frozen=True)
class AnswerJob:
    """The job of an answering worker. `settings` are those of `Config.for_workers`."""

    settings: Mapping[str, Any]
    model_folder: str
    adapter: str | None
    """The adapter's URI."""
    models: Sequence[str]
    """`base`, `tuned`, or both in this order."""
    questions: str
    """The questions as JSON lines."""
    known: Mapping[str, Mapping[int, Any]]
    """Answers of an earlier attempt, by model and index of the question."""
    caches: Mapping[str, str]
    """Files that keep answers, by model."""
    names: Mapping[str, Mapping[str, Collection[str]]] | None = None
    """Tables and columns of each database, in lower case, where answers may have no other names."""


@dataclass(frozen=True)
class AnswerOutcome:
    """The answers of all models to all questions, by model and index of the question."""

    answers: Mapping[str, Mapping[int, Any]]
