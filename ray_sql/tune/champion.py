"""The best trial's adapter, measured where the sweep never looked: on the held-out splits, against the base model and the default
settings, question by question. What comes of it lies in the study's folder as any run's results do, and in MLflow's registry."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ray_sql import finetune, progress, tracking, train
from ray_sql.config import Config
from ray_sql.display import Display
from ray_sql.errors import TrainingError
from ray_sql.evaluate import measure
from ray_sql.evaluate.measure import Measured
from ray_sql.finetune.prepare import Prepared
from ray_sql.store import storage
from ray_sql.store.run_folder import STUDY, RunFolder
from ray_sql.tasks import TASKS
from ray_sql.tune import space
from ray_sql.tune.study import Measure, Study, Trial, name

ALIAS = "champion"


def crown(
    config: Config,
    study: Study,
    prepared: Prepared,
    record: tracking.Run,
    facts: Mapping[str, Any],
    display: Display,
) -> dict[str, Any]:
    """Measure and register the best trial of a study; returns what `metrics.json` holds. Raises `TrainingError` if there is none."""
    best = _best(study)
    assert best.best
    chosen = _settings(config, best)
    adapter = _take(chosen, study, best)
    measured = _measure(chosen, study, prepared, adapter, display)
    won, verdict = judge(measured, config)
    sweep = {
        "study": STUDY,
        "trial": best.number,
        "point": best.point,
        "objective": best.best.objective,
        "default_objective": first.objective if (first := study.trials[0].best) else None,
        "trials": len(study.trials),
        "champion": won,
        "verdict": verdict,
        **facts,
    }
    steps = {
        "best_step": best.best.step,
        "steps": best.steps,
        "training_seconds": round(best.seconds, 1),
        "seconds": round(sum(trial.seconds for trial in study.trials), 1),
    }
    # a folder of its own in MLflow: of more trials another may win, and the version of this one stays what it was
    artifact = f"adapter-{name(best.number)}-step-{best.best.step}"
    metrics = finetune.conclude(
        chosen, prepared, measured, record, {**steps, "sweep": sweep}, artifact
    )
    _register(record, config, metrics, artifact, won)
    display.line(f"champion  {name(best.number)}: {verdict}")
    return metrics


def _best(study: Study) -> Trial:
    """The best trial, its adapter in its folder."""
    while (best := study.best()) and best.best:
        if _taken(study, best):
            return best
    reasons = "; ".join(
        f"{name(trial.number)}: {trial.reason}" for trial in study.trials[:3] if trial.reason
    )
    raise TrainingError(
        f"no trial of {study.run_dir} has a measured checkpoint ({reasons or 'none was trained'})"
    )


def _taken(study: Study, trial: Trial) -> bool:
    """Take a trial's adapter from its checkpoints once more: a driver may have been killed while the trial copied it. False where its best
    checkpoint turns out to be damaged; from then on it counts by what is left of it."""
    left = None
    with suppress(TrainingError):  # nothing is left
        left = train.keep_best(study.folder(trial.number))
    if left and trial.best and left.step == trial.best.step:
        return True
    measured = None
    if left and left.objective is not None:
        measured = Measure(left.step, left.objective, left.tie_break, dict(left.metrics))
    study.change(trial.number, best=measured)
    return False


def judge(measured: Measured, config: Config) -> tuple[bool, str]:
    """Whether the best trial wins on the held-out questions, and why: it must beat the base model, and the default settings must not
    beat it, by the paired test."""
    if "base" not in measured:
        return False, "not crowned: the base model was not measured (--evaluate.baseline)"
    test = measure.paired(measured, "base")
    against = (
        f"right where the base model is not on {test.only_b} held-out questions, wrong where it is "
        f"right on {test.only_a} (p = {test.p:.2g})"
    )
    if not test.b_is_better:
        return False, f"not crowned: {against}"
    if "default" in measured:
        test = measure.paired(measured, "default")
        against += (
            f"; against the default settings {test.only_b} to {test.only_a} (p = {test.p:.2g})"
        )
        if test.a_is_better:
            return False, f"not crowned: {against}"
    return True, against


def _settings(config: Config, trial: Trial) -> Config:
    """The settings that a trial was trained with, as those of a run in the study's folder; what is scored is for `config` to say."""
    return config.changed(space.read(config).settings(trial.point))


def _take(chosen: Config, study: Study, trial: Trial) -> str:
    """Copy the adapter of a trial's best checkpoint to the study's folder, with the recipe of a run of its own; returns where it is."""
    run = RunFolder(chosen.run_dir)
    run.write_settings(chosen.public())
    with tempfile.TemporaryDirectory(prefix="ray_sql-") as scratch:
        adapter = study.folder(trial.number).adapter
        run.write_adapter(storage.fetch(adapter.uri, Path(scratch) / "adapter"))
    return run.adapter.uri


def _measure(
    chosen: Config, study: Study, prepared: Prepared, adapter: str, display: Display
) -> Measured:
    """Judged answers of the base model, of the first trial (the default settings) where that is another, and of the best."""
    asked = prepared.questions(chosen)
    while study.trials[0].best and not _taken(study, study.trials[0]):
        pass
    first = study.trials[0]

    def answers(config: Config, adapter: str) -> Measured:
        points = progress.Progress(config, tracking.null_run(), display)
        return measure.of_models(
            config, asked, prepared.corpus.schemas, prepared.model_folder, adapter, display, points
        )

    found = answers(chosen, adapter)
    others = {model: rows for model, rows in found.items() if model != "tuned"}
    if first.best and first.number != study.best().number:  # type: ignore[union-attr]
        alone = _settings(chosen, first).changed({"evaluate.baseline": False})
        others["default"] = answers(alone, study.folder(first.number).adapter.uri)["tuned"]
    return {**others, "tuned": found["tuned"]}


def _register(
    record: tracking.Run, config: Config, metrics: Mapping[str, Any], artifact: str, won: bool
) -> None:
    main = TASKS[config.task_type].metric
    scores = metrics["tuned"].values()
    n = sum(one["n"] for one in scores)
    tags = {
        "score": str(sum(one[main] * one["n"] for one in scores) / max(1, n)),
        "metric": main,
        "measured_on": f"{metrics['data_fingerprint']} {','.join(config.split)} {n} {next(iter(scores)).get('semantics', '')}".strip(),
        "model_name": config.model_name,
    }
    record.register(f"ray-sql-{config.task_type}", artifact, tags, ALIAS, won)
