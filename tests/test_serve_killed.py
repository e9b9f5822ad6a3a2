"""A copy of the model that is killed under load: who waits for it, and who is answered again."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx2
import psutil
import pytest

from tests.conftest import QUESTIONS
from tests.serving import replica, running_job
from tests.waiting import HANGS, wait_until

CLIENTS = 6
COUNTED, COUNT = QUESTIONS[6]
"""A question whose answer the tuned run knows, and its SQL."""


@dataclass(frozen=True)
class Asked:
    """When a question was sent and answered, and whether the answer was the right one."""

    began: float
    ended: float
    status: int
    right: bool


def ask(client: httpx2.Client) -> Asked:
    """Ask, and note what came of it. A connection that is closed counts as status 0."""
    began = time.monotonic()
    status, right = 0, False
    try:
        answer = client.post("/v1/sql", json={"question": COUNTED, "database": "mall"})
    except httpx2.TransportError:
        pass
    else:
        status = answer.status_code
        right = status == 200 and answer.json()["sql"] == COUNT and answer.json()["rows"] == [[2]]
    return Asked(began, time.monotonic(), status, right)


@pytest.mark.cluster
def test_a_killed_copy_fails_only_what_it_was_answering(tuned_run: Path) -> None:
    made: list[Asked] = []
    enough = threading.Event()

    def client_of(client: httpx2.Client) -> None:
        while not enough.is_set():
            made.append(ask(client))

    def answered_since(moment: float) -> int:
        return sum(one.right for one in list(made) if one.began > moment)

    with running_job(tuned_run) as (job, client), ThreadPoolExecutor(CLIENTS) as threads:
        clients = [threads.submit(client_of, client) for _ in range(CLIENTS)]
        try:
            wait_until(lambda: answered_since(0) > 5 * CLIENTS)
            killed = replica(job)
            executors = killed.children(recursive=True)
            struck = time.monotonic()
            killed.kill()
            psutil.wait_procs([killed], HANGS)
            moment = time.monotonic()
            wait_until(lambda: answered_since(moment) > 5 * CLIENTS)
        finally:
            enough.set()
        for one in clients:
            one.result(HANGS)
        assert replica(job).pid != killed.pid
        _, left = psutil.wait_procs(executors, HANGS)
    assert not left, "processes that ran SQL for the killed copy are still there"
    failed = [one for one in made if not one.right]
    assert len(failed) <= CLIENTS
    assert all(one.began < moment and one.ended > struck for one in failed), failed
    assert {one.status for one in failed} <= {0, 500, 503}
