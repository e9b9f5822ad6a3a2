"""How values become settings: nested, merged, validated, and explained to the user where they are wrong."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError

from ray_sql.errors import ConfigError

C = TypeVar("C", bound=BaseModel)
_ABSENT = object()


def build(kind: type[C], values: Mapping[str, Any], sources: Mapping[str, Mapping[str, Any]]) -> C:
    """Validate `values`; `sources` (name → nested values) only serve the error messages."""
    sections = {name.split(".")[0] for name, _ in names(kind) if "." in name}
    try:  # a section whose settings are all commented out is an empty one
        return kind(
            **{
                name: {} if value is None and name in sections else value
                for name, value in values.items()
            }
        )
    except ValidationError as error:
        raise ConfigError(
            "\n".join(_explain(kind, one, sources) for one in error.errors())
        ) from None


def names(kind: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every setting as (dotted name, pydantic field), in order of definition."""
    for name, field in kind.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from names(field.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field


def describe(kind: type[BaseModel]) -> list[tuple[str, str, str, str]]:
    """Every setting as (name, values it takes, default, sentence), for the generated page."""
    return [
        (name, _values(field), _default(field), str(field.description))
        for name, field in names(kind)
    ]


def _values(field: Any) -> str:
    parts = (field.annotation, *get_args(field.annotation))
    choices = [part for part in parts if get_origin(part) is Literal]
    if choices:
        number = ["a number"] if any(get_origin(part) is Annotated for part in parts) else []
        return ", ".join([*number, *(f"`{choice}`" for choice in get_args(choices[0]))])
    kind = (
        str(getattr(field.annotation, "__name__", field.annotation))
        if not get_args(field.annotation)
        else str(field.annotation)
    )
    return kind.replace("pydantic.types.", "").replace(" | None", "").replace("|", "or")


def _default(field: Any) -> str:
    if field.is_required():
        return "required"
    return "" if field.default in (None, "", (), {}) else f"`{json.dumps(field.default)}`"


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """`{"lora.r": 8}` as `{"lora": {"r": 8}}`; nested mappings stay."""
    result: dict[str, Any] = {}
    for name, value in values.items():
        head, _, rest = str(name).partition(".")
        result = merge(result, {head: nested({rest: value}) if rest else value})
    return result


def merge(low: Mapping[str, Any], high: Mapping[str, Any]) -> dict[str, Any]:
    """`high` laid over `low`, section by section."""
    result = dict(low)
    for name, value in high.items():
        old = result.get(name)
        result[name] = (
            merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
        )
    return result


def _explain(kind: type[BaseModel], error: Any, sources: Mapping[str, Mapping[str, Any]]) -> str:
    path = [str(part) for part in error["loc"]]
    known = [name for name, _ in names(kind)]
    while (
        path
        and error["type"] != "extra_forbidden"
        and ".".join(path) not in known
        and len(path) > 1
    ):
        path.pop()  # inside a union or a list pydantic adds parts that are no settings
    name = ".".join(path)
    where = _origin(path, sources)
    if error["type"] == "extra_forbidden":
        return f"{where}: unknown setting{nearest(kind, name, '')}"
    if error["type"] == "missing":
        return f"--{name} is required: {kind.model_fields[name].description}"
    message = str(error["msg"]).removeprefix("Value error, ")
    if not name:
        return message
    field = dict(names(kind)).get(name)
    given = "a secret" if field and "SecretStr" in str(field.annotation) else repr(error["input"])
    if field is None:
        return f"{where}: {given} given, but it is a section; set {', '.join(n for n in known if n.startswith(f'{name}.'))}"
    return f"{where}: {given} given; {message[:1].lower()}{message[1:]}"


def _origin(path: list[str], sources: Mapping[str, Mapping[str, Any]]) -> str:
    """Which source a setting came from, as the user would name it; the last source that has it wins."""
    name = ".".join(path)
    for source in reversed(list(sources)):
        value: Any = sources[source]
        for part in path:
            value = value[part] if isinstance(value, Mapping) and part in value else _ABSENT
        if value is not _ABSENT:
            return (
                f"--{name}"
                if source == "flags"
                else name
                if source == "changes"
                else f"{source}: {name}"
            )
    return name


def nearest(kind: type[BaseModel], unknown: str, prefix: str) -> str:
    """The end of a message about an unknown setting: the known one most like it, or where all are listed."""
    known = [name for name, _ in names(kind)]
    near = (
        difflib.get_close_matches(unknown, known, 1, 0.6)
        or [n for n in known if n.split(".")[-1] == unknown][:1]
    )
    return f"; did you mean {prefix}{near[0]}?" if near else "; --help lists all"
