"""Measure which type this machine multiplies a model's matrices faster in: float32 or bfloat16.

The flags of a processor do not tell. One with AVX512-BF16 and no AMX multiplied in bfloat16 at half
the speed of float32.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

from pydantic import Field

from ray_sql.config.cores import usable_cores
from ray_sql.config.files import read_json
from ray_sql.errors import DamagedFile

MARGIN = 1.1
"""Times that bfloat16 must be as fast as float32 to be taken. It is rounded more, and cast to."""
TOKENS = 256
"""Rows of the products that are timed."""
WIDEST = 4096
"""The widest matrix that is timed, in place of wider ones of a large model."""
SECONDS = 0.05
"""Seconds for which each type is timed at least."""
CPU_NAMES = ("model name", "flags", "CPU implementer", "CPU part", "Features")
"""Lines of /proc/cpuinfo that tell processors apart."""

TURNS = 2
"""Times that each number of threads is tried."""

Seconds = Annotated[float, Field(gt=0)]
Product = tuple[int, int]
"""The inputs and outputs of a linear layer."""
SMALL_LAYER: tuple[Product, ...] = ((576, 576), (576, 1536), (1536, 576))
"""The products of a layer of SmolLM2-135M, where no model is named."""


@dataclass(frozen=True)
class Speed:
    """The seconds that a layer's products take in each type."""

    float32: Seconds
    bfloat16: Seconds

    @property
    def prefers_bfloat16(self) -> bool:
        """Tell whether bfloat16 is the faster type, by enough to be taken."""
        return self.bfloat16 * MARGIN < self.float32

    def line(self) -> str:
        """Return `float32: 1.9x as fast as bfloat16 here`."""
        types = [("float32", self.float32), ("bfloat16", self.bfloat16)]
        if self.prefers_bfloat16:
            types.reverse()
        (taken, seconds), (other, others) = types
        return f"{taken}: {others / seconds:.1f}x as fast as {other} here"


def measure_speed(products: Sequence[Product], cache: Path | None = None) -> Speed:
    """Return the speeds of a model's products on this machine, timed once for each of its kind.

    They are kept under `cache`, where it is given and can be written.
    """
    if cache is None:
        return time_products(tuple(products))
    file = cache / "speed" / f"{_machine(products)}.json"
    with suppress(DamagedFile):
        return read_json(Speed, file, "remove it")
    speed = time_products(tuple(products))
    with suppress(OSError):  # it is measured again, then
        file.parent.mkdir(parents=True, exist_ok=True)
        new = file.with_suffix(f".{os.getpid()}")
        new.write_text(json.dumps(asdict(speed)))
        os.replace(new, file)
    return speed


def _machine(products: Sequence[Product]) -> str:
    """Return 16 hex digits for what a speed depends on: products, processor, cores and torch."""
    parts = [products, processor(), usable_cores(), version("torch")]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def processor() -> list[str]:
    """Return what tells the processor of this machine from others."""
    names = [platform.machine(), platform.processor()]
    with suppress(OSError):
        first = Path("/proc/cpuinfo").read_text().partition("\n\n")[0]
        names += [line for line in first.splitlines() if line.startswith(CPU_NAMES)]
    return names


@lru_cache
def time_products(products: tuple[Product, ...]) -> Speed:
    """Time the products of both types in turns, and take the fastest turn of each.

    Whatever else runs on the machine slows some turns, of both types. All usable cores compute.
    """
    with _threads(usable_cores()):
        return _time(products)


@lru_cache
def fastest_threads(counts: tuple[int, ...]) -> int:
    """Return the number of threads that multiply a small model's matrices fastest.

    They are tried in turns, in the type that is the faster one.
    """
    if len(counts) == 1:
        return counts[0]

    def seconds(count: int) -> float:
        with _threads(count):
            speed = _time(SMALL_LAYER)
        return min(speed.float32, speed.bfloat16)

    turns = [[seconds(count) for count in counts] for _ in range(TURNS)]
    fastest = [min(of_one) for of_one in zip(*turns, strict=True)]
    return counts[fastest.index(min(fastest))]


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Let torch compute with `count` threads."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _time(products: Sequence[Product]) -> Speed:
    import torch

    def turn(matrices: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> float:
        started = time.perf_counter()
        for inputs, weights in matrices:
            torch.nn.functional.linear(inputs, weights)
        return time.perf_counter() - started

    shapes = [(min(wide, WIDEST), min(out, WIDEST)) for wide, out in products]
    layers = [
        [
            (
                torch.full((TOKENS, wide), 0.5, dtype=dtype),
                torch.full((out, wide), 0.5, dtype=dtype),
            )
            for wide, out in shapes
        ]
        for dtype in (torch.float32, torch.bfloat16)
    ]
    with torch.inference_mode():
        turns = [[turn(layer) for layer in layers]]  # the first one prepares kernels
        while len(turns) < 3 or sum(map(sum, turns[1:])) < 2 * SECONDS:
            turns.append([turn(layer) for layer in layers])
    return Speed(*(min(seconds) for seconds in zip(*turns[1:], strict=True)))
