"""Shapes of a run's JSON files, as far as code relies on them; other keys may stand beside."""

from __future__ import annotations

from typing import Annotated, Any, Literal, NotRequired

from pydantic import AfterValidator, ConfigDict, Field, with_config
from typing_extensions import TypedDict

from ray_sql.tasks import TASKS

OPEN = ConfigDict(extra="allow")
Count = Annotated[int, Field(ge=0, le=10**15)]
Interval = Annotated[list[float], Field(min_length=2, max_length=2)]


@with_config(OPEN)
class Marker(TypedDict):
    """`checkpoint.json`: the files of a complete checkpoint, and what it was measured at."""

    step: Count
    files: dict[str, int]
    checksums: NotRequired[dict[str, str]]
    objective: float | None
    tie_break: float | None
    metrics: dict[str, float]


@with_config(OPEN)
class _Logged(TypedDict):
    step: Count


@with_config(OPEN)
class TrainerState(TypedDict):
    """`trainer_state.json` of transformers: what was logged, by step."""

    log_history: list[_Logged]


@with_config(OPEN)
class AdapterConfig(TypedDict):
    """`adapter_config.json` of PEFT."""

    r: Count
    rank_pattern: NotRequired[dict[str, Count] | None]
    lora_alpha: float
    use_dora: bool
    use_rslora: bool
    target_modules: list[str] | str


@with_config(OPEN)
class _Serializer(TypedDict):
    name: str


@with_config(OPEN)
class _Template(TypedDict):
    system: str
    user: str
    evidence: str


@with_config(OPEN)
class Contract(TypedDict):
    """`contract.json`: all that an answer depends on besides the weights."""

    task_type: str
    model_name: str
    model_revision: Annotated[str, Field(pattern=r"^[\w./-]{1,200}$")] | None
    quantization: dict[str, Any]
    template: _Template
    template_hash: str
    serializer: _Serializer
    schema_form: str
    example_values: Count
    tokenizer_hash: str
    max_length: Count
    answer_format: str
    packages: dict[str, str]
    thinking: NotRequired[str]
    weights_sha256: NotRequired[str]
    compute_type: NotRequired[str]


@with_config(OPEN)
class Scores(TypedDict):
    """The scores of a model on a split."""

    n: Count
    gold_errors: Count
    interval: Interval
    semantics: NotRequired[Literal["spider", "bird", "strict"]]
    by_hardness: NotRequired[dict[str, dict[str, Any]]]


@with_config(OPEN)
class _Compared(TypedDict):
    only_tuned: Count
    mcnemar_p: float


@with_config(OPEN)
class _ComparedWithBase(_Compared):
    only_base: Count


@with_config(OPEN)
class _ComparedWithDefault(_Compared):
    only_default: Count


@with_config(OPEN)
class Rules(TypedDict):
    """`metrics.json` of whatever was judged, as far as its rules are asked for."""

    tuned: NotRequired[dict[str, dict[str, Any]]]
    base: NotRequired[dict[str, dict[str, Any]]]
    file: NotRequired[dict[str, dict[str, Any]]]


def _require_main_scores(metrics: Any) -> Any:
    task = TASKS.get(metrics["task_type"])
    if task is None:
        raise ValueError(f"task_type {metrics['task_type']!r} is unknown")
    for model in ("base", "default", "tuned"):
        for split, scores in metrics.get(model, {}).items():
            share = scores.get(task.metric)
            if not isinstance(share, int | float) or not 0 <= share <= 1:
                raise ValueError(f"{task.metric} of {model} on {split} is missing or no share")
    return metrics


@with_config(OPEN)
class ScoredMetrics(TypedDict):
    """`metrics.json` of a run or an evaluation, whose models have scores by split."""

    task_type: Literal["sql", "schema"]
    dataset_id: str
    links: NotRequired[str]


@with_config(OPEN)
class _RunMetrics(TypedDict):
    task_type: str
    base: NotRequired[dict[str, Scores]]
    default: NotRequired[dict[str, Scores]]
    tuned: NotRequired[dict[str, Scores]]
    dataset_id: str
    data_fingerprint: str
    identity: str
    mlflow_run_id: str | None
    tracking_uri: str | None
    best_step: Count
    steps: Count
    weights_sha256: NotRequired[str | None]
    training_seconds: float
    seconds: float
    compared: NotRequired[dict[str, _ComparedWithBase]]
    compared_default: NotRequired[dict[str, _ComparedWithDefault]]


RunMetrics = Annotated[_RunMetrics, AfterValidator(_require_main_scores)]
"""`metrics.json` of a finished training run or sweep."""


@with_config(OPEN)
class _ComparedWithAdapter(TypedDict):
    n: Count
    only_adapter: Count
    only_merged: Count
    mcnemar_p: float


@with_config(OPEN)
class MergedMetrics(TypedDict):
    """`metrics.json` of a merged model."""

    adapter: str
    merged: dict[str, Scores]
    compared: _ComparedWithAdapter


@with_config(OPEN)
class JudgedAnswer(TypedDict):
    """A line of `predictions.jsonl`."""

    id: str
    split: str
    verdict: str


@with_config(OPEN)
class MlflowRun(TypedDict):
    """`run.json`: the MLflow run that records a run."""

    mlflow_run_id: str
