"""Readings of how busy a node is while it trains, by the names that MLflow gives its own.

MLflow's monitor would need MLflow and the store's address in every worker. It reads as little.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress

import psutil
import ray.train
import torch

SECONDS = 10.0
"""Least seconds between two readings of a node; MLflow's own are as far apart."""


class NodeWatch:
    """Reads the use of a node; on workers other than the node's first, and where it is off, never.

    Names are `system/cpu_utilization_percentage`, …; of several nodes `system/node_1/…`.
    """

    def __init__(self, on: bool) -> None:
        self._on = on and ray.train.get_context().get_local_rank() == 0
        if not self._on:
            return
        context = ray.train.get_context()
        several = context.get_world_size() > context.get_local_world_size()
        self._group = f"system/node_{context.get_node_rank()}" if several else "system"
        self._due = 0.0
        self._first = _bytes_moved()
        with suppress(Exception):
            psutil.cpu_percent()  # a mean over the time since the call before

    def read(self) -> dict[str, float]:
        """Return the values of now, of a CPU the mean since the last ones; none if it is too soon.

        Megabytes over the network count from the start of the watch. Values that cannot be read are
        left out.
        """
        if not self._on or time.monotonic() < self._due:
            return {}
        self._due = time.monotonic() + SECONDS
        moved = {
            name: (now - self._first.setdefault(name, now)) / 1e6
            for name, now in _bytes_moved().items()
        }
        return {f"{self._group}/{name}": value for name, value in (_use() | moved).items()}


def _use() -> dict[str, float]:
    use: dict[str, float] = {}
    # a sandbox may hide /proc or the disk, and each system has errors of its own
    with suppress(Exception):
        use["cpu_utilization_percentage"] = psutil.cpu_percent()
    with suppress(Exception):
        use["system_memory_usage_percentage"] = psutil.virtual_memory().percent
    with suppress(Exception):
        use["disk_usage_percentage"] = psutil.disk_usage(os.sep).percent
    for gpu in range(torch.cuda.device_count()):
        use |= gpu_use(gpu)
    return use


def gpu_use(gpu: int) -> dict[str, float]:
    """Return how busy a GPU was in about the last second, its memory in use, and its power."""
    use: dict[str, float] = {}
    # NVML may be missing, or raise errors of its own, as for a part of a GPU
    with suppress(Exception):
        use[f"gpu_{gpu}_utilization_percentage"] = float(torch.cuda.utilization(gpu))
    with suppress(Exception):
        taken = torch.cuda.device_memory_used(gpu)
        whole = torch.cuda.get_device_properties(gpu).total_memory  # takes no memory of the GPU
        use[f"gpu_{gpu}_memory_usage_megabytes"] = taken / 1e6
        use[f"gpu_{gpu}_memory_usage_percentage"] = taken / whole * 100
    with suppress(Exception):
        use[f"gpu_{gpu}_power_usage_watts"] = torch.cuda.power_draw(gpu) / 1000
    return use


def _bytes_moved() -> dict[str, float]:
    """Return the bytes that came and went over the network since the machine started."""
    moved = None
    with suppress(Exception):  # as where /proc/net/dev cannot be read
        moved = psutil.net_io_counters()
    if moved is None:  # as where there is no network
        return {}
    return {
        "network_receive_megabytes": moved.bytes_recv,
        "network_transmit_megabytes": moved.bytes_sent,
    }
