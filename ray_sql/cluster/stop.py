"""How a driver that is told to stop ends in order: its workers learn of it, save, and end before the signal has its effect."""

from __future__ import annotations

import os
import signal
import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from typing import Any

from ray_sql.cluster.channel import OnPoint, note
from ray_sql.errors import last_line

PATIENCE = 45.0
"""Seconds that workers have to save and end once this process was told to stop: less than `RAY_JOB_STOP_WAIT_TIME_S` on a cluster of
ours, with time left to close the records."""


REACH_SECONDS = 15.0
"""Seconds that Ray has to take note of it."""


class ClusterEvent:
    """`threading.Event` for all processes of a cluster: a key in Ray's own store, so that it needs no process."""

    def __init__(self) -> None:
        self._key = f"ray_sql-{uuid.uuid4().hex}"

    def set(self) -> None:
        from ray.experimental import internal_kv

        internal_kv._internal_kv_put(self._key, b"set")

    def is_set(self) -> bool:
        from ray.experimental import internal_kv

        return bool(internal_kv._internal_kv_exists(self._key))


@contextmanager
def ending_in_order(
    told: threading.Event | ClusterEvent, begun: threading.Event, on_point: OnPoint
) -> Iterator[None]:
    """Inside, SIGTERM or Ctrl-C sets `told`, and has its effect when what is inside has ended.

    Its effect is immediate as long as nothing has `begun`, the second time, and after `PATIENCE` seconds. Signals reach the main thread:
    in any other this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {
        n: kept for n in numbers if (kept := signal.getsignal(n)) not in (None, signal.SIG_IGN)
    }
    received: list[int] = []
    ended = threading.Event()

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def end(number: int) -> None:
        patience = f"for at most {PATIENCE:.0f} s; once more stops at once"
        on_point(note(f"told to stop: a checkpoint is saved first, {patience}"))
        if not _reaches(told):
            on_point(
                note(
                    "Ray does not answer (was all of this machine told to stop?): there will be no checkpoint"
                )
            )
        else:
            ended.wait(PATIENCE)
        if not ended.is_set():
            os.kill(os.getpid(), number)

    def receive(number: int, frame: object) -> None:
        restore()
        if not begun.is_set():
            signal.raise_signal(number)
            return
        received.append(number)
        # not here: this code may have broken into the display's own, which cannot be entered twice
        threading.Thread(target=end, args=(number,), name="ray_sql-end", daemon=True).start()

    for number in before:
        signal.signal(number, receive)
    try:
        yield
    except Exception as error:
        if not received:
            raise
        on_point(note(f"stopped without a checkpoint: {last_line(error)}"))
    finally:
        ended.set()
        if not received:
            restore()
    if received:
        signal.raise_signal(received[0])


def _reaches(told: threading.Event | ClusterEvent) -> bool:
    """Set `told`; False where that fails, or hangs, because Ray is gone: Ray ends this process a minute later, whatever it is at."""
    over, reached = threading.Event(), threading.Event()

    def tell() -> None:
        with suppress(Exception):  # Ray's own errors have no common base
            told.set()
            reached.set()
        over.set()

    threading.Thread(target=tell, name="ray_sql-tell", daemon=True).start()
    over.wait(REACH_SECONDS)
    return reached.is_set()


def beside_signals(call: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Call in a thread, where this is the main one: signals are then received while it lasts, and Ray Train, which ends a run at
    Ctrl-C, leaves them to us."""
    if threading.current_thread() is not threading.main_thread():
        return call()
    result: Future[dict[str, Any]] = Future()

    def run() -> None:
        try:
            result.set_result(call())
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=run, name="ray_sql-fit", daemon=True).start()
    return result.result()
