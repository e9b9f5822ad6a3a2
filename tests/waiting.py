"""How tests wait: for events, never for a number of seconds."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

import psutil

T = TypeVar("T")

HANGS = 120.0
"""Seconds after which a test counts as hanging. Nothing that works comes near it, even where
eight other processes want the same core."""


def wait_until(happened: Callable[[], T]) -> T:
    """Return what `happened()` returns once that is true; fail where it never is."""
    end = time.monotonic() + HANGS
    while not (seen := happened()):
        assert time.monotonic() < end, "what the test waits for does not happen"
        time.sleep(0.01)
    return seen


def wait_until_at_work(process: psutil.Process) -> None:
    """Return once a process that was idle computes."""
    before = process.cpu_times().user
    wait_until(lambda: process.cpu_times().user > before + 0.1)
