"""Load what training and generation share: tokenizer, 4-bit base model and adapter.

The base model is loaded the same way on both sides, because an adapter trained over NF4 weights is
measured over NF4 weights.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import SecretStr

from ray_sql.config import absolute
from ray_sql.config.files import read_json
from ray_sql.config.sections import QuantizationSection
from ray_sql.errors import ModelError, RaySqlError, out_of_memory
from ray_sql.models.demo import demo_folder, demo_model
from ray_sql.models.logs import import_bitsandbytes, quiet
from ray_sql.models.patterns import check_patterns
from ray_sql.models.speed import SMALL_LAYER, Speed, measure_speed

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MOST_LAYERS = 2_000
"""Layers of a model. Each is laid out before its weights are looked for."""
SNAPSHOT_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
"""The files of a Hub repository that make a model."""


def compute_dtype(
    bf16: bool | None, folder: str | None = None, cache: Path | None = None, gpu: bool | None = None
) -> torch.dtype:
    """Return bfloat16 or float32, as `train.bf16` says; by default what the hardware is fast at.

    A GPU is asked; `gpu` tells whether it computes, by default where there is one. A CPU is timed
    at the products of the model in `folder`, once for a `cache`.
    """
    import torch

    gpu = torch.cuda.is_available() if gpu is None else gpu
    if bf16 is None and gpu:
        bf16 = bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if bf16 is None:
        bf16 = cpu_speed(folder, cache).prefers_bfloat16
    return torch.bfloat16 if bf16 else torch.float32


def cpu_speed(folder: str | None, cache: Path | None = None) -> Speed:
    """Return the speeds of this machine's CPU at the products of a layer of the model."""
    hidden = getattr(read_shape(folder), "hidden_size", None) if folder is not None else None
    if folder is None or hidden is None:
        return measure_speed(SMALL_LAYER, cache)
    inner = inner_size(read_shape(folder))
    return measure_speed([(hidden, hidden), (hidden, inner), (inner, hidden)], cache)


def inner_size(shape: Any) -> int:
    """Return the width inside of a model's layers; the largest where they differ (Gemma 3n)."""
    inner = getattr(shape, "intermediate_size", None) or 4 * shape.hidden_size
    return int(max(inner)) if isinstance(inner, list | tuple) else int(inner)


def resolve(
    model_name: str, cache: Path, token: SecretStr | None = None, revision: str | None = None
) -> tuple[str, str | None]:
    """Return where the base model lies: (folder, revision SHA of a Hub id).

    A Hub id is resolved once, so that all workers agree. A run that goes on gives the `revision`
    that it began with. Raises `ModelError` if it is neither a model folder, nor in the local Hub
    cache, nor reachable on the Hub.
    """
    if model_name == "demo":
        return str(demo_model(cache)), None
    folder = absolute(model_name)
    if folder.is_file():
        raise ModelError(
            f"--model_name {model_name}: is a file; give the folder of a Hugging Face model (a "
            "GGUF file cannot be trained on)"
        )
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelError(
                f"--model_name {model_name}: the folder holds no config.json; "
                "give a Hugging Face model folder"
            )
        _require_files(folder, model_name)
        return str(folder), None
    snapshot = _fetch_snapshot(model_name, revision, token)
    return snapshot, Path(snapshot).name


def _require_files(folder: Path, model_name: str) -> None:
    """Raise `ModelError` for a model folder with a pipe or a broken link in it.

    Reading a pipe would never end. Raises `DamagedFile` if its config.json is none.
    """
    flag = f"--model_name {model_name}"
    for file in sorted(folder.iterdir()):
        if not (file.is_file() or file.is_dir()):
            raise ModelError(f"{flag}: {file.name} is no ordinary file; give an intact folder")
        if file.is_file() and not os.access(file, os.R_OK):
            raise ModelError(f"{flag}: {file.name} cannot be read; correct its rights")
    read_json(dict[str, Any], folder / "config.json", "give an intact model folder")


def on_this_node(folder: str, model_name: str, cache: Path, token: SecretStr | None = None) -> str:
    """Return the model that the driver has in `folder`, on this node.

    A model of the Hub is fetched once for all processes of the node. Raises `ModelError` where a
    folder is not there.
    """
    place = Path(folder)
    if place == demo_folder(cache):
        return str(demo_model(cache))
    if place.parts[-3:-1] == (f"models--{model_name.replace('/', '--')}", "snapshots"):
        # Fetched even if it is there: small files come first, and a fetch that is under way, or was
        # cut off, lacks the weights.
        return _fetch_snapshot(model_name, place.name, token)
    if (place / "config.json").is_file():
        return folder
    raise ModelError(
        f"--model_name {model_name}: {folder} is not on every node; "
        "put it where all see it, or give a Hub id"
    )


def revision_of(contract: Mapping[str, Any] | None, model_name: str) -> str | None:
    """Return the base model's revision that a contract names; None for another base model."""
    named = contract or {}
    return named.get("model_revision") if named.get("model_name") == model_name else None


def _fetch_snapshot(
    model_name: str, revision: str | None, token: SecretStr | None, flag: str = "--model_name"
) -> str:
    from huggingface_hub import snapshot_download

    try:
        return str(
            snapshot_download(
                model_name,
                revision=revision,
                token=token.get_secret_value() if token else None,
                allow_patterns=SNAPSHOT_FILES,
            )
        )
    # a dozen kinds, from a malformed id to a cut connection; all mean the same to the user
    except Exception as error:
        which = f"{model_name} at {revision}" if revision else model_name
        raise ModelError(
            f"{flag} {which}: neither a local folder nor a model that the Hub gives "
            f"({type(error).__name__}); check the name, the network and --read_token (on a "
            "cluster's other nodes HF_TOKEN), or give a folder or `demo`"
        ) from None


def fetch_adapter(name: str, token: SecretStr | None) -> str:
    """Return the local folder of an adapter on the Hub, fetched once. Raises `ModelError`."""
    return _fetch_snapshot(name, None, token, "--adapter")


def check_window(folder: str, tokens: int, reason: str) -> None:
    """Raise `ModelError` if a model was not made for this many tokens at once.

    `reason` names the text, with `{tokens}` in it, and the way to a shorter one.
    """
    most = window(folder)
    if most and tokens > most:
        text = reason.format(tokens=f"{tokens:,}")
        raise ModelError(f"--model_name {folder}: it reads up to {most:,} tokens, but {text}")


def window(folder: str) -> int | None:
    """Return the tokens that a model was made to read at once; None where that is not known."""
    shape = read_shape(folder)
    most = getattr(shape, "max_position_embeddings", None)
    rope = getattr(shape, "rope_parameters", None) or {"rope_type": "default"}
    # positions that are scaled, or differ from layer to layer, may reach further than this number
    known = isinstance(most, int) and isinstance(rope, dict)
    return most if known and rope.get("rope_type") == "default" else None


def check_vocabulary(folder: str, largest: int) -> None:
    """Raise `ModelError` if a model has no embedding for the largest token of a text."""
    size = getattr(read_shape(folder), "vocab_size", None)
    if isinstance(size, int) and largest >= size:
        raise ModelError(
            f"--model_name {folder}: its tokenizer writes token {largest:,}, but the model has "
            f"embeddings for {size:,}: give the tokenizer it was trained with, or resize it "
            "(resize_token_embeddings) where tokens were added"
        )


def read_shape(folder: str) -> Any:
    """Return the sizes of a model's text part, as transformers reads them from config.json.

    Raises `ModelError` if they cannot be read, if the model needs code of its own, or if it has
    more layers than any.
    """
    quiet()
    from transformers import AutoConfig

    with _refusals(f"--model_name {folder}", "its config.json cannot be used"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        shape = config.get_text_config()
        # transformers fetches and runs what is named like a repository of the Hub
        if any("/" in str(part._attn_implementation) for part in (config, shape)):
            raise ModelError(
                f"--model_name {folder}: its config.json asks for attention of the Hub, code that "
                "is not run; remove attn_implementation there"
            )
        layers = getattr(shape, "num_hidden_layers", None)
        if isinstance(layers, int) and layers > MOST_LAYERS:
            raise ValueError(f"num_hidden_layers {layers:,}, over {MOST_LAYERS:,}")
    return shape


def load_tokenizer(folder: str) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a model folder, with a token that ends a text and one that pads.

    Raises `ModelError` if it cannot be loaded, or nothing in the folder names the end of a text.
    """
    quiet()
    from transformers import AutoTokenizer

    with _refusals(f"--model_name {folder}", "its tokenizer cannot be loaded"):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False
        )
    if tokenizer.eos_token is None:
        tokenizer.eos_token = _end_of_text(folder, tokenizer)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _end_of_text(folder: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the token that ends a text by the model's configuration, for a tokenizer without."""
    for name in ("generation_config.json", "config.json"):
        file = Path(folder) / name
        settings = read_json(dict, file, "fetch the model again") if file.is_file() else {}
        ends = settings.get("eos_token_id")
        first = ends[0] if isinstance(ends, list) and ends else ends
        if isinstance(first, int) and 0 <= first < len(tokenizer):
            return str(tokenizer.convert_ids_to_tokens(first))
    raise ModelError(
        f"--model_name {folder}: its tokenizer has no token for the end of a text, and no "
        "eos_token_id in generation_config.json or config.json names one; add eos_token to "
        "tokenizer_config.json"
    )


def load_base(
    folder: str,
    quantization: QuantizationSection,
    bf16: bool | None = None,
    device: str | torch.device | None = "cpu",
    cache: Path | None = None,
) -> PreTrainedModel:
    """Return the frozen base model on one device, in the type of `compute_dtype`.

    `quantization` has the words of BitsAndBytesConfig. A 4-bit model on a CPU has its weights
    expanded, and is kept in 4 bits under `cache`, where there is one. Raises `ModelError` if the
    folder cannot be loaded.
    """
    quiet()
    import_bitsandbytes()
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    # they load torch, which a driver does without
    from ray_sql.models import cpu_linear, quantised

    read_shape(folder)
    dtype = compute_dtype(bf16, folder)
    given: dict[str, Any] = {}
    place = None
    if quantization.load_in_4bit and cache is not None and str(device) == "cpu":
        place = quantised.place_of(folder, quantization, dtype, cache)
        kept = quantised.read(place, folder, dtype)
        if kept is not None:
            cpu_linear.dequantise_once(kept, dtype)
            return kept
    if quantization.load_in_4bit:
        given["quantization_config"] = BitsAndBytesConfig(
            **quantization.model_dump(), bnb_4bit_compute_dtype=dtype
        )
    with _refusals(f"--model_name {folder}", "cannot be loaded"):
        _check_shards(Path(folder))
        # never "auto": it would spread one model over all devices of a worker group
        model, report = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            device_map={"": device},
            trust_remote_code=False,
            output_loading_info=True,
            **given,
        )
        if missing := sorted(report["missing_keys"]):
            raise ValueError(f"its files lack {len(missing)} weights, {missing[0]} among them")
        _check_ends(model)
    if place is not None:
        quantised.keep(model, place, dtype)
    if quantization.load_in_4bit and model.device.type == "cpu":
        cpu_linear.dequantise_once(model, dtype)
    return model


def _check_shards(folder: Path) -> None:
    """Raise `ValueError` if a list of weight files names one outside of the folder."""
    for file in sorted(folder.glob("*.index.json")):
        listed = read_json(dict[str, Any], file, "fetch the model again").get("weight_map")
        for shard in sorted(set(map(str, dict(listed or {}).values()))):
            if Path(shard).name != shard:
                raise ValueError(f"{file.name} names weights outside of the folder: {shard!a:.99}")


def _check_ends(model: PreTrainedModel) -> None:
    """Raise `ValueError` if the tokens that end an answer are no numbers."""
    ends = model.generation_config.eos_token_id if model.generation_config else None
    for end in ends if isinstance(ends, list) else [ends]:
        if not isinstance(end, int | None):
            raise ValueError(
                f"eos_token_id {end!a:.99} is no number of a token; correct generation_config.json "
                "or config.json"
            )


def load_adapter(
    base: PreTrainedModel, adapter: str | Path, *, place: str = "", exact: bool = False
) -> PreTrainedModel:
    """Return `base` with the LoRA adapter of a local folder, for generation.

    Its weights are rounded to the base model's type, unless they are to be `exact`. `place` is
    where the user has the adapter, if the folder is a copy. Raises `ModelError` if the two do not
    fit.
    """
    place = place or str(adapter)
    from peft import PeftModel
    from peft.utils import CONFIG_NAME

    with _refusals(place, "not an adapter for this base model"):
        file = Path(adapter) / CONFIG_NAME
        if file.exists():
            shown = f"{place.rstrip('/')}/{CONFIG_NAME}"
            settings = read_json(dict[str, Any], file, "train the adapter again", shown)
            check_patterns(settings, [name for name, _ in base.named_modules()], shown)
        model = PeftModel.from_pretrained(base, str(adapter))
    for name, weight in model.named_parameters():
        # rounded once, where autocast would do it at every token
        if "lora_" in name and not exact:
            weight.data = weight.data.to(base.dtype)
    return model


@contextmanager
def _refusals(place: str, what: str) -> Iterator[None]:
    """Raise as `ModelError` whatever transformers and its neighbours raise over damaged files.

    They raise dozens of kinds, one of which is no `Exception`. Full memory is none of them.
    """
    try:
        yield
    except BaseException as error:
        panic = type(error).__name__ == "PanicException"  # how tokenizers, in Rust, falls over
        known = isinstance(error, RaySqlError) or out_of_memory(error)
        if known or not (panic or isinstance(error, Exception)):
            raise
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        if "trust_remote_code" in str(error):
            reason = "it needs code of its own, which is not run; give a model of a known type"
        if "weights_only" in str(error):  # advice to run it
            reason = "its weights may hold code, which is not run; give a model in safetensors"
        raise ModelError(f"{place}: {what}: {reason}") from None
