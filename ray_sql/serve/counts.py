"""Counts and times of a service, for Prometheus."""

from __future__ import annotations

import time
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from starlette.types import ASGIApp, Message, Receive, Scope, Send

TOGETHER = (1, 2, 4, 8, 16, 32, 64)
"""Bounds of the numbers of questions that are on their way together."""


class Counts:
    """The counts of one service, in a registry of their own."""

    def __init__(self, waiting: Callable[[], int]) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "ray_sql_requests", "Requests", ["route", "status"], registry=registry
        )
        self.seconds = Histogram(
            "ray_sql_request_seconds", "Seconds of a request", ["route"], registry=registry
        )
        self.together = Histogram(
            "ray_sql_answered_together",
            "Questions on their way as one was answered, it included",
            buckets=TOGETHER,
            registry=registry,
        )
        gauge = Gauge("ray_sql_waiting", "Questions that wait", registry=registry)
        gauge.set_function(waiting)


class Counted:
    """Counts every request by route and status, and its seconds by route."""

    def __init__(self, app: ASGIApp, counts: Counts) -> None:
        self._app, self._counts = app, counts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, and count it when its answer begins."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, has_answer = time.monotonic(), False

        def count(status: int) -> None:
            nonlocal has_answer
            has_answer = True
            route = getattr(scope.get("route"), "path", "other")
            self._counts.requests.labels(route, str(status)).inc()
            self._counts.seconds.labels(route).observe(time.monotonic() - began)

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                count(message["status"])
            await send(message)

        try:
            await self._app(scope, receive, counted)
        except Exception:  # Starlette answers it with 500, outside of this
            if not has_answer:
                count(500)
            raise
