"""Settings from flags, `--config` files and the environment.

A job ignores the settings of a run that it does not use. So a run's YAML file, config.json or flags
can be given to it as they are.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from typing import Any, TypeVar, get_origin

import yaml
from pydantic_settings import CliSettingsSource, SettingsError

from ray_sql.config.base import JobConfig
from ray_sql.config.files import read_text
from ray_sql.config.settings import Config
from ray_sql.config.urls import absolute, mask_secrets
from ray_sql.config.validate import (
    REMOVED,
    build,
    did_you_mean,
    merge,
    names,
    nested,
    without_unused,
)
from ray_sql.errors import ConfigError, DamagedFile

C = TypeVar("C", bound=JobConfig)

ENVIRONMENT = {"HF_TOKEN": ("read_token", "write_token"), "MLFLOW_TRACKING_URI": ("tracking.uri",)}
"""Environment variables that hold settings by convention, and the settings that they fill."""
LONGEST_FILE, DEEPEST = 500_000, 50
"""Characters, and brackets within each other, that a YAML file may have. Its reader takes hours for
some thousand open ones."""
MOST_VALUES = 100_000
"""Values of a YAML file, each counted as often as an alias repeats it."""


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
    words = _write_mappings(_write_switches(_drop_removed(argv), known), known)
    words = _repeat_flags(words, known)
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
        raise ConfigError(_without_values(message, argv))
    unknown = unknown.partition("=")[0]  # what follows may be a secret
    name = unknown.lstrip("-")
    if name in REMOVED:
        raise ConfigError(f"--{name}: {REMOVED[name][1]}")
    raise ConfigError(f"{unknown}: unknown flag{did_you_mean(known, name, '--')}")


def _without_values(message: str, argv: Sequence[str]) -> str:
    """Return argparse's message about a command line without what may be a secret in it."""
    if not message.startswith("unrecognized arguments"):
        return mask_secrets(message)
    if any(word.startswith(("--read_token", "--write_token")) for word in argv):
        return "there are words that belong to no flag; put a value with blanks in quotes"
    return f"{mask_secrets(message)}; what is no flag and no value of one stands before the flags"


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


def _write_mappings(argv: Iterable[str], kind: type[JobConfig]) -> list[str]:
    """Return `--x "{a: b}"` with JSON in place of YAML, for settings that are mappings."""
    several = {f"--{name}" for name, field in names(kind) if "dict[" in str(field.annotation)}
    words: list[str] = []
    for word in argv:
        flag, joined, value = word.partition("=")
        if not joined or flag not in several:
            flag, value = words[-1] if words else "", word
        if flag in several and value.lstrip().startswith("{"):
            word = word.removesuffix(value) + _as_json(flag, value)
        words.append(word)
    return words


def _as_json(flag: str, text: str) -> str:
    """Return a mapping in YAML, which JSON is too, as JSON. Raises `ConfigError` if it is none."""
    try:
        return json.dumps(yaml.safe_load(text))
    except (yaml.YAMLError, TypeError):
        raise ConfigError(
            f'{flag}: {text!r} is no mapping; write it as "{{question: q, query: sql}}" or as '
            "question=q,query=sql"
        ) from None


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
    name = f"--config {file}"
    try:
        text = read_text(absolute(file), "give the path of a YAML file", name)
    except DamagedFile as error:
        raise ConfigError(mask_secrets(str(error))) from None
    depths = accumulate((sign in "[{") - (sign in "]}") for sign in text)
    if len(text) > LONGEST_FILE or max(depths, default=0) > DEEPEST:
        raise ConfigError(f"{name}: longer or more deeply nested than any file of settings is")
    try:
        values = yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{name}{_reason(error)}; correct the line") from None
    if not isinstance(values, dict):
        raise ConfigError(
            f"{name}: must hold `setting: value` lines, found {type(values).__name__}"
        )
    if "config" in values:
        raise ConfigError(
            f"{name}: config: a file of settings reads no others; give each with --config"
        )
    return nested(values)


_TEXT = "tag:yaml.org,2002:str"


class _Loader(yaml.SafeLoader):
    """Refuse a setting that is given twice in a file, where YAML would keep the last."""

    def resolve(self, kind: type[yaml.Node], value: Any, implicit: Any) -> Any:
        """Leave `off` and 2024-01-31 the texts they are, which YAML 1.1 takes for false and a day.

        Where a setting is true or false, its validation understands such words.
        """
        tag: str = super().resolve(kind, value, implicit)  # type: ignore[no-untyped-call]
        is_switch = tag.endswith(":bool") and value.lower() not in ("true", "false")
        if is_switch or tag.endswith(":timestamp"):
            return _TEXT
        return tag

    def get_single_data(self) -> Any:
        node = self.get_single_node()
        if node is None:
            return None
        _check_node(node, "", {}, iter(range(MOST_VALUES)))
        return self.construct_document(node)


def _check_node(node: yaml.Node, name: str, seen: dict[str, int], budget: Iterator[int]) -> None:
    """Raise `ConstructorError` where a setting is given twice: `lora.r` is also `r` in `lora`.

    Raises it, too, where there are more values than `budget` has numbers: aliases multiply.
    """
    if next(budget, None) is None:
        problem = f"more than {MOST_VALUES:,} values"
        raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
    if isinstance(node, yaml.SequenceNode):
        for value in node.value:
            _check_node(value, "", {}, budget)
    elif isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            inner = f"{name}.{key.value}".lstrip(".") if isinstance(key.value, str) else "a setting"
            if inner in seen:
                problem = f"{inner} is given twice, on line {seen[inner]} and here"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen[inner] = key.start_mark.line + 1
            _check_node(value, inner, seen, budget)


def _reason(error: Exception) -> str:
    """Return what is wrong with a YAML text, without its words: they may be secrets."""
    mark = getattr(error, "problem_mark", None)
    where = f", line {mark.line + 1}" if mark else ""
    problem = getattr(error, "problem", None) or "nested too deeply, or a value that is none"
    if isinstance(error, yaml.reader.ReaderError):
        where, problem = "", f"character {error.character!r} at position {error.position}"
    # what YAML quotes is the file's own, but for single signs and `<block end>`
    problem = re.sub(r"'(?!<[a-z ]+>')[^']{2,}'|\"[^\"]*\"", "…", str(problem))
    return f"{where}: not valid YAML ({mask_secrets(problem)})"


def _read_environment(variable: str) -> dict[str, Any]:
    if value := os.environ.get(variable, "").strip():
        return nested(dict.fromkeys(ENVIRONMENT[variable], value))
    return {}
