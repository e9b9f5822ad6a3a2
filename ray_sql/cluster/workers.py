"""Run a function on N worker processes: Ray Train's TorchTrainer around it, restarts, and what becomes of errors.

With `scaling.num_workers` 0 the function runs in this process and Ray is not started.
"""

from __future__ import annotations

import importlib
import logging
import threading
from collections.abc import Callable, Mapping
from typing import Any

import ray_sql
from ray_sql import errors
from ray_sql.cluster.channel import Channel, OnPoint, Point, Shown, mark
from ray_sql.cluster.resources import scaling_config
from ray_sql.cluster.start import start_ray
from ray_sql.cluster.stop import ClusterEvent, beside_signals, ending_in_order
from ray_sql.config import Config
from ray_sql.errors import (
    OutOfMemory,
    RaySqlError,
    StoreError,
    TrainingError,
    last_line,
    out_of_memory,
    says_full,
)

Loop = Callable[[dict[str, Any]], dict[str, Any]]
WORKER_ENVIRONMENT = {
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}
MORE_MEMORY = "lower --eval_batch_size, --evaluate.max_new_tokens or --rows.max_length, or use --train.gradient_checkpointing"
"""What is left to do where forward passes are as small as they get."""


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
        if point["kind"] in ("train", "curve"):  # from here on there is something to save, or saved
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
            return beside_signals(lambda: _fit(loop, full, config, run_dir, resizes))
    except (KeyboardInterrupt, SystemExit):
        ray.shutdown()  # at once: left to the interpreter's exit it waits a quarter of a minute for workers that are busy
        raise


def _fit(
    loop: Loop, plan: dict[str, Any], config: Config, run_dir: str, resizes: bool
) -> dict[str, Any]:
    from ray.train import FailureConfig, LoggingConfig, RunConfig
    from ray.train.torch import TorchTrainer
    from ray.train.v2.api.exceptions import ControllerError, TrainingFailedError

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
        if isinstance(error, ControllerError) and out_of_memory(error):
            raise OutOfMemory(f"{last_line(error)}; {MORE_MEMORY}") from error
        raise TrainingError(
            f"the workers failed, restarts included; the last time with: {last_line(error)}. Run the same "
            "command again to go on from the last checkpoint; more restarts: --scaling.max_failures"
        ) from error
    if "user_error" in returned:
        kind, message = returned["user_error"]
        raise getattr(importlib.import_module(errors.__name__), kind)(message)
    return returned


def _once_without_memory() -> Any:
    """A callback of Ray Train that ends a run whose memory is full, on whichever rank: Ray would restart the workers, as often as it may,
    to find it full again. Raising is the one way to say so. A process that is gone is Ray's to restart, also where its monitor killed it
    because the node's memory was full: that may be a neighbour's doing."""
    from ray.train import UserCallback
    from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

    class OnceWithoutMemory(UserCallback):  # type: ignore[misc]  # ray is not followed by mypy
        def after_exception(
            self, run_context: Any, worker_exceptions: dict[int, Exception]
        ) -> None:
            for rank, error in sorted(worker_exceptions.items()):
                if not isinstance(error, WorkerHealthCheckFailedError) and out_of_memory(error):
                    said = [line.strip() for line in str(error).splitlines() if says_full(line)]
                    raise MemoryError(
                        f"worker {rank} is out of memory: {said[-1] if said else last_line(error)}"
                    )

    return OnceWithoutMemory()


class _Guarded:
    """A loop whose user errors are returned, not raised: Ray would restart the workers only to meet them again. A storage that fails is
    raised: it may be this node's alone, and a rank that left quietly would let the others wait for it."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop

    def __call__(self, plan: dict[str, Any]) -> dict[str, Any]:
        import ray.train

        ours, shown = logging.getLogger(ray_sql.__name__), Shown(plan["emit"])
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
