"""The score that the trials of a sweep are compared by, as people read it."""

from __future__ import annotations

from dataclasses import dataclass

from ray_sql.config import Config
from ray_sql.display import percent
from ray_sql.tasks import TASKS


@dataclass(frozen=True)
class Objective:
    """The main score of a task, or the validation loss, which a study keeps negated."""

    label: str
    is_loss: bool

    @classmethod
    def of(cls, config: Config) -> Objective:
        """Return the objective that the settings choose."""
        if config.tune.objective == "eval_loss":
            return cls("validation loss", True)
        # validation prompts show what is trained on
        by = " by oracle links" if config.prompt.schema_form != "full" else ""
        return cls(TASKS[config.task_type].label + by, False)

    @property
    def axis_label(self) -> str:
        """The label of a figure's axis, with its unit."""
        return self.label if self.is_loss else f"{self.label}, %"

    def plotted(self, value: float) -> float:
        """Return a value of the study in the unit of `axis_label`."""
        return -value if self.is_loss else 100 * value

    def text(self, value: float) -> str:
        """Write a value of the study for people."""
        return f"{-value:.4f}" if self.is_loss else percent(value)
