"""The settings tree: each setting once, with its default, its allowed values, and the sentence that documents it.

Flat names are those of the original project's command line; sections use the words of the library that receives them.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    ValidatorFunctionWrapHandler,
    field_serializer,
    field_validator,
    model_validator,
)
from pydantic_settings import BaseSettings, NoDecode, PydanticBaseSettingsSource, SettingsConfigDict

from ray_sql.config.road import build, merge, nested

Task = Literal["sql", "schema"]

IDENTITY = {"model_name", "task_type", "dataset_id", "seed", "learning_rate", "num_epochs", "save_steps"}
IDENTITY |= {"data", "prompt", "rows", "lora", "quantization", "train"}
"""Settings that shape the adapter; a run may be continued under other values of all the rest."""


POPULATIONS = {"pbt", "pb2", "pbt_replay", "hyperband", "bohb", "hb_bohb", "resource_changing"}
"""Schedulers of Ray Tune that need trials' checkpoints in Tune's own hands."""


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


class DataSection(Section):
    databases: str | None = None
    """Folder that holds `<db_id>/<db_id>.sqlite`, or a SQLAlchemy URL (with `{db_id}` in it for several); by default the dataset's own.
    SQL is executed on SQLite and PostgreSQL, whose password is best given as PGPASSWORD or in ~/.pgpass."""
    columns: dict[str, str] = {}
    """Our field = the dataset's column, where its names differ, e.g. `{question: pergunta, query: sql}`."""
    split_by: Literal["database", "question"] | None = None
    """What is set aside as a whole: a database with all its questions, or a question; by default databases, where they are small enough."""
    validation_fraction: float = Field(0.05, ge=0, lt=1)
    """Share of the training examples set aside to choose the best checkpoint."""
    test_fraction: float = Field(0.1, ge=0, lt=1)
    """Share of the examples set aside to be scored where the dataset is one file without splits."""
    limit: int | None = Field(None, ge=1)
    """Train on at most this many examples, drawn with the seed."""


class PromptSection(Section):
    serializer: Literal["ddl", "compact", "m_schema"] = "ddl"
    """How a schema is written: CREATE TABLE statements, one line a table, or M-Schema with example values."""
    schema_form: Literal["full", "tables", "reduced"] = "full"
    """Which part of the schema is shown: all of it, the tables the gold SQL needs, or those tables' needed columns and keys."""
    example_values: int = Field(0, ge=0, le=20)
    """Example values per column, read from the database; only `m_schema` writes them."""


class RowsSection(Section):
    max_length: int = Field(2048, ge=16)
    """Longest row in tokens, prompt and answer together; nothing is ever cut silently."""
    too_long: Literal["error", "trim_schema", "drop"] = "error"
    """What to do with a longer training example: refuse, leave out tables its SQL does not use, or drop it and say so."""
    examples_per_row: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Questions on one database that share its schema in one row, at the same loss; `auto` is 8 where the model allows it, 1 is off."""
    row_length: int = Field(4096, ge=16)
    """Longest shared row in tokens; what does not fit starts another."""


class LoraSection(Section):
    r: int = Field(64, ge=1)
    """Rank of the update matrices."""
    lora_alpha: float = Field(128, gt=0)
    """Scale: the update is multiplied by lora_alpha / r."""
    lora_dropout: float = Field(0.1, ge=0, lt=1)
    """Dropout on the adapter's input while training."""
    target_modules: str | list[str] = "all-linear"
    """Modules that get an adapter: names, a regular expression, or `all-linear`."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Which biases are trained."""
    use_rslora: bool = False
    """Scale by lora_alpha / sqrt(r) instead (rank-stabilised LoRA)."""
    use_dora: bool = False
    """Decompose weights into magnitude and direction (DoRA); slower."""


class QuantizationSection(Section):
    load_in_4bit: bool = True
    """Keep the frozen base model in 4 bits; off trains LoRA over the unquantised model."""
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"
    """4-bit data type."""
    bnb_4bit_use_double_quant: bool = False
    """Quantise the quantisation constants too: 0.4 bit less per weight."""


class TrainSection(Section):
    max_steps: int = Field(-1, ge=-1)
    """Stop after this many optimizer steps; -1 follows num_epochs."""
    lr_scheduler_type: Literal["cosine", "linear", "constant", "constant_with_warmup"] = "cosine"
    """Course of the learning rate."""
    warmup_ratio: float = Field(0.03, ge=0, lt=1)
    """Share of the steps in which the learning rate rises from 0."""
    weight_decay: float = Field(0.001, ge=0)
    """Decay of the adapter's weights."""
    max_grad_norm: float = Field(0.3, gt=0)
    """Gradients are scaled down to this norm."""
    optim: str | None = None
    """Optimizer by transformers' name; by default `paged_adamw_8bit` on a GPU and `adamw_torch_fused` on a CPU."""
    bf16: bool | None = None
    """Compute in bfloat16; by default where the hardware has units for it."""
    gradient_checkpointing: bool | None = None
    """Recompute activations in the backward pass to save memory; by default on a GPU only."""
    logging_steps: int = Field(10, ge=1)
    """Log loss, learning rate and speed every so many steps."""
    global_batch_size: int | None = Field(None, ge=1)
    """Examples per optimizer step, whatever the number of workers; decides grad_accum_steps, which must then be left unset."""

    @field_validator("max_steps")
    @classmethod
    def _not_none(cls, steps: int) -> int:
        if steps == 0:
            raise ValueError("0 steps train nothing; -1 follows num_epochs")
        return steps


class ScalingSection(Section):
    num_workers: Annotated[int | tuple[int, int], NoDecode] = 1
    """Training processes, one GPU each where there are GPUs; 0 trains inside this process without starting Ray. `1,4` (in YAML
    `[1, 4]`) trains on as many as the cluster has at the time, within these bounds."""
    elastic_resize_monitor_interval_s: float = Field(60.0, gt=0)
    """Between two such bounds: seconds between two looks at whether the cluster has room for more workers."""
    use_gpu: bool | None = None
    """Whether each worker takes a GPU; by default if the cluster has any, or its autoscaler may add some."""
    resources_per_worker: dict[str, float] | None = None
    """Ray resources of one worker, e.g. `{CPU: 4, GPU: 1}`."""
    max_failures: int = Field(2, ge=-1)
    """Restarts from the last checkpoint after a worker or node is lost; -1 is unlimited."""
    storage_path: str | None = None
    """Shared folder or URI (`s3://…`) where runs live on a cluster; by default output_dir on this machine."""

    @field_validator("num_workers", mode="wrap")
    @classmethod
    def _read_bounds(cls, given: Any, validated: ValidatorFunctionWrapHandler) -> int | tuple[int, int]:
        """A number, or two: `1,4` of a command line, a list in YAML and JSON."""
        words = given.split(",") if isinstance(given, str) and "," in given else given
        try:
            bounds: int | tuple[int, int] = validated(words)
        except ValidationError:
            bounds = -1
        if bounds < 0 if isinstance(bounds, int) else not 1 <= bounds[0] < bounds[1]:
            raise ValueError(
                "input should be greater than or equal to 0, or two bounds from 1 up, the smaller first: 1,4"
            )
        return bounds


class EvaluateSection(Section):
    semantics: Literal["spider", "bird", "strict"] = "spider"
    """When two results are equal: Spider's test-suite rule, BIRD's set of rows, or the same list of rows."""
    keep_distinct: bool = False
    """Under `spider`: compare with DISTINCT left in (the official evaluator strips it by default)."""
    max_new_tokens: int = Field(256, ge=1)
    """Longest generated answer in tokens."""
    max_num_seqs: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Questions answered together over the schemas they share; `auto` is up to 64, as many as memory allows. In float32
    answers do not change; in bfloat16 near-ties may."""
    num_beams: int = Field(1, ge=1)
    """Beams of the search for an answer to the scored questions, 1 is greedy; checkpoints are always chosen by greedy answers."""
    first_executable: bool = False
    """With beams: take the first candidate, best first, that runs on the question's database, instead of the first."""
    backend: Literal["transformers", "vllm"] = "transformers"
    """What answers the scored questions; `vllm` needs a GPU and `pip install -e '.[vllm]'`."""
    ves_iterations: int = Field(0, ge=0)
    """Under `bird`: time every right prediction against its gold so many times (officially 100) for R-VES; needs an idle machine."""
    timeout: float = Field(30.0, gt=0)
    """Seconds one query may run before it is stopped and counted as `timeout`."""
    limit: int | None = Field(None, ge=1)
    """Score at most this many examples of each split, drawn with the seed."""
    processes: int | None = Field(None, ge=1)
    """Processes that execute SQL; by default one per core, at most 8."""
    select_examples: int = Field(64, ge=0)
    """Validation examples answered at evaluate.eval_steps to choose the best checkpoint; 0 keeps the last one."""
    eval_steps: int | None = Field(None, ge=1)
    """Answer them every so many optimizer steps and at the end, a multiple of save_steps; by default at every save."""
    baseline: bool = True
    """Measure the base model without the adapter too, on the same examples."""


class TuneSection(Section):
    num_samples: int = Field(16, ge=1)
    """Trials of a study; the first has the settings as they are, so that a sweep can only win."""
    space: dict[str, dict[str, list[Any]]] = {
        "learning_rate": {"loguniform": [2e-5, 2e-3]},
        "lora.r": {"choice": [8, 16, 32, 64, 128]},
    }
    """Setting = what to draw it from: `choice` of values, or `uniform`, `loguniform`, `randint`, `lograndint` between two bounds (both
    included). With `lora.r` goes `lora.lora_alpha`, at the ratio the settings have (2), unless it is an axis of its own."""
    objective: Literal["answers", "eval_loss"] = "answers"
    """What trials, and the checkpoints of any run, are chosen by: execution accuracy (sql) or strict recall, then F1 (schema) of answers to
    the validation questions, or the loss on them, without asking them."""
    scheduler: str = "asha"
    """`asha` stops trials that fall behind, `fifo` trains all to the end."""
    grace_period: int | None = Field(None, ge=1)
    """Optimizer steps before a trial may be stopped; by default up to the first measurement."""
    reduction_factor: float = Field(3, gt=1)
    """Of so many trials that reach a rung one goes on, and each rung is so many times as many steps as the one before."""
    max_concurrent_trials: int | None = Field(None, ge=1)
    """Trials at a time; by default as many as the cluster's resources hold."""

    @field_validator("space")
    @classmethod
    def _read_exponents(cls, space: dict[str, dict[str, list[Any]]]) -> dict[str, dict[str, list[Any]]]:
        """Numbers that YAML reads as text, as it does `5e-5`."""
        return {
            name: {kind: [_number(value) for value in values] for kind, values in axis.items()}
            for name, axis in space.items()
        }

    @field_validator("scheduler")
    @classmethod
    def _check_scheduler(cls, name: str) -> str:
        if name.lower() in POPULATIONS:
            raise ValueError(
                f"{name} copies weights between trials or pauses them, and over Ray Train Tune holds no trial's checkpoint: it would "
                "run and exploit nothing. Use asha or fifo"
            )
        if name not in ("asha", "fifo"):
            raise ValueError("input should be 'asha' or 'fifo'")
        return name


class TrackingSection(Section):
    enabled: bool = True
    """Record the run in MLflow."""
    uri: str | None = None
    """MLflow tracking server or database; by default `sqlite:///mlflow.db` in the folder the job started in."""
    experiment: str = "ray_sql"
    """MLflow experiment that runs are filed under."""


class HubSection(Section):
    repo_id: str | None = Field(None, pattern=r"^([\w.-]+/)?[\w.-]+$")
    """Repository that is pushed to, `owner/name`; by default output_name under the token's user."""
    base_model: str | None = Field(None, pattern=r"^([\w.-]+/)?[\w.-]+$")
    """The base model's name on the Hub, needed where model_name is a folder: a published adapter names its base."""
    private: bool = True
    """Create the repository private; one that exists stays as it is."""
    license: str | None = None
    """Licence in the Hub's words, e.g. `apache-2.0`; by default the one that the Hub has for the base model."""
    push_checkpoints: Literal["none", "best", "all"] = "none"
    """Push checkpoints to the branch `checkpoints` while training goes on: each that is the best so far, or all."""
    merge: bool = False
    """Also merge the adapter into the unquantised base in bfloat16 (`merged/`), measure that, and push it to `<repo_id>-merged`."""
    force: bool = False
    """Publish an adapter that was not shown to beat its base model, too."""


class Config(BaseSettings):
    """Settings of a fine-tuning run."""

    model_config = SettingsConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=(), allow_inf_nan=False
    )

    config: tuple[str, ...] = ()
    """YAML (or JSON) files with settings, later ones over earlier ones, flags over all."""
    model_name: str
    """Base model: a Hub id, a folder, or `demo` for the small model the demo uses."""
    output_name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run and of its folder under output_dir."""
    task_type: Task
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
    """Examples per forward pass and worker where they share no row; a shared row is a pass of its own (rows.examples_per_row)."""
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
        return (init_settings,)  # `load` merges the sources itself, to be able to say which one a bad value came from

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

    @model_validator(mode="after")
    def _check_schema_form(self) -> Self:
        if self.task_type == "schema" and self.prompt.schema_form != "full":
            raise ValueError(
                f"prompt.schema_form {self.prompt.schema_form} shows the answer of task_type schema in its prompt: use full"
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
        if self.evaluate.first_executable and self.task_type == "schema":
            raise ValueError(
                "evaluate.first_executable executes SQL, which task_type schema does not write: leave it out"
            )
        return self

    @model_validator(mode="after")
    def _check_ves(self) -> Self:
        if self.evaluate.ves_iterations and (self.evaluate.semantics != "bird" or self.task_type == "schema"):
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
        own = "/" not in start or (absolute(start).is_relative_to(self.run_dir) and "://" not in self.run_dir)
        if self.overwrite and start and own:
            raise ValueError(
                f"overwrite removes the run that prev_checkpoint {start} belongs to: leave one of the two out"
            )
        return self

    @model_validator(mode="after")
    def _check_global_batch(self) -> Self:
        wanted, micro = self.train.global_batch_size, self.train_batch_size * self.workers
        if wanted is None or self.elastic:
            return self
        if wanted % micro:
            raise ValueError(
                f"train.global_batch_size {wanted} does not divide by train_batch_size {self.train_batch_size} x "
                f"{self.workers} workers = {micro}: choose a multiple of {micro}"
            )
        if "grad_accum_steps" in self.model_fields_set and self.grad_accum_steps != wanted // micro:
            raise ValueError(
                f"train.global_batch_size {wanted} needs grad_accum_steps {wanted // micro}, but {self.grad_accum_steps} was "
                "given: leave one of the two unset"
            )
        return self

    @model_validator(mode="after")
    def _check_elastic_batch(self) -> Self:
        sizes = range(self.fewest_workers, self.workers + 1)
        odd = [str(size) for size in sizes if self.global_batch % (self.train_batch_size * size)]
        if self.elastic and odd:
            every = self.train_batch_size * math.lcm(*sizes)
            near = max(1, round(self.global_batch / every)) * every
            raise ValueError(
                f"scaling.num_workers {sizes[0]},{sizes[-1]}: a step of {self.global_batch} examples does not divide by "
                f"train_batch_size {self.train_batch_size} x {', '.join(odd)} workers: set train.global_batch_size to a multiple "
                f"of {every}, as {near}, or narrow the bounds"
            )
        if self.elastic and self.train.global_batch_size and "grad_accum_steps" in self.model_fields_set:
            raise ValueError(
                f"scaling.num_workers {sizes[0]},{sizes[-1]}: with train.global_batch_size {self.train.global_batch_size}, "
                "grad_accum_steps follows from the number of workers: leave it unset"
            )
        return self

    @property
    def elastic(self) -> bool:
        """Whether the number of workers may change during the run."""
        return isinstance(self.scaling.num_workers, tuple)

    @property
    def workers(self) -> int:
        """Training processes, counting this one when Ray is not used; of an elastic run, the most."""
        bounds = self.scaling.num_workers
        return bounds[1] if isinstance(bounds, tuple) else max(1, bounds)

    @property
    def fewest_workers(self) -> int:
        """With how many workers a run can train; `workers`, unless it is elastic."""
        bounds = self.scaling.num_workers
        return bounds[0] if isinstance(bounds, tuple) else self.workers

    @property
    def accumulation(self) -> int:
        """How many times `train_batch_size` examples make each of `workers`' part of an optimizer step."""
        if self.train.global_batch_size is None:
            return self.grad_accum_steps
        return self.train.global_batch_size // (self.train_batch_size * self.workers)

    @property
    def global_batch(self) -> int:
        """Examples per optimizer step, with however many workers."""
        return self.train.global_batch_size or self.train_batch_size * self.grad_accum_steps * self.workers

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
        return step % (self.evaluate.eval_steps or self.save_steps) == 0 or step >= self.steps(examples)

    @property
    def run_dir(self) -> str:
        """Absolute folder or URI of this run; absolute because Ray changes a worker's working directory."""
        root = self.scaling.storage_path or self.output_dir
        return f"{root.rstrip('/')}/{self.output_name}" if "://" in root else str(absolute(root) / self.output_name)

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
        settings = {name: value for name, value in self.public().items() if name in Config.model_fields}
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
        given = nested(self.model_dump(mode="python", exclude_unset=True, exclude={"read_token", "write_token"}))
        given |= {name: token for name in ("read_token", "write_token") if (token := getattr(self, name))}
        return build(type(self), merge(given, nested(changes)), {"changes": nested(changes)})


class EvaluateConfig(Config):
    """Settings of an evaluation; a model is needed only where there is no predictions file."""

    model_name: str = Field("", description=Config.model_fields["model_name"].description)
    task_type: Task = Field("sql", description=Config.model_fields["task_type"].description)
    predictions_file: str | None = None
    """Score this file instead of asking a model: `predictions.jsonl` (id, predicted), or one SQL query a line in the split's order."""
    adapter: str | None = None
    """Folder or URI of the adapter to measure beside its base model, e.g. `out/demo/adapter`."""
    compare: tuple[str, ...] = ()
    """Two files of judged predictions (`predictions.jsonl`) to compare question by question; nothing is asked or executed."""

    @model_validator(mode="before")
    @classmethod
    def _name_a_comparison(cls, values: Any) -> Any:
        return {"output_name": "comparison"} | values if isinstance(values, dict) and values.get("compare") else values

    @model_validator(mode="after")
    def _check_source(self) -> Self:
        if not self.predictions_file and not self.model_name and not self.compare:
            raise ValueError(
                "nothing to evaluate: give --predictions_file, or --model_name (and --adapter), or --compare A B"
            )
        return self

    @model_validator(mode="after")
    def _check_compare(self) -> Self:
        if len(self.compare) not in (0, 2):
            raise ValueError(f"--compare takes two files of judged predictions, {len(self.compare)} given")
        for name in ("predictions_file", "adapter"):
            if self.compare and getattr(self, name):
                raise ValueError(f"--compare reads what was judged already: leave --{name} out, or evaluate it first")
        return self


class PublishConfig(Config):
    """Settings of a publication: which run, and how it goes to the Hub; the rest is read from the run's own folder."""

    model_name: str = Field("", description=Config.model_fields["model_name"].description)
    task_type: Task = Field("sql", description=Config.model_fields["task_type"].description)


class TasksConfig(Config):
    """Settings for one task or several."""

    task_type: tuple[Task, ...] = Field(min_length=1)  # type: ignore[assignment]
    """`sql`, `schema`, or both (`sql,schema`): a study each, one after the other."""

    @field_validator("task_type", mode="before")
    @classmethod
    def _split_tasks(cls, given: Any) -> Any:
        listed = given.split(",") if isinstance(given, str) else given
        return list(dict.fromkeys(listed)) if isinstance(listed, list | tuple) else listed

    def studies(self) -> list[Config]:
        """The settings of each task's study; where there are several, each has a folder of its own, `<output_name>-<task>`, and a
        repository, `<hub.repo_id>-<task>`."""
        own = set(type(self).model_fields) - set(Config.model_fields)
        given = self.model_dump(mode="python", exclude_unset=True, exclude={"read_token", "write_token", *own})
        given |= {name: token for name in ("read_token", "write_token") if (token := getattr(self, name))}
        return [
            build(Config, merge(given, self._named(task)), {"changes": {"task_type": task}}) for task in self.task_type
        ]

    def _named(self, task: Task) -> dict[str, Any]:
        if len(self.task_type) < 2:
            return {"task_type": task}
        named: dict[str, Any] = {"task_type": task, "output_name": f"{self.output_name}-{task}"}
        return named | ({"hub": {"repo_id": f"{self.hub.repo_id}-{task}"}} if self.hub.repo_id else {})


class CheckConfig(TasksConfig):
    """Settings of a run or of a sweep: both can be checked."""

    replay: bool = False
    """Check nothing: send MLflow what a run or a sweep that has ended kept while no server answered."""


class SweepConfig(TasksConfig):
    """Settings of a sweep: those of a run, which its trials change, for one task or several."""

    resume: bool = False
    """Go on with a study that was cut off; without one there, begin it."""

    @model_validator(mode="after")
    def _check_resume(self) -> Self:
        if self.resume and self.overwrite:
            raise ValueError("resume goes on with the study that overwrite removes: leave one of the two out")
        return self

    @model_validator(mode="after")
    def _check_fixed_workers(self) -> Self:
        if self.elastic:
            raise ValueError(
                f"scaling.num_workers {self.fewest_workers},{self.workers}: a sweep counts how many trials fit by what one takes, so "
                "its trials have a fixed number of workers: give one"
            )
        return self

    @model_validator(mode="after")
    def _check_push_checkpoints(self) -> Self:
        if self.hub.push_checkpoints != "none":
            raise ValueError(
                f"hub.push_checkpoints {self.hub.push_checkpoints}: a sweep pushes its best adapter only; leave it out"
            )
        return self


def _number(value: Any) -> Any:
    exponent = isinstance(value, str) and re.fullmatch(r"[+-]?\d+\.?\d*[eE][+-]?\d+", value)
    return float(value) if exponent else value


def without_password(uri: str | None) -> str | None:
    """A URI with `***` in place of its password: `postgresql://user:***@host/db`."""
    masked = uri and re.sub(r"(://[^:/@]*):[^@\s]*@", r"\1:***@", uri)
    return masked and re.sub(r"([?&]password=)[^&\s]*", r"\1***", masked)


def passwordless(uri: str | None) -> str | None:
    """A URI as it may be written into a file and still be opened: without its password, which PGPASSWORD or ~/.pgpass then gives."""
    bare = uri and re.sub(r"(://[^:/@]*):[^@]*@", r"\1@", uri)
    return bare and re.sub(r"(?<=[?&])password=[^&]*&?", "", bare).rstrip("?&")


def absolute(path: str | Path) -> Path:
    """The absolute form of a path, with `~` expanded; symbolic links stay as the user wrote them."""
    return Path(os.path.abspath(os.path.expanduser(path)))
