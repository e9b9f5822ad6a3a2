"""Events reach the driver in order; a receiver that fails, or knows no case, is no secret."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from ray_sql import tracking
from ray_sql.cluster import Channel
from ray_sql.cluster.events import (
    CheckpointSaved,
    Event,
    Note,
    RowsChosen,
    TrialEvent,
    UnknownEvent,
)
from ray_sql.display import Display
from ray_sql.report import progress
from ray_sql.store.run_folder import RunFolder


@pytest.fixture(scope="module", autouse=True)
def one_ray() -> Iterator[None]:
    """One Ray for all tests of this module."""
    import ray

    ray.init(address="local", num_cpus=2, include_dashboard=False, logging_level="ERROR")
    yield
    ray.shutdown()


def test_events_come_in_order_and_a_decision_goes_back() -> None:
    events: list[Event] = []

    def decide(event: Event) -> bool:
        events.append(event)
        return isinstance(event, CheckpointSaved) and event.step < 2

    sent = [Note("a"), CheckpointSaved(1, {"loss": 0.5}), CheckpointSaved(2), Note("b")]
    with Channel(decide, decides=True) as channel:
        send = channel.sender()
        assert [send(event) for event in sent] == [None, True, False, None]
    assert events == sent


def test_a_receiver_that_fails_is_reported_once_and_hears_the_rest(
    caplog: pytest.LogCaptureFixture,
) -> None:
    heard: list[Event] = []

    def broken(event: Event) -> None:
        heard.append(event)
        raise OSError("the disk is full")

    with Channel(broken) as channel:
        send = channel.sender()
        send(Note("a"))
        send(Note("b"))
    assert heard == [Note("a"), Note("b")]
    assert (
        caplog.text.count("events may not be recorded") == 1
        and "OSError: the disk is full" in caplog.text
    )


def test_an_event_without_a_case_is_an_error(make_config: Any) -> None:
    show = progress.Progress(RunFolder(make_config().run_dir), tracking.null_run(), Display())
    with pytest.raises(UnknownEvent, match="no case for an event of type RowsChosen"):
        show(RowsChosen(8))
    with (
        pytest.raises(UnknownEvent, match="no case for an event of type TrialEvent"),
        Channel(show) as channel,
    ):
        channel.sender()(TrialEvent(0, Note("a")))
