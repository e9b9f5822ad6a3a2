"""Settings from flags, `--config` files and the environment.

A job ignores the settings of a run that it does not use. So a run's YAML file, config.json or flags
can be given to it as they are.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_origin

import yaml
from pydantic_settings import CliSettingsSource, SettingsError

from ray_sql.config.base import JobConfig
from ray_sql.config.settings import Config
from ray_sql.config.validate import REMOVED, build, merge, names, nearest, nested, without_unused
from ray_sql.errors import ConfigError

C = TypeVar("C", bound=JobConfig)

ENVIRONMENT = {"HF_TOKEN": ("read_token", "write_token"), "MLFLOW_TRACKING_URI": ("tracking.uri",)}
"""Environment variables that hold settings by convention, and the settings that they fill."""


def load(kind: type[C], argv: Sequence[str] | None = None, **overrides: Any) -> C:
    """Return settings from flags, `--config` files and the environment.

    Raises `ConfigError` with one line per mistake, each naming the flag or file and key, what was
    given and what is allowed.
    """
    argv = sys.argv[1:] if argv is None else argv
    flags = merge(_read_flags(argv, kind), nested(overrides))
    sources = {str(file): _read_file(str(file)) for file in flags.get("config", ())}
    sources |= {variable: _read_environment(variable) for variable in ENVIRONMENT}
    sources["flags"] = flags
    merged: dict[str, Any] = {}
    for values in sources.values():
        merged = merge(merged, values)
    return build(kind, without_unused(kind, Config, merged), sources)


def _read_flags(argv: Sequence[str], kind: type[JobConfig]) -> dict[str, Any]:
    # the flags of a run are known to every job; what the job does not use is left out later
    known = kind if issubclass(kind, Config) else type("Flags", (Config, kind), {})
    words = _repeat_flags(_write_switches(_drop_removed(argv), known), known)
    try:
        source = CliSettingsSource[Any](
            known,
            cli_parse_args=words,
            cli_implicit_flags=True,
            cli_exit_on_error=False,
            cli_hide_none_type=True,
        )
        return dict(source())
    except SettingsError as error:
        message = str(error).removeprefix("error parsing CLI: ")
    unknown = message.removeprefix("unrecognized arguments: ").split()[0]
    if not message.startswith("unrecognized arguments") or not unknown.startswith("-"):
        raise ConfigError(message)
    name = unknown.lstrip("-").partition("=")[0]
    if name in REMOVED:
        raise ConfigError(f"--{name}: {REMOVED[name][1]}")
    raise ConfigError(f"{unknown}: unknown flag{nearest(known, unknown.lstrip('-'), '--')}")


def _drop_removed(argv: Sequence[str]) -> list[str]:
    """Leave out settings of earlier versions that are given the value they always had."""
    words = list(argv)
    for name, (ignored, _) in REMOVED.items():
        for form in ([f"--{name}", str(ignored)], [f"--{name}={ignored}"]):
            for start in range(len(words) - len(form), -1, -1):
                if words[start : start + len(form)] == form:
                    del words[start : start + len(form)]
    return words


def _write_switches(argv: Iterable[str], kind: type[JobConfig]) -> list[str]:
    """Return `--x true` as `--x`, and `--x false` as `--no-x`: the forms that argparse knows."""
    switches = {
        f"--{name}" for name, field in names(kind) if field.annotation in (bool, bool | None)
    }
    parts: list[str] = []
    for word in argv:
        flag, _, value = word.partition("=")
        parts += [flag, value] if flag in switches and "=" in word else [word]
    words: list[str] = []
    for part in parts:
        is_value = bool(words) and words[-1] in switches
        if is_value and part.lower() == "false":
            words[-1] = f"--no-{words[-1][2:]}"
        elif not is_value or part.lower() != "true":
            words.append(part)
    return words


def _repeat_flags(argv: Iterable[str], kind: type[JobConfig]) -> list[str]:
    """Return `--files a b` as `--files a --files b`, for settings that take several words."""
    several = {f"--{name}" for name, field in names(kind) if get_origin(field.annotation) is tuple}
    words: list[str] = []
    for word in argv:
        follows_value = len(words) > 1 and words[-2] in several and not words[-1].startswith("-")
        if follows_value and not word.startswith("-"):
            words.append(words[-2])
        words.append(word)
    return words


def _read_file(file: str) -> dict[str, Any]:
    try:
        values = yaml.safe_load(Path(file).expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"--config {file}: cannot be read ({error.strerror}); give the path of a YAML file"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"--config {file}: not valid YAML: {' '.join(str(error).split())}"
        ) from None
    if not isinstance(values, dict):
        raise ConfigError(
            f"--config {file}: must hold `setting: value` lines, found {type(values).__name__}"
        )
    return nested(values)


def _read_environment(variable: str) -> dict[str, Any]:
    if value := os.environ.get(variable):
        return nested(dict.fromkeys(ENVIRONMENT[variable], value))
    return {}
