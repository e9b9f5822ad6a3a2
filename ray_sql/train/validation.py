"""The evaluation of a checkpoint, which chooses between checkpoints."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray_sql import generate, rows
from ray_sql.cluster.ranks import gather_all, rank, world_size
from ray_sql.config import Batching, Config
from ray_sql.config.files import parse_json
from ray_sql.data.shown import ORACLE
from ray_sql.database import Schema
from ray_sql.evaluate import scoring
from ray_sql.generate.answers import Decoding, answer_on_all_ranks
from ray_sql.generate.name_guard import guards
from ray_sql.store import storage
from ray_sql.store.run_folder import RESTORE, RunFolder
from ray_sql.tasks import TASKS
from ray_sql.train import trainer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def read_held_out(folder: RunFolder, scratch: Path) -> list[rows.TokenizedExample]:
    """Return the examples that the loss is validated on; none where there are none."""
    if not storage.exists(folder.validation_rows):
        return []
    return rows.read(storage.fetch_file(folder.validation_rows, scratch / "validation.parquet"))


class Validation:
    """Measures the loss on fixed validation examples and, unless it alone chooses, their answers.

    Each rank computes its share, and rank 0 judges and has the result.
    """

    def __init__(
        self,
        config: Config,
        tokenizer: PreTrainedTokenizerBase,
        batching: Batching,
        examples: Sequence[rows.TokenizedExample],
        scratch: Path,
    ) -> None:
        folder = RunFolder(config.run_dir)
        self._questions = generate.parse(storage.read_text(folder.validation_questions) or "")
        if rank() == 0:  # the rank that executes
            self._questions = generate.localize(self._questions, scratch)
        self._examples = examples
        settings = config.evaluate
        if config.tune.objective != "chosen":
            settings = settings.greedy()
        # nothing is timed here: the other ranks would wait, and it chooses nothing
        self._settings = settings.model_copy(update={"ves_iterations": 0})
        self._task, self._by_loss = TASKS[config.task_type], config.tune.objective == "eval_loss"
        self._schemas = _read_schemas(folder) if settings.ground != "none" else {}
        self._guards = None
        if settings.ground == "constrain":
            names = {name: schema.lower_names() for name, schema in self._schemas.items()}
            self._guards = guards(names, self._questions)
        # its prompts show what is trained on
        self._name = "validation" + ORACLE * (config.prompt.schema_form != "full")
        self._tokenizer, self._batching = tokenizer, batching
        self._decoding = Decoding.from_settings(settings, config.eval_batch_size, config.seed)

    def __call__(self, model: PreTrainedModel) -> dict[str, Any] | None:
        """Return `objective`, `tie_break` and `metrics` on rank 0.

        Returns None on other ranks, and where there is nothing to validate on.
        """
        if not self._questions:
            return None
        metrics = {"validation/n": float(len(self._questions))}
        if self._examples:
            metrics["validation/loss"] = self._loss(model)
        if self._by_loss:
            loss = metrics.get("validation/loss", math.nan)
            objective = -loss if math.isfinite(loss) else None  # else nothing was measured
            return {"objective": objective, "tie_break": None, "metrics": metrics}
        answers = answer_on_all_ranks(
            model, self._tokenizer, self._questions, self._decoding, self._guards
        )
        if answers is None:
            return None
        rows = scoring.score(self._questions, answers, self._task, self._settings, self._schemas)
        scores = scoring.summarise(rows, self._task, self._settings)
        objective, tie_break = self._task.objective(scores)
        followed = scoring.headline(scores, self._task)
        metrics |= {f"{self._name}/{name}": value for name, value in followed.items()}
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


def _read_schemas(folder: RunFolder) -> dict[str, Schema]:
    """Return the schemas of the validation questions, by database."""
    content = storage.read_text(folder.validation_schemas) or ""
    return parse_json(dict[str, Schema], content, folder.validation_schemas, RESTORE)
