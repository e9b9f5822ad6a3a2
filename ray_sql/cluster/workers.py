"""Run a function on N worker processes with Ray Train: restarts, events and errors.

With `scaling.num_workers` 0 the function runs in this process and Ray is not started.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

import ray_sql
from ray_sql.cluster import ray_internals
from ray_sql.cluster.channel import Channel, WarningSender
from ray_sql.cluster.events import DriverLink, Event, OnEvent, StageEnded, WorkersPlaced
from ray_sql.cluster.resources import scaling_config
from ray_sql.cluster.start import start_ray
from ray_sql.cluster.stop import ClusterEvent, GracefulStop, run_in_thread
from ray_sql.config.sections import ScalingSection
from ray_sql.errors import (
    OutOfMemory,
    RaySqlError,
    StoreError,
    TrainingError,
    last_line,
    out_of_memory,
    says_full,
)

Job = TypeVar("Job")
Result = TypeVar("Result")
Loop = Callable[[Job, DriverLink], Result]
"""Runs on every worker; the result of rank 0 counts."""
WORKER_ENVIRONMENT = {
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}
MORE_MEMORY = (
    "lower --eval_batch_size, --evaluate.max_new_tokens or --rows.max_length, or use "
    "--train.gradient_checkpointing"
)
"""The way out where forward passes are as small as they get."""


RAY_KILLED = "running low on memory"
"""Words of Ray's monitor where it killed a worker."""


@dataclass(frozen=True)
class UserError:
    """A worker's error that the user can fix: returned, since Ray would restart what raises."""

    error: RaySqlError


def run_workers(
    loop: Loop[Job, Result],
    job: Job,
    scaling: ScalingSection,
    storage_path: str,
    on_event: OnEvent,
    *,
    decides: bool = False,
    resizes: bool = False,
) -> Result:
    """Call `loop(job, driver)` on every worker and return the result of rank 0.

    `driver.emit(event)` reaches `on_event` here. Where `on_event` `decides`, workers wait at every
    checkpoint for its decision. `storage_path` is the run's folder, in which Ray keeps its state.
    With `resizes`, workers of an elastic run come and go; else those there at the start stay.

    A worker that dies is restarted with all others, `scaling.max_failures` times. Raises the
    `RaySqlError` that rank 0 raised, and `TrainingError` when the restarts are used up.
    """
    import ray

    if scaling.num_workers == 0:
        return _run_in_process(loop, job, on_event)
    start_ray()
    on_event(StageEnded("Ray"))
    told_to_stop = ClusterEvent()
    placed: list[Any] = []

    def receive(event: Event) -> bool | None:
        if not isinstance(event, WorkersPlaced):
            return on_event(event)
        placed.append(event.group)
        return None

    stop = GracefulStop(receive, told_to_stop.set)
    try:
        with Channel(stop.on_event, decides) as channel, stop:
            worker = _Worker(loop, job, DriverLink(channel.sender(), told_to_stop.is_set))
            returned = run_in_thread(lambda: _fit(worker, scaling, storage_path, resizes))
    except (KeyboardInterrupt, SystemExit):
        # at once: at the interpreter's exit it waits a quarter of a minute for busy workers
        ray.shutdown()
        raise
    except TrainingError:
        _free(placed)
        raise
    if isinstance(returned, UserError):
        raise returned.error
    return returned


def _free(groups: Sequence[Any]) -> None:
    """Give back what workers had reserved, which Ray keeps where its monitor killed one of them.

    Ray Train asks every worker to end its process group before it removes their placement group. A
    killed one raises, and the next workers would wait for its cores for ever.
    """
    from ray.util import remove_placement_group

    for group in groups:
        remove_placement_group(group)


def _run_in_process(loop: Loop[Job, Result], job: Job, on_event: OnEvent) -> Result:
    from ray.train import ScalingConfig
    from ray.train.torch import TorchTrainer

    logging.getLogger("ray.train").setLevel(logging.WARNING)  # it announces every report
    with GracefulStop(on_event) as stop:
        driver = DriverLink(stop.on_event, stop.is_told, in_process=True)
        trainer = TorchTrainer(
            lambda: loop(job, driver), scaling_config=ScalingConfig(num_workers=0)
        )
        result = trainer.fit().return_value
    return cast(Result, result)


def _fit(
    worker: _Worker[Job, Result], scaling: ScalingSection, storage_path: str, resizes: bool
) -> Result | UserError:
    from ray.exceptions import RayError
    from ray.train import (
        ControllerError,
        FailureConfig,
        LoggingConfig,
        RunConfig,
        TrainingFailedError,
    )
    from ray.train.torch import TorchTrainer

    trainer = TorchTrainer(
        worker,
        scaling_config=scaling_config(scaling, resizes),
        run_config=RunConfig(
            name="ray",
            storage_path=storage_path,
            failure_config=FailureConfig(max_failures=scaling.max_failures),
            logging_config=LoggingConfig(log_level="WARNING"),
            worker_runtime_env={"env_vars": WORKER_ENVIRONMENT},
            callbacks=[_end_when_memory_is_full()],
        ),
    )
    try:
        return cast(Result | UserError, trainer.fit().return_value)
    except (TrainingFailedError, RayError) as error:  # Ray's own: its controller was lost
        if isinstance(error, ControllerError | RayError) and out_of_memory(error):
            raise OutOfMemory(f"{_reason(error)}; {MORE_MEMORY}") from error
        raise TrainingError(
            f"the workers failed, restarts included; the last time with: {last_line(error)}. Run "
            "the same command again to go on from the last checkpoint; more restarts: "
            "--scaling.max_failures"
        ) from error


def _reason(error: Exception) -> str:
    """Return the line that says whose memory was full; Ray's monitor ends with pages of advice."""
    lines = [line.strip() for line in str(error).splitlines() if RAY_KILLED in line]
    return lines[0][:300] if lines else last_line(error)


def _end_when_memory_is_full() -> Any:
    """Return a callback of Ray Train that ends a run whose memory is full on any rank.

    Ray would restart the workers, as often as it may, to find memory full again; raising is the
    one way to end it. A lost process is Ray's to restart, also where Ray's monitor killed it
    because the node's memory was full: a neighbour may have filled it.
    """
    from ray.train import UserCallback

    class EndWhenMemoryIsFull(UserCallback):  # type: ignore[misc]  # ray is not followed by mypy
        def after_exception(
            self, run_context: Any, worker_exceptions: dict[int, Exception]
        ) -> None:
            for rank, error in sorted(worker_exceptions.items()):
                if not ray_internals.is_lost_worker(error) and out_of_memory(error):
                    lines = [line.strip() for line in str(error).splitlines() if says_full(line)]
                    reason = lines[-1] if lines else last_line(error)
                    raise MemoryError(f"worker {rank} is out of memory: {reason}")

    return EndWhenMemoryIsFull()


class _Worker(Generic[Job, Result]):
    """A loop as Ray Train calls it on a worker: its errors for the user are returned, not raised.

    An error of the storage is raised. It may fail on this node alone, and a rank that left quietly
    would let the others wait.
    """

    def __init__(self, loop: Loop[Job, Result], job: Job, driver: DriverLink) -> None:
        self._loop, self._job, self._driver = loop, job, driver

    def __call__(self) -> Result | UserError:
        import ray.train
        from ray.util import get_current_placement_group

        logger, handler = logging.getLogger(ray_sql.__name__), WarningSender(self._driver.emit)
        if ray.train.get_context().get_world_rank() == 0:
            logger.addHandler(handler)
            self._driver.emit(WorkersPlaced(get_current_placement_group()))
        try:
            return self._loop(self._job, self._driver)
        except StoreError:
            raise
        except RaySqlError as error:
            return UserError(error)
        finally:
            logger.removeHandler(handler)
