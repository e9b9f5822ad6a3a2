"""Ray itself: joined where RAY_ADDRESS names a cluster, else started on this machine, and left in order."""

from __future__ import annotations

import logging
import os
import signal
import threading
from concurrent.futures import Future, ThreadPoolExecutor

from ray_sql.errors import ConfigError

ENVIRONMENT = {
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # the patch pickles every Dataset.map with the whole module
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # the default of 2 s is also how long every report waits
    "RAY_worker_niceness": "0",  # the default of 15 lets whatever else runs on this machine slow training down
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # Ray's future default; unset, every worker prints a warning about it
}
KNOCK_SECONDS = 5.0
"""How long a cluster may take to answer at all."""
_STARTER = ThreadPoolExecutor(1, thread_name_prefix="ray_sql-start")
"""One thread: whoever asks for Ray second finds it started."""
_BEGUN: list[Future[None]] = []
"""The start that is under way, if any."""
_OURS = threading.Event()
"""Set while there is a Ray that this process started or joined itself."""


def address() -> str | None:
    """The cluster that RAY_ADDRESS names; None where this process is to start a Ray of its own."""
    named = os.environ.get("RAY_ADDRESS")
    return None if named in (None, "", "local") else named


def joins() -> bool:
    """Whether there is a Ray that `start_ray` joins; else it starts one on this machine."""
    import ray

    return address() is not None or ray.is_initialized()


def begin_ray() -> Future[None]:
    """Join the cluster that RAY_ADDRESS names, or start Ray on this machine, beside whatever this process does next."""
    if not _BEGUN:
        _BEGUN.append(_STARTER.submit(_init_ray))
    return _BEGUN[0]


def start_ray() -> None:
    """`begin_ray`, waited for; does nothing if Ray is there. Raises `ConfigError` where RAY_ADDRESS names no cluster."""
    try:
        begin_ray().result()
    except (ConnectionError, RuntimeError, ValueError) as error:
        if not address():
            raise
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"RAY_ADDRESS {address()}: no Ray cluster answers there ({reason}); correct it, or unset it to start Ray here"
        ) from None
    finally:
        _BEGUN.clear()  # asked again, it looks again: Ray may have been shut down since
    if threading.current_thread() is threading.main_thread():
        # Ray's core has put a handler below Python's that writes a stack trace and aborts; ours closes runs on the way out
        signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))


def _init_ray() -> None:
    import ray

    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if not ray.is_initialized():
        # it announces at every start that tokens are on, as they should be, and that SIGTERM stays ours, as it should
        logging.getLogger("ray._private.authentication.authentication_token_setup").setLevel(
            logging.ERROR
        )
        logging.getLogger("ray._private.worker").addFilter(
            lambda record: "SIGTERM" not in record.getMessage()
        )
        # workers' own output stays in Ray's logs and dashboard: what matters comes through the channel, and their errors as errors
        # never `auto` unasked: a cluster that was killed leaves its address behind, and Ray would try it for many minutes
        _knock(place := address() or "local")
        ray.init(place, logging_level=logging.WARNING, log_to_driver=False)
        _OURS.set()


def _knock(named: str) -> None:
    """Raise in seconds, not in minutes as Ray does, where no cluster answers at an address (`ConnectionError`), or where it refuses this
    process's token (`ConfigError`)."""
    import grpc
    import ray
    from ray._private.grpc_utils import init_grpc_channel
    from ray._private.services import canonicalize_bootstrap_address
    from ray.exceptions import AuthenticationError

    place = None if "://" in named else canonicalize_bootstrap_address(named)
    if place is None:  # this machine, or an address that only Ray's own client reads
        return
    try:
        with init_grpc_channel(
            place
        ) as channel:  # first: where no cluster is, Ray's client waits, and then ends the process
            grpc.channel_ready_future(channel).result(timeout=KNOCK_SECONDS)
        ray._raylet.GcsClient(address=place)
    except grpc.FutureTimeoutError:
        raise ConnectionError(f"nothing of Ray's in {KNOCK_SECONDS:.0f} s") from None
    except AuthenticationError:
        raise ConfigError(
            f"RAY_ADDRESS {named}: the cluster refuses this process's token; set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or "
            "RAY_AUTH_TOKEN_PATH to the token that its nodes were started with"
        ) from None


def leave_ray() -> None:
    """Shut down the Ray that this process started, or leave the cluster it joined; one that was there before stays.

    At the interpreter's exit it would be too late: Ray's processes end with the thread that started them, which is gone by then, and
    Tune waits a minute to take its registrations back.
    """
    if _OURS.is_set():
        import ray

        _OURS.clear()
        ray.shutdown()
