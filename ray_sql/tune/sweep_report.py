"""`sweep.html`: the figures and every trial of a study in one file, like a run's `report.html`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ray_sql.display import percent
from ray_sql.report import figures as plots
from ray_sql.report import html
from ray_sql.store import storage
from ray_sql.tune.objective import Objective
from ray_sql.tune.session import StudySession
from ray_sql.tune.space import Axis, Space, shown
from ray_sql.tune.study import Study, TrialRecord, read_scores

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NOTE = (
    "The objective is that of a trial's best checkpoint on the validation questions, which chose "
    "it: expect less of it on others. The first trial has the settings as they were given. A trial "
    "marked stopped fell behind the others at a rung of ASHA."
)


def write(session: StudySession, used: str) -> dict[str, Figure]:
    """Write the page into the study's folder. Returns its figures by file name."""
    config, study, space = session.config, session.study, session.space
    goal = Objective.of(config)
    figures = draw(goal, space, study)
    axes = [axis.name for axis in space.axes]
    page = html.render(
        "sweep.jinja",
        f"{config.output_name}: {len(study.trials)} trials",
        _facts(session, used),
        figures,
        header=["trial", *axes, "steps", goal.axis_label, "tie-break", "minutes", "state"],
        trials=[_row(goal, space, study, trial) for trial in study.trials],
        note=NOTE,
    )
    storage.write_text(study.folder.sweep_report, page)
    return figures


def draw(goal: Objective, space: Space, study: Study) -> dict[str, Figure]:
    """Draw every trial's best over the axes, and the objectives by step, if any was measured."""
    best = study.best()
    if best is None:
        return {}
    trials = [
        {
            **trial.point,
            "trial": trial.number,
            "objective": goal.plotted(trial.best.objective) if trial.best else None,
            "stopped": trial.state == "stopped",
        }
        for trial in study.trials
    ]
    curves = {}
    for trial in study.trials:
        scores = read_scores(study.trial_folder(trial.number))
        if scores:
            curves[trial.name] = [(score.step, goal.plotted(score.objective)) for score in scores]
    axes = [(axis.name, _scale(axis)) for axis in space.axes]
    return {
        "objective.png": plots.sweep(trials, axes, goal.axis_label),
        "courses.png": plots.learning_curves(curves, best.name, goal.axis_label),
    }


def _scale(axis: Axis) -> str:
    if axis.kind == "choice":
        return "category"
    return "log" if axis.is_logarithmic else "linear"


def _facts(session: StudySession, used: str) -> Mapping[str, str]:
    config, study = session.config, session.study
    best = study.best()
    facts: dict[str, Any] = {
        "task": config.task_type,
        "data": config.dataset_id,
        "base model": config.model_name,
        "best": best.name if best else "none",
        "used": used,
        "MLflow run": study.mlflow_run_id,
    }
    return {name: str(value) for name, value in facts.items() if value}


def _row(goal: Objective, space: Space, study: Study, trial: TrialRecord) -> tuple[str, list[str]]:
    """Return (CSS class, cells) of a trial."""
    best = study.best()
    is_best = best is not None and best.number == trial.number
    score, tie_break = "", ""
    if trial.best:
        score = goal.text(trial.best.objective)
        tie_break = "" if trial.best.tie_break is None else percent(trial.best.tie_break)
    name = trial.name + (" (the settings)" if trial.number == 0 else "")
    state = trial.state + (f": {trial.reason}" if trial.reason else "")
    values = [shown(trial.point[axis.name]) for axis in space.axes]
    minutes = f"{trial.seconds / 60:.1f}"
    cells = [name, *values, str(trial.steps), score, tie_break, minutes, state]
    return "best" if is_best else trial.state, cells
