"""Keep the verdict that a model computes shared rows rightly, so that its next start need not try.

It is found again only for the same weights to the bit, settings, compute type, lengths, processor,
libraries and code of ours. A refusal is not kept, for it may have had another cause.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ray_sql.config.files import read_json
from ray_sql.errors import DamagedFile, StoreError
from ray_sql.models.speed import processor
from ray_sql.store import storage

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LIBRARIES = (
    *("torch", "transformers", "bitsandbytes"),
    *("flash-linear-attention", "causal-conv1d", "mamba-ssm", "kernels"),
)
"""Those whose code computes a model; those of the second line only where they are installed."""
OWN_CODE = ("models", "rows")
"""The folders of ours whose code lays rows out and computes them."""


@dataclass(frozen=True)
class Verdict:
    """A model computes shared rows rightly; if `masked`, with a mask only."""

    masked: bool


def place_of(model: PreTrainedModel, longest: int, row: int, cache: Path) -> Path:
    """Return where the verdict on a model on a CPU is kept, there or not.

    Its examples have up to `longest` tokens, and its rows up to `row`.
    """
    parts = [
        [type(model).__qualname__, model.config._attn_implementation, str(model.dtype)],
        [model.config.to_json_string(use_diff=False), _weights(model), longest, row],
        [processor(), [_version(library) for library in LIBRARIES], _own_code()],
    ]
    digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    return cache / "shared_rows" / f"{digest}.json"


def read(place: Path) -> Verdict | None:
    """Return the verdict that is kept at `place`; None if there is none, or a damaged one."""
    with suppress(DamagedFile):
        return read_json(Verdict, place, "remove it")
    return None


def keep(place: Path, verdict: Verdict) -> None:
    """Keep a verdict, where the cache can be written."""
    with suppress(StoreError):  # it is tried again, then
        storage.write_local_text(place, json.dumps(asdict(verdict)))


def _weights(model: PreTrainedModel) -> str:
    """Return a checksum of a model's weights and their scales, each counted once."""
    digest = hashlib.blake2b()
    known = set()
    for name, weight in model.state_dict().items():
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        if weight.data_ptr() not in known:
            known.add(weight.data_ptr())
            digest.update(weight.contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _version(library: str) -> str | None:
    with suppress(PackageNotFoundError):
        return version(library)
    return None


def _own_code() -> str:
    """Return a checksum of our own code that takes part."""
    package = Path(__file__).parent.parent
    files = [file for folder in OWN_CODE for file in sorted((package / folder).glob("*.py"))]
    return hashlib.blake2b(b"".join(file.read_bytes() for file in files)).hexdigest()
