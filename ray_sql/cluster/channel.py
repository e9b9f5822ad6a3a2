"""Events brought from workers to the driver.

They go through a queue. `ray.train.report` is a barrier over all ranks and is throttled by the
controller's poll; a point on the loss curve needs neither.
"""

from __future__ import annotations

import logging
import pickle
import threading
from contextlib import suppress
from typing import TYPE_CHECKING

from ray_sql.cluster.events import CheckpointSaved, Event, Note, OnEvent, UnknownEvent
from ray_sql.errors import RaySqlError

if TYPE_CHECKING:
    from ray.util.queue import Queue

log = logging.getLogger(__name__)

CLOSED = b""
"""The last message of a channel."""


class Sender:
    """The workers' end of a channel; a lost driver or queue costs events, never the run."""

    def __init__(self, queue: Queue, decisions: Queue | None) -> None:
        self._queue, self._decisions = queue, decisions
        self._lost = False

    def __call__(self, event: Event) -> bool | None:
        from ray.exceptions import RayError

        if self._lost:
            return None
        try:
            # as bytes: the queue's process need not import what is sent
            self._queue.put_nowait(pickle.dumps(event))
            if self._decisions is not None and isinstance(event, CheckpointSaved):
                return self._decision(event.step)
        except RayError as error:
            self._lost = True
            log.warning("progress can no longer be sent to the driver: %s", error)
        return None

    def _decision(self, step: int) -> bool:
        """Wait for the driver's decision at a step; pass over those meant for a dead worker."""
        assert self._decisions is not None
        while True:
            decided_step, go_on = self._decisions.get()
            if decided_step == step:
                return bool(go_on)


class Channel:
    """The driver's end: a queue in the cluster, and a thread that hands its events on in order.

    Where `on_event` decides, a second queue carries its decisions back. A kind of failure of the
    receiver is reported once, and later events still reach it. Leaving the channel raises
    `UnknownEvent` if a receiver had no case for an event.
    """

    def __init__(self, on_event: OnEvent, decides: bool = False) -> None:
        import ray
        from ray.util.queue import Queue
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        # on the driver's node: a queue on another node would be lost with that node
        node = ray.get_runtime_context().get_node_id()
        strategy = NodeAffinitySchedulingStrategy(node, soft=False)
        options = {"num_cpus": 0, "scheduling_strategy": strategy}
        self._queue = Queue(actor_options=options)
        self._decisions = Queue(actor_options=options) if decides else None
        self._on_event = on_event
        self._unknown: UnknownEvent | None = None
        self._failures: set[type[Exception]] = set()
        self._thread = threading.Thread(target=self._drain, name="ray_sql-events", daemon=True)

    def sender(self) -> Sender:
        """Return the end that processes of the cluster send events with."""
        return Sender(self._queue, self._decisions)

    def __enter__(self) -> Channel:
        self._thread.start()
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        from ray.exceptions import RayError

        # earlier events are still heard; those that busy workers send after a stop are not
        with suppress(RayError):
            self._queue.put(CLOSED)
        self._thread.join()
        for queue in (self._queue, self._decisions):
            if queue is not None:
                queue.shutdown(force=True)
        if self._unknown is not None and error is None:
            raise self._unknown

    def _drain(self) -> None:
        from ray.exceptions import RayError

        while True:
            try:
                message = self._queue.get()
            except RayError as error:
                log.warning("the workers' events can no longer be read: %s", error)
                return
            if message == CLOSED:
                return
            try:
                event = pickle.loads(message)
            except Exception as error:  # of whatever kind: later events can still be read
                log.warning("an event cannot be read: %s: %s", type(error).__name__, error)
                continue
            go_on = self._receive(event)
            if self._decisions is not None and isinstance(event, CheckpointSaved):
                self._decisions.put((event.step, go_on is not False))

    def _receive(self, event: Event) -> bool | None:
        try:
            return self._on_event(event)
        except UnknownEvent as error:
            self._unknown = error
        except Exception as error:
            # a display or a log that fails must not take later events with it
            if type(error) not in self._failures:
                text = f"{type(error).__name__}: {error}"
                is_bug = not isinstance(error, RaySqlError)
                log.warning("events may not be recorded: %s", text, exc_info=is_bug)
            self._failures.add(type(error))
        return None


class WarningSender(logging.Handler):
    """Sends a worker's warnings to the run's display; its own output stays in Ray's logs."""

    def __init__(self, emit: OnEvent) -> None:
        super().__init__(logging.WARNING)
        self._emit = emit

    def emit(self, record: logging.LogRecord) -> None:
        self._emit(Note(record.getMessage()))
