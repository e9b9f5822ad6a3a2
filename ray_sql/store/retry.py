"""Try again: one way for storage and the Hub, which decide what may pass and how long to wait."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from tenacity import RetryCallState, Retrying

T = TypeVar("T")


def retry(action: Callable[[], T], wait: Callable[[Exception, int], float]) -> T:
    """Return what `action` returns, trying again after each failure.

    `wait(error, failures)` returns the seconds until the next try, or raises to give up.
    """

    def pause(state: RetryCallState) -> float:
        error = state.outcome.exception() if state.outcome else None
        assert isinstance(error, Exception)  # tenacity passes on whatever else is raised
        return wait(error, state.attempt_number)

    return Retrying(wait=pause, sleep=lambda seconds: time.sleep(seconds))(action)
