"""The device that a worker computes on."""

from __future__ import annotations

import ctypes
import os
import sys
from typing import TYPE_CHECKING

from ray_sql.config.cores import physical_cores, usable_cores
from ray_sql.config.sections import ScalingSection
from ray_sql.models.speed import fastest_threads

if TYPE_CHECKING:
    import torch

GPU_DEVICES = ("/dev/nvidiactl", "/dev/nvhost-gpu", "/dev/nvgpu", "/dev/dxg", "/dev/kfd")
"""Devices of the drivers of GPUs on Linux, one of which is there where torch finds a GPU."""


def claim_device(scaling: ScalingSection) -> torch.device:
    """Return the calling worker's device: the GPU that Ray gave it, or the CPU.

    On a CPU, torch gets the worker's equal share of the cores that this process may use. Ray lets a
    CPU worker use one thread unless told otherwise.
    """
    import ray.train.torch
    import torch

    if on_gpu(scaling):
        return ray.train.torch.get_device()
    keep_freed_memory()
    most = int((scaling.resources_per_worker or {}).get("CPU", usable_cores()))
    set_threads(ray.train.get_context().get_local_world_size(), max(1, most))
    return torch.device("cpu")


def set_threads(parts: int = 1, most: int | None = None) -> None:
    """Let torch compute on an equal part of the cores that this process may use.

    `parts` processes compute at a time, each with `most` threads at most. Where a core counts as
    two CPUs, a thread on each core and one on each CPU are timed, and the faster is taken.
    """
    import torch

    cpus = usable_cores()
    counts = {max(1, min(most or cpus, found // parts)) for found in (physical_cores(), cpus)}
    torch.set_num_threads(fastest_threads(tuple(sorted(counts))))


def on_gpu(scaling: ScalingSection) -> bool:
    """Tell whether this process computes on a GPU: it has one, and the user did not say no."""
    return scaling.use_gpu is not False and count_gpus() > 0


def count_gpus() -> int:
    """Return the number of GPUs that torch sees. Where no driver is, torch is not loaded."""
    if sys.platform == "linux" and not any(map(os.path.exists, GPU_DEVICES)):
        return 0
    import torch

    return int(torch.cuda.device_count())


def keep_freed_memory() -> None:
    """Tell glibc to keep the memory of freed tensors.

    By default it gives every large block back to the kernel and faults its pages in again. On 2
    cores with a 135M model, a fifth of all time was spent in the kernel, and a step took 1.3 times
    as long. (One arena for all threads, the other usual advice, made steps 1.3 times longer again.)
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
        mallopt(mmap_threshold, 1 << 30)
        mallopt(trim_threshold, (1 << 31) - 1)
