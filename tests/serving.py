"""A service of a run, on a free port of this machine, for tests."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest
import uvicorn

from ray_sql.config import ServeConfig, load
from ray_sql.config.sections import ServeSection
from ray_sql.generate import Answer
from ray_sql.generate.answers import OnAnswer
from ray_sql.serve.access import is_local
from ray_sql.serve.app import make_app
from ray_sql.serve.databases import registered
from ray_sql.serve.engine import Engine, Joinable
from ray_sql.serve.opening import find_linker, open_engine
from ray_sql.serve.prompter import Asked, Prompter
from ray_sql.serve.recipe import find
from tests.waiting import HANGS, wait_until


def settings(run: Path, **given: Any) -> ServeConfig:
    """Return the settings of a service of a run."""
    return load(ServeConfig, [], output_name=run.name, output_dir=str(run.parent), **given)


def make_engine(run: Path, **given: Any) -> Engine:
    """Return an engine on all databases of a run."""
    config = settings(run, **given)
    found = find(config)
    prompter = Prompter(found, registered({}, found.config))
    return open_engine(prompter, find_linker(config, prompter))


@contextmanager
def serving(
    engine: Engine, token: str | None = None, listen: str = "127.0.0.1", **section: Any
) -> Iterator[httpx2.Client]:
    """Serve on a free port of this machine; yield a client that asks 127.0.0.1."""
    app = make_app(engine, ServeSection(**section), token)
    config = uvicorn.Config(app, listen, port=0, log_level="debug", log_config=None)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    wait_until(lambda: server.started)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        with httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=HANGS) as client:
            yield client
    finally:
        server.should_exit = True
        thread.join(HANGS)


@dataclass(frozen=True)
class Held:
    """An engine that begins with a batch, and answers it once it is released."""

    begun: threading.Event = field(default_factory=threading.Event)
    released: threading.Event = field(default_factory=threading.Event)

    def wait_begun(self) -> None:
        """Return once a batch is being answered: its questions wait no more."""
        assert self.begun.wait(HANGS), "no question reaches the engine"

    def release(self) -> None:
        """Let it answer this batch and all that come."""
        self.released.set()


@contextmanager
def holding(engine: Engine) -> Iterator[Held]:
    """Hold an engine at its first batch."""
    held, answer = Held(), engine.answer_joinable

    def wait(batch: Joinable) -> None:
        held.begun.set()
        held.released.wait(HANGS)
        answer(batch)

    engine.answer_joinable = wait  # type: ignore[method-assign]
    try:
        yield held
    finally:
        engine.answer_joinable = answer  # type: ignore[method-assign]
        held.release()


@contextmanager
def always_answering(engine: Engine, raw: str) -> Iterator[None]:
    """Let the model of an engine write the same text, whatever it is asked."""

    def answer(asked: Sequence[Asked], settings: Any, on_answer: OnAnswer, *_: Any) -> None:
        for index in range(len(asked)):
            on_answer(index, Answer(raw, 1, 1, 0.0))

    written = engine._model.answer
    engine._model.answer = answer  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        engine._model.answer = written  # type: ignore[method-assign]


def own_address() -> str:
    """Return an address of this machine that others reach; skip the test where it has none."""
    found = [
        one.address
        for addresses in psutil.net_if_addrs().values()
        for one in addresses
        if one.family == socket.AF_INET and not is_local(one.address)
    ]
    return found[0] if found else pytest.skip("this machine has no address but its own")


def count_waiting(client: httpx2.Client) -> float:
    """Return how many questions wait, by the metrics."""
    lines = client.get("/metrics").text.splitlines()
    return float(next(line for line in lines if line.startswith("ray_sql_waiting ")).split()[1])


@contextmanager
def running_job(run: Path, *words: str) -> Iterator[tuple[psutil.Popen, httpx2.Client]]:
    """Run `jobs.serve` on a run in a process of its own; yield it, and a client.

    The process must end as one does that is told to.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "jobs.serve", "--output_name", run.name]
    command += ["--output_dir", str(run.parent), "--serve.port", str(port), *words]
    environment = {**os.environ, "RAY_SQL_TOKEN": ""}
    process = psutil.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        lines = iter(process.stdout)
        assert any(f"http://127.0.0.1:{port}/v1/sql" in line for line in lines)
        with httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=HANGS) as client:
            yield process, client
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(HANGS) == 128 + signal.SIGTERM


def replica(job: psutil.Process) -> psutil.Process:
    """Return the process of a job in which the model answers."""
    (found,) = [one for one in job.children(recursive=True) if is_replica(one)]
    return found


def is_replica(process: psutil.Process) -> bool:
    """Tell whether a process holds a copy of the model, by the name that Ray Serve gives it."""
    try:
        return "ServeReplica" in " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return False
