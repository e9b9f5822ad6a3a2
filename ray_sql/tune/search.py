"""Choose the next trial: Optuna's TPE behind Ray Tune's OptunaSearch, and ASHA on our own step.

Both repeat over restarts: a resumed study goes on as the unbroken one would.
"""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search.optuna import OptunaSearch

from ray_sql.tune.space import Point, Space
from ray_sql.tune.study import SETTLED, Study

if TYPE_CHECKING:
    from optuna import Study as OptunaStudy
    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial, TrialState

    from ray_sql.config.sections import TuneSection

STARTUP_TRIALS = 4
"""Trials drawn at random before TPE learns from them; of fewer than 16 trials, a quarter."""
TPE_DRAWS = 20
"""Draws of TPE in search of a point that was not tried before."""
RANDOM_DRAWS = 200
"""Draws at random after those. In a small space there may be no new point."""


class RepeatableSampler(BaseSampler):  # type: ignore[misc]  # optuna is not followed by mypy
    """TPE over all axes jointly. Its draw depends on the seed, the trial's number and the results.

    A sampler that lives through a study also depends on how often it was asked, which a resumed
    study cannot repeat. No point is drawn twice.
    """

    def __init__(self, axes: dict[str, BaseDistribution], seed: int, startup: int) -> None:
        self._axes, self._seed, self._startup = axes, seed, startup

    def infer_relative_search_space(
        self, study: OptunaStudy, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """Return all axes, from the first trial on."""
        return self._axes

    def sample_relative(
        self, study: OptunaStudy, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Return a point that no other trial has."""
        trials = study.get_trials(deepcopy=False)
        tried = [other.params for other in trials if other.number < trial.number]
        point: dict[str, Any] = {}
        for attempt in range(TPE_DRAWS + RANDOM_DRAWS):
            point = self._draw(study, trial, attempt)
            if point not in tried:
                break
        return point

    def sample_independent(
        self, study: OptunaStudy, trial: FrozenTrial, param_name: str, param_distribution: Any
    ) -> Any:
        """Draw at random an axis that is not drawn jointly. There is none."""
        sampler = RandomSampler(self._seed + trial.number)
        return sampler.sample_independent(study, trial, param_name, param_distribution)

    def after_trial(
        self, study: OptunaStudy, trial: FrozenTrial, state: TrialState, values: Any
    ) -> None:
        """Keep nothing: the study holds all results."""

    def _draw(self, study: OptunaStudy, trial: FrozenTrial, attempt: int) -> dict[str, Any]:
        seed = (self._seed * 1_000_003 + trial.number * 1_009 + attempt) % 2**32
        if trial.number < self._startup or attempt >= TPE_DRAWS:
            sampler = RandomSampler(seed)
            return {
                name: sampler.sample_independent(study, trial, name, axis)
                for name, axis in self._axes.items()
            }
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            tpe = TPESampler(seed=seed, multivariate=True, constant_liar=True, n_startup_trials=0)
        return dict(tpe.sample_relative(study, trial, self._axes))


class StudySearch(OptunaSearch):  # type: ignore[misc]  # ray is not followed by mypy
    """OptunaSearch that writes each trial into the study's file before the trial starts.

    It asks for the trials of a resumed study first.
    """

    def __init__(self, space: Space, study: Study, num_samples: int, seed: int) -> None:
        self._study, self._points, self._suggested = study, space, 0
        axes = {axis.name: axis.distribution() for axis in space.axes}
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        startup = max(2, min(STARTUP_TRIALS, num_samples // 4))
        super().__init__(
            axes,
            metric="score",
            mode="max",
            sampler=RepeatableSampler(axes, seed, startup),
            points_to_evaluate=[trial.point for trial in study.trials] or [space.start],
        )

    def suggest(self, trial_id: str) -> dict[str, Any]:
        """Return the next trial as its process gets it.

        That is its number, its settings, and how an earlier attempt settled it, if one did.
        """
        point: Point = dict(super().suggest(trial_id))
        trial = self._study.trial_at(self._suggested, point)
        self._suggested += 1
        return {
            "trial": trial.number,
            "changes": self._points.changes(trial.point),
            "settled": trial.state if trial.state in SETTLED else None,
        }

    def save(self, checkpoint_path: str) -> None:
        """Write an empty file: a resumed sweep reads the study's own."""
        Path(checkpoint_path).touch()


class AshaButFirst(ASHAScheduler):  # type: ignore[misc]
    """ASHA that never stops the first trial, which the best one is compared with."""

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Decide whether a trial goes on."""
        decision = str(super().on_trial_result(tune_controller, trial, result))
        return TrialScheduler.CONTINUE if trial.config["trial"] == 0 else decision


def scheduler(tune: TuneSection, steps: int, eval_every: int) -> TrialScheduler:
    """Return ASHA with rungs at grace_period x reduction_factor^k optimizer steps, or none.

    `eval_every` is the number of steps between two evaluations.
    """
    if tune.scheduler == "fifo":
        return FIFOScheduler()
    return AshaButFirst(
        time_attr="step",  # Tune's own `training_iteration` starts anew with every restart
        metric="score",
        mode="max",
        max_t=steps,
        grace_period=grace_period(tune, steps, eval_every),
        reduction_factor=tune.reduction_factor,
    )


def grace_period(tune: TuneSection, steps: int, eval_every: int) -> int:
    """Return the steps before a trial may be stopped."""
    return min(steps, tune.grace_period or eval_every)


def rungs(tune: TuneSection, steps: int, eval_every: int) -> list[int]:
    """Return the evaluated steps at which a trial may be stopped."""
    if tune.scheduler == "fifo":
        return []
    stops: list[int] = []
    rung = float(grace_period(tune, steps, eval_every))
    while rung < steps:
        evaluated = math.ceil(rung / eval_every) * eval_every
        if evaluated < steps and evaluated not in stops:
            stops.append(evaluated)
        rung *= tune.reduction_factor
    return stops
