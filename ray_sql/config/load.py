"""Settings from flags, `--config` files and the environment; `--help`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, get_origin

import yaml
from pydantic_settings import CliSettingsSource, SettingsError

from ray_sql.config.settings import Config
from ray_sql.config.validate import build, merge, names, nearest, nested
from ray_sql.errors import ConfigError

C = TypeVar("C", bound=Config)

ENVIRONMENT = {"HF_TOKEN": ("read_token", "write_token"), "MLFLOW_TRACKING_URI": ("tracking.uri",)}
"""Environment variables that hold a setting by convention, and the settings they fill when nothing else does."""


def load(kind: type[C], argv: Sequence[str] | None = None, **overrides: Any) -> C:
    """Settings from flags, `--config` files and the environment; `--help` prints and exits.

    Raises `ConfigError` with one line per mistake, each naming the flag or file and key, what was given and what is allowed.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    flags = _read_flags(argv, kind)
    flags = merge(flags, nested(overrides))
    sources: dict[str, dict[str, Any]] = {}
    for file in flags.get("config", ()):
        sources[str(file)] = _read_file(str(file))
    sources |= {
        variable: found for variable in ENVIRONMENT if (found := _read_environment(variable))
    }
    sources["flags"] = flags
    merged: dict[str, Any] = {}
    for values in sources.values():
        merged = merge(merged, values)
    return build(kind, merged, sources)


def _read_flags(argv: list[str], kind: type[Config]) -> dict[str, Any]:
    try:
        source = CliSettingsSource[Any](
            kind,
            cli_parse_args=_lists(_switches(argv, kind), kind),
            cli_implicit_flags=True,
            cli_exit_on_error=False,
            cli_hide_none_type=True,
            cli_prog_name=_program(),
        )
        return dict(source())
    except SettingsError as error:
        message = str(error).removeprefix("error parsing CLI: ")
        unknown = message.removeprefix("unrecognized arguments: ").split()[0]
        if message.startswith("unrecognized arguments") and unknown.startswith("-"):
            raise ConfigError(
                f"{unknown}: unknown flag{nearest(kind, unknown.lstrip('-'), '--')}"
            ) from None
        raise ConfigError(message) from None


def _switches(argv: list[str], kind: type[Config]) -> list[str]:
    """The flags with `--x true` as `--x` and `--x false` as `--no-x`, the only forms that argparse knows."""
    switches = {
        f"--{name}" for name, field in names(kind) if field.annotation in (bool, bool | None)
    }
    words: list[str] = []
    for word in (
        part
        for one in argv
        for part in (one.split("=", 1) if one.split("=")[0] in switches else [one])
    ):
        value = word.lower() if words and words[-1] in switches else None
        if value == "false":
            words[-1] = f"--no-{words[-1][2:]}"
        elif value != "true":
            words.append(word)
    return words


def _lists(argv: list[str], kind: type[Config]) -> list[str]:
    """`--compare a b` as `--compare a --compare b`: the words after a setting that takes several all belong to it."""
    several = {f"--{name}" for name, field in names(kind) if get_origin(field.annotation) is tuple}
    words: list[str] = []
    for word in argv:
        flag = words[-2] if len(words) > 1 else ""
        if flag in several and not word.startswith("-") and not words[-1].startswith("-"):
            words.append(flag)
        words.append(word)
    return words


def _program() -> str:
    main = sys.modules.get("__main__")
    spec = getattr(main, "__spec__", None)
    return f"python -m {spec.name}" if spec else Path(sys.argv[0]).name


def _read_file(file: str) -> dict[str, Any]:
    try:
        value = yaml.safe_load(Path(file).expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"--config {file}: cannot be read ({error.strerror}); give the path of a YAML file"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"--config {file}: not valid YAML: {' '.join(str(error).split())}"
        ) from None
    if not isinstance(value, dict):
        raise ConfigError(
            f"--config {file}: must hold `setting: value` lines, found {type(value).__name__}"
        )
    return nested(value)


def _read_environment(variable: str) -> dict[str, Any]:
    value = os.environ.get(variable)
    return nested(dict.fromkeys(ENVIRONMENT[variable], value)) if value else {}
