"""Every use of Ray's private API; `pyproject.toml` pins the version of Ray that it was read in."""

from __future__ import annotations

import json
import logging
import os

JOB_CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""The environment variable in which Ray gives a submitted job its id and more, as JSON."""


def autoscaler_node_types() -> list[tuple[dict[str, float], int]]:
    """Return (resources, maximum count) of each node type that the autoscaler reported to Ray.

    A negative count means no limit. Ray offers no public way to read these limits.
    """
    from ray._private.state import state

    reported = state.get_cluster_config()
    if reported is None:
        return []
    return [(dict(group.resources), group.max_count) for group in reported.node_group_configs]


def submission() -> str | None:
    """Return the id of the submitted job that this process is the entry point of, if it is one."""
    job = json.loads(os.environ.get(JOB_CONFIG, "{}"))
    found: str | None = job.get("metadata", {}).get("job_submission_id")
    return found


def put_key(key: str) -> None:
    """Keep a key in Ray's own store, for all processes of the cluster."""
    from ray.experimental import internal_kv

    internal_kv._internal_kv_put(key, b"set")


def has_key(key: str) -> bool:
    """Tell whether a key is in Ray's own store."""
    from ray.experimental import internal_kv

    return bool(internal_kv._internal_kv_exists(key))


def probe_address(address: str, seconds: float) -> None:
    """Raise within seconds where no cluster answers at an address; Ray itself takes minutes.

    Raises `ConnectionError`, or Ray's `AuthenticationError` where the cluster refuses this
    process's token. Passes over `local`, and over addresses that only Ray's own client reads.
    """
    import grpc
    import ray
    from ray._private.grpc_utils import init_grpc_channel
    from ray._private.services import canonicalize_bootstrap_address

    place = None if "://" in address else canonicalize_bootstrap_address(address)
    if place is None:
        return
    try:
        # a bare connection first: where no cluster is, Ray's client ends the process
        with init_grpc_channel(place) as channel:
            grpc.channel_ready_future(channel).result(timeout=seconds)
        ray._raylet.GcsClient(address=place)
    except grpc.FutureTimeoutError:
        raise ConnectionError(f"nothing of Ray's in {seconds:.0f} s") from None


def silence_start() -> None:
    """Silence two lines of every start: that tokens are on, and that SIGTERM stays ours."""
    tokens = logging.getLogger("ray._private.authentication.authentication_token_setup")
    tokens.setLevel(logging.ERROR)
    worker = logging.getLogger("ray._private.worker")
    if not_about_sigterm not in worker.filters:
        worker.addFilter(not_about_sigterm)


def not_about_sigterm(record: logging.LogRecord) -> bool:
    return "SIGTERM" not in record.getMessage()


def is_lost_worker(error: Exception) -> bool:
    """Tell the end of a worker's process from an error that the worker raised."""
    from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

    return isinstance(error, WorkerHealthCheckFailedError)
