"""What single jobs take besides the settings of a run."""

from __future__ import annotations

from typing import Any, Self

from pydantic import Field, field_validator, model_validator

from ray_sql.config.settings import Config
from ray_sql.config.validate import build, merge
from ray_sql.tasks import TaskName


class EvaluateConfig(Config):
    """Settings of an evaluation; a model is needed only where there is no predictions file."""

    model_name: str = Field("", description=Config.model_fields["model_name"].description)
    task_type: TaskName = Field("sql", description=Config.model_fields["task_type"].description)
    predictions_file: str | None = None
    """Score this file instead of asking a model: `predictions.jsonl` (id, predicted), or one SQL query a line in the split's order."""
    adapter: str | None = None
    """Folder or URI of the adapter to measure beside its base model, e.g. `out/demo/adapter`."""
    compare: tuple[str, ...] = ()
    """Two files of judged predictions (`predictions.jsonl`) to compare question by question; nothing is asked or executed."""

    @model_validator(mode="before")
    @classmethod
    def _name_a_comparison(cls, values: Any) -> Any:
        return (
            {"output_name": "comparison"} | values
            if isinstance(values, dict) and values.get("compare")
            else values
        )

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
            raise ValueError(
                f"--compare takes two files of judged predictions, {len(self.compare)} given"
            )
        for name in ("predictions_file", "adapter"):
            if self.compare and getattr(self, name):
                raise ValueError(
                    f"--compare reads what was judged already: leave --{name} out, or evaluate it first"
                )
        return self


class PublishConfig(Config):
    """Settings of a publication: which run, and how it goes to the Hub; the rest is read from the run's own folder."""

    model_name: str = Field("", description=Config.model_fields["model_name"].description)
    task_type: TaskName = Field("sql", description=Config.model_fields["task_type"].description)


class TasksConfig(Config):
    """Settings for one task or several."""

    task_type: tuple[TaskName, ...] = Field(min_length=1)  # type: ignore[assignment]
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
        given = self.model_dump(
            mode="python", exclude_unset=True, exclude={"read_token", "write_token", *own}
        )
        given |= {
            name: token for name in ("read_token", "write_token") if (token := getattr(self, name))
        }
        return [
            build(Config, merge(given, self._named(task)), {"changes": {"task_type": task}})
            for task in self.task_type
        ]

    def _named(self, task: TaskName) -> dict[str, Any]:
        if len(self.task_type) < 2:
            return {"task_type": task}
        named: dict[str, Any] = {"task_type": task, "output_name": f"{self.output_name}-{task}"}
        return named | (
            {"hub": {"repo_id": f"{self.hub.repo_id}-{task}"}} if self.hub.repo_id else {}
        )


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
            raise ValueError(
                "resume goes on with the study that overwrite removes: leave one of the two out"
            )
        return self

    @model_validator(mode="after")
    def _check_fixed_workers(self) -> Self:
        if self.scaling.elastic:
            raise ValueError(
                f"scaling.num_workers {self.scaling.min_workers},{self.scaling.max_workers}: "
                "a sweep counts how many trials fit by what one takes, so "
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
