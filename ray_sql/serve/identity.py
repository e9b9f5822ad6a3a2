"""Tell of what a served model is made, so that it can be compared with the measured one.

Answers alone do not tell an older adapter from another rank, base or quantisation. A service of
this project says in `/v1/models` what it loaded, and `verify` compares it with the run's own.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Self

from ray_sql.config.sections import QuantizationSection
from ray_sql.store import storage
from ray_sql.store.run_folder import ADAPTER_WEIGHTS, AdapterFolder

PIECES, PIECE_BYTES = 64, 4096
"""Pieces of each file of a base model that are read: all of them would take minutes."""
WEIGHTS = {".safetensors", ".bin", ".gguf", ".pt"}
Part = Literal["another base", "another quantization", "another rank", "another adapter"]


@dataclass(frozen=True)
class Identity:
    """Short texts that differ where a model's parts do."""

    base: str
    quantization: str
    rank: str
    adapter: str

    @classmethod
    def of(
        cls, model_folder: str, quantization: QuantizationSection, adapter: AdapterFolder
    ) -> Self:
        """Return the identity of a base model, loaded so, with an adapter."""
        lora = adapter.read_adapter_config() or {}
        with tempfile.TemporaryDirectory(prefix="ray_sql-") as scratch:
            file = Path(scratch) / ADAPTER_WEIGHTS
            storage.fetch_file(adapter.place(ADAPTER_WEIGHTS), file)
            weights = storage.sha256(file)
        return cls(
            base=base_digest(Path(model_folder)),
            quantization=json.dumps(quantization.model_dump(mode="json"), sort_keys=True),
            rank=f"r {lora.get('r')}, alpha {lora.get('lora_alpha')}",
            adapter=weights,
        )

    def named(self) -> dict[str, str]:
        """Return the texts by name, for JSON."""
        return asdict(self)

    def difference(self, served: Mapping[str, Any]) -> tuple[Part, str] | None:
        """Return the first part that a service says to have otherwise, and the evidence."""
        parts: dict[str, Part] = {
            "base": "another base",
            "quantization": "another quantization",
            "rank": "another rank",
            "adapter": "another adapter",
        }
        for name, part in parts.items():
            own, other = getattr(self, name), served.get(name, "")
            if other and other != own:
                return part, f"the endpoint says that its {name} is {other}; measured was {own}"
        return None


def base_digest(folder: Path) -> str:
    """Return 16 hex digits of a model's weights: names and sizes of its files, and pieces of all.

    It tells other weights by accident, and is no proof against forgery.
    """
    digest = hashlib.sha256()
    for file in sorted(one for one in folder.iterdir() if one.suffix in WEIGHTS):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}\n".encode())
        with file.open("rb") as stream:
            for piece in range(PIECES):
                stream.seek(size * piece // PIECES)
                digest.update(stream.read(PIECE_BYTES))
    return digest.hexdigest()[:16]
