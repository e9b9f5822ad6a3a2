"""The settings of single jobs, beside those of a run or instead of them."""

from __future__ import annotations

import warnings
from typing import Any, Self

from pydantic import Field, field_validator, model_validator

from ray_sql.config.base import TOKENS, JobConfig
from ray_sql.config.sections import (
    MOST,
    AnswersSection,
    RepositorySection,
    ServeSection,
    TrackingSection,
)
from ray_sql.config.settings import Config, ModelConfig
from ray_sql.config.urls import absolute
from ray_sql.config.validate import build, merge
from ray_sql.tasks import TaskName

# pydantic's models have a method of this name, which nobody calls
warnings.filterwarnings("ignore", message='Field name "json" in "AskConfig"')
ASKING = {
    *("max_new_tokens", "num_beams", "samples", "temperature", "top_p", "ground", "choose"),
    *("semantics", "timeout", "max_rows", "max_bytes", "max_sql_length"),
    *("backend", "url", "served_model"),
}
"""Settings of `evaluate` that questions without gold use."""


class EvaluateConfig(Config):
    """Settings of an evaluation: those of the run whose splits and model it takes.

    All are read and checked together, though an evaluation uses a part. A predictions file needs
    no model.
    """

    model_name: str = Field("", description=ModelConfig.model_fields["model_name"].description)
    task_type: TaskName = Field(
        "sql", description=ModelConfig.model_fields["task_type"].description
    )
    predictions_file: str | None = None
    """Score this file instead of asking a model: JSON, CSV, BIRD's own file, or one SQL query a
    line in the split's order."""
    adapter: str | None = None
    """Measure the adapter in this folder or URI beside its base model, e.g. `out/demo/adapter`."""
    audit: str | None = None
    """Give scores without the questions that this audit.json flags, too."""

    @model_validator(mode="after")
    def _check_source(self) -> Self:
        if not self.predictions_file and not self.model_name:
            raise ValueError(
                "nothing to evaluate: give --predictions_file, or --model_name (and --adapter)"
            )
        return self

    @classmethod
    def shown(cls) -> set[str]:
        """Leave out the settings of training."""
        split = {"data.validation_fraction", "data.limit"}
        return ModelConfig.shown() | split | {"predictions_file", "adapter", "audit"}


class CompareConfig(JobConfig):
    """Settings of a comparison of two scored files. Nothing is asked or executed."""

    output_name: str = Field(
        "comparison",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        description="Name the comparison, and its folder under output_dir.",
    )
    files: tuple[str, ...]
    """Compare these two files of judged predictions (`predictions.jsonl`) question by question."""

    @field_validator("files")
    @classmethod
    def _check_two(cls, files: tuple[str, ...]) -> tuple[str, ...]:
        if len(files) != 2:
            raise ValueError("give two files of judged predictions")
        return files


class PublishConfig(JobConfig):
    """Settings of a publication. The run's own folder holds all the rest."""

    hub: RepositorySection = RepositorySection()


class TunedConfig(JobConfig):
    """Settings of a job that asks a tuned model. The adapter's folder has all the rest."""

    output_name: str = Field(
        "",
        pattern=r"^([A-Za-z0-9][A-Za-z0-9._-]*)?$",
        description="Ask the adapter of this run in output_dir.",
    )
    adapter: str | None = None
    """Ask the adapter in this folder, URI or Hub repository, not that of a run."""
    evaluate: AnswersSection = AnswersSection()

    @model_validator(mode="after")
    def _check_adapter(self) -> Self:
        if not self.output_name and not self.adapter:
            raise ValueError("no adapter to ask: give --output_name of a run, or --adapter")
        return self

    @classmethod
    def shown(cls) -> set[str]:
        """Leave out the settings of scores."""
        asking = {f"evaluate.{name}" for name in ASKING}
        return {name for name in super().shown() if "evaluate." not in name or name in asking}


class AskingConfig(TunedConfig):
    """Settings of a job that asks about databases."""

    linker: str | None = None
    """Ask the adapter in this folder, URI or Hub repository first, which finds links. The prompt
    shows what they leave of the schema."""


class OneDatabaseConfig(AskingConfig):
    """Settings of a job that asks about one database."""

    database: str | None = None
    """Ask about this database: a SQLite or DuckDB file, an SQLAlchemy URL, or the name of one of
    the run's own."""


class AskConfig(OneDatabaseConfig):
    """Settings of questions from the terminal."""

    question: tuple[str, ...] = ()
    """Ask this question. Without one, questions are read from the terminal or the standard
    input."""
    json: bool = False  # type: ignore[assignment]
    """Print a JSON object a question, as the service answers."""
    corrections: str = "corrections.jsonl"
    """Append corrected pairs to this file, which `dataset_id` reads."""


class McpConfig(OneDatabaseConfig):
    """Settings of an assistant's tool."""

    max_rows: int = Field(100, ge=0, le=MOST)
    """Send the assistant at most this many rows of a result, beside their number."""


class ResultsConfig(JobConfig):
    """Settings of a folder of results, which others can read and score again."""

    runs: tuple[str, ...] = Field(min_length=1)
    """Gather the answers and scores in these folders of runs or evaluations."""
    publish: bool = False
    """Push the folder to the Hub as a dataset."""
    hub: RepositorySection = RepositorySection()

    @classmethod
    def shown(cls) -> set[str]:
        """Leave out what only models have."""
        return super().shown() - {
            f"hub.{name}" for name in ("base_model", "merge", "merged_dtype", "force")
        }


class PagesConfig(JobConfig):
    """Settings of a job that looks at runs and makes none."""

    output_name: str = Field("all", description="Not used.")
    tracking: TrackingSection = TrackingSection()

    @classmethod
    def shown(cls) -> set[str]:
        """Leave out what only a run has."""
        unused = {"output_name", "cache_dir", *TOKENS}
        unused |= {f"tracking.{name}" for name in ("enabled", "system_metrics", "questions")}
        return super().shown() - unused


class UiConfig(PagesConfig):
    """Settings of MLflow's pages."""

    port: int = Field(5000, ge=1, le=65535)
    """Show the pages at this port of this machine."""

    @classmethod
    def shown(cls) -> set[str]:
        """Leave out the folders of runs."""
        return super().shown() - {"output_dir", "scaling.storage_path"}


class RunsConfig(PagesConfig):
    """Settings of a list of runs."""

    older_than: str = Field("", pattern=r"^(\d{1,4}[hdw])?$")
    """List only runs in which nothing has changed for so long: `12h`, `30d`, `8w`."""
    delete: bool = False
    """Remove the folders and the MLflow runs that `older_than` lists. Without it they are shown."""


class ServeConfig(AskingConfig):
    """Settings of a service."""

    serve: ServeSection = ServeSection()

    def for_replicas(self) -> dict[str, Any]:
        """Return the settings that were given, with absolute paths, without tokens."""
        once = {"config", "dry_run"}
        settings = self.model_dump(mode="json", exclude_unset=True, exclude=TOKENS | once)
        settings |= {"output_dir": str(absolute(self.output_dir)), "cache_dir": str(self.cache)}
        if self.adapter and absolute(self.adapter).exists():
            settings["adapter"] = str(absolute(self.adapter))
        if self.linker and absolute(self.linker).exists():
            settings["linker"] = str(absolute(self.linker))
        if self.serve.corrections:
            settings["serve"]["corrections"] = str(absolute(self.serve.corrections))
        if self.serve.databases:
            settings["serve"]["databases"] = {
                name: _from_any_folder(place) for name, place in self.serve.databases.items()
            }
        return settings


def _from_any_folder(place: str) -> str:
    """Return a database's path, or the URL of its file, with an absolute path."""
    scheme, slashes, path = place.partition(":///")
    if slashes and scheme in ("sqlite", "duckdb"):
        return f"{scheme}:///{absolute(path)}"
    return place if "://" in place else str(absolute(place))


class VerifyConfig(TunedConfig):
    """Settings of the check that an endpoint is the model of a run."""

    questions: int = Field(64, ge=1, le=100_000)
    """Send this many of the run's scored questions, drawn with its seed."""

    @model_validator(mode="after")
    def _check_run_and_url(self) -> Self:
        if not self.output_name or not self.evaluate.url:
            raise ValueError(
                "give the run whose answers are compared (--output_name), and the endpoint's "
                "address (--evaluate.url, e.g. http://127.0.0.1:8000/v1)"
            )
        return self

    @classmethod
    def shown(cls) -> set[str]:
        """Leave out the choice between an endpoint and a model here."""
        return super().shown() - {"evaluate.backend"}


class TasksConfig(Config):
    """Settings for one task or several."""

    task_type: tuple[TaskName, ...] = Field(min_length=1)  # type: ignore[assignment]
    """Train for `sql`, for `schema`, or for both (`sql,schema`): a study each, one after the
    other."""

    @field_validator("task_type", mode="before")
    @classmethod
    def _split_tasks(cls, given: Any) -> Any:
        if isinstance(given, str):
            given = given.split(",")
        return list(dict.fromkeys(given)) if isinstance(given, list | tuple) else given

    def studies(self) -> list[Config]:
        """Return the settings of each task's study.

        Several have a folder each, `<output_name>-<task>`, and a repository,
        `<hub.repo_id>-<task>`.
        """
        own = set(type(self).model_fields) - set(Config.model_fields)
        given = {name: value for name, value in self.given().items() if name not in own}
        return [
            build(Config, merge(given, self._named(task)), {"changes": {"task_type": task}})
            for task in self.task_type
        ]

    def _named(self, task: TaskName) -> dict[str, Any]:
        named: dict[str, Any] = {"task_type": task}
        if len(self.task_type) > 1:
            if task == "schema":  # whose prompts must not show its answers
                named["prompt"] = {"schema_form": "full"}
            named["output_name"] = f"{self.output_name}-{task}"
            if self.hub.repo_id:
                named["hub"] = {"repo_id": f"{self.hub.repo_id}-{task}"}
        return named


class CheckConfig(TasksConfig):
    """Settings of a run or of a sweep: both can be checked."""

    replay: bool = False
    """Check nothing. Send MLflow the records that an ended run or sweep kept while no server
    answered."""


class SweepConfig(TasksConfig):
    """Settings of a sweep for one task or several: those of a run, which its trials change."""

    resume: bool = False
    """Continue a study that was cut off. If there is none, begin it."""

    @model_validator(mode="after")
    def _check_resume(self) -> Self:
        if self.resume and self.overwrite:
            raise ValueError(
                "resume goes on with the study that overwrite removes: leave one of the two out"
            )
        return self

    @model_validator(mode="after")
    def _check_fixed_workers(self) -> Self:
        if self.scaling.elastic:
            bounds = f"{self.scaling.min_workers},{self.scaling.max_workers}"
            raise ValueError(
                f"scaling.num_workers {bounds}: a sweep plans its trials by their resources, so a "
                "trial has a fixed number of workers: give one"
            )
        return self

    @model_validator(mode="after")
    def _check_push_checkpoints(self) -> Self:
        if self.hub.push_checkpoints != "none":
            raise ValueError(
                f"hub.push_checkpoints {self.hub.push_checkpoints}: a sweep pushes its best "
                "adapter only; leave it out"
            )
        return self


class PipelineConfig(SweepConfig):
    """Settings of a pipeline: those of a sweep for one task, or for both, one after the other."""

    sweep: bool = True
    """Sweep each task. Without, train each once, with the settings as they are."""

    def studies(self) -> list[Config]:
        """Return the settings of each task's study, those of the linker first."""
        return sorted(super().studies(), key=lambda study: study.task_type != "schema")

    @model_validator(mode="after")
    def _check_links(self) -> Self:
        if len(self.task_type) > 1 and self.prompt.links is not None:
            raise ValueError(
                f"prompt.links {self.prompt.links}: the pipeline asks without links, with those of "
                "its own linker, and with gold ones: leave it out"
            )
        if self.linking.keep and self.evaluate.samples == 1:
            raise ValueError(
                f"linking.keep {self.linking.keep} counts a linker's samples, but evaluate.samples "
                "is 1: raise it, or leave linking.keep out"
            )
        return self

    @property
    def measures_noise(self) -> bool:
        """Say whether the generator trains with the noise that its linker is measured to have."""
        given = {"spare_tables", "spare_columns"} & self.prompt.model_fields_set
        return len(self.task_type) > 1 and self.prompt.schema_form == "noisy" and not given

    @model_validator(mode="after")
    def _check_noise(self) -> Self:
        if self.measures_noise and not self.data.validation_fraction:
            raise ValueError(
                "prompt.schema_form noisy: data.validation_fraction 0 leaves no questions to "
                "measure the linker's mistakes on: raise it, or give prompt.spare_tables and "
                "prompt.spare_columns"
            )
        return self
