"""An adapter over its base in this process: each schema is computed once, and kept for a while."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

from ray_sql import cluster, models
from ray_sql.config.sections import AnswersSection, QuantizationSection
from ray_sql.generate import Question
from ray_sql.generate.answerer import Answerer
from ray_sql.generate.answers import Decoding, Fits, OnAnswer
from ray_sql.generate.decoder import Needed, always
from ray_sql.generate.name_guard import NameGuard, guards
from ray_sql.serve.engine import More
from ray_sql.serve.identity import Identity
from ray_sql.serve.prompter import Asked, Prompter
from ray_sql.store import storage

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SCHEMA_BYTES = 2**30
"""Bytes of the schemas that are kept computed."""


@dataclass(frozen=True)
class Base:
    """A base model as an adapter was trained over it, and where it computes."""

    folder: str
    quantization: QuantizationSection
    bf16: bool | None
    on_gpu: bool

    @classmethod
    def of(cls, prompter: Prompter) -> Self:
        """Return the base model of a prompter's adapter."""
        config = prompter.config
        on_gpu = cluster.on_gpu(config.scaling)
        return cls(prompter.model_folder, config.quantization, config.train.bf16, on_gpu)

    def differing(self, other: Base) -> list[str]:
        """Return the settings by which two differ."""
        settings = {
            "model_name": (self.folder, other.folder),
            "quantization": (self.quantization, other.quantization),
            "train.bf16": (self.bf16, other.bf16),
            "scaling.use_gpu": (self.on_gpu, other.on_gpu),
        }
        return [name for name, (own, others) in settings.items() if own != others]

    def load(self, cache: Path) -> PreTrainedModel:
        """Load it, in the type that this machine is fast at."""
        if not self.on_gpu:
            cluster.keep_freed_memory()
        dtype = models.compute_dtype(self.bf16, self.folder, cache, self.on_gpu)
        bf16, device = str(dtype) == "torch.bfloat16", "cuda" if self.on_gpu else "cpu"
        return models.load_base(self.folder, self.quantization, bf16, device, cache)


class LocalModel:
    """A tuned model that answers prompts, for one thread at a time.

    It puts its adapter on `base`, which nothing else may use.
    """

    def __init__(
        self, prompter: Prompter, base: PreTrainedModel, schema_bytes: int = SCHEMA_BYTES
    ) -> None:
        self._prompter = prompter
        with tempfile.TemporaryDirectory(prefix="ray_sql-") as scratch:
            adapter = storage.fetch(prompter.adapter.uri, Path(scratch))
            model = models.load_adapter(base, adapter)
        self.described = Identity.of(
            prompter.model_folder, prompter.config.quantization, prompter.adapter
        ).named()
        """Of what it is made, which `verify` compares with the measured model."""
        self._open = ExitStack()
        answerer = Answerer(model, prompter.tokenizer, schema_bytes)
        self._answerer = self._open.enter_context(answerer)

    def answer(
        self,
        asked: Sequence[Asked],
        settings: AnswersSection,
        on_answer: OnAnswer,
        more: More | None = None,
        needed: Needed = always,
    ) -> None:
        """Answer prompts, and those that join them, together, as long as they are needed."""
        config = self._prompter.config
        decoding = Decoding.from_settings(settings, config.eval_batch_size, config.seed)
        names: dict[str, NameGuard] = {}

        def take(taken: Sequence[Asked]) -> list[Question]:
            questions = [one.question for one in taken]
            if settings.ground == "constrain":
                names.update(self._guards([one for one in questions if one.db_id not in names]))
            return questions

        def joined(fits: Fits) -> list[Question]:
            assert more is not None
            return take(more(fits))

        self._answerer.answer(
            take(asked),
            decoding,
            self._prompter.begins,
            names if settings.ground == "constrain" else None,
            on_answer=on_answer,
            more=joined if more else None,
            needed=needed,
        )

    def _guards(self, questions: Sequence[Question]) -> dict[str, NameGuard]:
        databases = {one.db_id: self._prompter.databases[one.db_id] for one in questions}
        known = {name: one.schema.lower_names() for name, one in databases.items()}
        return guards(known, questions)

    def close(self) -> None:
        """Leave the model as it was."""
        self._open.close()
