"""The settings of a run: each once, with its default, its allowed values, and its sentence.

Flat names are those of the original project's command line. Sections use the words of the
library that receives them.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Self

from pydantic import Field, field_validator, model_validator

from ray_sql.config.base import TOKENS, JobConfig
from ray_sql.config.batching import (
    Batching,
    choose_examples_per_row,
    examples_per_row_of_one_database,
)
from ray_sql.config.sections import (
    MOST,
    NO_LINKS,
    AnswersSection,
    DataSection,
    EvaluateSection,
    HubSection,
    LinkingSection,
    LoraSection,
    PrecisionSection,
    PromptSection,
    QuantizationSection,
    QuestionsSection,
    RowsSection,
    ScalingSection,
    TrackingSection,
    TrainSection,
    TuneSection,
)
from ray_sql.config.urls import absolute, mask_password, strip_password
from ray_sql.tasks import TASKS, TaskName

IDENTITY = {
    *("model_name", "task_type", "dataset_id", "seed", "learning_rate", "num_epochs", "save_steps"),
    *("data", "prompt", "rows", "lora", "quantization", "train"),
}
"""Settings that shape the adapter. A run may be continued under other values of all the rest."""
SHOWN_SIZES = 10
"""Numbers of workers that one message lists."""


class ModelConfig(JobConfig):
    """Settings of a job that asks a model the questions of a dataset."""

    model_name: str
    """Load this base model: a Hub id, a folder, or `demo` for the demo's small model."""
    task_type: TaskName
    """Write the query (`sql`), or name the tables and columns it needs (`schema`)."""
    dataset_id: str = "NESPED-GEN/spider_selector_schemaReduzido"
    """Read questions from a folder in Spider's or BIRD's format, JSONL files, a Hub dataset, or
    `demo`."""
    split: tuple[str, ...] = ("dev",)
    """Score the examples of these splits, e.g. `dev` or `seen,unseen`. They are never trained
    on."""
    seed: int = Field(14, ge=0, lt=2**32)
    """Seed everything random: split, order, adapter, dropout."""
    eval_batch_size: int = Field(1, ge=1, le=MOST)
    """Generate for this many prompts at a time, with beams or for a model that cannot share a
    schema."""
    data: QuestionsSection = QuestionsSection()
    prompt: PromptSection = PromptSection()
    linking: LinkingSection = LinkingSection()
    quantization: QuantizationSection = QuantizationSection()
    train: PrecisionSection = PrecisionSection()
    scaling: ScalingSection = ScalingSection()
    evaluate: AnswersSection = AnswersSection()

    @field_validator("split", mode="before")
    @classmethod
    def _split_names(cls, given: Any) -> Any:
        return given.split(",") if isinstance(given, str) else given

    @model_validator(mode="after")
    def _check_example_values(self) -> Self:
        prompt = self.prompt
        if prompt.example_values and prompt.serializer != "m_schema":
            raise ValueError(
                f"prompt.example_values is {prompt.example_values}, but prompt.serializer "
                f"{prompt.serializer} writes none: use --prompt.serializer m_schema, or set it to 0"
            )
        return self

    def _executes_sql(self) -> bool:
        """Say whether answers are SQL. Settings of several tasks are checked once per task."""
        task = TASKS.get(self.task_type)
        return task is None or task.executes_sql

    @model_validator(mode="after")
    def _check_schema_form(self) -> Self:
        if not self._executes_sql() and self.prompt.schema_form != "full":
            raise ValueError(
                f"prompt.schema_form {self.prompt.schema_form} shows the answer of task_type "
                f"{self.task_type} in its prompt: use full"
            )
        if not self._executes_sql() and self.prompt.asked_links != NO_LINKS:
            raise ValueError(
                f"prompt.links {self.prompt.links}: task_type {self.task_type} finds links, and is "
                "shown none: leave it out"
            )
        return self

    @model_validator(mode="after")
    def _check_choice(self) -> Self:
        """Check that there is something to choose from, in the way that is asked for."""
        evaluate, way = self.evaluate, self.evaluate.way
        sampled, beams = evaluate.samples > 1, evaluate.num_beams > 1
        if sampled and beams:
            raise ValueError(
                f"evaluate.samples {evaluate.samples} and evaluate.num_beams {evaluate.num_beams} "
                "are two ways to get several answers: leave one of the two out"
            )
        if way in ("vote", "weighted_vote") and not sampled:
            raise ValueError(
                f"evaluate.choose {way} counts samples, but evaluate.samples is 1: raise it, or "
                "leave it out"
            )
        if way == "first_executable" and not (sampled or beams):
            raise ValueError(
                "evaluate.first_executable chooses among beams or samples, but evaluate.num_beams "
                "and evaluate.samples are 1: raise one of them, or leave it out"
            )
        if way == "first_executable" and not self._executes_sql():
            raise ValueError(
                "evaluate.first_executable executes SQL, which task_type "
                f"{self.task_type} does not write: leave it out"
            )
        return self

    @model_validator(mode="after")
    def _check_ground(self) -> Self:
        needed = {"repaired": "repair", "constrained": "constrain"}.get(self.evaluate.way)
        if needed and self.evaluate.ground != needed:
            raise ValueError(
                f"evaluate.choose {self.evaluate.way} needs evaluate.ground {needed}, not "
                f"{self.evaluate.ground}: set it, or choose another answer"
            )
        if self.evaluate.ground == "constrain" and not self._executes_sql():
            raise ValueError(
                f"evaluate.ground constrain follows SQL, which task_type {self.task_type} does not "
                "write: use repair"
            )
        if self.evaluate.ground == "constrain" and self.evaluate.num_beams > 1:
            raise ValueError(
                "evaluate.ground constrain works with greedy answers and samples, not with "
                f"evaluate.num_beams {self.evaluate.num_beams}: leave one of the two out"
            )
        return self

    @model_validator(mode="after")
    def _check_backend(self) -> Self:
        evaluate = self.evaluate
        if evaluate.backend == "transformers":
            return self
        if not evaluate.url:
            raise ValueError(
                "evaluate.backend openai needs evaluate.url: give the endpoint's address, e.g. "
                "http://127.0.0.1:8000/v1"
            )
        if evaluate.samples > 1 or evaluate.num_beams > 1 or evaluate.ground == "constrain":
            raise ValueError(
                "evaluate.backend openai gives one greedy answer a question: leave out "
                "evaluate.samples, evaluate.num_beams and evaluate.ground constrain"
            )
        return self

    @model_validator(mode="after")
    def _check_ves(self) -> Self:
        evaluate = self.evaluate
        is_bird = evaluate.semantics == "bird" and self._executes_sql()
        if evaluate.ves_iterations and not is_bird:
            raise ValueError(
                f"evaluate.ves_iterations {evaluate.ves_iterations} times right queries for BIRD's "
                "R-VES: use task_type sql and evaluate.semantics bird, or leave it out"
            )
        return self

    @model_validator(mode="after")
    def _check_gpu(self) -> Self:
        scaling = self.scaling
        if scaling.use_gpu is False and (scaling.resources_per_worker or {}).get("GPU"):
            raise ValueError(
                "scaling.use_gpu is false, but scaling.resources_per_worker asks for a GPU: "
                "leave one of the two out"
            )
        return self

    def public(self) -> dict[str, Any]:
        """Return all settings as plain JSON values, without tokens: for config.json and MLflow.

        Leaves out settings for one command only. Given back, they would delete, not run, or
        publish.
        """
        once = {"config", "dry_run", "overwrite", "publish"} & set(type(self).model_fields)
        settings = self.model_dump(mode="json", exclude=TOKENS | once)
        # a mask given back would be taken for the password; without one, libpq looks for it
        settings["data"]["databases"] = strip_password(settings["data"]["databases"])
        return settings


class Config(ModelConfig):
    """Settings of a run."""

    learning_rate: float = Field(1e-4, gt=0, le=1e9)
    """Raise the learning rate to this peak."""
    num_epochs: float = Field(1, gt=0, le=10_000)
    """Pass over the training examples this many times."""
    train_batch_size: int = Field(1, ge=1, le=1_000_000)
    """Put at most this many examples into a forward pass per worker. A shared row with more gets
    its own pass."""
    grad_accum_steps: int = Field(8, ge=1, le=1_000_000)
    """Average an optimizer step over train_batch_size x grad_accum_steps x workers examples."""
    save_steps: int = Field(250, ge=1, le=MOST)
    """Save a checkpoint every this many optimizer steps."""
    prev_checkpoint: str | None = None
    """Continue from this checkpoint: `checkpoint-1000` of this run, a path, or a URI."""
    overwrite: bool = False
    """Remove an earlier run of the same name and start afresh."""
    publish: bool = False
    """Push the best adapter to the Hub once it is measured, with a model card."""
    data: DataSection = DataSection()
    rows: RowsSection = RowsSection()
    lora: LoraSection = LoraSection()
    train: TrainSection = TrainSection()
    evaluate: EvaluateSection = EvaluateSection()
    tune: TuneSection = TuneSection()
    tracking: TrackingSection = TrackingSection()
    hub: HubSection = HubSection()

    @model_validator(mode="after")
    def _check_eval_steps(self) -> Self:
        eval_steps, save_steps = self.evaluate.eval_steps, self.save_steps
        if eval_steps and eval_steps % save_steps:
            near = max(1, round(eval_steps / save_steps)) * save_steps
            raise ValueError(
                f"evaluate.eval_steps {eval_steps} is no multiple of save_steps {save_steps}, and "
                f"only a checkpoint that is saved can be the best: use {near}, or save_steps "
                f"{math.gcd(eval_steps, save_steps)}"
            )
        return self

    @model_validator(mode="after")
    def _check_overwrite(self) -> Self:
        start = self.prev_checkpoint or ""
        in_run_dir = "://" not in self.run_dir and absolute(start).is_relative_to(self.run_dir)
        if self.overwrite and start and ("/" not in start or in_run_dir):
            raise ValueError(
                f"overwrite removes the run that prev_checkpoint {start} belongs to: "
                "leave one of the two out"
            )
        return self

    @model_validator(mode="after")
    def _check_global_batch_size(self) -> Self:
        wanted, workers = self.train.global_batch_size, self.scaling.max_workers
        per_pass = self.train_batch_size * workers
        if wanted is None or self.scaling.elastic:
            return self
        if wanted % per_pass:
            raise ValueError(
                f"train.global_batch_size {wanted} does not divide by train_batch_size "
                f"{self.train_batch_size} x {workers} workers = {per_pass}: choose a multiple of "
                f"{per_pass}"
            )
        needed = wanted // per_pass
        if "grad_accum_steps" in self.model_fields_set and self.grad_accum_steps != needed:
            raise ValueError(
                f"train.global_batch_size {wanted} needs grad_accum_steps {needed}, but "
                f"{self.grad_accum_steps} was given: leave one of the two unset"
            )
        return self

    @model_validator(mode="after")
    def _check_elastic_batch(self) -> Self:
        if not self.scaling.elastic:
            return self
        sizes = range(self.scaling.min_workers, self.scaling.max_workers + 1)
        bounds = f"scaling.num_workers {sizes[0]},{sizes[-1]}"
        step = self.batching.global_batch_size
        uneven = [str(size) for size in sizes if step % (self.train_batch_size * size)]
        if uneven:
            multiple = self.train_batch_size * math.lcm(*sizes)
            fitting = ""
            if multiple <= MOST:
                near = max(1, round(step / multiple)) * multiple
                fitting = f"set train.global_batch_size to a multiple of {multiple}, as {near}, or "
            listed = ", ".join(uneven[:SHOWN_SIZES]) + ", …" * (len(uneven) > SHOWN_SIZES)
            raise ValueError(
                f"{bounds}: a step of {step} examples does not divide by train_batch_size "
                f"{self.train_batch_size} x {listed} workers: {fitting}narrow the bounds"
            )
        if self.train.global_batch_size and "grad_accum_steps" in self.model_fields_set:
            raise ValueError(
                f"{bounds}: with train.global_batch_size {self.train.global_batch_size}, "
                "grad_accum_steps follows from the number of workers: leave it unset"
            )
        return self

    @property
    def accumulation_steps(self) -> int:
        """`grad_accum_steps`, or the number that `train.global_batch_size` leads to."""
        if self.train.global_batch_size is None:
            return self.grad_accum_steps
        return self.train.global_batch_size // (self.train_batch_size * self.scaling.max_workers)

    @property
    def batching(self) -> Batching:
        """Return the sizes by which examples become optimizer steps."""
        size = self.train.global_batch_size
        if size is None:
            size = self.train_batch_size * self.grad_accum_steps * self.scaling.max_workers
        return Batching(
            global_batch_size=size,
            train_batch_size=self.train_batch_size,
            examples_per_row=choose_examples_per_row(self.rows.examples_per_row, size),
            row_length=self.rows.row_length,
            num_epochs=self.num_epochs,
            max_steps=self.train.max_steps,
            seed=self.seed,
        )

    def batching_of(self, databases: Iterable[str]) -> Batching:
        """Return `batching` for training examples on these databases."""
        batching = self.batching
        if self.rows.examples_per_row != "auto" or len(set(databases)) != 1:
            return batching
        shared = examples_per_row_of_one_database(
            batching.global_batch_size, self.scaling.max_workers
        )
        return replace(batching, examples_per_row=shared)

    @property
    def eval_every(self) -> int:
        """The optimizer steps between two evaluations of checkpoints."""
        return self.evaluate.eval_steps or self.save_steps

    def is_eval_step(self, step: int, examples: int) -> bool:
        """Say whether a checkpoint is measured: at every `eval_steps`, and at the run's last step.

        `examples` is the number of training examples.
        """
        return step % self.eval_every == 0 or step >= self.batching.steps(examples)

    @property
    def publishes(self) -> bool:
        """Say whether a training run pushes anything to the Hub."""
        return self.publish or self.hub.push_checkpoints != "none"

    def public(self) -> dict[str, Any]:
        """Return all settings as plain JSON values, without tokens: for config.json, MLflow and
        workers.

        Leaves out settings for one command only, and grad_accum_steps if `train.global_batch_size`
        decides it. So the run can go on with another number of workers.
        """
        settings = super().public()
        settings["tracking"]["uri"] = mask_password(settings["tracking"]["uri"])
        del settings["hub"]["force"]
        if self.train.global_batch_size is not None:
            del settings["grad_accum_steps"]
        return settings

    def for_workers(self) -> dict[str, Any]:
        """Return `public()` with absolute local paths, because Ray changes a worker's folder."""
        names = Config.model_fields
        settings = {name: value for name, value in self.public().items() if name in names}
        settings |= {"output_dir": str(absolute(self.output_dir)), "cache_dir": str(self.cache)}
        root = self.scaling.storage_path
        if root and "://" not in root:
            settings["scaling"]["storage_path"] = str(absolute(root))
        return settings

    def identity(self) -> str:
        """Return 12 hex digits that change when a setting that shapes the adapter changes."""
        settings = self.model_dump(mode="json", include=IDENTITY)
        settings["prompt"] = self.prompt.of_training()
        settings["train"]["global_batch_size"] = self.batching.global_batch_size
        if self.prompt.thinking == "off":  # runs of versions that knew no thinking go on
            settings["prompt"].pop("thinking")
        settings["data"].pop("databases")  # the same databases may lie elsewhere on another machine
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
