"""The sections of the settings, in the words of the library that receives each."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    field_validator,
)
from pydantic_settings import NoDecode

POPULATIONS = {"pbt", "pb2", "pbt_replay", "hyperband", "bohb", "hb_bohb", "resource_changing"}
"""Schedulers of Ray Tune that need trials' checkpoints in Tune's own hands."""


class Section(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )


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
    """Questions on one database that share its schema in one row, at the same loss; 1 is off. `auto` is no more than an optimizer step
    then has rows, so that the step mixes databases: 2 of a step of 8, 4 of 16 or 32, 8 of 64; 1 where the model allows no more."""
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

    @property
    def elastic(self) -> bool:
        """Tell whether the number of workers may change during the run."""
        return isinstance(self.num_workers, tuple)

    @property
    def max_workers(self) -> int:
        """Training processes, counting this one where Ray is not used; the most of an elastic run."""
        return (
            self.num_workers[1] if isinstance(self.num_workers, tuple) else max(1, self.num_workers)
        )

    @property
    def min_workers(self) -> int:
        """Training processes that a run needs: `max_workers`, or fewer for an elastic run."""
        return self.num_workers[0] if isinstance(self.num_workers, tuple) else self.max_workers

    @field_validator("num_workers", mode="wrap")
    @classmethod
    def _read_bounds(
        cls, given: Any, validated: ValidatorFunctionWrapHandler
    ) -> int | tuple[int, int]:
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
    def _read_exponents(
        cls, space: dict[str, dict[str, list[Any]]]
    ) -> dict[str, dict[str, list[Any]]]:
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


def _number(value: Any) -> Any:
    exponent = isinstance(value, str) and re.fullmatch(r"[+-]?\d+\.?\d*[eE][+-]?\d+", value)
    return float(value) if exponent else value
