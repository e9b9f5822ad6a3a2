"""Read text and JSON that anybody may have written or damaged, or say in one line why not.

Whatever is wrong with a file ends in `DamagedFile`, which names the file, the place and the way
out. JSON is read by pydantic. It refuses what Python's own reader passes on or falls over: deep
nesting, numbers of thousands of digits, half characters, and values of another shape.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from ray_sql.errors import DamagedFile, NotUtf8

T = TypeVar("T")

BOM = b"\xef\xbb\xbf"
"""Bytes that some editors put before a text in UTF-8."""
LARGEST = 2 * 2**30
"""Bytes of a file, or of what it unpacks to, that are read at once. A file of nothing but a hole
takes no room on the disk, and all memory."""
_PLACE = re.compile(r"(.*?)(?: at line (\d+) column \d+)?")


def read_text(file: str | Path, way_out: str, name: str = "") -> str:
    """Return a file's text. `name` is what the user knows the file by, if not its path.

    Raises `DamagedFile` if it is missing, no ordinary file, unreadable or not UTF-8.
    """
    try:
        content = read_bytes(file)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise DamagedFile(f"{name or file}: cannot be read ({reason}); {way_out}") from None
    return decode(content, name or str(file), way_out)


def read_json(shape: type[T], file: str | Path, way_out: str, name: str = "") -> T:
    """Return the JSON value of a file, in a shape that pydantic knows.

    Raises `DamagedFile` if it cannot be read, is not JSON, or has another shape.
    """
    return parse_json(shape, read_text(file, way_out, name), name or str(file), way_out)


def parse_json(
    shape: type[T], content: str | bytes, name: str, way_out: str, line: int | None = None
) -> T:
    """Return the JSON value of a text, in a shape that pydantic knows.

    `name` and `line` say where the text is from. Raises `DamagedFile` if it is not JSON, or has
    another shape.
    """
    try:
        value: T = _adapter(shape).validate_json(content)
    except ValidationError as error:
        (first, *_) = error.errors(include_url=False, include_input=False)
        what, found = _other_shape(first), None
        if not content.strip():
            what = "is empty"
        elif first["type"] == "json_invalid":
            match = _PLACE.fullmatch(str(first["ctx"]["error"]))
            reason, found = match.groups() if match else ("", None)
            what = f"not valid JSON ({reason})"
        at = line or found
        where = f"{name}, line {at}" if at else name
        raise DamagedFile(f"{where}: {what}; {way_out}") from None
    return value


def decode(content: bytes, name: str, way_out: str) -> str:
    """Return bytes as text, without a byte order mark. Raises `NotUtf8` where they are none."""
    try:
        return content.removeprefix(BOM).decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise NotUtf8(f"{name}, line {line}: not UTF-8 text; {way_out}") from None


def read_bytes(file: str | Path) -> bytes:
    """Return the bytes of an ordinary file.

    Raises `DamagedFile` for a pipe or a device, reading which might never end, and for a file that
    memory would not hold. Raises `OSError` where nothing can be read.
    """
    with open(file, "rb", opener=_open_now) as stream:
        found = os.fstat(stream.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise DamagedFile(f"{file}: is a pipe or device; give an ordinary file")
        if found.st_size > LARGEST:
            raise DamagedFile(
                f"{file}: has {found.st_size:,} bytes, over {LARGEST:,}; divide it into files that "
                "fit into memory"
            )
        return stream.read()


def _open_now(file: str, flags: int) -> int:
    """Open a file without waiting for whoever writes to a pipe."""
    return os.open(file, flags | os.O_NONBLOCK)


_adapter: Callable[[Any], TypeAdapter[Any]] = lru_cache(TypeAdapter)
"""Return what reads values of a shape; made once for each."""


def _other_shape(error: Any) -> str:
    """Say in words where a value has another shape."""
    place = ".".join(str(part)[:80] for part in error["loc"])
    if error["type"] == "missing":
        return f"{place!r} is missing"
    message = str(error["msg"])
    message = f"{message[:1].lower()}{message[1:]}"
    return f"{place!r}: {message}" if place else message
