"""The best trial's adapter, measured where the sweep never looked.

On the held-out splits it is compared with the base model and the default settings, question by
question. The results lie in the study's folder as a run's do, and in MLflow's registry.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ray_sql import tracking, train
from ray_sql.config import Config
from ray_sql.errors import TrainingError
from ray_sql.evaluate.models import evaluate_models
from ray_sql.evaluate.results import paired
from ray_sql.finetune.results import conclude
from ray_sql.metrics.judged import Evaluation
from ray_sql.report.progress import Progress
from ray_sql.store import storage
from ray_sql.store.run_folder import STUDY, RunFolder
from ray_sql.tasks import TASKS
from ray_sql.tune.objective import Objective
from ray_sql.tune.session import StudySession
from ray_sql.tune.space import shown_point
from ray_sql.tune.study import StepScore, Study, TrialRecord

ALIAS = "champion"


def choose(session: StudySession, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Measure and register the best trial. Returns the content of `metrics.json`.

    Raises `TrainingError` if no trial has a checkpoint that was evaluated.
    """
    study, config = session.study, session.config
    best = _best_trial(study)
    score = best.best
    assert score
    chosen = config.changed(session.space.changes(best.point))
    _take_adapter(chosen, study, best)
    session.mark_winner(best)
    evaluation = _evaluate(session, chosen, best)
    won, verdict = judge(evaluation)
    first = study.trials[0].best
    sweep = {
        "study": STUDY,
        "trial": best.number,
        "point": best.point,
        "objective": score.objective,
        "default_objective": first.objective if first else None,
        "trials": len(study.trials),
        "chosen": _why_chosen(session, best, score),
        "champion": won,
        "verdict": verdict,
        **facts,
    }
    steps = {
        "best_step": score.step,
        "objective": score.objective,
        "steps": best.steps,
        "training_seconds": round(best.seconds, 1),
        "seconds": round(sum(trial.seconds for trial in study.trials), 1),
    }
    # a folder of its own in MLflow: with more trials another may win, and this version stays
    artifact = f"adapter-{best.name}-step-{score.step}"
    every_fact = {**steps, "sweep": sweep}
    metrics = conclude(chosen, session.prepared, evaluation, session.record, every_fact, artifact)
    _register(session.record, metrics, artifact, won)
    session.display.line(f"champion  {best.name}: {verdict}")
    return metrics


def _why_chosen(session: StudySession, best: TrialRecord, score: StepScore) -> str:
    """Say by what a trial won, and what the default settings had."""
    trials, goal = session.study.trials, Objective.of(session.config)
    first, questions = trials[0], len(session.prepared.validation())
    text = (
        f"{best.name} won of {len(trials)} trials: {goal.label} {goal.text(score.objective)} on "
        f"{questions} validation questions at step {score.step}, with {shown_point(best.point)}"
    )
    if first.best and first.number != best.number:
        had = goal.text(first.best.objective)
        text += f"; the default settings had {had} ({first.name})"
    return text


def judge(evaluation: Evaluation) -> tuple[bool, str]:
    """Return whether the best trial wins on the held-out questions, and why.

    By the paired test it must beat the base model, and the default settings must not beat it.
    """
    if "base" not in evaluation:
        return False, "not crowned: the base model was not measured (--evaluate.baseline)"
    test = paired(evaluation, "base")
    verdict = (
        f"right where the base model is not on {test.only_b} held-out questions, wrong where it is "
        f"right on {test.only_a} (p = {test.p:.2g})"
    )
    if not test.b_is_better:
        return False, f"not crowned: {verdict}"
    if "default" in evaluation:
        test = paired(evaluation, "default")
        counts = f"{test.only_b} to {test.only_a}"
        verdict += f"; against the default settings {counts} (p = {test.p:.2g})"
        if test.a_is_better:
            return False, f"not crowned: {verdict}"
    return True, verdict


def _best_trial(study: Study) -> TrialRecord:
    """Return the best trial; its adapter lies in its folder."""
    best = study.best()
    while best:
        if _keep_adapter(study, best):
            return best
        best = study.best()
    failed = [f"{trial.name}: {trial.reason}" for trial in study.trials[:3] if trial.reason]
    reasons = "; ".join(failed) or "none was trained"
    raise TrainingError(f"no trial of {study.folder} has a measured checkpoint ({reasons})")


def _keep_adapter(study: Study, trial: TrialRecord) -> bool:
    """Copy a trial's best adapter from its checkpoints again; a killed driver may have cut it off.

    Returns False where its best checkpoint is damaged. From then on the trial counts by the best of
    its other checkpoints.
    """
    kept = None
    with suppress(TrainingError):  # no checkpoint is left
        kept = train.keep_best(study.trial_folder(trial.number))
    if kept and trial.best and kept.step == trial.best.step:
        return True
    score = None
    if kept and kept.objective is not None:
        score = StepScore(kept.step, kept.objective, kept.tie_break, dict(kept.metrics))
    study.change(trial.number, best=score)
    return False


def _take_adapter(chosen: Config, study: Study, trial: TrialRecord) -> None:
    """Copy a trial's adapter to the study's folder, with the recipe of a run of its own."""
    folder = RunFolder(chosen.run_dir)
    folder.write_settings(chosen.public())
    with tempfile.TemporaryDirectory(prefix="ray_sql-") as scratch:
        adapter = study.trial_folder(trial.number).adapter.uri
        folder.write_adapter(storage.fetch(adapter, Path(scratch) / "adapter"))


def _evaluate(session: StudySession, chosen: Config, best: TrialRecord) -> Evaluation:
    """Judge answers of the base model, the first trial where that is another, and the best."""
    study = session.study
    while study.trials[0].best and not _keep_adapter(study, study.trials[0]):
        pass  # the next best checkpoint is tried
    first = study.trials[0]

    def evaluate(config: Config, adapter: str, name: str) -> Evaluation:
        progress = Progress(RunFolder(config.run_dir), tracking.null_run(), session.display)
        return evaluate_models(
            config,
            session.questions,
            session.prepared.judged_schemas,
            session.prepared.model_folder,
            adapter,
            session.display,
            progress,
            called={"tuned": name},
        )

    evaluation = evaluate(chosen, RunFolder(chosen.run_dir).adapter.uri, "tuned")
    tuned = evaluation.pop("tuned")
    if first.best and first.number != best.number:
        alone = chosen.changed(session.space.changes(first.point))
        alone = alone.changed({"evaluate.baseline": False})
        adapter = study.trial_folder(first.number).adapter.uri
        evaluation["default"] = evaluate(alone, adapter, "default")["tuned"]
    return {**evaluation, "tuned": tuned}


def _register(record: tracking.Run, metrics: Mapping[str, Any], artifact: str, won: bool) -> None:
    task = TASKS[metrics["task_type"]]
    scores = metrics["tuned"].values()
    n = sum(split["n"] for split in scores)
    correct = sum(split[task.metric] * split["n"] for split in scores)
    semantics = next((split.get("semantics", "") for split in scores), "")
    splits = ",".join(metrics["tuned"])
    tags = {
        "score": str(correct / max(1, n)),
        "metric": task.metric,
        "measured_on": f"{metrics['data_fingerprint']} {splits} {n} {semantics}".strip(),
        "model_name": metrics["model_name"],
    }
    record.register(f"ray-sql-{task.name}", artifact, tags, ALIAS, won)
