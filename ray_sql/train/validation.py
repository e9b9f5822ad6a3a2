"""What a checkpoint is measured at, to choose between them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray_sql import generate, rows
from ray_sql.cluster.ranks import gather_all
from ray_sql.config import Batching, Config
from ray_sql.evaluate import scoring
from ray_sql.store import storage
from ray_sql.store.run_folder import RunFolder

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Validation:
    """The loss on a fixed set of validation examples and, unless the loss alone chooses, their questions answered and judged; each
    rank does its share, and rank 0 has the result."""

    def __init__(
        self, config: Config, tokenizer: PreTrainedTokenizerBase, batching: Batching, scratch: Path
    ) -> None:
        import ray.train

        folder = RunFolder(config.run_dir)
        self._questions = generate.parse(storage.read_text(folder.validation_questions) or "")
        if ray.train.get_context().get_world_rank() == 0:  # the one that executes
            self._questions = generate.unpack(self._questions, scratch)
        self._rows = []
        if storage.exists(folder.validation_rows):
            self._rows = rows.read(
                storage.fetch_file(folder.validation_rows, scratch / "validation.parquet")
            )
        # nothing is timed here: the other ranks would wait, and it chooses nothing
        self._config = config.changed({"evaluate.ves_iterations": 0})
        self._tokenizer, self._batching = tokenizer, batching

    def __call__(self, model: PreTrainedModel) -> dict[str, Any] | None:
        """What orders the checkpoint and its metrics, on rank 0; None on other ranks, and where there is nothing to validate on."""
        if not self._questions:
            return None
        measured = {"validation/n": float(len(self._questions))}
        if self._rows:
            measured["validation/loss"] = self._loss(model)
        if self._config.tune.objective == "eval_loss":
            objective = -measured["validation/loss"] if self._rows else None
            return {"objective": objective, "tie_break": None, "metrics": measured}
        answers = generate.answer_together(model, self._tokenizer, self._questions, self._config)
        if answers is None:
            return None
        scores = scoring.summarise(
            scoring.score(self._questions, answers, self._config), self._config
        )
        objective, tie_break = scoring.objective(scores)
        metrics = measured | scoring.flat(scores, "validation")
        return {"objective": objective, "tie_break": tie_break, "metrics": metrics}

    def _loss(self, model: PreTrainedModel) -> float:
        """The mean over all ranks' answer tokens."""
        import ray.train

        from ray_sql.train import trainer

        context, pad = ray.train.get_context(), self._tokenizer.pad_token_id
        rank, world = context.get_world_rank(), context.get_world_size()
        part = trainer.held_out_loss(model, self._rows, self._batching, rank, world, pad)
        parts = gather_all(part)
        return float(sum(total for total, _ in parts) / sum(labels for _, labels in parts))
