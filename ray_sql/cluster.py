"""Run a function on N worker processes: Ray Train's TorchTrainer around it, what they say brought back to the driver.

With `scaling.num_workers` 0 the function runs in this process and Ray is not started. Otherwise this process joins the cluster that
RAY_ADDRESS names (`ray job submit` sets it), or starts Ray on this machine. Workers speak through a queue, not through
`ray.train.report`: a report is a barrier over all ranks and is throttled by the controller's poll, a point on the loss curve needs
neither.
"""

from __future__ import annotations

import ctypes
import importlib
import logging
import math
import os
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray_sql import errors
from ray_sql.config import Config
from ray_sql.errors import ConfigError, RaySqlError, StoreError, TrainingError

if TYPE_CHECKING:
    import torch
    from ray.train import ScalingConfig
    from ray.util.queue import Queue

log = logging.getLogger(__name__)

Point = dict[str, Any]
OnPoint = Callable[[Point], bool | None]
"""What becomes of a point; False, for a checkpoint's, means that training should stop there."""
Loop = Callable[[dict[str, Any]], dict[str, Any]]
END: Point = {"kind": "end"}
"""The last point of a channel."""

ENVIRONMENT = {
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # the patch pickles every Dataset.map with the whole module
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # the default of 2 s is also how long every report waits
    "RAY_worker_niceness": "0",  # the default of 15 lets whatever else runs on this machine slow training down
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # Ray's future default; unset, every worker prints a warning about it
}
WORKER_ENVIRONMENT = {
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}

BOOTSTRAP = "~/ray_bootstrap_config.yaml"
"""Where `ray up` leaves the cluster's description on its head, on which jobs run."""
KNOCK_SECONDS = 5.0
"""How long a cluster may take to answer at all."""
MANY = 1000
"""Nodes of a type that has no limit."""

FULL_MEMORY = ("out of memory", "can't allocate memory")
"""How CUDA and torch's CPU allocator say that memory is full."""

PATIENCE = 45.0
"""Seconds that workers have to save and end once this process was told to stop: less than `RAY_JOB_STOP_WAIT_TIME_S` on a cluster of
ours, with time left to close the records."""

_STARTER = ThreadPoolExecutor(1, thread_name_prefix="ray_sql-start")
"""One thread: whoever asks for Ray second finds it started."""
_BEGUN: list[Future[None]] = []
"""The start that is under way, if any."""
_OURS = threading.Event()
"""Set while there is a Ray that this process started or joined itself."""


def run_workers(
    loop: Loop,
    plan: Mapping[str, Any],
    config: Config,
    on_point: OnPoint,
    run_dir: str,
    decides: bool = False,
    resizes: bool = False,
) -> dict[str, Any]:
    """Call `loop(plan)` on every worker and return what rank 0 returned; `plan["emit"](point)` reaches `on_point` here, and
    `plan["stopping"]()` says whether this process was told to stop.

    Where `on_point` `decides`, workers wait at every checkpoint for what it says. Of an elastic run, workers come and go where it
    `resizes`; else as many as there is room for at the start stay.

    A worker that dies is restarted with all others, `scaling.max_failures` times. Raises the `RaySqlError` that rank 0 raised,
    and `TrainingError` when the restarts are used up.
    """
    import ray
    from ray.train.torch import TorchTrainer

    begun = threading.Event()

    def passed_on(point: Point) -> bool | None:
        if point["kind"] == "train":
            begun.set()
        return on_point(point)

    if config.scaling.num_workers == 0:
        from ray.train import ScalingConfig

        logging.getLogger("ray.train").setLevel(logging.WARNING)  # it announces every report
        told = threading.Event()
        trainer = TorchTrainer(
            loop,
            train_loop_config={**plan, "emit": passed_on, "stopping": told.is_set},
            scaling_config=ScalingConfig(num_workers=0),
        )
        with ending_in_order(told, begun, on_point):
            return dict(trainer.fit().return_value)
    start_ray()
    on_point(mark("Ray"))
    sign = ClusterEvent()
    try:
        with Channel(passed_on, decides) as channel, ending_in_order(sign, begun, on_point):
            full = {**plan, "emit": channel.sender(), "stopping": sign.is_set}
            return _beside_signals(lambda: _fit(loop, full, config, run_dir, resizes))
    except (KeyboardInterrupt, SystemExit):
        ray.shutdown()  # at once: left to the interpreter's exit it waits a quarter of a minute for workers that are busy
        raise


class ClusterEvent:
    """`threading.Event` for all processes of a cluster: a key in Ray's own store, so that it needs no process."""

    def __init__(self) -> None:
        self._key = f"ray_sql-{uuid.uuid4().hex}"

    def set(self) -> None:
        from ray.experimental import internal_kv

        internal_kv._internal_kv_put(self._key, b"set")

    def is_set(self) -> bool:
        from ray.experimental import internal_kv

        return bool(internal_kv._internal_kv_exists(self._key))


@contextmanager
def ending_in_order(told: threading.Event | ClusterEvent, begun: threading.Event, on_point: OnPoint) -> Iterator[None]:
    """Inside, SIGTERM or Ctrl-C sets `told`, and has its effect when what is inside has ended.

    Its effect is immediate as long as nothing has `begun`, the second time, and after `PATIENCE` seconds. Signals reach the main thread:
    in any other this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {n: kept for n in numbers if (kept := signal.getsignal(n)) not in (None, signal.SIG_IGN)}
    received: list[int] = []
    ended = threading.Event()

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def end(number: int) -> None:
        on_point(
            {
                "kind": "note",
                "text": f"told to stop: a checkpoint is saved first, for at most {PATIENCE:.0f} s; once more stops at once",
            }
        )
        told.set()
        if not ended.wait(PATIENCE):
            os.kill(os.getpid(), number)

    def receive(number: int, frame: object) -> None:
        restore()
        if not begun.is_set():
            signal.raise_signal(number)
            return
        received.append(number)
        # not here: this code may have broken into the display's own, which cannot be entered twice
        threading.Thread(target=end, args=(number,), name="ray_sql-end", daemon=True).start()

    for number in before:
        signal.signal(number, receive)
    try:
        yield
    except Exception as error:
        if not received:
            raise
        on_point({"kind": "note", "text": f"stopped without a checkpoint: {_last_line(error)}"})
    finally:
        ended.set()
        if not received:
            restore()
    if received:
        signal.raise_signal(received[0])


def _beside_signals(call: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Call in a thread, where this is the main one: signals are then received while it lasts, and Ray Train, which ends a run at
    Ctrl-C, leaves them to us."""
    if threading.current_thread() is not threading.main_thread():
        return call()
    result: Future[dict[str, Any]] = Future()

    def run() -> None:
        try:
            result.set_result(call())
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=run, name="ray_sql-fit", daemon=True).start()
    return result.result()


def mark(stage: str, at: float | None = None) -> Point:
    """The point that says when a stage of starting up ended: now, or `at` (seconds since the epoch)."""
    return {"kind": "mark", "stage": stage, "at": time.time() if at is None else at}


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
        address = os.environ.get("RAY_ADDRESS")
        if not address:
            raise
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"RAY_ADDRESS {address}: no Ray cluster answers there ({reason}); correct it, or unset it to start Ray here"
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
        logging.getLogger("ray._private.authentication.authentication_token_setup").setLevel(logging.ERROR)
        logging.getLogger("ray._private.worker").addFilter(lambda record: "SIGTERM" not in record.getMessage())
        # workers' own output stays in Ray's logs and dashboard: what matters comes through the channel, and their errors as errors
        # never `auto` unasked: a cluster that was killed leaves its address behind, and Ray would try it for many minutes
        address = os.environ.get("RAY_ADDRESS") or "local"
        _knock(address)
        ray.init(address, logging_level=logging.WARNING, log_to_driver=False)
        _OURS.set()


def _knock(address: str) -> None:
    """Raise in seconds, not in minutes as Ray does, where no cluster answers at an address (`ConnectionError`), or where it refuses this
    process's token (`ConfigError`)."""
    import grpc
    import ray
    from ray._private.grpc_utils import init_grpc_channel
    from ray._private.services import canonicalize_bootstrap_address
    from ray.exceptions import AuthenticationError

    place = None if "://" in address else canonicalize_bootstrap_address(address)
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
            f"RAY_ADDRESS {address}: the cluster refuses this process's token; set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or "
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


@dataclass(frozen=True)
class Room:
    """How many trainings of one kind the cluster holds at a time, on how many nodes. `each` is what one worker takes, by Ray's resource
    names, and `needs` what one training does."""

    at_once: int
    nodes: int
    each: dict[str, float]
    needs: dict[str, float]
    arithmetic: str

    @property
    def unit(self) -> tuple[str, float]:
        """What its use is counted in: GPUs, or CPUs where it has none, and how many."""
        return ("GPU", self.needs["GPU"]) if self.needs.get("GPU") else ("CPU", self.needs.get("CPU", 1.0))

    def decided(self, config: Config) -> Config:
        """The same settings with what a worker takes said in full: decided once, and not again by every trial."""
        return config.changed(
            {"scaling.use_gpu": bool(self.each.get("GPU")), "scaling.resources_per_worker": self.each}
        )


def room(config: Config) -> Room:
    """What a training takes at least, and how often that fits into the cluster (with all that its autoscaler may add), or this machine."""
    nodes = capacity()
    each = per_worker(config, nodes)
    holding = [node for node in nodes if holds(node, each)]
    workers = sum(holds(node, each) for node in holding)
    scarce = min(each, key=lambda name: sum(holds(node, {name: each[name]}) for node in nodes))
    have = f"{sum(node.get(scarce, 0) for node in nodes):g} {scarce} here"
    if len(nodes) > 1:
        largest = max(node.get(scarce, 0) for node in nodes)
        have = f"{workers} workers of {each[scarce]:g} {scarce} fit on {len(nodes)} nodes (the largest has {largest:g})"
        need = f"{config.fewest_workers} a trial"
    else:
        need = f"{each[scarce] * config.fewest_workers:g} a trial ({config.fewest_workers} x {each[scarce]:g})"
    at_once = workers // config.fewest_workers
    needs = {name: amount * config.fewest_workers for name, amount in each.items()}
    return Room(at_once, len(holding), each, needs, f"{have} / {need} = {at_once}")


def per_worker(config: Config, nodes: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """What one worker takes, by Ray's resource names: a GPU where a node has any, else as many CPUs as all workers can have."""
    gpu = config.scaling.use_gpu
    if gpu is None:
        gpu = any(node.get("GPU") for node in nodes)
    each = {name: amount for name, amount in (config.scaling.resources_per_worker or {}).items() if amount}
    if gpu:
        each.setdefault("GPU", 1)
    cores = [int(node.get("CPU", 0)) for node in nodes]
    return each or {
        "CPU": max(
            (n for n in range(1, max(cores, default=0) + 1) if sum(own // n for own in cores) >= config.workers),
            default=1,
        )
    }


def holds(node: Mapping[str, float], each: Mapping[str, float]) -> int:
    """How many workers fit on a node; 1.0 // 0.2 is 4."""
    return min(int(node.get(name, 0) / amount + 1e-9) for name, amount in each.items())


def joins() -> bool:
    """Whether there is a Ray that `start_ray` joins; else it starts one on this machine."""
    import ray

    return os.environ.get("RAY_ADDRESS", "local") not in ("", "local") or ray.is_initialized()


def capacity() -> list[dict[str, float]]:
    """Ray's resources of every node that the cluster has or its autoscaler may add; of this machine where no Ray runs and none is named."""
    import ray

    if not joins():
        import torch

        return [{"CPU": float(os.cpu_count() or 1), "GPU": float(torch.cuda.device_count())}]
    start_ray()
    nodes: list[dict[str, float]] = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return nodes + [resources for resources, most in _node_types() for _ in range(_missing(resources, most, nodes))]


def _missing(resources: Mapping[str, float], most: int, nodes: Sequence[Mapping[str, float]]) -> int:
    """How many nodes of a type may be added to those that are there; Ray does not say of which type a node is."""
    there = sum(all(node.get(name, 0) == resources.get(name, 0) for name in ("CPU", "GPU")) for node in nodes)
    return max(0, (MANY if most < 0 else most) - there)


def _node_types() -> list[tuple[dict[str, float], int]]:
    """The autoscaler's node types and how many of each there may be: as it told the cluster, else as `ray up` left it on the head."""
    from ray._private.state import state  # the only place where the autoscaler's limits can be read

    told = state.get_cluster_config()
    if told is not None and told.node_group_configs:
        return [(dict(group.resources), group.max_count) for group in told.node_group_configs]
    file = Path(BOOTSTRAP).expanduser()
    if not (os.environ.get("RAY_ADDRESS") and file.is_file()):
        return []
    import yaml

    given = yaml.safe_load(file.read_text())
    types = given.get("available_node_types", {})
    head = given.get("head_node_type")
    return [
        (one.get("resources", {}), one.get("max_workers", given.get("max_workers", 0)))
        for name, one in types.items()
        if name != head
    ]


def scaling_config(config: Config, resizes: bool = False) -> ScalingConfig:
    """Ray's ScalingConfig: a GPU each where the cluster has or may get any, else an equal share of its CPUs."""
    from ray.train import ScalingConfig

    nodes = capacity()
    each = per_worker(config, nodes)
    for name, amount in each.items():
        have = sum(node.get(name, 0) for node in nodes)
        # a cluster that we joined may still grow; one that we started will not, and Ray would wait for ever
        least = config.fewest_workers
        if amount * least > have and not os.environ.get("RAY_ADDRESS"):
            raise ConfigError(
                f"--scaling.num_workers {least} needs {amount * least:g} {name}, but this machine has {have:g}; use fewer workers, or "
                "--scaling.resources_per_worker"
            )
    return ScalingConfig(
        num_workers=config.scaling.num_workers,
        elastic_resize_monitor_interval_s=config.scaling.elastic_resize_monitor_interval_s if resizes else math.inf,
        use_gpu=bool(each.get("GPU")),
        resources_per_worker=each,
    )


def claim_device(config: Config) -> torch.device:
    """The device of the worker that calls this: the GPU Ray gave it, or the CPU with its equal share of the machine's cores.

    Ray lets a CPU worker use one thread unless told otherwise.
    """
    import ray.train.torch
    import torch

    if on_gpu(config):
        return ray.train.torch.get_device()
    keep_freed_memory()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    asked = (config.scaling.resources_per_worker or {}).get("CPU", cores)
    torch.set_num_threads(max(1, min(int(asked), cores // ray.train.get_context().get_local_world_size())))
    return torch.device("cpu")


def on_gpu(config: Config) -> bool:
    """Whether this process computes on a GPU: it has one, and the user did not say no."""
    import torch

    return torch.cuda.is_available() and config.scaling.use_gpu is not False


def keep_freed_memory() -> None:
    """Tell glibc to keep freed tensors: by default it gives every large one back to the kernel and faults its pages in again.

    Measured on 2 cores with a 135M model: a fifth of all time was spent in the kernel, and a step took 1.3 times as long. (One
    arena for all threads, the other usual advice, made steps 1.3 times longer again.)
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
        mallopt(mmap_threshold, 1 << 30)
        mallopt(trim_threshold, (1 << 31) - 1)


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
                return bool(self._decisions.get())
        except RayError as error:
            self._lost = True
            log.warning("progress can no longer be sent to the driver: %s", error)
        return None


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
                self._decisions.put(decision is not False)

    def _take(self, point: Point) -> bool | None:
        try:
            return self._on_point(point)
        except Exception as error:  # a display or a log that fails must not take the other points with it
            log.warning("a point was not shown: %s: %s", type(error).__name__, error)
            return None


def _fit(loop: Loop, plan: dict[str, Any], config: Config, run_dir: str, resizes: bool) -> dict[str, Any]:
    from ray.train import FailureConfig, LoggingConfig, RunConfig
    from ray.train.torch import TorchTrainer
    from ray.train.v2.api.exceptions import TrainingFailedError

    scaling = scaling_config(config, resizes)
    trainer = TorchTrainer(
        _Guarded(loop),
        train_loop_config=plan,
        scaling_config=scaling,
        run_config=RunConfig(
            name="ray",
            storage_path=run_dir,
            failure_config=FailureConfig(max_failures=config.scaling.max_failures),
            logging_config=LoggingConfig(log_level="WARNING"),
            worker_runtime_env={"env_vars": WORKER_ENVIRONMENT},
            callbacks=[_once_without_memory()],
        ),
    )
    try:
        returned = dict(trainer.fit().return_value)
    except TrainingFailedError as error:
        if out_of_memory(error):
            raise TrainingError(
                f"out of memory: {_last_line(error)}; lower --train_batch_size, --rows.examples_per_row or --rows.max_length, or use "
                "--train.gradient_checkpointing"
            ) from error
        raise TrainingError(
            f"the workers failed, restarts included; the last time with: {_last_line(error)}. Run the same "
            "command again to go on from the last checkpoint; more restarts: --scaling.max_failures"
        ) from error
    if "user_error" in returned:
        kind, message = returned["user_error"]
        raise getattr(importlib.import_module(errors.__name__), kind)(message)
    return returned


def _once_without_memory() -> Any:
    """A callback of Ray Train that ends a run whose memory is full, on whichever rank: Ray would restart the workers, as often as it may,
    to find it full again. Raising is the one way to say so; that a node's memory was full (Ray's monitor) may be a neighbour's doing."""
    from ray.train import UserCallback

    class OnceWithoutMemory(UserCallback):  # type: ignore[misc]  # ray is not followed by mypy
        def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
            for rank, error in sorted(worker_exceptions.items()):
                said = [line.strip() for line in str(error).splitlines() if any(s in line.lower() for s in FULL_MEMORY)]
                if said or isinstance(error, MemoryError):
                    raise MemoryError(f"worker {rank}: {said[-1] if said else error}")

    return OnceWithoutMemory()


def out_of_memory(error: BaseException | None) -> bool:
    """Whether memory was full, on a GPU or a node, in this process or in any worker: in the error, or in what it came from."""
    while error is not None:
        text = f"{type(error).__name__} {error}".lower()
        if isinstance(error, MemoryError) or any(sign in text for sign in (*FULL_MEMORY, "outofmemory")):
            return True
        error = error.__cause__
    return False


class _Guarded:
    """A loop whose user errors are returned, not raised: Ray would restart the workers only to meet them again. A storage that fails is
    raised: it may be this node's alone, and a rank that left quietly would let the others wait for it."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop

    def __call__(self, plan: dict[str, Any]) -> dict[str, Any]:
        import ray.train

        ours, shown = logging.getLogger(__package__), _Shown(plan["emit"])
        if ray.train.get_context().get_world_rank() == 0:
            ours.addHandler(shown)
        try:
            return self._loop(plan)
        except StoreError:
            raise
        except RaySqlError as error:
            return {"user_error": (type(error).__name__, str(error))}
        finally:
            ours.removeHandler(shown)


class _Shown(logging.Handler):
    """A worker's warnings as lines of the run's display: its own output stays in Ray's logs."""

    def __init__(self, emit: OnPoint) -> None:
        super().__init__(logging.WARNING)
        self._emit = emit

    def emit(self, record: logging.LogRecord) -> None:
        self._emit({"kind": "note", "text": record.getMessage()})


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__
