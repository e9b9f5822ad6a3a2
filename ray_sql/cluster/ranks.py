"""Agreement between the processes of a worker group; a process alone agrees with itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from ray_sql.errors import RaySqlError

T = TypeVar("T")


def rank() -> int:
    """Return this process's number in its group; 0 for a process alone."""
    import torch.distributed as dist

    return int(dist.get_rank()) if dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of processes in the group."""
    import torch.distributed as dist

    return int(dist.get_world_size()) if dist.is_initialized() else 1


def gather_all(value: Any) -> list[Any]:
    """Return every rank's value, by rank, on every rank."""
    import torch.distributed as dist

    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def agreed(make: Callable[[], T]) -> T:
    """Return the result of `make`. Where it fails on a rank, raise that rank's error on all.

    A rank that left alone would let the others wait for it.
    """
    problem: RaySqlError | None = None
    try:
        result = make()
    except RaySqlError as error:
        problem = error
    for error_of_rank in gather_all(problem):
        if error_of_rank:
            raise error_of_rank
    return result
