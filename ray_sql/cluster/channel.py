"""What workers say, brought to the driver: points through a queue, not through `ray.train.report`, which is a barrier over all ranks
and is throttled by the controller's poll; a point on the loss curve needs neither."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray.util.queue import Queue

log = logging.getLogger(__name__)

Point = dict[str, Any]
OnPoint = Callable[[Point], bool | None]
"""What becomes of a point; False, for a checkpoint's, means that training should stop there."""
END: Point = {"kind": "end"}
"""The last point of a channel."""


def mark(stage: str, at: float | None = None) -> Point:
    """The point that says when a stage of starting up ended: now, or `at` (seconds since the epoch)."""
    return {"kind": "mark", "stage": stage, "at": time.time() if at is None else at}


def note(text: str) -> Point:
    """The point that is a line for people."""
    return {"kind": "note", "text": text}


class Sender:
    """The workers' end of a channel; a lost driver or queue costs points, never the run."""

    def __init__(self, queue: Queue, decisions: Queue | None) -> None:
        self._queue, self._decisions = queue, decisions
        self._lost = False

    def __call__(self, point: Point) -> bool | None:
        from ray.exceptions import RayError

        if self._lost:
            return None
        try:
            self._queue.put_nowait(point)
            if self._decisions is not None and point["kind"] == "validation":
                return self._decided(point["step"])
        except RayError as error:
            self._lost = True
            log.warning("progress can no longer be sent to the driver: %s", error)
        return None

    def _decided(self, step: int) -> bool:
        """What the driver says of this step; what it said to a worker that died before it heard it is passed over."""
        assert self._decisions is not None
        while True:
            of, go_on = self._decisions.get()
            if of == step:
                return bool(go_on)


class Channel:
    """The driver's end: a queue in the cluster and a thread that hands its points to `on_point`, in order; and where `on_point`
    decides, a queue back."""

    def __init__(self, on_point: OnPoint, decides: bool = False) -> None:
        import ray
        from ray.util.queue import Queue
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        # on the driver's node: on another it would be lost with that, and all later points with it
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        options = {"num_cpus": 0, "scheduling_strategy": here}
        self._queue = Queue(actor_options=options)
        self._decisions = Queue(actor_options=options) if decides else None
        self._on_point = on_point
        self._thread = threading.Thread(target=self._drain, name="ray_sql-points", daemon=True)

    def sender(self) -> Sender:
        """What processes of the cluster send points with."""
        return Sender(self._queue, self._decisions)

    def __enter__(self) -> Channel:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        from ray.exceptions import RayError

        # what was said before is still heard; not what busy workers go on to say to a driver that was told to stop
        with suppress(RayError):
            self._queue.put(END)
        self._thread.join()
        for queue in (self._queue, self._decisions):
            if queue is not None:
                queue.shutdown(force=True)

    def _drain(self) -> None:
        from ray.exceptions import RayError

        while True:
            try:
                point = self._queue.get()
            except RayError as error:
                log.warning("the workers' points can no longer be read: %s", error)
                return
            if point == END:
                return
            decision = self._take(point)
            if self._decisions is not None and point["kind"] == "validation":
                self._decisions.put((point["step"], decision is not False))

    def _take(self, point: Point) -> bool | None:
        try:
            return self._on_point(point)
        except (
            Exception
        ) as error:  # a display or a log that fails must not take the other points with it
            log.warning("a point was not shown: %s: %s", type(error).__name__, error)
            return None


class Shown(logging.Handler):
    """A worker's warnings as lines of the run's display: its own output stays in Ray's logs."""

    def __init__(self, emit: OnPoint) -> None:
        super().__init__(logging.WARNING)
        self._emit = emit

    def emit(self, record: logging.LogRecord) -> None:
        self._emit(note(record.getMessage()))
