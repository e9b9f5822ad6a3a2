"""The evaluation of a checkpoint, which chooses between checkpoints."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray_sql import generate, rows
from ray_sql.cluster.ranks import gather_all, rank, world_size
from ray_sql.config import Batching, Config
from ray_sql.evaluate import scoring
from ray_sql.generate.answers import Decoding, answer_on_all_ranks
from ray_sql.store import storage
from ray_sql.store.run_folder import RunFolder
from ray_sql.tasks import TASKS
from ray_sql.train import trainer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Validation:
    """Measures the loss on fixed validation examples and, unless it alone chooses, their answers.

    Each rank computes its share, and rank 0 judges and has the result.
    """

    def __init__(
        self, config: Config, tokenizer: PreTrainedTokenizerBase, batching: Batching, scratch: Path
    ) -> None:
        folder = RunFolder(config.run_dir)
        self._questions = generate.parse(storage.read_text(folder.validation_questions) or "")
        if rank() == 0:  # the rank that executes
            self._questions = generate.localize(self._questions, scratch)
        self._examples = []
        if storage.exists(folder.validation_rows):
            local = storage.fetch_file(folder.validation_rows, scratch / "validation.parquet")
            self._examples = rows.read(local)
        # nothing is timed here: the other ranks would wait, and it chooses nothing
        self._config = config.changed({"evaluate.ves_iterations": 0})
        self._tokenizer, self._batching = tokenizer, batching
        self._decoding = Decoding.greedy(config.evaluate, config.eval_batch_size)

    def __call__(self, model: PreTrainedModel) -> dict[str, Any] | None:
        """Return `objective`, `tie_break` and `metrics` on rank 0.

        Returns None on other ranks, and where there is nothing to validate on.
        """
        if not self._questions:
            return None
        metrics = {"validation/n": float(len(self._questions))}
        if self._examples:
            metrics["validation/loss"] = self._loss(model)
        if self._config.tune.objective == "eval_loss":
            loss = metrics.get("validation/loss", math.nan)
            objective = -loss if math.isfinite(loss) else None  # else nothing was measured
            return {"objective": objective, "tie_break": None, "metrics": metrics}
        answers = answer_on_all_ranks(model, self._tokenizer, self._questions, self._decoding)
        if answers is None:
            return None
        task, settings = TASKS[self._config.task_type], self._config.evaluate
        rows = scoring.score(self._questions, answers, task, settings)
        scores = scoring.summarise(rows, task, settings)
        objective, tie_break = task.objective(scores)
        metrics |= scoring.mlflow_metrics(scores, "validation")
        return {"objective": objective, "tie_break": tie_break, "metrics": metrics}

    def _loss(self, model: PreTrainedModel) -> float:
        """Return the mean loss over all ranks' answer tokens."""
        part = trainer.held_out_loss(
            model,
            self._examples,
            self._batching,
            rank(),
            world_size(),
            self._tokenizer.pad_token_id,
        )
        totals, counts = zip(*gather_all(part), strict=True)
        return float(sum(totals) / sum(counts))
