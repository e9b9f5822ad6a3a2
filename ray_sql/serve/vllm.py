"""The configuration with which vLLM serves an adapter so that it is the measured model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from ray_sql.config.sections import ServeSection
from ray_sql.errors import ConfigError
from ray_sql.serve.prompter import Prompter

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks that vLLM makes room for."""


def configuration(prompter: Prompter, section: ServeSection) -> str:
    """Return what `vllm serve --config` reads, as YAML.

    Raises `ConfigError` for an adapter that vLLM cannot load: its weights must be merged.
    """
    lora = prompter.adapter.read_adapter_config() or {}
    rank = _rank(lora, str(prompter.adapter))
    folder, settings = prompter.model_folder, prompter.config
    by_name = not Path(settings.model_name).exists() and "/" in settings.model_name
    values: dict[str, Any] = {
        "model": settings.model_name if by_name else folder,
        "served-model-name": f"{prompter.name}-base",
        "enable-lora": True,
        "lora-modules": [f"{prompter.name}={prompter.adapter.uri}"],
        "max-lora-rank": rank,
        "max-loras": 1,
        # else the defaults of the base's generation_config.json change greedy answers
        "generation-config": "vllm",
        "enable-prefix-caching": True,
        "host": section.host,
        "port": section.port,
    }
    revision = (prompter.adapter.read_contract() or {}).get("model_revision")
    if by_name and revision:
        values["revision"] = revision
    if settings.train.bf16 is not None:  # vLLM takes bfloat16 for a base in float32
        values["dtype"] = "bfloat16" if settings.train.bf16 else "float32"
    if settings.quantization.load_in_4bit:
        values["quantization"] = "bitsandbytes"
    return _COMMENT.format(
        name=prompter.name, host=section.host, port=section.port
    ) + yaml.safe_dump(values, sort_keys=False)


_COMMENT = """\
# vllm serve --config THIS_FILE
# ask for the model {name}, not {name}-base; then, for it to be the measured one:
# ray-sql verify --output_name {name} --evaluate.url http://{host}:{port}/v1 \\
#     --evaluate.served_model {name}
"""


def _rank(lora: Mapping[str, Any], place: str) -> int:
    """Return the rank to make room for."""
    highest = max([lora.get("r", 0), *(lora.get("rank_pattern") or {}).values()])
    reasons = {
        "use_dora": lora.get("use_dora"),
        "modules_to_save": lora.get("modules_to_save"),
        "bias": lora.get("bias", "none") != "none",
        f"rank {highest}": highest > RANKS[-1],
    }
    if "://" in place:
        raise ConfigError(f"{place}: vLLM reads adapters from a disk; give --adapter with a copy")
    wrong = [name for name, is_so in reasons.items() if is_so]
    if wrong:
        raise ConfigError(
            f"{place}: vLLM loads no adapter with {', '.join(wrong)}; merge it into its base "
            "(ray-sql publish --hub.merge), and serve the merged folder"
        )
    return next(rank for rank in RANKS if rank >= highest)
