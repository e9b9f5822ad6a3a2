"""What a sweep varies: axes of settings, each checked before anything starts, and the point that the settings themselves are.

An axis may be whatever shapes the adapter and leaves the questions, the rows and the number of steps alone: trials are judged on the same
questions, read the same rows, and are compared at the same step.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from ray_sql.config import Config, names
from ray_sql.errors import ConfigError

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

Kind = Literal["choice", "uniform", "loguniform", "randint", "lograndint"]
Point = dict[str, Any]
"""A trial's values, by setting."""

TUNABLE = ("learning_rate", "lora.", "train.")
BUDGET = {"train.max_steps", "train.global_batch_size"}
"""Settings that decide how many steps there are or how much one sees: at a step, trials must have seen equally much."""
WITHOUT_EFFECT = {"train.logging_steps", "train.gradient_checkpointing"}


@dataclass(frozen=True)
class Axis:
    """One setting, and what it is drawn from: the values of a choice, or the bounds of a range, both included."""

    name: str
    kind: Kind
    values: tuple[Any, ...]

    @property
    def text(self) -> str:
        """For people: `learning_rate loguniform 2e-05 … 0.002`."""
        return f"{self.name} {self.kind} {(', ' if self.kind == 'choice' else ' … ').join(map(shown, self.values))}"

    def holds(self, value: Any) -> bool:
        """Whether the axis can draw `value`."""
        if self.kind == "choice":
            return value in self.values
        return bool(self.values[0] <= value <= self.values[1])

    def distribution(self) -> BaseDistribution:
        """The same in Optuna's words."""
        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

        if self.kind == "choice":
            return CategoricalDistribution(self.values)
        low, high = self.values
        made = FloatDistribution if self.kind.endswith("uniform") else IntDistribution
        return made(low, high, log=self.kind.startswith("log"))


@dataclass(frozen=True)
class Space:
    """The axes of a sweep over the settings `config`."""

    config: Config
    axes: tuple[Axis, ...]

    def settings(self, point: Point) -> dict[str, Any]:
        """What a trial at `point` changes. With the rank goes lora_alpha at the settings' own ratio, or the two would be confounded."""
        changes = dict(point)
        if "lora.r" in point and "lora.lora_alpha" not in point:
            changes["lora.lora_alpha"] = (
                point["lora.r"] * self.config.lora.lora_alpha / self.config.lora.r
            )
        return changes

    def start(self) -> Point:
        """The point where the settings themselves are."""
        return {axis.name: self.config.setting(axis.name) for axis in self.axes}


def read(config: Config) -> Space:
    """The axes of `tune.space`. Raises `ConfigError`, naming the axis, for one that is unknown, malformed or may not be varied, for a
    value that its setting does not take, and where the settings themselves lie outside."""
    if not config.tune.space:
        raise ConfigError(
            "tune.space is empty: name at least one setting to vary, or leave it out for rate and rank"
        )
    axes = tuple(_axis(name, given, config) for name, given in config.tune.space.items())
    space = Space(config, axes)
    for axis, value in zip(axes, space.start().values(), strict=True):
        if not axis.holds(value):
            raise ConfigError(
                f"tune.space: the first trial has the settings as they are, but {axis.name} {shown(value)} is not in "
                f"{axis.text.removeprefix(axis.name).strip()}: widen the axis, or set {axis.name} to a value in it"
            )
    return space


def shown(value: Any) -> str:
    """A value as it is read most easily."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _axis(name: str, given: Mapping[str, Sequence[Any]], config: Config) -> Axis:
    _check_name(name)
    if len(given) != 1 or next(iter(given)) not in get_args(Kind):
        raise ConfigError(
            f"tune.space: {name} is {dict(given)}; give it one of {', '.join(get_args(Kind))}, e.g. {name}: {{choice: [a, b]}}"
        )
    ((kind, values),) = given.items()
    checked = tuple(_value(name, value, config) for value in values)
    if (
        len(set(checked)) != len(checked)
        or len(checked) < 2
        or (kind != "choice" and len(checked) != 2)
    ):
        wanted = "two or more different values" if kind == "choice" else "two different bounds"
        raise ConfigError(f"tune.space: {name}: {kind} takes {wanted}, given {list(values)}")
    if kind != "choice":
        _check_bounds(name, kind, checked)
    return Axis(name, kind, checked)  # type: ignore[arg-type]  # that it is a Kind was seen above


def _check_name(name: str) -> None:
    known = [known for known, _ in names(Config)]
    if name not in known:
        near = (
            difflib.get_close_matches(name, known, 1, 0.6)
            or [n for n in known if n.split(".")[-1] == name][:1]
        )
        raise ConfigError(
            f"tune.space: {name} is no setting"
            + (f"; did you mean {near[0]}?" if near else "; --help lists all")
        )
    if name in BUDGET | WITHOUT_EFFECT or not name.startswith(TUNABLE):
        raise ConfigError(
            f"tune.space: {name} cannot be an axis: trials read the same rows, answer the same questions, and are compared at the same "
            f"step. Set it for the whole sweep; axes are learning_rate and settings of lora and train"
        )


def _value(name: str, value: Any, config: Config) -> Any:
    """The value as its setting has it, after the validation every setting gets."""
    if isinstance(value, list | dict):
        raise ConfigError(
            f"tune.space: {name}: {value} is not a single value; axes are drawn from single values"
        )
    try:
        return config.changed({name: value}).setting(name)
    except ConfigError as error:
        raise ConfigError(f"tune.space: {error}") from None


def _check_bounds(name: str, kind: str, bounds: tuple[Any, ...]) -> None:
    low, high = bounds
    if not all(isinstance(bound, int | float) and not isinstance(bound, bool) for bound in bounds):
        raise ConfigError(f"tune.space: {name} is not a number: give it a choice of values")
    if low > high or (kind.startswith("log") and low <= 0):
        wanted = "two bounds above 0" if kind.startswith("log") else "two bounds"
        raise ConfigError(
            f"tune.space: {name}: {kind} takes {wanted}, the lower one first, given {list(bounds)}"
        )
    if kind.endswith("uniform") == isinstance(low, int):
        right = (
            kind.replace("uniform", "randint")
            if isinstance(low, int)
            else kind.replace("randint", "uniform")
        )
        raise ConfigError(
            f"tune.space: {name} is {'a whole' if isinstance(low, int) else 'no whole'} number: use {right}"
        )
