"""Keep a base model in its 4-bit form: to quantise takes a CPU most of the time of a load.

A kept model was loaded once more and compared. It is the one that was quantised, to the bit.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray_sql.config.sections import QuantizationSection
from ray_sql.errors import out_of_memory

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

ROOM = 3
"""Times the model's size that must be free on the disk."""
DAY = 24 * 3600.0
UNUSED = 30 * DAY
"""Seconds after which a kept model that nobody read is removed."""


def place_of(
    folder: str, quantization: QuantizationSection, dtype: torch.dtype, cache: Path
) -> Path:
    """Return where the model of `folder` is kept in 4 bits, whatever of it is there.

    Another file in the folder, another setting or another version of a library is another place.
    """
    files = [
        (file.name, file.stat().st_size, file.stat().st_mtime_ns)
        for file in sorted(Path(folder).iterdir())
        if file.is_file()
    ]
    versions = [version(package) for package in ("torch", "transformers", "bitsandbytes")]
    parts = [folder, files, quantization.model_dump(), str(dtype), versions]
    digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
    return cache / "quantised" / f"{Path(folder).name}-{digest}"


def read(place: Path, folder: str, dtype: torch.dtype) -> PreTrainedModel | None:
    """Return the model that is kept at `place`; None if there is none, or a damaged one.

    It is named after `folder`, as the one that was quantised.
    """
    if not place.is_dir() or not any(place.iterdir()):
        return None
    try:
        model = _load(place, dtype)
    except Exception as error:  # of any kind, for files may be damaged in any way
        if out_of_memory(error):
            raise
        shutil.rmtree(place, ignore_errors=True)
        return None
    model.name_or_path = model.config._name_or_path = folder
    with suppress(OSError):  # a cache that cannot be written is never cleared
        os.utime(place)
    return model


def keep(model: PreTrainedModel, place: Path, dtype: torch.dtype) -> None:
    """Keep a model that was just quantised, if it comes back the same and the disk has room.

    An empty folder is left for a model that does not come back the same, as a sign. Of several
    processes one does it. Models that were not read for `UNUSED` seconds make room.
    """
    if place.exists():
        return
    # all that can go wrong (a full disk, a model that cannot be saved) only costs time later
    with suppress(Exception):
        place.parent.mkdir(parents=True, exist_ok=True)
        _clear(place.parent)
        if shutil.disk_usage(place.parent).free < ROOM * model.get_memory_footprint():
            return
        scratch = place.with_name(f"{place.name}.new")
        scratch.mkdir()  # fails where another process is at it
        try:
            new = scratch / "model"
            model.save_pretrained(new)
            if not _is_same(model, _load(new, dtype)):
                shutil.rmtree(new)
                new.mkdir()
            os.replace(new, place)
        finally:
            shutil.rmtree(scratch)


def _clear(kept: Path) -> None:
    """Remove models that nobody read for long, and what a killed process left a day ago."""
    for place in kept.iterdir():
        left_over = place.suffix == ".new" or place.name.startswith("tmp")
        if time.time() - place.stat().st_mtime > (DAY if left_over else UNUSED):
            shutil.rmtree(place, ignore_errors=True)


def _load(place: Path, dtype: torch.dtype) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(
        place,
        dtype=dtype,
        device_map={"": "cpu"},
        trust_remote_code=False,
        output_loading_info=True,
    )
    if report["missing_keys"] or report["unexpected_keys"]:
        raise ValueError("other weights than were kept")
    loaded: PreTrainedModel = model
    return loaded


def _is_same(model: PreTrainedModel, other: PreTrainedModel) -> bool:
    """Tell whether two models have the same weights, scales and buffers, to the bit."""
    import torch

    def values(one: PreTrainedModel) -> dict[str, Any]:
        found: dict[str, Any] = dict([*one.named_parameters(), *one.named_buffers()])
        for name, weight in one.named_parameters():
            if state := getattr(weight, "quant_state", None):
                found |= {f"{name}.{key}": value for key, value in state.as_dict().items()}
        return found | {"ends": one.generation_config.eos_token_id}

    def same(a: Any, b: Any) -> bool:
        if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
            return bool(a.dtype == b.dtype and torch.equal(a, b))
        return bool(a == b)

    mine, others = values(model), values(other)
    if mine.keys() != others.keys():
        return False
    return all(same(mine[name], others[name]) for name in mine)
