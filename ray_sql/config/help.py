"""The settings of a job as a person reads them: for `--help` and for docs/settings.md."""

from __future__ import annotations

import json
import textwrap
from dataclasses import dataclass
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel, SecretStr

from ray_sql.config.base import JobConfig
from ray_sql.config.jobs import TasksConfig
from ray_sql.config.validate import names, section_of

EVERYDAY = (
    *("model_name", "output_name", "task_type", "dataset_id", "pairs", "url", "files"),
    *(
        "predictions_file",
        "adapter",
        "question",
        "database",
        "split",
        "learning_rate",
        "num_epochs",
        "config",
        "dry_run",
        "overwrite",
    ),
)
BATCHES = (
    *("train_batch_size", "grad_accum_steps", "eval_batch_size", "save_steps", "prev_checkpoint"),
)
FOLDERS = ("output_dir", "cache_dir", "read_token", "write_token")
SECTIONS = (
    *("data", "prompt", "linking", "rows", "lora", "quantization", "train", "scaling"),
    *("evaluate", "tune", "tracking", "hub", "serve"),
)
WORDS = {str: "text", SecretStr: "text", int: "integer", float: "number", bool: "true, false"}


@dataclass(frozen=True)
class Setting:
    """One setting in words; `default` is JSON, `required`, or empty if nothing is set."""

    name: str
    values: str
    default: str
    sentence: str


@dataclass(frozen=True)
class Group:
    """Settings under one heading: a section, or flat settings that belong together."""

    title: str
    sentence: str
    settings: tuple[Setting, ...]


def groups(kind: type[JobConfig]) -> list[Group]:
    """Return the settings that a job uses by heading, the everyday ones first."""
    shown = kind.shown()
    flat = {
        name: _setting(name, field)
        for name, field in names(kind)
        if name in shown and "." not in name
    }
    first = [name for name in EVERYDAY if name in flat]
    other = [name for name in flat if name not in EVERYDAY + BATCHES + FOLDERS]
    headings = [
        _group("Everyday settings", "", flat, first + other),
        _group("Batches and checkpoints", "", flat, BATCHES),
        _group("Folders and tokens", "", flat, FOLDERS),
    ]
    for title in SECTIONS:
        section = section_of(kind.model_fields.get(title))
        if section is not None:
            settings = {name: _setting(f"{title}.{name}", item) for name, item in names(section)}
            used = [name for name in settings if f"{title}.{name}" in shown]
            if title == "tune":
                used = [name for name in used if _uses(kind, name)]
            headings.append(_group(title, section.__doc__ or "", settings, used))
    return [group for group in headings if group.settings]


def help_text(usage: str, summary: str, kind: type[JobConfig]) -> str:
    """Return what `--help` of a job prints."""
    lines = [f"usage: {usage} [--setting value ...]", "", summary]
    for group in groups(kind):
        lines += ["", f"{group.title}: {group.sentence}".removesuffix(": ")]
        for setting in group.settings:
            lines += _entry(setting)
    return "\n".join([*lines, "", FOOTER])


FOOTER = """\
Settings come from --config files, the environment (HF_TOKEN, MLFLOW_TRACKING_URI) and flags; flags
win. In YAML: `lora: {r: 32}` or `lora.r: 32`. A setting of a run that a job does not use is
ignored, so a run's YAML file or config.json can be given to every job."""


def _entry(setting: Setting) -> list[str]:
    """Return the lines of a setting: its flag, and its sentence below."""
    is_switch = setting.values == WORDS[bool]
    head = f"  --{setting.name}"
    if is_switch and setting.default != "false":
        head += f", --no-{setting.name}"
    facts = [] if is_switch else [setting.values]
    if setting.default == "required":
        facts.append("required")
    elif setting.default not in ("", "false"):
        facts.append(f"default {setting.default}")
    if facts:
        head += f"  ({'; '.join(facts)})"
    heads = textwrap.wrap(head, 98, subsequent_indent="      ", break_on_hyphens=False)
    text = textwrap.wrap(setting.sentence, 94, break_on_hyphens=False)
    return [*heads, *(f"      {line}" for line in text)]


def _group(title: str, sentence: str, settings: dict[str, Setting], used: Any) -> Group:
    return Group(title, sentence, tuple(settings[name] for name in used if name in settings))


def _uses(kind: type[BaseModel], name: str) -> bool:
    """Say whether a job uses a setting of `tune`: a run without trials uses the objective only."""
    return name == "objective" or issubclass(kind, TasksConfig)


def _setting(name: str, field: Any) -> Setting:
    default = "required"
    if not field.is_required():
        default = json.dumps(field.default).removeprefix("null")
    if default in ('""', "[]", "{}"):
        default = ""
    sentence = " ".join(str(field.description).split())
    return Setting(name, _values(field.annotation), default, sentence)


def _values(kind: Any) -> str:
    """Return in words the values that a type takes."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Literal:
        return ", ".join(parts)
    if origin is Annotated:
        return _values(parts[0])
    if origin is dict:
        return "map"
    if origin in (list, tuple):
        if parts == (int, int):
            return "two integers"
        return f"list of {_values(parts[0])}" if parts[0] is not str else "list"
    if parts:
        return " or ".join(_values(part) for part in parts if part is not NoneType)
    return WORDS[kind]
