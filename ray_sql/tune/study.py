"""A study: the trials of a sweep, each with its point, state and best checkpoint, in `study.json`.

The file is written whole at every change, and a resumed sweep starts from it alone. Recorded points
are tried again in their order, their scores are reported again from their folders, and only what
is missing is trained.

Ray Tune's own snapshot is not used. It is written every ten seconds and in place. A driver killed
between two snapshots forgets trials, and one killed in a snapshot forgets all of them. Optuna's
storage is not used either: it needs a local file, and a study may lie on `s3://`.
"""

from __future__ import annotations

import hashlib
import json
import sys
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from typing_extensions import TypedDict

from ray_sql.config import Config, differences
from ray_sql.errors import ConfigError, StoreError
from ray_sql.store import checkpoints
from ray_sql.store.run_folder import STUDY, RunFolder
from ray_sql.tune.space import Point

State = Literal["waiting", "running", "finished", "stopped", "failed"]
SETTLED = ("finished", "stopped", "failed")
PLACES = ("output_dir", "output_name", "cache_dir", "scaling", "tracking")
"""Settings that say where a study is kept and computed, not what it is."""
WORST = -sys.float_info.max
"""The score of a failed trial: the search learns to keep away."""


@dataclass(frozen=True)
class StepScore:
    """The validation scores of a trial at a step. A higher objective is better.

    The tie-break decides between equal objectives.
    """

    step: int
    objective: float
    tie_break: float | None
    metrics: dict[str, float]

    @property
    def rank(self) -> tuple[float, float, int]:
        """Sort the better last, and the later of equal ones, as `Checkpoint.rank` does.

        So the best score is always that of a checkpoint which was not pruned.
        """
        return self.objective, WORST if self.tie_break is None else self.tie_break, self.step

    @property
    def score(self) -> float:
        """Return objective and tie-break as one number in the same order.

        Objectives of n answers differ by 1/n at least.
        """
        return self.objective + (self.tie_break or 0.0) / (
            self.metrics.get("validation/n", 1.0) + 1
        )


@dataclass(frozen=True)
class TrialRecord:
    """One trial and its results. `steps` and `seconds` count all attempts.

    `reason` says why a trial failed.
    """

    number: int
    point: Point
    state: State = "waiting"
    best: StepScore | None = None
    steps: int = 0
    seconds: float = 0.0
    reason: str | None = None
    mlflow_run_id: str | None = None

    @property
    def name(self) -> str:
        """Name the trial for people and for its folder."""
        return trial_name(self.number)


class SavedStudy(TypedDict):
    """`study.json`."""

    key: str
    settings: dict[str, Any]
    mlflow_run_id: str | None
    trials: list[TrialRecord]
    finished: bool
    id: str


@dataclass
class Study:
    """The trials of one task's sweep. A study that replaces it has another `id`."""

    folder: RunFolder
    key: str
    settings: dict[str, Any]
    mlflow_run_id: str | None = None
    trials: list[TrialRecord] = field(default_factory=list)
    finished: bool = False
    id: str = field(default_factory=lambda: uuid.uuid4().hex)

    @property
    def tags(self) -> dict[str, str]:
        """Return the tags that find its MLflow run, should the run's id be lost."""
        return {"study": self.id}

    def trial_at(self, number: int, point: Point) -> TrialRecord:
        """Return the trial of a number, added to the study if it is new."""
        if number == len(self.trials):
            self.trials.append(TrialRecord(number, point))
            self.save()
        return self.trials[number]

    def change(self, number: int, **values: Any) -> TrialRecord:
        """Change what is known of a trial."""
        self.trials[number] = replace(self.trials[number], **values)
        self.save()
        return self.trials[number]

    def save(self) -> None:
        """Write the file."""
        values = asdict(self)
        del values["folder"]
        self.folder.write_study(values)

    def begin_records_anew(self) -> None:
        """Forget the MLflow runs of the study and its trials: they are those of another folder."""
        self.id, self.mlflow_run_id = uuid.uuid4().hex, None
        self.trials = [replace(trial, mlflow_run_id=None) for trial in self.trials]

    def trial_folder(self, number: int) -> RunFolder:
        """Return a trial's own folder."""
        return self.folder.trial(trial_name(number))

    def settled(self, count: int) -> int:
        """Count those of the first `count` trials that have ended, in whatever way."""
        return sum(trial.state in SETTLED for trial in self.trials[:count])

    def best(self) -> TrialRecord | None:
        """Return the trial with the best checkpoint, the earlier of two equal ones."""
        scored = [trial for trial in self.trials if trial.best and trial.state != "failed"]

        def rank(trial: TrialRecord) -> tuple[float, float, int]:
            assert trial.best
            objective, tie_break, _ = trial.best.rank
            return objective, tie_break, -trial.number

        return max(scored, key=rank, default=None)


def trial_name(number: int) -> str:
    """Name a trial: `trial-003`."""
    return f"trial-{number:03}"


def trial_settings(config: Config, changes: Mapping[str, Any], number: int) -> Config:
    """Return the settings of a trial of the study `config`; its folder lies in the study's."""
    root = "scaling.storage_path" if config.scaling.storage_path else "output_dir"
    trials = RunFolder(config.run_dir).trials
    return config.changed({**changes, root: trials, "output_name": trial_name(number)})


def begin(config: Config) -> Study:
    """Return a study that has no trials yet."""
    settings = {name: value for name, value in config.public().items() if name not in PLACES}
    return Study(RunFolder(config.run_dir), key(config), settings)


def load(config: Config) -> Study | None:
    """Return the study in the folder of `config`; None where there is none.

    Raises `ConfigError` for one of other settings, `StoreError` if the folder holds something else.
    """
    folder = RunFolder(config.run_dir)
    folder.finish_removal()
    saved = folder.read_study(SavedStudy)
    if saved is None:
        require_free(folder)
        return None
    if saved["key"] != key(config):
        changed = differences(saved["settings"], config.public())
        raise ConfigError(
            f"{folder.uri} holds a study of other settings ({changed or 'another version'}); "
            "choose another --output_name, or replace it with --overwrite"
        )
    # a folder that was moved or copied is its own
    return Study(
        folder,
        saved["key"],
        saved["settings"],
        saved["mlflow_run_id"],
        saved["trials"],
        saved["finished"],
        saved["id"],
    )


def open_or_begin(config: Config, resume: bool) -> Study:
    """Return the study to go on with, or a new one.

    Raises `ConfigError` where a study was cut off and `resume` is not set.
    """
    if config.overwrite:
        folder = RunFolder(config.run_dir)
        folder.finish_removal()
        require_free(folder)
        return begin(config)
    study = load(config)
    if study and not study.finished and not resume:
        settled, count = study.settled(config.tune.num_samples), config.tune.num_samples
        raise ConfigError(
            f"{config.run_dir} holds a study that was cut off, with {settled} of {count} trials "
            "settled: --resume goes on with it, --overwrite starts afresh"
        )
    return study or begin(config)


def require_free(folder: RunFolder) -> None:
    """Raise `StoreError` if a folder holds something that is no study.

    Inputs from which nothing was trained may be replaced.
    """
    if folder.has_study() or not folder.contents():
        return
    trained = checkpoints.complete(folder) or folder.adapter.exists()
    if trained or not folder.has_inputs():
        raise StoreError(
            f"{folder.uri}: exists, but is no study ({STUDY} is missing); choose another "
            "--output_name"
        )


def key(config: Config) -> str:
    """Return 12 hex digits over all that trials and their objective depend on.

    The number of trials is not part of it: a study may be given more later.
    """
    tune = config.tune.model_dump(mode="json", exclude={"num_samples", "max_concurrent_trials"})
    answering = {"semantics", "keep_distinct", "max_new_tokens", "select_examples", "eval_steps"}
    parts = [config.identity(), tune, config.evaluate.model_dump(include=answering)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]


def read_scores(folder: RunFolder) -> list[StepScore]:
    """Return a trial's scores by step, from its file and from its checkpoints.

    A process may have been killed before it wrote the file.
    """
    scores = {score.step: score for score in folder.read_trial_measures(StepScore)}
    for saved in checkpoints.complete(folder):
        if saved.objective is not None:
            score = StepScore(saved.step, saved.objective, saved.tie_break, saved.metrics)
            scores.setdefault(saved.step, score)
    return [scores[step] for step in sorted(scores)]


def write_scores(folder: RunFolder, scores: list[StepScore]) -> None:
    """Keep a trial's scores in its folder."""
    folder.write_trial_measures([asdict(score) for score in scores])
