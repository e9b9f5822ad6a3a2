"""Ray's private API does in this version of Ray what `cluster/ray_internals.py` needs of it."""

from __future__ import annotations

import logging
import re
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from ray_sql.cluster import ray_internals

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module", autouse=True)
def one_ray() -> Iterator[None]:
    """One Ray for all tests of this module."""
    import ray

    ray.init(address="local", num_cpus=2, include_dashboard=False, logging_level="ERROR")
    yield
    ray.shutdown()


def test_ray_is_pinned_to_the_version_that_was_read() -> None:
    import ray

    (lowest, bound) = re.findall(
        r"ray\[.*\]>=([\d.]+),<([\d.]+)", (ROOT / "pyproject.toml").read_text()
    )[0]
    assert ray.__version__.startswith(f"{lowest}.") and bound == "2.61"


def test_a_submitted_job_knows_its_id(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR

    assert ray_internals.JOB_CONFIG == RAY_JOB_CONFIG_JSON_ENV_VAR
    monkeypatch.delenv(ray_internals.JOB_CONFIG, raising=False)
    assert ray_internals.submission() is None
    given = '{"runtime_env": {}, "metadata": {"job_submission_id": "raysubmit_1"}}'
    monkeypatch.setenv(ray_internals.JOB_CONFIG, given)
    assert ray_internals.submission() == "raysubmit_1"


def test_a_key_is_seen_once_it_is_put() -> None:
    assert not ray_internals.has_key("ray_sql-test")
    ray_internals.put_key("ray_sql-test")
    assert ray_internals.has_key("ray_sql-test")


def test_a_cluster_without_an_autoscaler_reports_no_node_types() -> None:
    assert ray_internals.autoscaler_node_types() == []


def test_node_types_that_the_autoscaler_reported_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray._private.state import state
    from ray.core.generated import autoscaler_pb2

    reported = autoscaler_pb2.ClusterConfig()
    reported.node_group_configs.add(resources={"CPU": 16, "GPU": 4}, max_count=3, name="gpu")
    monkeypatch.setattr(state, "get_cluster_config", lambda: reported)
    assert ray_internals.autoscaler_node_types() == [({"CPU": 16, "GPU": 4}, 3)]


def test_an_address_is_probed_in_seconds() -> None:
    import ray

    ray_internals.probe_address("local", 1.0)
    ray_internals.probe_address("ray://nowhere:10001", 1.0)
    ray_internals.probe_address(ray.get_runtime_context().gcs_address, 5.0)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nobody = f"127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(ConnectionError, match=r"nothing of Ray's in 1 s"):
        ray_internals.probe_address(nobody, 1.0)


def test_two_lines_of_a_start_are_silenced(caplog: pytest.LogCaptureFixture) -> None:
    ray_internals.silence_start()
    ray_internals.silence_start()
    worker = logging.getLogger("ray._private.worker")
    assert len([one for one in worker.filters if one is ray_internals.not_about_sigterm]) == 1
    record = logging.LogRecord("ray._private.worker", logging.INFO, "", 1, "", None, None)
    record.msg = "SIGTERM handler is not set because a handler was already set"
    assert not worker.filter(record)
    record.msg = "Started a local Ray instance."
    assert worker.filter(record)
    tokens = logging.getLogger("ray._private.authentication.authentication_token_setup")
    assert not tokens.isEnabledFor(logging.WARNING)


def test_a_lost_process_is_told_from_an_error_of_a_worker() -> None:
    from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

    assert ray_internals.is_lost_worker(WorkerHealthCheckFailedError("gone", RuntimeError()))
    assert not ray_internals.is_lost_worker(RuntimeError("CUDA out of memory"))
