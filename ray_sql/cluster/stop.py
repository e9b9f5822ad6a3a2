"""A driver that is told to stop ends in order: its workers save and end before the signal acts."""

from __future__ import annotations

import os
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

from ray_sql.cluster import ray_internals
from ray_sql.cluster.events import Event, Note, OnEvent, Resumed, TrainPoint
from ray_sql.errors import last_line

T = TypeVar("T")
STOP_SECONDS = 45.0
"""Seconds that workers have to save and end. Less than `RAY_JOB_STOP_WAIT_TIME_S` on a cluster of
ours, so that there is time left to close the records."""
AGAIN_SECONDS = 1.0
"""A signal within these seconds counts as the same one: `timeout` sends two at a time."""
SAY_SECONDS = 2.0
"""Seconds after which people are told what a signal waits for."""
RAY_SECONDS = 15.0
"""Seconds that Ray has to take note of the stop."""


class ClusterEvent:
    """A `threading.Event` for all processes of a cluster: a key in Ray's own store."""

    def __init__(self) -> None:
        self._key = f"ray_sql-{uuid.uuid4().hex}"

    def set(self) -> None:
        """Set it for all processes."""
        ray_internals.put_key(self._key)

    def is_set(self) -> bool:
        """Tell whether any process has set it."""
        return ray_internals.has_key(self._key)


class GracefulStop:
    """Inside, SIGTERM or Ctrl-C tells workers to stop, and acts when what is inside has ended.

    The signal acts at once before there is anything to save, when it comes a second time, and
    after `STOP_SECONDS`. Signals reach the main thread: in any other thread this does nothing.

    `tell` tells workers in other processes. One in this process asks `is_told`, which is true from
    the signal on: no thread has to get its turn first.
    """

    def __init__(self, on_event: OnEvent, tell: Callable[[], None] | None = None) -> None:
        self._on_event, self._tell = on_event, tell
        self._handlers: dict[int, Any] = {}
        self._received: int | None = None
        self._has_state = threading.Event()
        self._ended = threading.Event()

    def is_told(self) -> bool:
        """Tell whether a signal has come that work is to end for."""
        return self._received is not None

    def on_event(self, event: Event) -> bool | None:
        """Hand an event on; after the first step there is something to save, or saved."""
        if isinstance(event, TrainPoint | Resumed):
            self._has_state.set()
        return self._on_event(event)

    def __enter__(self) -> GracefulStop:
        _receive_by(self._receive, self._handlers)
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> bool:
        self._ended.set()
        if self._received is None:
            _restore(self._handlers)
            return False
        if isinstance(error, Exception):
            self._on_event(Note(f"stopped without a checkpoint: {last_line(error)}"))
        if error is None or isinstance(error, Exception):
            signal.raise_signal(self._received)
            return True
        return False

    def _receive(self, number: int, frame: object) -> None:
        _restore(self._handlers)
        if not self._has_state.is_set():
            signal.raise_signal(number)
            return
        self._received = number
        # in a thread: the signal may have broken into the display, which cannot be entered twice
        threading.Thread(target=self._end, args=(number,), name="ray_sql-end", daemon=True).start()

    def _end(self, number: int) -> None:
        """Tell the workers and wait for them; send the signal again if they do not end."""
        limit = f"if it ends within {STOP_SECONDS:.0f} s; once more stops at once"
        self._on_event(Note(f"told to stop: a checkpoint is saved after this step, {limit}"))
        if self._tell_workers():
            self._ended.wait(STOP_SECONDS)
        else:
            reason = "Ray does not answer (was all of this machine told to stop?)"
            self._on_event(Note(f"{reason}: there will be no checkpoint"))
        if not self._ended.is_set():
            os.kill(os.getpid(), number)

    def _tell_workers(self) -> bool:
        """Return False where that fails or hangs, because Ray is gone.

        Ray ends this process a minute later, whatever it is doing.
        """
        if self._tell is None:
            return True
        try:
            _start(self._tell, "ray_sql-tell").result(RAY_SECONDS)
        except Exception:  # Ray's own errors have no common base
            return False
        return True


@contextmanager
def said_when_slow(say: Callable[[], None]) -> Iterator[None]:
    """Call `say`, in a thread, if what is inside takes longer than `SAY_SECONDS`."""
    timer = threading.Timer(SAY_SECONDS, say)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextmanager
def signals_later(before: Callable[[], None], say: Callable[[], None]) -> Iterator[None]:
    """Let SIGTERM or Ctrl-C act when what is inside has ended, after a call of `before`.

    `say` is called where the signal waits for long. It acts at once when it comes again
    `AGAIN_SECONDS` later. Signals reach the main thread: in any other thread this does nothing.
    """
    came: list[tuple[int, float]] = []
    handlers: dict[int, Any] = {}

    def receive(number: int, _: object) -> None:
        came.append((number, time.monotonic()))
        if len(came) == 1:
            waiting.enter_context(said_when_slow(say))
        if came[-1][1] - came[0][1] > AGAIN_SECONDS:
            _restore(handlers)
            signal.raise_signal(number)

    with ExitStack() as waiting:
        _receive_by(receive, handlers)
        try:
            yield
        finally:
            _restore(handlers)
            if came:
                before()
                signal.raise_signal(came[0][0])


def _receive_by(receive: Callable[[int, Any], None], handlers: dict[int, Any]) -> None:
    """Have a function receive SIGTERM and Ctrl-C; put the handlers that it replaces in a dict."""
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            handler = signal.getsignal(number)
            if handler not in (None, signal.SIG_IGN):
                handlers[number] = handler
                signal.signal(number, receive)


def _restore(handlers: dict[int, Any]) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)


def run_in_thread(call: Callable[[], T]) -> T:
    """Call in a thread, where this is the main one, and return the result.

    The main thread then receives signals meanwhile. Ray Train, which ends a run at Ctrl-C, leaves
    them to us.
    """
    if threading.current_thread() is not threading.main_thread():
        return call()
    return _start(call, "ray_sql-fit").result()


def _start(call: Callable[[], T], name: str) -> Future[T]:
    """Call in a thread that does not keep the process alive."""
    result: Future[T] = Future()

    def run() -> None:
        try:
            result.set_result(call())
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=run, name=name, daemon=True).start()
    return result
