"""`ray-sql serve` on a Ray that others use: their applications stay, and strangers stay out."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import pytest

from tests.conftest import QUESTIONS
from tests.serving import own_address
from tests.waiting import HANGS

pytestmark = pytest.mark.cluster
COUNTED, COUNT = QUESTIONS[6]
"""A question whose answer the tuned run knows, and its SQL."""


@pytest.fixture
def port(ray_local: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Let Ray Serve listen on all addresses, with an application `other` of somebody else."""
    import ray
    from ray import serve

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        number = probe.getsockname()[1]

    @serve.deployment(ray_actor_options={"num_cpus": 0})
    class Other:
        def __call__(self, request: object) -> str:
            return "still here"

    serve.start(http_options={"host": "0.0.0.0", "port": number})
    serve.run(Other.bind(), name="other", route_prefix="/other")  # type: ignore[attr-defined]
    monkeypatch.setenv("RAY_ADDRESS", ray.get_runtime_context().gcs_address)
    yield number
    serve.shutdown()


@contextmanager
def job(run: Path, port: int, token: str = "") -> Iterator[subprocess.Popen[str]]:
    """Run `jobs.serve` on a run, told to listen on this machine alone."""
    command = [sys.executable, "-m", "jobs.serve", "--output_name", run.name]
    command += ["--output_dir", str(run.parent), "--serve.port", str(port)]
    environment = {**os.environ, "RAY_SQL_TOKEN": token}
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment)
    try:
        yield process
    finally:
        process.kill()
        process.wait(HANGS)


def other(port: int) -> str:
    """Return what the application of somebody else answers."""
    return httpx2.get(f"http://127.0.0.1:{port}/other", timeout=HANGS).text


def test_it_leaves_the_applications_of_others_and_answers_no_stranger(
    tuned_run: Path, port: int
) -> None:
    with job(tuned_run, port) as process:
        assert process.stdout is not None
        assert any("answering at" in line for line in process.stdout)
        body = {"question": COUNTED, "database": "mall"}
        here = f"http://127.0.0.1:{port}/v1"
        assert httpx2.post(f"{here}/sql", json=body, timeout=HANGS).json()["sql"] == COUNT
        stranger = httpx2.get(
            f"http://{own_address()}:{port}/v1/models", headers={"Host": "localhost"}, timeout=HANGS
        )
        assert (stranger.status_code, "RAY_SQL_TOKEN" in stranger.text) == (403, True)
        with job(tuned_run, port) as second:
            _, told = second.communicate(timeout=HANGS)
        assert (second.returncode, "serves an application ray_sql already" in told) == (2, True)
        process.send_signal(signal.SIGTERM)
        assert process.wait(HANGS) == 128 + signal.SIGTERM
    assert httpx2.get(f"{here}/models", timeout=HANGS).status_code == 404
    assert other(port) == "still here"


def test_a_token_that_only_the_command_has_is_named(tuned_run: Path, port: int) -> None:
    with job(tuned_run, port, token="sesame") as process:
        _, told = process.communicate(timeout=HANGS)
    assert process.returncode == 2, told
    assert "RAY_SQL_TOKEN is set where the service was started, and not on a node" in told
    assert other(port) == "still here"


def test_a_route_of_another_application_is_named(tuned_run: Path, port: int) -> None:
    from ray import serve

    @serve.deployment(ray_actor_options={"num_cpus": 0})
    class Root:
        def __call__(self, request: object) -> str:
            return "the root"

    serve.run(Root.bind(), name="root", route_prefix="/")  # type: ignore[attr-defined]
    with job(tuned_run, port) as process:
        _, told = process.communicate(timeout=HANGS)
    assert process.returncode == 2, told
    assert 'Prefix / is being used by application "root"' in told
    assert httpx2.get(f"http://127.0.0.1:{port}/", timeout=HANGS).text == "the root"
