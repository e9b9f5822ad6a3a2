"""The device that a worker computes on."""

from __future__ import annotations

import ctypes
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ray_sql.config.sections import ScalingSection

if TYPE_CHECKING:
    import torch

QUOTAS = (Path("/sys/fs/cgroup/cpu.max"),)
"""Files with the CPU time of a container: microseconds, or max, in a period of microseconds."""
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
    cores = usable_cores()
    wanted = int((scaling.resources_per_worker or {}).get("CPU", cores))
    share = cores // ray.train.get_context().get_local_world_size()
    torch.set_num_threads(max(1, min(wanted, share)))
    return torch.device("cpu")


def usable_cores(quotas: Sequence[Path] = QUOTAS) -> int:
    """Return the cores that this process may use: not other processes', nor over a container's.

    `quotas` are the files in which Linux keeps a container's limit. More threads than that would be
    held up together in every period.
    """
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    for file in quotas:
        try:
            words = file.read_text().split()
        except OSError:  # another kind of system
            continue
        if len(words) == 2 and words[0] != "max":
            # of a core that is shared, a part is as good as the whole
            cores = min(cores, math.ceil(int(words[0]) / int(words[1])))
    return max(1, cores)


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
