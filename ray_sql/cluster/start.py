"""Ray itself: joined where RAY_ADDRESS names a cluster, else started here; and left in order."""

from __future__ import annotations

import logging
import os
import signal
import threading
from concurrent.futures import Future, ThreadPoolExecutor, wait

from ray_sql.cluster import ray_internals
from ray_sql.errors import ConfigError, RaySqlError, StoreError

ENVIRONMENT = {
    # the patch pickles every Dataset.map with the whole module
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    # the default of 2 s is also how long every report waits
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    # the default of 15 lets whatever else runs on this machine slow training down
    "RAY_worker_niceness": "0",
    # Ray's future default; unset, every worker prints a warning about it
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
PROBE_SECONDS = 5.0
"""Seconds that a cluster has to answer at all."""
_STARTER = ThreadPoolExecutor(1, thread_name_prefix="ray_sql-start")
"""One thread, so that a second request finds Ray started."""
_STARTING: list[Future[None]] = []
"""The start that is under way, if any."""
_DASHBOARD: list[str] = []
"""Host and port of Ray's dashboard, where it has one."""
_OURS = threading.Event()
"""Set while there is a Ray that this process started or joined itself."""


def address() -> str | None:
    """Return the cluster that RAY_ADDRESS names; None if Ray is to be started on this machine."""
    named = os.environ.get("RAY_ADDRESS")
    return None if named in (None, "", "local") else named


def joins() -> bool:
    """Tell whether there is a Ray that `start_ray` joins; else it starts one on this machine."""
    import ray

    return address() is not None or ray.is_initialized()


def start_ray_in_background() -> Future[None]:
    """Begin what `start_ray` does, beside whatever this process does next."""
    if not _STARTING:
        _STARTING.append(_STARTER.submit(_init_ray))
    return _STARTING[0]


def start_ray() -> None:
    """Join the cluster that RAY_ADDRESS names, or start Ray here; do nothing if Ray is there.

    Raises:
        ConfigError: no cluster answers at RAY_ADDRESS.
        StoreError: Ray does not start here. Its processes took too long, or cannot write files.
    """
    try:
        start_ray_in_background().result()
    except RaySqlError:
        raise
    except Exception as error:  # Ray's own have no common base
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        if place := address():
            raise ConfigError(
                f"RAY_ADDRESS {place}: no Ray cluster answers there ({reason}); correct it, or "
                "unset it to start Ray here"
            ) from None
        raise StoreError(
            f"Ray did not start on this machine ({reason}); give the command again when less runs "
            "here, or without Ray: finetune and evaluate take --scaling.num_workers 0"
        ) from None
    finally:
        _STARTING.clear()  # look again next time: Ray may have been shut down since
    if threading.current_thread() is threading.main_thread():
        # Ray's core puts a handler below Python's that writes a stack trace and aborts; the one
        # of ours, which closes runs on the way out, goes back on top
        signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))


def _init_ray() -> None:
    import ray
    from ray.exceptions import AuthenticationError

    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if ray.is_initialized():
        return
    ray_internals.silence_start()
    # never `auto` unasked: a cluster that was killed leaves its address behind, and Ray would try
    # it for many minutes
    place = address() or "local"
    try:
        ray_internals.probe_address(place, PROBE_SECONDS)
    except AuthenticationError:
        raise ConfigError(
            f"RAY_ADDRESS {place}: the cluster refuses this process's token; set "
            "RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to the token that its "
            "nodes were started with"
        ) from None
    # the workers' own output stays in Ray's logs and dashboard; their warnings and errors come
    # through the channel
    context = ray.init(place, logging_level=logging.WARNING, log_to_driver=False)
    _DASHBOARD[:] = [context.dashboard_url] if context.dashboard_url else []
    _OURS.set()


def dashboard() -> str | None:
    """Return the address of Ray's dashboard, at this process's job if it was submitted as one.

    None where Ray has no dashboard, or was not started by this process.
    """
    if not _DASHBOARD:
        return None
    job = ray_internals.submission()
    return f"http://{_DASHBOARD[0]}" + (f"/#/jobs/{job}" if job else "")


def leave_ray() -> None:
    """Shut down the Ray that this process started, or leave the cluster that it joined.

    A Ray that was there before stays. At the interpreter's exit it would be too late. Ray's
    processes end with the thread that started them, which is gone by then. Tune would wait a minute
    to take its registrations back.
    """
    if _STARTING:  # of a run that ended before it needed Ray
        wait(_STARTING)
        _STARTING.clear()
    if _OURS.is_set():
        import ray

        _OURS.clear()
        _DASHBOARD.clear()
        ray.shutdown()
