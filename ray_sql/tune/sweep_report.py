"""`sweep.html`: the figures and every trial of a study in one file, like a run's `report.html`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ray_sql.config import Config
from ray_sql.display import percent
from ray_sql.report import figures as plots
from ray_sql.report import html
from ray_sql.store import storage
from ray_sql.store.run_folder import RunFolder
from ray_sql.tune.objective import Objective
from ray_sql.tune.space import Axis, Space, shown
from ray_sql.tune.study import Study, Trial, measured, name

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NOTE = (
    "The objective is that of a trial's best checkpoint on the validation questions, which chose it: expect less of it on others. "
    "The first trial has the settings as they were given. A trial marked stopped fell behind the others at a rung of ASHA."
)


def write(config: Config, space: Space, study: Study, hours: str) -> dict[str, Figure]:
    """Write the page into the study's folder; returns its figures by file name."""
    made = figures(config, space, study)
    page = html.render(
        "sweep.jinja",
        f"{config.output_name}: {len(study.trials)} trials",
        _facts(config, study, hours),
        made,
        header=[
            "trial",
            *(axis.name for axis in space.axes),
            "steps",
            Objective.of(config).axis_label,
            "tie-break",
            "minutes",
            "state",
        ],
        trials=[_row(config, space, study, trial) for trial in study.trials],
        note=NOTE,
    )
    storage.write_text(RunFolder(study.run_dir).sweep_report, page)
    return made


def figures(config: Config, space: Space, study: Study) -> dict[str, Figure]:
    """Every trial's best over the axes, and the objectives by step."""
    objective = Objective.of(config)
    rows = [
        {
            **trial.point,
            "trial": trial.number,
            "objective": objective.plotted(trial.best.objective) if trial.best else None,
            "stopped": trial.state == "stopped",
        }
        for trial in study.trials
    ]
    courses = {
        name(trial.number): [(one.step, objective.plotted(one.objective)) for one in points]
        for trial in study.trials
        if (points := measured(study.folder(trial.number)))
    }
    best = study.best()
    return {
        "objective.png": plots.sweep(
            rows, [(axis.name, _kind(axis)) for axis in space.axes], objective.axis_label
        ),
        "courses.png": plots.courses(
            courses, name(best.number) if best else "", objective.axis_label
        ),
    }


def _kind(axis: Axis) -> str:
    if axis.kind != "choice":
        return "log" if axis.kind.startswith("log") else "linear"
    return "category"


def _facts(config: Config, study: Study, hours: str) -> Mapping[str, str]:
    best = study.best()
    known: dict[str, Any] = {
        "task": config.task_type,
        "data": config.dataset_id,
        "base model": config.model_name,
        "best": name(best.number) if best else "none",
        "used": hours,
        "MLflow run": study.mlflow_run_id,
    }
    return {key: str(one) for key, one in known.items() if one}


def _row(config: Config, space: Space, study: Study, trial: Trial) -> tuple[str, list[str]]:
    best = study.best()
    chief = best is not None and best.number == trial.number
    objective = Objective.of(config).text(trial.best.objective) if trial.best else ""
    tie_break = (
        "" if trial.best is None or trial.best.tie_break is None else percent(trial.best.tie_break)
    )
    called = name(trial.number) + (" (the settings)" if trial.number == 0 else "")
    state = trial.state + (f": {trial.reason}" if trial.reason else "")
    values = [shown(trial.point[axis.name]) for axis in space.axes]
    cells = [
        called,
        *values,
        str(trial.steps),
        objective,
        tie_break,
        f"{trial.seconds / 60:.1f}",
        state,
    ]
    return "best" if chief else trial.state, cells
