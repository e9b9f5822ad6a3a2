"""An adapter's weights: whole, plain, and those that were measured."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ray_sql.errors import ModelError
from ray_sql.store import storage
from ray_sql.store.run_folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS, AdapterFolder

WAY_OUT = "restore it from a copy, or train again"
HARMLESS_RANK = 1024
"""A rank for which there is room anywhere. A higher one must be that of the weights."""


def check(file: Path, place: str, known: str | None = None) -> None:
    """Raise `ModelError` unless a local file holds an adapter's weights, whole.

    A pickle, a cut file or a pipe holds none. `known` is the SHA-256 that it must have. `place` is
    where the user finds it.
    """
    from safetensors import SafetensorError, safe_open

    if not file.is_file():
        raise ModelError(f"{place}: is missing, or no ordinary file; {WAY_OUT}")
    try:
        with safe_open(file, "pt") as opened:
            names = list(opened.keys())
    except (SafetensorError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(
            f"{place}: holds no weights that are whole ({reason}); {WAY_OUT}"
        ) from None
    if not any("lora_" in name for name in names):
        raise ModelError(f"{place}: holds no weights of LoRA; give the adapter of a run")
    if known and storage.sha256(file) != known:
        raise ModelError(
            f"{place}: is not the file that was measured (SHA-256 is not {known[:12]}…); {WAY_OUT}"
        )


def fetch(adapter: AdapterFolder, target: Path, known: str | None = None) -> Path:
    """Copy an adapter's weights to a local file, checked as in `check`."""
    place = adapter.place(ADAPTER_WEIGHTS)
    if not storage.exists(place):
        raise ModelError(f"{place}: is missing, or no ordinary file; {WAY_OUT}")
    storage.fetch_file(place, target)
    check(target, place, known)
    return target


def require_whole(adapter: AdapterFolder) -> None:
    """Raise `ModelError` unless an adapter's weights are those that its contract names.

    Raises `DamagedFile` if PEFT's configuration beside them is none.
    """
    config = adapter.read_adapter_config()
    if config is None:
        raise ModelError(f"{adapter.place(ADAPTER_CONFIG)}: is missing; {WAY_OUT}")
    known = (adapter.read_contract() or {}).get("weights_sha256")
    with tempfile.TemporaryDirectory(prefix="ray_sql-") as scratch:
        file = fetch(adapter, Path(scratch) / ADAPTER_WEIGHTS, known)
        _require_ranks(config, file, adapter.place(ADAPTER_CONFIG))


def _require_ranks(config: Mapping[str, Any], file: Path, place: str) -> None:
    """Raise `ModelError` for ranks that the weights do not have.

    PEFT makes room for the ranks of the configuration before it reads a weight.
    """
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        names = [name for name in opened.keys() if "lora_" in name]  # noqa: SIM118
        widest = max(max(opened.get_slice(name).get_shape(), default=0) for name in names)
    ranks = {"r": config["r"]} | dict(config.get("rank_pattern") or {})
    for name, rank in ranks.items():
        if rank > max(widest, HARMLESS_RANK):
            raise ModelError(f"{place}: {name[:80]!r} is {rank:,}, which no weight has; {WAY_OUT}")


def require_own(adapter: AdapterFolder) -> None:
    """Raise `ModelError` for weights that are a link: what it leads to may become another file."""
    place = adapter.place(ADAPTER_WEIGHTS)
    if "://" not in place and Path(place).is_symlink():
        raise ModelError(f"{place}: is a link to another file; {WAY_OUT}")
