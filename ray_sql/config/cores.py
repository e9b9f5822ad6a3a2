"""Count the cores that this process may compute on."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

QUOTAS = (Path("/sys/fs/cgroup/cpu.max"), Path("/sys/fs/cgroup/cpu/cpu.cfs_quota_us"))
"""Files with the CPU time of a container, in microseconds of a period: of cgroup 2, and of 1."""
PERIOD = "cpu.cfs_period_us"
"""The file of cgroup 1 that has the period, beside that of the time."""
CPUS = Path("/sys/devices/system/cpu")
"""The folder in which Linux describes each CPU."""


def usable_cores(quotas: Sequence[Path] = QUOTAS) -> int:
    """Return the CPUs that this process may use: not other processes', nor over a container's.

    `quotas` are the files in which Linux keeps a container's limit. More threads than that would be
    held up together in every period.
    """
    cores = len(_allowed())
    for file in quotas:
        with suppress(OSError, ValueError):  # another kind of system, or no limit
            words = file.read_text().split()
            if len(words) == 1:
                words += file.with_name(PERIOD).read_text().split()
            spent, period = map(int, words)
            if spent > 0:
                # of a core that is shared, a part is as good as the whole
                cores = min(cores, math.ceil(spent / period))
    return max(1, cores)


def physical_cores(cpus: Path = CPUS, quotas: Sequence[Path] = QUOTAS) -> int:
    """Return the cores under the usable CPUs, for a core may count as two.

    Where the system does not tell, each CPU is a core.
    """
    usable = usable_cores(quotas)
    with suppress(OSError):
        files = [cpus / f"cpu{one}" / "topology" / "thread_siblings_list" for one in _allowed()]
        return min(usable, len({file.read_text().strip() for file in files}))
    return usable


def _allowed() -> set[int]:
    """Return the numbers of the CPUs that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return set(os.sched_getaffinity(0))
    return set(range(os.cpu_count() or 1))
