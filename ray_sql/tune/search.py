"""Where the next trial is: Optuna's TPE behind Ray Tune's OptunaSearch, repeatable over restarts, and ASHA on our own step."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search.optuna import OptunaSearch

from ray_sql.config import Config
from ray_sql.tune.space import Point, Space
from ray_sql.tune.study import SETTLED, Study

if TYPE_CHECKING:
    from optuna import Study as OptunaStudy
    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial, TrialState

STARTUP = 4
"""Trials drawn at random, the first one counted, before TPE has enough to learn from; of fewer than four times as many, a quarter."""
TRIES, CHANCES = 20, 200
"""TPE's draws in search of a point that was not tried before, and then draws at random; in a small space there may be none."""


class Draws(BaseSampler):  # type: ignore[misc]  # optuna is not followed by mypy
    """TPE over all axes jointly, as a function of the seed, the trial's number and what is known: a resumed study goes on as the
    unbroken one would, where a sampler that lives through it depends on how often it was asked. No point is drawn twice."""

    def __init__(self, space: dict[str, BaseDistribution], seed: int, startup: int) -> None:
        self._space, self._seed, self._startup = space, seed, startup

    def infer_relative_search_space(
        self, study: OptunaStudy, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """All axes, from the first trial on."""
        return self._space

    def sample_relative(
        self, study: OptunaStudy, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """A point that no other trial has."""
        known = [
            other.params
            for other in study.get_trials(deepcopy=False)
            if other.number < trial.number
        ]
        point: dict[str, Any] = {}
        for attempt in range(TRIES + CHANCES):
            point = self._draw(study, trial, attempt)
            if point not in known:
                break
        return point

    def sample_independent(
        self,
        study: OptunaStudy,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """What is not drawn jointly, which is nothing, at random."""
        return RandomSampler(self._seed + trial.number).sample_independent(
            study, trial, param_name, param_distribution
        )

    def _draw(self, study: OptunaStudy, trial: FrozenTrial, attempt: int) -> dict[str, Any]:
        seed = (self._seed * 1_000_003 + trial.number * 1_009 + attempt) % 2**32
        if trial.number < self._startup or attempt >= TRIES:
            chance = RandomSampler(seed)
            return {
                name: chance.sample_independent(study, trial, name, axis)
                for name, axis in self._space.items()
            }
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            tpe = TPESampler(seed=seed, multivariate=True, constant_liar=True, n_startup_trials=0)
        return dict(tpe.sample_relative(study, trial, self._space))

    def after_trial(
        self, study: OptunaStudy, trial: FrozenTrial, state: TrialState, values: Any
    ) -> None:
        """Nothing: all that is known lies in the study."""


class Search(OptunaSearch):  # type: ignore[misc]  # ray is not followed by mypy
    """OptunaSearch that writes each trial down before it starts, and asks for those that a resumed study has first."""

    def __init__(self, space: Space, study: Study) -> None:
        self._study_file, self._points, self._asked = study, space, 0
        axes = {axis.name: axis.distribution() for axis in space.axes}
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        startup = max(2, min(STARTUP, space.config.tune.num_samples // 4))
        super().__init__(
            axes,
            metric="score",
            mode="max",
            sampler=Draws(axes, space.config.seed, startup),
            points_to_evaluate=[trial.point for trial in study.trials] or [space.start()],
        )

    def suggest(self, trial_id: str) -> dict[str, Any]:
        """The next trial as its process gets it: number, settings, and how an earlier attempt settled it, if one did."""
        point: Point = dict(super().suggest(trial_id))
        trial = self._study_file.ask(self._asked, point)
        self._asked += 1
        changes = self._points.settings(trial.point)
        return {
            "trial": trial.number,
            "changes": changes,
            "settled": trial.state if trial.state in SETTLED else None,
        }

    def save(self, checkpoint_path: str) -> None:
        """Nothing: a resumed sweep reads the study's own file."""
        Path(checkpoint_path).touch()


class Halving(ASHAScheduler):  # type: ignore[misc]
    """ASHA, but the first trial goes on to the end: it is what the best is compared with, and must have had its chance."""

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Whether a trial goes on."""
        decision = str(super().on_trial_result(tune_controller, trial, result))
        return TrialScheduler.CONTINUE if trial.config["trial"] == 0 else decision


def scheduler(config: Config, steps: int) -> TrialScheduler:
    """ASHA with rungs at grace_period x reduction_factor^k optimizer steps, or none."""
    if config.tune.scheduler == "fifo":
        return FIFOScheduler()
    return Halving(
        time_attr="step",  # Tune's own `training_iteration` starts anew with every restart of a trial
        metric="score",
        mode="max",
        max_t=steps,
        grace_period=grace(config, steps),
        reduction_factor=config.tune.reduction_factor,
    )


def grace(config: Config, steps: int) -> int:
    """Steps before a trial may be stopped."""
    return min(steps, config.tune.grace_period or config.evaluate.eval_steps or config.save_steps)


def rungs(config: Config, steps: int) -> list[int]:
    """The measured steps at which a trial may be stopped."""
    every = config.evaluate.eval_steps or config.save_steps
    if config.tune.scheduler == "fifo":
        return []
    found, rung = [], float(grace(config, steps))
    while rung < steps:
        found.append(int(-(-rung // every) * every))
        rung *= config.tune.reduction_factor
    return [step for step in dict.fromkeys(found) if step < steps]
