"""One retry loop for storage and for the Hub. Each decides what may pass, and how long to wait."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def retry(action: Callable[[], T], wait: Callable[[Exception, int], float]) -> T:
    """Return what `action` returns, trying again after each failure.

    `wait(error, failures)` returns the seconds until the next try, or raises to give up.
    """
    for failures in itertools.count(1):
        try:
            return action()
        except Exception as error:  # storage and the Hub's client raise families of their own
            seconds = wait(error, failures)
        time.sleep(seconds)
    raise AssertionError("a try returns, or `wait` raises")
