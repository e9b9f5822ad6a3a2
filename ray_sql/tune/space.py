"""The axes of a sweep: settings to vary, each checked before anything starts.

An axis may be any setting that shapes the adapter and leaves questions, rows and the number of
steps alone. Trials answer the same questions, read the same rows, and are compared at the same
step.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from ray_sql.config import Config, names
from ray_sql.errors import ConfigError

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

Kind = Literal["choice", "uniform", "loguniform", "randint", "lograndint"]
Point = dict[str, Any]
"""A trial's values, by setting."""
Validate = Callable[[str, Any], Any]
"""Returns a setting's value after the validation that every setting gets; raises `ConfigError`."""

TUNABLE = ("learning_rate", "lora.", "train.")
BUDGET = {"train.max_steps", "train.global_batch_size"}
"""Settings that decide how many examples a trial has seen at a step; they must be equal for all."""
WITHOUT_EFFECT = {"train.logging_steps", "train.gradient_checkpointing"}


@dataclass(frozen=True)
class Axis:
    """One setting, and its values: those of a choice, or the bounds of a range, both included."""

    name: str
    kind: Kind
    values: tuple[Any, ...]

    @property
    def text(self) -> str:
        """Describe the axis: `learning_rate loguniform 2e-05 … 0.002`."""
        return f"{self.name} {self.range}"

    @property
    def range(self) -> str:
        """Describe the values: `loguniform 2e-05 … 0.002`."""
        between = ", " if self.kind == "choice" else " … "
        return f"{self.kind} {between.join(map(shown, self.values))}"

    @property
    def is_logarithmic(self) -> bool:
        """Tell whether values are drawn, and plotted, by their order of magnitude."""
        return self.kind.startswith("log")

    def holds(self, value: Any) -> bool:
        """Tell whether the axis can draw `value`."""
        if self.kind == "choice":
            return value in self.values
        return bool(self.values[0] <= value <= self.values[1])

    def distribution(self) -> BaseDistribution:
        """Return the axis as Optuna knows it."""
        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

        if self.kind == "choice":
            return CategoricalDistribution(self.values)
        low, high = self.values
        kind = FloatDistribution if self.kind.endswith("uniform") else IntDistribution
        return kind(low, high, log=self.is_logarithmic)


@dataclass(frozen=True)
class Space:
    """The axes of a sweep, and the point where the settings themselves are."""

    axes: tuple[Axis, ...]
    start: Point
    rank: int
    alpha: float
    """`lora.r` and `lora.lora_alpha` of the settings."""

    def changes(self, point: Point) -> dict[str, Any]:
        """Return the settings that a trial at `point` changes.

        A rank brings its lora_alpha at the settings' own ratio; else the two would be confounded.
        """
        changes = dict(point)
        if "lora.r" in point:
            changes.setdefault("lora.lora_alpha", point["lora.r"] * self.alpha / self.rank)
        return changes


def read(config: Config) -> Space:
    """Return the axes of `tune.space`.

    Raises `ConfigError` for an unknown or malformed axis, and for one that may not be varied.
    Raises it also for a value that its setting does not take, and for settings outside their axis.
    The message names the axis.
    """
    if not config.tune.space:
        raise ConfigError(
            "tune.space is empty: name at least one setting to vary, or leave it out for rate and "
            "rank"
        )

    def validate(name: str, value: Any) -> Any:
        return config.changed({name: value}).setting(name)

    axes = tuple(_axis(name, given, validate) for name, given in config.tune.space.items())
    start = {axis.name: config.setting(axis.name) for axis in axes}
    for axis in axes:
        if not axis.holds(start[axis.name]):
            raise ConfigError(
                f"tune.space: the first trial has the settings as they are, but {axis.name} "
                f"{shown(start[axis.name])} is not in {axis.range}: widen the axis, or set "
                f"{axis.name} to a value in it"
            )
    return Space(axes, start, config.lora.r, config.lora.lora_alpha)


def shown(value: Any) -> str:
    """Write a value as people read it most easily."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def shown_point(point: Point) -> str:
    """Write a point: `learning_rate 0.0001, lora.r 64`."""
    return ", ".join(f"{name} {shown(value)}" for name, value in point.items())


def _axis(name: str, given: Mapping[str, Sequence[Any]], validate: Validate) -> Axis:
    _check_name(name)
    if len(given) != 1 or next(iter(given)) not in get_args(Kind):
        raise ConfigError(
            f"tune.space: {name} is {dict(given)}; give it one of {', '.join(get_args(Kind))}, "
            f"e.g. {name}: {{choice: [a, b]}}"
        )
    ((kind, values),) = given.items()
    checked = tuple(_value(name, value, validate) for value in values)
    wanted = "two or more different values" if kind == "choice" else "two different bounds"
    enough = len(checked) >= 2 if kind == "choice" else len(checked) == 2
    if not enough or len(set(checked)) != len(checked):
        raise ConfigError(f"tune.space: {name}: {kind} takes {wanted}, given {list(values)}")
    if kind != "choice":
        _check_bounds(name, kind, checked)
    return Axis(name, kind, checked)  # type: ignore[arg-type]  # checked above to be a Kind


def _check_name(name: str) -> None:
    known = [setting for setting, _ in names(Config)]
    if name not in known:
        near = difflib.get_close_matches(name, known, 1, 0.6)
        near += [setting for setting in known if setting.split(".")[-1] == name]
        hint = f"did you mean {near[0]}?" if near else "--help lists all"
        raise ConfigError(f"tune.space: {name} is no setting; {hint}")
    if name in BUDGET | WITHOUT_EFFECT or not name.startswith(TUNABLE):
        raise ConfigError(
            f"tune.space: {name} cannot be an axis: trials read the same rows, answer the same "
            "questions, and are compared at the same step. Set it for the whole sweep; axes are "
            "learning_rate and settings of lora and train"
        )


def _value(name: str, value: Any, validate: Validate) -> Any:
    if isinstance(value, list | dict):
        raise ConfigError(f"tune.space: {name}: {value} is not a single value; give single values")
    try:
        return validate(name, value)
    except ConfigError as error:
        raise ConfigError(f"tune.space: {error}") from None


def _check_bounds(name: str, kind: str, bounds: tuple[Any, ...]) -> None:
    low, high = bounds
    if not all(isinstance(bound, int | float) and not isinstance(bound, bool) for bound in bounds):
        raise ConfigError(f"tune.space: {name} is not a number: give it a choice of values")
    logarithmic = kind.startswith("log")
    if low > high or (logarithmic and low <= 0):
        wanted = "two bounds above 0" if logarithmic else "two bounds"
        raise ConfigError(
            f"tune.space: {name}: {kind} takes {wanted}, the lower one first, given {list(bounds)}"
        )
    if kind.endswith("uniform") and isinstance(low, int):
        right = kind.replace("uniform", "randint")
        raise ConfigError(f"tune.space: {name} is a whole number: use {right}")
    if kind.endswith("randint") and not isinstance(low, int):
        right = kind.replace("randint", "uniform")
        raise ConfigError(f"tune.space: {name} is no whole number: use {right}")
