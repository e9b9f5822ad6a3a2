"""What a study knows: its trials, each with its point, state and best checkpoint, in `study.json`.

The file is written whole at every change, and a resumed sweep starts from it alone: recorded points are tried again in their order, what
was measured of them is reported again from their folders, and only what is missing is trained. Ray Tune's own snapshot is not used: it
is written every ten seconds and in place, so that a driver killed between two of them forgets trials, and in one of them, all of them.
"""

from __future__ import annotations

import hashlib
import json
import sys
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from ray_sql.config import Config, differences, mask_password
from ray_sql.errors import ConfigError, StoreError
from ray_sql.store import checkpoints
from ray_sql.store.run_folder import STUDY, RunFolder
from ray_sql.tune.space import Point

State = Literal["waiting", "running", "finished", "stopped", "failed"]
SETTLED = ("finished", "stopped", "failed")
WORST = -sys.float_info.max
"""The score of a trial that failed: the search learns to keep away."""


@dataclass(frozen=True)
class Measure:
    """What was measured at a step of a trial; a higher objective is better, the tie-break decides between equal ones."""

    step: int
    objective: float
    tie_break: float | None
    metrics: dict[str, float]

    @property
    def rank(self) -> tuple[float, float, int]:
        """Sorts the better last, and of equal ones the later, as `Checkpoint.rank` does: what is the best is never pruned."""
        return self.objective, WORST if self.tie_break is None else self.tie_break, self.step

    @property
    def score(self) -> float:
        """Objective and tie-break as one number in the same order: of n answers, objectives differ by 1/n at least."""
        return self.objective + (self.tie_break or 0.0) / (
            self.metrics.get("validation/n", 1.0) + 1
        )


@dataclass(frozen=True)
class Trial:
    """One trial. `steps` were trained in `seconds` of all attempts; `reason` says why it failed."""

    number: int
    point: Point
    state: State = "waiting"
    best: Measure | None = None
    steps: int = 0
    seconds: float = 0.0
    reason: str | None = None
    mlflow_run_id: str | None = None


@dataclass
class Study:
    """The trials of one task's sweep, in the folder `run_dir`. `id` is of this study alone: one that replaces it has another."""

    run_dir: str
    key: str
    settings: dict[str, Any]
    mlflow_run_id: str | None = None
    trials: list[Trial] = field(default_factory=list)
    finished: bool = False
    id: str = field(default_factory=lambda: uuid.uuid4().hex)

    @property
    def tags(self) -> dict[str, str]:
        """What its MLflow run is found by, should the run's id be lost."""
        return {"study": self.id}

    def ask(self, number: int, point: Point) -> Trial:
        """The trial of a number, added to the study if it is new."""
        if number == len(self.trials):
            self.trials.append(Trial(number, point))
            self.save()
        return self.trials[number]

    def change(self, number: int, **values: Any) -> Trial:
        """Change what is known of a trial."""
        self.trials[number] = replace(self.trials[number], **values)
        self.save()
        return self.trials[number]

    def save(self) -> None:
        """Write the file."""
        RunFolder(self.run_dir).write_study(asdict(self))

    def folder(self, number: int) -> RunFolder:
        """A trial's run folder."""
        return RunFolder(self.run_dir).trial(name(number))

    def settled(self, count: int) -> int:
        """How many of the first `count` trials have ended, in whatever way."""
        return sum(trial.state in SETTLED for trial in self.trials[:count])

    def best(self) -> Trial | None:
        """The trial with the best checkpoint, the earlier of two equal ones; None where none was measured."""
        measured = [trial for trial in self.trials if trial.best and trial.state != "failed"]
        return max(measured, key=lambda trial: (*trial.best.rank[:2], -trial.number), default=None)  # type: ignore[union-attr]


def name(number: int) -> str:
    """What a trial is called."""
    return f"trial-{number:03}"


def settings(config: Config, changes: Mapping[str, Any], number: int) -> Config:
    """The settings of a trial of the study `config`, whose own folder lies in the study's."""
    root = "scaling.storage_path" if config.scaling.storage_path else "output_dir"
    return config.changed(
        {**changes, root: RunFolder(config.run_dir).trials, "output_name": name(number)}
    )


def begin(config: Config) -> Study:
    """A study that has no trials yet."""
    return Study(
        config.run_dir,
        key(config),
        {**config.public(), "tracking": {"uri": mask_password(config.tracking.uri)}},
    )


def load(config: Config) -> Study | None:
    """The study in the folder of `config`; None where there is none.

    Raises `ConfigError` if it is of other settings, `StoreError` if the folder holds something else.
    """
    folder = RunFolder(config.run_dir)
    folder.finish_removal()
    saved = folder.read_study()
    if saved is None:
        check_free(config)
        return None
    trials = [
        Trial(**{**one, "best": one["best"] and Measure(**one["best"])})
        for one in saved.pop("trials")
    ]
    if saved["key"] != key(config):
        differing = differences(saved["settings"], config.public()) or "another version"
        raise ConfigError(
            f"{config.run_dir} holds a study of other settings ({differing}); choose another "
            "--output_name, or replace it with --overwrite"
        )
    return Study(**saved, trials=trials)


def check_free(config: Config) -> None:
    """Raise `StoreError` if the folder of `config` holds something that is no study; inputs from which nothing was trained may go."""
    folder = RunFolder(config.run_dir)
    folder.finish_removal()
    if folder.has_study() or not folder.exists():
        return
    trained = checkpoints.complete(folder) or folder.adapter.exists()
    if trained or not folder.has_inputs():
        raise StoreError(
            f"{folder}: exists, but is no study ({STUDY} is missing); choose another --output_name"
        )


def key(config: Config) -> str:
    """Changes with whatever trials and their objective depend on; the number of trials may be raised later."""
    tune = config.tune.model_dump(mode="json", exclude={"num_samples", "max_concurrent_trials"})
    asked = {"semantics", "keep_distinct", "max_new_tokens", "select_examples", "eval_steps"}
    parts = [config.identity(), tune, config.evaluate.model_dump(include=asked)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]


def measured(folder: RunFolder) -> list[Measure]:
    """What was measured of a trial, by step: as its file has it, and as its checkpoints say, should the file have been too late."""
    found = {one["step"]: Measure(**one) for one in folder.read_trial_measures()}
    for one in checkpoints.complete(folder):
        if one.objective is not None:
            found.setdefault(one.step, Measure(one.step, one.objective, one.tie_break, one.metrics))
    return [found[step] for step in sorted(found)]


def record(folder: RunFolder, measures: list[Measure]) -> None:
    """Keep what was measured of a trial."""
    folder.write_trial_measures(asdict(measure) for measure in measures)
