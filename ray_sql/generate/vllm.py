"""Answers by vLLM, for those who have it and a GPU: it keeps the schemas that prompts share by itself, and takes the adapter as LoRA.

Written against vLLM's documented interface (`LLM`, `SamplingParams`, `LoRARequest`) and not run by this project's tests, which
have no vLLM; only the error where it is missing is tested. It rounds in its own way, so answers may differ from those of
`transformers` where two tokens are about equally likely.
"""

from __future__ import annotations

import importlib.util
import json
import time
from collections.abc import Sequence
from pathlib import Path

from ray_sql import models
from ray_sql.config import Config
from ray_sql.errors import ConfigError
from ray_sql.generate.ends import Ends
from ray_sql.generate.questions import Answer, Question

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""LoRA ranks that vLLM makes room for; an adapter takes the next larger one."""


def check(config: Config) -> None:
    """Raise `ConfigError` if `evaluate.backend` is vLLM and there is none."""
    if config.evaluate.backend == "vllm" and importlib.util.find_spec("vllm") is None:
        raise ConfigError(
            "--evaluate.backend vllm: vLLM is not installed here; pip install -e '.[vllm]' on a machine with a GPU, or use "
            "--evaluate.backend transformers"
        )


class Engine:
    """vLLM over a base model, in 4 bits where the adapter was trained so, and the adapter of a local folder where given."""

    def __init__(self, model_folder: str, adapter: Path | None, config: Config) -> None:
        check(config)
        from vllm import LLM

        self._config, self._adapter = config, adapter
        self._ends = Ends(None, models.load_tokenizer(model_folder))
        together = config.evaluate.max_num_seqs
        self._model = LLM(
            model=model_folder,
            dtype=str(models.compute_dtype(config)).removeprefix("torch."),
            quantization="bitsandbytes" if config.quantization.load_in_4bit else None,
            enable_prefix_caching=True,
            seed=config.seed,
            **({} if together == "auto" else {"max_num_seqs": together}),
            **({"enable_lora": True, "max_lora_rank": _room(adapter)} if adapter else {}),
        )

    def answer(self, asked: Sequence[Question], tuned: bool) -> list[Answer]:
        """Greedy answers in the order asked, by the base model, or by the adapter over it."""
        from vllm import SamplingParams
        from vllm.lora.request import LoRARequest

        started = time.monotonic()
        outputs = self._model.generate(
            [{"prompt_token_ids": one.input_ids} for one in asked],
            SamplingParams(
                temperature=0.0,
                max_tokens=self._config.evaluate.max_new_tokens,
                stop_token_ids=self._ends.stops,
            ),
            lora_request=LoRARequest("tuned", 1, str(self._adapter)) if tuned else None,
            use_tqdm=False,
        )
        seconds = (time.monotonic() - started) / max(1, len(asked))
        said = []
        for one, output in zip(asked, outputs, strict=True):
            tokens = self._ends.until_closed(self._ends.cut(output.outputs[0].token_ids))
            said.append(Answer(self._ends.text(tokens), len(one.input_ids), len(tokens), seconds))
        return said


def _room(adapter: Path) -> int:
    """The rank to make room for."""
    rank = int(json.loads((adapter / "adapter_config.json").read_text())["r"])
    room = next((one for one in RANKS if one >= rank), None)
    if room is None:
        raise ConfigError(
            f"--evaluate.backend vllm takes LoRA ranks up to {RANKS[-1]}, this adapter has {rank}: use transformers"
        )
    return room
