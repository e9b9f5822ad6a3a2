"""Turn values into settings: nest, merge and validate them, and explain what is wrong."""

from __future__ import annotations

import reprlib
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from ray_sql.config.nearest import nearest
from ray_sql.config.urls import mask_secrets
from ray_sql.errors import ConfigError

C = TypeVar("C", bound=BaseModel)
_ABSENT = object()
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 100
_SHORT.maxlevel = 2
ALLOWED = " given; "
"""Words between a wrong value and what is allowed."""
PLACES = {"output_dir", "output_name", "cache_dir", "scaling.storage_path"}
"""Settings that say where a run is kept, not what it is."""

REMOVED: dict[str, tuple[Any, str]] = {
    "compare": ([], "compare two files with `ray-sql compare A B`")
}
"""Settings of earlier versions: the value that saved files hold and that is ignored, and the way
out of others."""


def build(kind: type[C], values: Mapping[str, Any], sources: Mapping[str, Mapping[str, Any]]) -> C:
    """Return `values` as validated settings.

    `sources` (name → nested values) serve the error messages. Raises `ConfigError` with a line per
    mistake.
    """
    sections = {name.split(".")[0] for name, _ in names(kind) if "." in name}
    # a section whose settings are all commented out is an empty one
    empty = {name for name, value in values.items() if value is None and name in sections}
    try:
        return kind(**{**values, **{name: {} for name in empty}})
    except ValidationError as error:
        lines: dict[str, str] = {}
        for detail in error.errors():
            given, _, allowed = _explain(kind, detail, sources).partition(ALLOWED)
            # one mistake for each member of a union
            lines[given] = f"{lines[given]}, or {allowed}" if given in lines else allowed
        mistakes = [f"{given}{ALLOWED}{allowed}" for given, allowed in lines.items()]
        raise ConfigError(
            "\n".join(mistake.removesuffix(ALLOWED) for mistake in mistakes)
        ) from None


def names(kind: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every setting as (dotted name, pydantic field), in order of definition."""
    for name, field in kind.model_fields.items():
        if section := section_of(field):
            yield from names(section, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field


def section_of(field: Any) -> type[BaseModel] | None:
    """Return the class of a field that is a section, None for a plain setting or none."""
    kind = getattr(field, "annotation", None)
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return `{"lora.r": 8}` as `{"lora": {"r": 8}}`; nested mappings stay."""
    result: dict[str, Any] = {}
    for name, value in values.items():
        head, _, rest = str(name).partition(".")
        if rest:
            value = nested({rest: value})
        result = merge(result, {head: value})
    return result


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return `{"lora": {"r": 8}}` as `{"lora.r": 8}`."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """Return the first three settings in which two mappings differ, in words; empty if none
    does. A folder that was moved is no difference."""
    before, after = flatten(old), flatten(new)
    changed = [
        f"{name} {before[name]!r} there, {value!r} here"
        for name, value in after.items()
        if name in before and before[name] != value and name not in PLACES
    ]
    return "; ".join(changed[:3])


def merge(low: Mapping[str, Any], high: Mapping[str, Any]) -> dict[str, Any]:
    """Return `high` laid over `low`, section by section."""
    result = dict(low)
    for name, value in high.items():
        below = result.get(name)
        if isinstance(below, Mapping) and isinstance(value, Mapping):
            value = merge(below, value)
        result[name] = value
    return result


def without_removed(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested `values` without the settings in `REMOVED`.

    Raises `ValueError` with the way out for one that holds more than saved files do.
    """
    result = dict(values)
    for name, (ignored, way_out) in REMOVED.items():
        section_name, _, key = name.rpartition(".")
        section = result.get(section_name) if section_name else result
        if not isinstance(section, Mapping) or key not in section:
            continue
        if section[key] != ignored:
            raise ValueError(f"{name}: {section[key]!r} given; {way_out}")
        remaining = {other: value for other, value in section.items() if other != key}
        result = {**result, section_name: remaining} if section_name else remaining
    return result


def without_unused(
    kind: type[BaseModel], run: type[BaseModel], values: Mapping[str, Any]
) -> dict[str, Any]:
    """Return nested `values` without those settings of a `run` that `kind` does not have."""
    used: dict[str, Any] = {}
    for name, value in values.items():
        field, run_field = kind.model_fields.get(name), run.model_fields.get(name)
        if field is None and run_field is not None:
            continue
        section, run_section = section_of(field), section_of(run_field)
        if section and run_section and isinstance(value, Mapping):
            value = without_unused(section, run_section, value)
        used[name] = value
    return used


def did_you_mean(kind: type[BaseModel], unknown: str, prefix: str) -> str:
    """Return the end of a message about an unknown setting: the known one most like it, if any."""
    near = nearest(unknown, [name for name, _ in names(kind)])
    meant = " or ".join(f"{prefix}{name}" for name in near)
    return f"; did you mean {meant}?" if near else "; --help lists all"


def _explain(kind: type[BaseModel], error: Any, sources: Mapping[str, Mapping[str, Any]]) -> str:
    known = dict(names(kind))
    path = [str(part) for part in error["loc"]]
    is_unknown = error["type"] == "extra_forbidden"
    while len(path) > 1 and not is_unknown and ".".join(path) not in known:
        path.pop()  # inside a union or a list pydantic adds parts that are no settings
    name = ".".join(path)
    where = mask_secrets(_origin(path, sources))
    if is_unknown:
        return f"{where}: unknown setting{did_you_mean(kind, name, '')}"
    if error["type"] == "missing":
        return f"--{name} is required: {kind.model_fields[name].description}"
    message = str(error["msg"]).removeprefix("Value error, ")
    if error["type"] == "string_type":
        message = "Input should be a text; write it in quotes"
    if not name:
        return message
    field = known.get(name)
    if field is None:
        settings = ", ".join(other for other in known if other.startswith(f"{name}."))
        number = isinstance(error["input"], int | float)
        given = repr(error["input"]) if number else "a text or a list"  # which may be a secret
        return f"{where}: {given} given, but it is a section; set {settings}"
    given = "a secret" if "SecretStr" in str(field.annotation) else _shown(error["input"])
    return f"{where}: {given}{ALLOWED}{message[:1].lower()}{message[1:]}"


def _shown(value: Any) -> str:
    """Return a value as it was given, in bounded length and without secrets."""
    if isinstance(value, str):
        value = mask_secrets(value)
    return mask_secrets(_SHORT.repr(value))


def _origin(path: list[str], sources: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a setting's name as the user would find it: in the last source that has it."""
    name = ".".join(path)
    for source in reversed(list(sources)):
        value: Any = sources[source]
        for part in path:
            value = value[part] if isinstance(value, Mapping) and part in value else _ABSENT
        if value is _ABSENT:
            continue
        return {"flags": f"--{name}", "changes": name}.get(source, f"{source}: {name}")
    return name
