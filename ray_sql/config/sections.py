"""The sections of the settings, in the words of the library that receives each."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    field_validator,
)
from pydantic_settings import NoDecode

POPULATION_SCHEDULERS = {
    "pbt",
    "pb2",
    "pbt_replay",
    "hyperband",
    "bohb",
    "hb_bohb",
    "resource_changing",
}
"""Schedulers of Ray Tune that need trials' checkpoints in Tune's own hands."""


MOST = 10**9
"""The largest whole number of a setting that only compares: a limit, an interval in steps."""
MOST_WORKERS = 10_000
"""More processes than any cluster runs; a list with one entry each stays small."""
LONGEST = 30 * 24 * 3600.0
"""Seconds, a month: clocks of the libraries take no more than some 10^9."""
Many = Annotated[int, Field(ge=1, le=MOST)]

NO_LINKS, GOLD = "none", "gold"
"""Values of `prompt.links` besides the place of a linker."""
NO_VALUES = "none"
"""The value of `prompt.values` for prompts without cells."""
LinkedForm = Literal["tables", "reduced"]
"""The parts of a schema that links can leave: whole tables, or columns of them."""


class Section(BaseModel):
    """Hold settings that belong together; frozen, without unknown names."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )


class QuestionsSection(Section):
    """Describe the questions and their databases."""

    databases: str | None = None
    """Find databases here: a file, a folder of files or of folders (`<db_id>/<db_id>.sqlite`), or
    an SQLAlchemy URL (`{db_id}` names one of several). By default the dataset brings its own. SQL
    is executed on SQLite, DuckDB, PostgreSQL and MySQL. Give PostgreSQL's password as PGPASSWORD
    or in ~/.pgpass, and MySQL's as MYSQL_PWD."""
    columns: dict[str, str] = {}
    """Map our fields to the dataset's columns where names differ, e.g. `{question: pergunta, query:
    sql}`."""
    bad_rows: Literal["leave_out", "error", "keep"] = "leave_out"
    """Leave out rows whose question or gold SQL is empty or no text, and training examples whose
    gold does not run. Or refuse the dataset, or keep all that are not empty."""
    split_by: Literal["database", "question"] | None = None
    """Set aside whole databases, or single questions. By default databases, where they are small
    enough."""
    test_fraction: float = Field(0.1, ge=0, lt=1)
    """Set aside this share of the examples for scoring, if the dataset is one file without
    splits."""


class DataSection(QuestionsSection):
    """Describe the questions, their databases, and the examples to train on."""

    validation_fraction: float = Field(0.05, ge=0, lt=1)
    """Set aside this share of the training examples to choose the best checkpoint."""
    limit: Many | None = None
    """Train on at most this many examples, drawn with the seed."""


class PromptSection(Section):
    """Choose how a prompt shows the schema."""

    serializer: Literal["ddl", "compact", "m_schema"] = "ddl"
    """Write a schema as CREATE TABLE statements, as one line a table, or as M-Schema with example
    values."""
    schema_form: Literal["full", "tables", "reduced", "noisy"] = "full"
    """Train on all of the schema, on the tables the gold SQL needs, or on those tables' needed
    columns and keys. `noisy` is the last, among names that a linker would add."""
    links: str | None = None
    """Make the schemas of scored questions smaller by these links: `none`, `gold`, a linker's
    predictions, or its adapter, which is asked first. By default gold's for `tables` and `reduced`.
    Scores by gold links are called oracle."""
    spare_tables: float = Field(0.1, ge=0, le=1)
    """Show each table that is not needed by this chance, under `noisy`: a linker's score
    `spare_tables`."""
    spare_columns: float = Field(0.1, ge=0, le=1)
    """Show each column of a shown table that is not needed by this chance, under `noisy`: a
    linker's score `spare_columns`."""
    full_share: float = Field(0.2, ge=0, le=1)
    """Show this share of the training examples the full schema, under `noisy`."""
    thinking: Literal["off", "on"] = "off"
    """Let a thinking model think before it answers, where its chat template can switch that. `on`
    needs a larger `evaluate.max_new_tokens`, for thoughts are tokens too."""
    example_values: int = Field(0, ge=0, le=20)
    """Show this many example values per column, read from the database. Only `m_schema` writes
    them."""
    description_chars: int = Field(0, ge=0, le=10**6)
    """Say beside tables and columns what they mean, in at most this many characters a database. It
    is taken from `descriptions.yaml`, BIRD's CSV files, or the server's comments."""
    values: Literal["none", "matched"] = "none"
    """Show the cells of the database that a question names, behind the schema. They are found in
    any case, inflected, misspelt, and as numbers and dates."""
    values_top: int = Field(5, ge=1, le=50)
    """Show at most this many of them, under `matched`."""
    values_without: tuple[str, ...] = ()
    """Show no cells of these columns, under `matched`: `table.column`, `table`, or `*.column`."""

    @property
    def asked_links(self) -> str:
        """Whose links make the schemas of scored questions smaller."""
        return self.links or (GOLD if self.schema_form in ("tables", "reduced") else NO_LINKS)

    @property
    def links_kind(self) -> Literal["none", "gold", "predicted"]:
        """The kind of these links, without the place of a linker."""
        match self.asked_links:
            case "none" | "gold" as kind:
                return kind
            case _:
                return "predicted"

    def of_training(self) -> dict[str, Any]:
        """Return the settings that shape training examples, as plain values."""
        noise = {"spare_tables", "spare_columns", "full_share"}
        unused = {"links"} if self.schema_form == "noisy" else {"links", *noise}
        if self.values == NO_VALUES:
            unused |= {"values", "values_top", "values_without"}
        if not self.description_chars:
            unused.add("description_chars")
        return self.model_dump(exclude=unused)


class LinkingSection(Section):
    """Choose what is made of links before they make a schema smaller."""

    form: LinkedForm | None = None
    """Show linked tables whole, or their linked columns and keys. By default as prompt.schema_form
    was trained, and whole where that is full."""
    complete: bool = True
    """Add keys, and the tables on the way between linked ones, to a linker's links."""
    keep: float | None = Field(None, gt=0, le=1)
    """Keep what this share of a linker's samples names: less keeps more. By default its chosen
    answer is taken."""

    def form_of(self, trained: str) -> LinkedForm:
        """Return the form of linked schemas for a model that was trained on this form."""
        return self.form or ("reduced" if trained in ("reduced", "noisy") else "tables")


class RowsSection(Section):
    """Lay examples out in rows of tokens."""

    max_length: int = Field(2048, ge=16, le=MOST)
    """Allow rows of at most this many tokens, prompt and answer together. Nothing is cut
    silently."""
    too_long: Literal["error", "trim_schema", "drop"] = "error"
    """Refuse a longer training example, leave out tables its SQL does not use, or drop it and say
    so. `trim_schema` leaves out tables where questions are answered, too."""
    examples_per_row: Many | Literal["auto"] = "auto"
    """Put this many questions on one database into a row that holds their schema once, at the same
    loss. 1 turns it off. `auto` keeps several databases in a step: 4 for steps of 8 to 32, 8 for
    64. It is up to 8 where there is one database, and 1 if the model allows no more."""
    row_length: int = Field(4096, ge=16, le=MOST)
    """Allow shared rows of at most this many tokens. Further questions start another row."""


class LoraSection(Section):
    """Configure the adapter, in PEFT's words."""

    r: int = Field(64, ge=1, le=100_000_000)
    """Set the rank of the update matrices."""
    lora_alpha: float = Field(128, gt=0, le=1e6)
    """Multiply the update by lora_alpha / r."""
    lora_dropout: float = Field(0.1, ge=0, lt=1)
    """Drop this share of the adapter's input while training."""
    target_modules: str | list[str] = "all-linear"
    """Adapt these modules: names, a regular expression, or `all-linear`."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Train these biases."""
    use_rslora: bool = False
    """Scale by lora_alpha / sqrt(r) instead (rank-stabilised LoRA)."""
    use_dora: bool = False
    """Decompose weights into magnitude and direction (DoRA). Slower."""


class QuantizationSection(Section):
    """Quantise the base model, in BitsAndBytesConfig's words."""

    load_in_4bit: bool = True
    """Keep the frozen base model in 4 bits. Off trains LoRA over the unquantised model."""
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"
    """Choose the 4-bit data type."""
    bnb_4bit_use_double_quant: bool = False
    """Quantise the quantisation constants too, which saves 0.4 bit per weight."""


class PrecisionSection(Section):
    """Choose the precision of the computation."""

    bf16: bool | None = None
    """Compute in bfloat16, or not. By default a GPU that has it does, and a CPU that is timed to be
    faster so. A run goes on as it began."""


class TrainSection(PrecisionSection):
    """Configure the optimizer and its steps, in transformers' words."""

    max_steps: int = Field(-1, ge=-1, le=1_000_000)
    """Stop after this many optimizer steps. -1 follows num_epochs."""
    lr_scheduler_type: Literal["cosine", "linear", "constant", "constant_with_warmup"] = "cosine"
    """Let the learning rate follow this curve."""
    warmup_ratio: float = Field(0.03, ge=0, lt=1)
    """Raise the learning rate from 0 over this share of the steps."""
    weight_decay: float = Field(0.001, ge=0, le=100)
    """Decay the adapter's weights by this factor."""
    max_grad_norm: float = Field(0.3, gt=0, le=1e30)
    """Scale gradients down to this norm."""
    optim: str | None = None
    """Choose an optimizer by transformers' name. By default `paged_adamw_8bit` on a GPU,
    `adamw_torch_fused` on a CPU."""
    gradient_checkpointing: bool | None = None
    """Recompute activations in the backward pass to save memory. By default on a GPU only."""
    logging_steps: int = Field(10, ge=1, le=MOST)
    """Log loss, learning rate and speed every this many steps."""
    global_batch_size: Many | None = None
    """Train on this many examples per optimizer step, with any number of workers. Leave
    grad_accum_steps unset with it."""

    @field_validator("max_steps")
    @classmethod
    def _check_max_steps(cls, steps: int) -> int:
        if steps == 0:
            raise ValueError("0 steps train nothing; -1 follows num_epochs")
        return steps


class StorageSection(Section):
    """Choose where runs lie on a cluster."""

    storage_path: str | None = None
    """Keep runs in this shared folder or URI (`s3://…`). By default in output_dir on this
    machine."""


class ScalingSection(StorageSection):
    """Choose workers and their resources, in Ray's words."""

    num_workers: Annotated[int | tuple[int, int], NoDecode] = 1
    """Train with this many processes, one GPU each where there are GPUs. 0 trains in this process,
    without Ray. `1,4` (in YAML `[1, 4]`) uses as many as the cluster has at the time, within these
    bounds."""
    elastic_resize_monitor_interval_s: float = Field(60.0, gt=0, le=LONGEST)
    """Look for room for more workers every this many seconds, if num_workers has two bounds."""
    use_gpu: bool | None = None
    """Give each worker a GPU. By default if the cluster has any, or its autoscaler may add some."""
    resources_per_worker: dict[str, Annotated[float, Field(ge=0, le=MOST)]] | None = None
    """Reserve these Ray resources for each worker, e.g. `{CPU: 4, GPU: 1}`."""
    max_failures: int = Field(2, ge=-1, le=MOST)
    """Restart from the last checkpoint this many times after losing a worker or node. -1 is
    unlimited."""

    @property
    def elastic(self) -> bool:
        """Say whether the number of workers may change during the run."""
        return isinstance(self.num_workers, tuple)

    @property
    def max_workers(self) -> int:
        """Training processes, counting this one where Ray is not used; the most of an elastic
        run."""
        workers = self.num_workers
        return workers[1] if isinstance(workers, tuple) else max(1, workers)

    @property
    def min_workers(self) -> int:
        """Training processes that a run needs: `max_workers`, or fewer for an elastic run."""
        return self.num_workers[0] if isinstance(self.num_workers, tuple) else self.max_workers

    @field_validator("num_workers", mode="wrap")
    @classmethod
    def _read_bounds(
        cls, given: Any, validate: ValidatorFunctionWrapHandler
    ) -> int | tuple[int, int]:
        """Read a number, or two: `1,4` on a command line, a list in YAML and JSON."""
        if isinstance(given, str) and "," in given:
            given = given.split(",")
        allowed = (
            f"input should be from 0 to {MOST_WORKERS}, or two bounds from 1 up, "
            "the smaller first: 1,4"
        )
        try:
            bounds: int | tuple[int, int] = validate(given)
        except ValidationError:
            raise ValueError(allowed) from None
        if isinstance(bounds, int) and 0 <= bounds <= MOST_WORKERS:
            return bounds
        if isinstance(bounds, tuple) and 1 <= bounds[0] < bounds[1] <= MOST_WORKERS:
            return bounds
        raise ValueError(allowed)


Way = Literal["greedy", "first_executable", "vote", "weighted_vote", "repaired", "constrained"]
"""Ways to choose a question's answer."""


class AnswersSection(Section):
    """Choose how questions are answered and answers are scored."""

    semantics: Literal["spider", "bird", "strict"] = "spider"
    """Call two results equal by Spider's test-suite rule, by BIRD's set of rows, or as the same
    list of rows."""
    keep_distinct: bool = False
    """Compare with DISTINCT left in, under `spider`. The official evaluator strips it by
    default."""
    max_new_tokens: int = Field(256, ge=1, le=MOST)
    """Generate at most this many tokens per answer."""
    max_num_seqs: Many | Literal["auto"] = "auto"
    """Answer this many questions at a time over the schemas they share. `auto` is up to 64, as
    memory allows. In float32 answers do not change; in bfloat16 near-ties may."""
    num_beams: int = Field(1, ge=1, le=1000)
    """Search with this many beams for answers to the scored questions; 1 is greedy. Checkpoints are
    chosen by greedy answers, unless tune.objective is `chosen`."""
    samples: int = Field(1, ge=1, le=1000)
    """Draw this many answers to each scored question, beside the greedy one. 1 draws none."""
    temperature: float = Field(0.4, gt=0, le=10)
    """Draw samples at this temperature. Lower ones draw likely tokens more often."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Draw each token from the likeliest ones whose probabilities reach this sum."""
    ground: Literal["none", "repair", "constrain"] = "none"
    """Mend names that the schema lacks (`repair`), or write none (`constrain`, on SQLite and
    PostgreSQL only). The answer as written is scored too."""
    choose: Way = "greedy"
    """Take this answer to each scored question. Every other one has a score of its own."""
    first_executable: bool = False
    """Take the best beam that runs, as `evaluate.choose first_executable` does."""
    ves_iterations: int = Field(0, ge=0, le=10_000)
    """Time each right prediction against its gold this many times, for BIRD's R-VES (officially
    100). Needs an idle machine."""
    timeout: float = Field(30.0, gt=0, le=LONGEST)
    """Stop a query after this many seconds and count it as `timeout`."""
    max_rows: int = Field(100_000, ge=1, le=MOST)
    """Stop a query whose result has more rows. A gold query that is stopped is not counted."""
    max_bytes: int = Field(256 * 2**20, ge=1, le=MOST)
    """Stop a query whose result has more bytes; a number counts 8."""
    max_sql_length: int = Field(100_000, ge=1, le=MOST)
    """Refuse a query whose text has more bytes."""
    backend: Literal["transformers", "openai"] = "transformers"
    """Ask the model here, or the endpoint at `evaluate.url`, which speaks OpenAI's protocol."""
    url: str | None = None
    """Ask the endpoint below this address, e.g. `http://127.0.0.1:8000/v1`. It may get a key, as
    OPENAI_API_KEY in the environment."""
    served_model: str | None = None
    """Ask this model of the endpoint. By default the first that it lists."""
    limit: Many | None = None
    """Score at most this many examples of each split, drawn with the seed."""
    processes: int | None = Field(None, ge=1, le=1000)
    """Execute SQL in this many processes. By default one per core, at most 8."""
    baseline: bool = True
    """Measure the base model without the adapter too, on the same examples."""

    @field_validator("url")
    @classmethod
    def _check_url(cls, url: str | None) -> str | None:
        if url and not url.startswith(("http://", "https://")):
            raise ValueError("begins with neither http:// nor https://; give the whole address")
        return url

    @property
    def way(self) -> Way:
        """The way in which a question's answer is chosen."""
        return "first_executable" if self.first_executable else self.choose

    def greedy(self) -> Self:
        """Return the settings with one greedy answer to each question, scored as written."""
        one = {"samples": 1, "num_beams": 1, "ground": "none", "choose": "greedy"}
        return self.model_copy(update={**one, "first_executable": False})


class EvaluateSection(AnswersSection):
    """Choose how checkpoints are compared, questions are answered, and answers are scored."""

    select_examples: int = Field(64, ge=0, le=MOST)
    """Answer this many validation examples at evaluate.eval_steps to choose the best checkpoint. 0
    keeps the last one."""
    eval_steps: Many | None = None
    """Answer them every this many optimizer steps, a multiple of save_steps, and at the end. By
    default at every save."""


class TuneSection(Section):
    """Choose what a sweep tries, in Ray Tune's words."""

    objective: Literal["answers", "chosen", "eval_loss"] = "answers"
    """Choose trials and checkpoints by greedy answers to the validation questions (`answers`), by
    those that evaluate.choose takes (`chosen`), or by the loss (`eval_loss`). Answers count by
    execution accuracy (sql), or by strict recall and then F1 (schema)."""
    num_samples: int = Field(16, ge=1, le=100_000)
    """Run this many trials per study. The first has the settings as they are, so that a sweep can
    only win."""
    space: dict[str, dict[str, list[Any]]] = {
        "learning_rate": {"loguniform": [2e-5, 2e-3]},
        "lora.r": {"choice": [8, 16, 32, 64, 128]},
    }
    """Draw these settings: from a `choice` of values, or by `uniform`, `loguniform`, `randint`,
    `lograndint` between two bounds. Bounds are included. `lora.lora_alpha` follows `lora.r` at the
    ratio of the settings (2), unless it is an axis too."""
    scheduler: str = "asha"
    """Stop trials that fall behind (`asha`), or train all to the end (`fifo`)."""
    grace_period: Many | None = None
    """Stop no trial before this many optimizer steps. By default the first measurement is
    awaited."""
    reduction_factor: float = Field(3, gt=1, le=1000)
    """Keep one in this many trials at each rung. Each rung trains this many times longer than the
    last."""
    max_concurrent_trials: int | None = Field(None, ge=1, le=MOST_WORKERS)
    """Run at most this many trials at a time. By default as many as the cluster's resources
    hold."""

    @field_validator("space")
    @classmethod
    def _read_exponents(
        cls, space: dict[str, dict[str, list[Any]]]
    ) -> dict[str, dict[str, list[Any]]]:
        """Read numbers that YAML takes for text, such as `5e-5`."""
        return {name: _read_axis(axis) for name, axis in space.items()}

    @field_validator("scheduler")
    @classmethod
    def _check_scheduler(cls, name: str) -> str:
        if name.lower() in POPULATION_SCHEDULERS:
            raise ValueError(
                f"{name} copies weights between trials or pauses them. Over Ray Train, Tune holds "
                "no trial's checkpoint, so it would run and exploit nothing. Use asha or fifo"
            )
        if name not in ("asha", "fifo"):
            raise ValueError("input should be 'asha' or 'fifo'")
        return name


class TrackingSection(Section):
    """Record runs in MLflow."""

    enabled: bool = True
    """Record the run in MLflow."""
    uri: str | None = None
    """Record in this MLflow server or database. By default `sqlite:///mlflow.db` in the folder the
    job started in."""
    experiment: str = "ray_sql"
    """File runs under this MLflow experiment."""
    system_metrics: bool = True
    """Record how busy each node is while it trains, every 10 s."""
    questions: bool = False
    """Record each scored question with its verdict, so that MLflow shows two runs question by
    question. 1,000 questions take about 20 s."""


class RepositorySection(Section):
    """Publish on the Hugging Face Hub."""

    repo_id: str | None = Field(None, pattern=r"^([\w.-]+/)?[\w.-]+$")
    """Push to this repository, `owner/name`. By default output_name under the token's user."""
    base_model: str | None = Field(None, pattern=r"^([\w.-]+/)?[\w.-]+$")
    """Name the base model on the Hub if model_name is a folder. A published adapter names its
    base."""
    private: bool = True
    """Create the repository private. An existing one stays as it is."""
    license: str | None = None
    """Publish under this licence in the Hub's words, e.g. `apache-2.0`. By default the base
    model's."""
    merge: bool = False
    """Merge the adapter into its base too (`merged/`), measure it, push it to
    `<repo_id>-merged`."""
    merged_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Write the merged model in this type. In float32 it takes twice the bytes, and rounds nothing
    away: it answers as the adapter does in float32."""
    force: bool = False
    """Publish an adapter even if it was not shown to beat its base model."""


class HubSection(RepositorySection):
    """Publish on the Hugging Face Hub, at the end or while training."""

    push_checkpoints: Literal["none", "best", "all"] = "none"
    """Push checkpoints to the branch `checkpoints` while training: each that is the best so far, or
    all."""


class ServeSection(Section):
    """Serve a tuned model over HTTP."""

    databases: dict[str, str] = {}
    """Answer about these databases: a name for each file or SQLAlchemy URL. By default about
    the run's own."""
    host: str = "127.0.0.1"
    """Listen on this address. Any but this machine's own needs RAY_SQL_TOKEN in the environment."""
    port: int = Field(8000, ge=1, le=65535)
    """Listen on this port."""
    num_replicas: int = Field(1, ge=1, le=MOST_WORKERS)
    """Serve by this many copies of the model."""
    ray_actor_options: dict[str, Annotated[float, Field(ge=0, le=MOST)]] = {}
    """Reserve these for each copy, in Ray's words, e.g. `{num_cpus: 4}` or `{num_gpus: 1}`. By
    default copies share the cores, and use no GPU."""
    max_waiting: int = Field(64, ge=1, le=MOST_WORKERS)
    """Refuse further questions, with 503, while this many wait at a copy of the model."""
    request_timeout_s: float = Field(60.0, gt=0, le=LONGEST)
    """Give up a request after this many seconds, with 504: its answer and its query together."""
    max_request_bytes: int = Field(65_536, ge=1, le=MOST)
    """Refuse a request whose body has more bytes, with 413."""
    max_result_bytes: int = Field(8 * 2**20, ge=1, le=MOST)
    """Stop a query whose result has more bytes, or a text or blob on the way to it. A smaller
    `evaluate.max_bytes` counts instead."""
    schema_bytes: int = Field(2**30, ge=0, le=10**15)
    """Keep computed schemas in at most this many bytes of memory."""
    gpu: Literal["vllm"] | None = None
    """Serve nothing, and print the configuration with which this server loads the adapter."""
    corrections: str | None = None
    """Append pairs that are corrected on the page to this file, which `dataset_id` reads. By
    default none are kept."""
    log_questions: bool = False
    """Log questions and the SQL of their answers, which may hold what is private."""


def _read_axis(axis: dict[str, list[Any]]) -> dict[str, list[Any]]:
    return {kind: [_number(value) for value in values] for kind, values in axis.items()}


def _number(value: Any) -> Any:
    exponent = isinstance(value, str) and re.fullmatch(r"[+-]?\d+\.?\d*[eE][+-]?\d+", value)
    return float(value) if exponent else value
