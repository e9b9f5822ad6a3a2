"""Copies of a run's adapter with a fault in them, which stay what they claim to be."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from ray_sql.store import storage


def weakened(run: Path, folder: Path, factor: float = 0.9) -> Path:
    """Return a copy of a run's adapter whose update is multiplied by a factor."""
    shutil.copytree(run / "adapter", folder)
    file = folder / "adapter_model.safetensors"
    weights = load_file(file)
    save_file({name: w * (factor if "lora_B" in name else 1) for name, w in weights.items()}, file)
    return told(folder, weights_sha256=storage.sha256(file))


def half_the_rank(run: Path, folder: Path) -> Path:
    """Return a copy of a run's adapter without the second half of its rank."""
    shutil.copytree(run / "adapter", folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    rank = config["r"] // 2
    config |= {"r": rank, "lora_alpha": config["lora_alpha"] // 2}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    file = folder / "adapter_model.safetensors"
    cut = {
        name: (w[:rank] if "lora_A" in name else w[:, :rank]).contiguous()
        for name, w in load_file(file).items()
    }
    save_file(cut, file)
    return told(folder, weights_sha256=storage.sha256(file))


def told(folder: Path, settings: dict[str, Any] | None = None, **contract: Any) -> Path:
    """Change the settings and the contract of an adapter's folder; return it."""
    for name, changes in (("ray_sql_config.json", settings or {}), ("contract.json", contract)):
        saved = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(saved | changes))
    return folder


def computed_in_float32(run: Path, folder: Path) -> Path:
    """Return a copy of a run's adapter that is computed in float32, on any machine."""
    shutil.copytree(run / "adapter", folder)
    settings = json.loads((folder / "ray_sql_config.json").read_text())
    return told(folder, {"train": settings.get("train", {}) | {"bf16": False}})


def over_other_bits(run: Path, folder: Path) -> Path:
    """Return a copy of a run's adapter whose base is loaded in 4 bits, or is not any more."""
    shutil.copytree(run / "adapter", folder)
    quantization = json.loads((folder / "contract.json").read_text())["quantization"]
    quantization["load_in_4bit"] = not quantization["load_in_4bit"]
    return told(folder, {"quantization": quantization}, quantization=quantization)


def over_another_base(run: Path, folder: Path, base: Path | None = None) -> Path:
    """Return a copy of a run's adapter over a base of other weights."""
    shutil.copytree(run / "adapter", folder)
    own = base or Path(json.loads((folder / "contract.json").read_text())["model_name"])
    noisy = folder.with_name(f"{folder.name}-base")
    shutil.copytree(own, noisy)
    torch.manual_seed(14)
    for file in noisy.glob("*.safetensors"):
        weights = load_file(file)
        changed = {name: w + 0.05 * w.std() * torch.randn_like(w) for name, w in weights.items()}
        save_file(changed, file, {"format": "pt"})
    return told(folder, {"model_name": str(noisy)}, model_name=str(noisy))
