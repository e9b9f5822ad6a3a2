"""The device that a worker computes on."""

from __future__ import annotations

import ctypes
import os
from typing import TYPE_CHECKING

from ray_sql.config.sections import ScalingSection

if TYPE_CHECKING:
    import torch


def claim_device(scaling: ScalingSection) -> torch.device:
    """Return the calling worker's device: the GPU that Ray gave it, or the CPU.

    On a CPU, torch gets the worker's equal share of the machine's cores. Ray lets a CPU worker use
    one thread unless told otherwise.
    """
    import ray.train.torch
    import torch

    if on_gpu(scaling):
        return ray.train.torch.get_device()
    keep_freed_memory()
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    wanted = int((scaling.resources_per_worker or {}).get("CPU", cores))
    share = cores // ray.train.get_context().get_local_world_size()
    torch.set_num_threads(max(1, min(wanted, share)))
    return torch.device("cpu")


def on_gpu(scaling: ScalingSection) -> bool:
    """Tell whether this process computes on a GPU: it has one, and the user did not say no."""
    import torch

    return torch.cuda.is_available() and scaling.use_gpu is not False


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
