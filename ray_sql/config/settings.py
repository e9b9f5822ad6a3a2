"""The settings tree: each setting once, with its default, its allowed values, and the sentence that documents it.

Flat names are those of the original project's command line; sections use the words of the library that receives them.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from pydantic import Field, SecretStr, field_serializer, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from ray_sql.config.sections import (
    DataSection,
    EvaluateSection,
    HubSection,
    LoraSection,
    PromptSection,
    QuantizationSection,
    RowsSection,
    ScalingSection,
    TrackingSection,
    TrainSection,
    TuneSection,
)
from ray_sql.config.urls import absolute, passwordless, without_password
from ray_sql.config.validate import build, merge, nested
from ray_sql.tasks import TASKS, TaskName

IDENTITY = {
    "model_name",
    "task_type",
    "dataset_id",
    "seed",
    "learning_rate",
    "num_epochs",
    "save_steps",
}
IDENTITY |= {"data", "prompt", "rows", "lora", "quantization", "train"}
"""Settings that shape the adapter; a run may be continued under other values of all the rest."""


class Config(BaseSettings):
    """Settings of a fine-tuning run."""

    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        protected_namespaces=(),
        allow_inf_nan=False,
    )

    config: tuple[str, ...] = ()
    """YAML (or JSON) files with settings, later ones over earlier ones, flags over all."""
    model_name: str
    """Base model: a Hub id, a folder, or `demo` for the small model the demo uses."""
    output_name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run and of its folder under output_dir."""
    task_type: TaskName
    """`sql` writes the query; `schema` names the tables and columns it needs."""
    read_token: SecretStr | None = None
    """Hub token for reading the model and the dataset; better given as HF_TOKEN in the environment."""
    write_token: SecretStr | None = None
    """Hub token for publishing; better given as HF_TOKEN in the environment."""
    dataset_id: str = "NESPED-GEN/spider_selector_schemaReduzido"
    """Questions: a folder in Spider's or BIRD's format, a JSONL file or a folder of them, a Hub dataset, or `demo`."""
    prev_checkpoint: str | None = None
    """Continue from this checkpoint: `checkpoint-1000` of this run, a path, or a URI."""
    seed: int = 14
    """Seed of everything random: split, order, adapter, dropout."""
    train_batch_size: int = Field(1, ge=1)
    """Most examples in a forward pass of a worker, in one row or several; a row that more examples share is a pass by itself."""
    eval_batch_size: int = Field(1, ge=1)
    """Whole prompts computed together when generating with beams, or with a model that cannot share a schema's computation."""
    grad_accum_steps: int = Field(8, ge=1)
    """A step averages over train_batch_size x grad_accum_steps x workers examples, however they are laid out in forward passes."""
    learning_rate: float = Field(1e-4, gt=0)
    """Peak learning rate."""
    num_epochs: float = Field(1, gt=0)
    """Passes over the training examples."""
    save_steps: int = Field(250, ge=1)
    """Save a checkpoint every so many optimizer steps."""
    split: tuple[str, ...] = ("dev",)
    """Splits whose examples are scored, e.g. `dev` or `seen,unseen`; never trained on."""
    output_dir: str = "out"
    """Folder of all runs."""
    cache_dir: str = "~/.cache/ray_sql"
    """Folder for what can be made again: tokenised rows, converted models, unpacked demo databases."""
    overwrite: bool = False
    """Start the run afresh, removing an earlier run of the same name."""
    publish: bool = False
    """Push the best adapter to the Hub once it is measured, with a model card made from what was measured."""
    dry_run: bool = False
    """Resolve the settings, show one rendered example, the length audit and the plan, and stop."""
    data: DataSection = DataSection()
    prompt: PromptSection = PromptSection()
    rows: RowsSection = RowsSection()
    lora: LoraSection = LoraSection()
    quantization: QuantizationSection = QuantizationSection()
    train: TrainSection = TrainSection()
    scaling: ScalingSection = ScalingSection()
    evaluate: EvaluateSection = EvaluateSection()
    tune: TuneSection = TuneSection()
    tracking: TrackingSection = TrackingSection()
    hub: HubSection = HubSection()

    @classmethod
    def settings_customise_sources(
        cls, settings_cls: Any, init_settings: PydanticBaseSettingsSource, *_: Any, **__: Any
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (
            init_settings,
        )  # `load` merges the sources itself, to be able to say which one a bad value came from

    @field_serializer("read_token", "write_token")
    def _hide(self, _: SecretStr | None) -> None:
        return None

    @model_validator(mode="after")
    def _check_example_values(self) -> Self:
        if self.prompt.example_values and self.prompt.serializer != "m_schema":
            raise ValueError(
                f"prompt.example_values is {self.prompt.example_values}, but prompt.serializer {self.prompt.serializer} "
                "writes none: use --prompt.serializer m_schema, or set it to 0"
            )
        return self

    def _executes_sql(self) -> bool:
        """Tell whether answers are SQL; settings of several tasks are checked once per task."""
        task = TASKS.get(self.task_type)
        return task is None or task.executes_sql

    @model_validator(mode="after")
    def _check_schema_form(self) -> Self:
        if not self._executes_sql() and self.prompt.schema_form != "full":
            raise ValueError(
                f"prompt.schema_form {self.prompt.schema_form} shows the answer of task_type {self.task_type} in its prompt: use full"
            )
        return self

    @model_validator(mode="after")
    def _check_beams(self) -> Self:
        beams = self.evaluate.num_beams
        if self.evaluate.first_executable and beams == 1:
            raise ValueError(
                "evaluate.first_executable chooses among beams, but evaluate.num_beams is 1: raise it, or leave it out"
            )
        if beams > 1 and self.evaluate.backend == "vllm":
            raise ValueError(
                f"evaluate.num_beams is {beams}, but evaluate.backend vllm answers greedily: use evaluate.backend transformers"
            )
        if self.evaluate.first_executable and not self._executes_sql():
            raise ValueError(
                f"evaluate.first_executable executes SQL, which task_type {self.task_type} does not write: leave it out"
            )
        return self

    @model_validator(mode="after")
    def _check_ves(self) -> Self:
        if self.evaluate.ves_iterations and (
            self.evaluate.semantics != "bird" or not self._executes_sql()
        ):
            raise ValueError(
                f"evaluate.ves_iterations {self.evaluate.ves_iterations} times right queries for BIRD's R-VES: use task_type sql "
                "and evaluate.semantics bird, or leave it out"
            )
        return self

    @model_validator(mode="after")
    def _check_gpu(self) -> Self:
        if self.scaling.use_gpu is False and (self.scaling.resources_per_worker or {}).get("GPU"):
            raise ValueError(
                "scaling.use_gpu is false, but scaling.resources_per_worker asks for a GPU: leave one of the two out"
            )
        return self

    @model_validator(mode="after")
    def _check_places(self) -> Self:
        places = {
            "scaling.storage_path": self.scaling.storage_path,
            "output_dir": self.output_dir,
            "prev_checkpoint": self.prev_checkpoint,
        }
        for name, place in places.items():
            if place != without_password(place):
                raise ValueError(
                    f"{name} {without_password(place)}: keys do not belong into an address, which is logged and saved; give them in the "
                    "environment (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY), or the nodes a role"
                )
        return self

    @model_validator(mode="after")
    def _check_eval_steps(self) -> Self:
        every = self.evaluate.eval_steps
        if every and every % self.save_steps:
            near = max(1, round(every / self.save_steps)) * self.save_steps
            raise ValueError(
                f"evaluate.eval_steps {every} is no multiple of save_steps {self.save_steps}, and only a checkpoint that is saved can be "
                f"the best: use {near}, or save_steps {math.gcd(every, self.save_steps)}"
            )
        return self

    @model_validator(mode="after")
    def _check_overwrite(self) -> Self:
        start = self.prev_checkpoint or ""
        own = "/" not in start or (
            absolute(start).is_relative_to(self.run_dir) and "://" not in self.run_dir
        )
        if self.overwrite and start and own:
            raise ValueError(
                f"overwrite removes the run that prev_checkpoint {start} belongs to: leave one of the two out"
            )
        return self

    @model_validator(mode="after")
    def _check_global_batch(self) -> Self:
        wanted, micro = (
            self.train.global_batch_size,
            self.train_batch_size * self.scaling.max_workers,
        )
        if wanted is None or self.scaling.elastic:
            return self
        if wanted % micro:
            raise ValueError(
                f"train.global_batch_size {wanted} does not divide by train_batch_size {self.train_batch_size} x "
                f"{self.scaling.max_workers} workers = {micro}: choose a multiple of {micro}"
            )
        if "grad_accum_steps" in self.model_fields_set and self.grad_accum_steps != wanted // micro:
            raise ValueError(
                f"train.global_batch_size {wanted} needs grad_accum_steps {wanted // micro}, but {self.grad_accum_steps} was "
                "given: leave one of the two unset"
            )
        return self

    @model_validator(mode="after")
    def _check_elastic_batch(self) -> Self:
        sizes = range(self.scaling.min_workers, self.scaling.max_workers + 1)
        odd = [str(size) for size in sizes if self.global_batch % (self.train_batch_size * size)]
        if self.scaling.elastic and odd:
            every = self.train_batch_size * math.lcm(*sizes)
            near = max(1, round(self.global_batch / every)) * every
            raise ValueError(
                f"scaling.num_workers {sizes[0]},{sizes[-1]}: a step of {self.global_batch} examples does not divide by "
                f"train_batch_size {self.train_batch_size} x {', '.join(odd)} workers: set train.global_batch_size to a multiple "
                f"of {every}, as {near}, or narrow the bounds"
            )
        if (
            self.scaling.elastic
            and self.train.global_batch_size
            and "grad_accum_steps" in self.model_fields_set
        ):
            raise ValueError(
                f"scaling.num_workers {sizes[0]},{sizes[-1]}: with train.global_batch_size {self.train.global_batch_size}, "
                "grad_accum_steps follows from the number of workers: leave it unset"
            )
        return self

    @property
    def accumulation(self) -> int:
        """How many times `train_batch_size` examples make each of `workers`' part of an optimizer step."""
        if self.train.global_batch_size is None:
            return self.grad_accum_steps
        return self.train.global_batch_size // (self.train_batch_size * self.scaling.max_workers)

    @property
    def global_batch(self) -> int:
        """Examples per optimizer step, with however many workers."""
        return (
            self.train.global_batch_size
            or self.train_batch_size * self.grad_accum_steps * self.scaling.max_workers
        )

    def steps_per_epoch(self, examples: int) -> int:
        """Optimizer steps of a pass over so many examples; a last, smaller one counts."""
        return math.ceil(examples / self.global_batch)

    def steps(self, examples: int) -> int:
        """Optimizer steps of a run over so many examples."""
        if self.train.max_steps > 0:
            return self.train.max_steps
        return max(1, math.ceil(self.steps_per_epoch(examples) * self.num_epochs))

    def measured(self, step: int, examples: int) -> bool:
        """Whether the checkpoint of a step is measured in a run over so many examples: at every `eval_steps`, and the last one."""
        return step % (self.evaluate.eval_steps or self.save_steps) == 0 or step >= self.steps(
            examples
        )

    @property
    def run_dir(self) -> str:
        """Absolute folder or URI of this run; absolute because Ray changes a worker's working directory."""
        root = self.scaling.storage_path or self.output_dir
        return (
            f"{root.rstrip('/')}/{self.output_name}"
            if "://" in root
            else str(absolute(root) / self.output_name)
        )

    @property
    def publishes(self) -> bool:
        """Whether a training run pushes anything to the Hub."""
        return self.publish or self.hub.push_checkpoints != "none"

    @property
    def cache(self) -> Path:
        """Absolute folder for what can be made again."""
        return absolute(self.cache_dir)

    def public(self) -> dict[str, Any]:
        """All settings as plain JSON values, without the tokens: what config.json, MLflow and workers receive.

        What `train.global_batch_size` decides is left out, so that they can be given back with another number of workers.
        """
        # said to one command; given back, they would delete, not run, or publish
        once = {"config", "dry_run", "overwrite", "publish"}
        settings = self.model_dump(mode="json", exclude={"read_token", "write_token", *once})
        # what is given back must not log in with a mask for a password: without one, libpq finds it where it belongs
        settings["data"]["databases"] = passwordless(settings["data"]["databases"])
        settings["tracking"]["uri"] = without_password(settings["tracking"]["uri"])
        del settings["hub"]["force"]  # as above
        if self.train.global_batch_size is not None:
            del settings["grad_accum_steps"]
        return settings

    def for_workers(self) -> dict[str, Any]:
        """`public()` of a run as a process in another folder needs it: Ray changes a worker's, so local paths are absolute."""
        settings = {
            name: value for name, value in self.public().items() if name in Config.model_fields
        }
        settings |= {"output_dir": str(absolute(self.output_dir)), "cache_dir": str(self.cache)}
        root = self.scaling.storage_path
        if root and "://" not in root:
            settings["scaling"]["storage_path"] = str(absolute(root))
        return settings

    def identity(self) -> str:
        """12 hex digits that change when a setting that shapes the adapter changes."""
        settings = self.model_dump(mode="json", include=IDENTITY)
        settings["train"]["global_batch_size"] = self.global_batch
        settings["data"].pop("databases")  # the same databases may lie elsewhere on another machine
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]

    def setting(self, name: str) -> Any:
        """The value of a dotted setting, e.g. `lora.r`."""
        value: Any = self
        for part in name.split("."):
            value = getattr(value, part)
        return value

    def changed(self, changes: Mapping[str, Any]) -> Self:
        """A copy with dotted settings changed, e.g. `{"lora.r": 16}`, validated like any other; tokens stay."""
        given = nested(
            self.model_dump(
                mode="python", exclude_unset=True, exclude={"read_token", "write_token"}
            )
        )
        given |= {
            name: token for name in ("read_token", "write_token") if (token := getattr(self, name))
        }
        return build(type(self), merge(given, nested(changes)), {"changes": nested(changes)})
