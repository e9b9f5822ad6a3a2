"""Agreement between the processes of a worker group; one process alone agrees with itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from ray_sql.errors import RaySqlError

T = TypeVar("T")


def rank() -> int:
    """Return this process's number in its group, 0 for one alone."""
    import torch.distributed as dist

    return int(dist.get_rank()) if dist.is_initialized() else 0


def gather_all(value: Any) -> list[Any]:
    """Return every rank's value, by rank, on every rank."""
    import torch.distributed as dist

    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, value)
    return parts


def agreed(make: Callable[[], T]) -> T:
    """Return what `make` returns. Where it fails on one rank, raise that rank's error on all.

    A rank that left alone would let the others wait for it.
    """
    problem: RaySqlError | None = None
    try:
        made = make()
    except RaySqlError as error:
        problem = error
    for each in gather_all(problem):
        if each:
            raise each
    return made
