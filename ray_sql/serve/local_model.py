"""An adapter over its base in this process: each schema is computed once, and kept for a while."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from ray_sql import cluster, models
from ray_sql.config.sections import AnswersSection, ScalingSection
from ray_sql.generate import Answer
from ray_sql.generate.answerer import Answerer
from ray_sql.generate.answers import Decoding
from ray_sql.generate.name_guard import guards
from ray_sql.serve.identity import Identity
from ray_sql.serve.prompter import Asked, Prompter
from ray_sql.store import storage

if TYPE_CHECKING:
    import torch

SCHEMA_BYTES = 2**30
"""Bytes of the schemas that are kept computed."""


class LocalModel:
    """A tuned model that answers prompts, for one thread at a time."""

    def __init__(self, prompter: Prompter, schema_bytes: int = SCHEMA_BYTES) -> None:
        self._prompter, config = prompter, prompter.config
        device, folder, cache = _device(config.scaling), prompter.model_folder, config.cache
        dtype = models.compute_dtype(config.train.bf16, folder, cache, device.type == "cuda")
        bf16 = str(dtype) == "torch.bfloat16"
        base = models.load_base(folder, config.quantization, bf16, device, cache)
        with tempfile.TemporaryDirectory(prefix="ray_sql-") as scratch:
            adapter = storage.fetch(prompter.adapter.uri, Path(scratch))
            model = models.load_adapter(base, adapter)
        self.described = Identity.of(
            prompter.model_folder, config.quantization, prompter.adapter
        ).named()
        """Of what it is made, which `verify` compares with the measured model."""
        self._open = ExitStack()
        answerer = Answerer(model, prompter.tokenizer, schema_bytes)
        self._answerer = self._open.enter_context(answerer)

    def answer(self, asked: Sequence[Asked], settings: AnswersSection) -> list[Answer]:
        """Return the answers to prompts, computed together."""
        config = self._prompter.config
        decoding = Decoding.from_settings(settings, config.eval_batch_size, config.seed)
        questions = [one.question for one in asked]
        names = None
        if settings.ground == "constrain":
            databases = {one.db_id: self._prompter.databases[one.db_id] for one in questions}
            known = {name: one.schema.lower_names() for name, one in databases.items()}
            names = guards(known, questions)
        return self._answerer.answer(questions, decoding, self._prompter.begins, names)

    def close(self) -> None:
        """Leave the model as it was."""
        self._open.close()


def _device(scaling: ScalingSection) -> torch.device:
    import torch

    if cluster.on_gpu(scaling):
        return torch.device("cuda")
    cluster.keep_freed_memory()
    return torch.device("cpu")
