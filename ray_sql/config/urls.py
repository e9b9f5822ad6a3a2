"""Paths and addresses as users give them: made absolute, and shown or stored without their passwords."""

from __future__ import annotations

import os
import re
from pathlib import Path


def _hidden(uri: str, instead: str) -> str:
    """`uri`, or a text with URIs in it, with another word in place of `:password`."""

    def hide(found: re.Match[str]) -> str:
        scheme, user, rest = found.groups()
        if scheme in {"http", "https", "hdfs"} and re.match(r"\d+(?:[/?#]|$)", rest):
            return found[0]  # a port
        # up to the last @ before the path; of a password that holds a slash, up to the first, or, where no host follows, the last
        password = re.match(r"[^/?#]*@", rest) or re.match(
            r".*@" if scheme in {"s3", "gs"} else r"[^@]*@", rest
        )
        return f"{scheme}{user}{instead}@{rest[password.end() :]}" if password else found[0]

    return re.sub(r"([\w+.-]*)(://[^:/@\s\[]*):(\S*)", hide, uri)


def without_password(uri: str | None) -> str | None:
    """A URI with `***` in place of its password: `postgresql://user:***@host/db`."""
    masked = uri and _hidden(uri, ":***")
    return masked and re.sub(r"([?&]password=)[^&\s]*", r"\1***", masked)


def passwordless(uri: str | None) -> str | None:
    """A URI as it may be written into a file and still be opened: without its password, which PGPASSWORD or ~/.pgpass then gives."""
    bare = uri and _hidden(uri, "")
    return bare and re.sub(r"(?<=[?&])password=[^&]*&?", "", bare).rstrip("?&")


def absolute(path: str | Path) -> Path:
    """The absolute form of a path, with `~` expanded; symbolic links stay as the user wrote them."""
    return Path(os.path.abspath(os.path.expanduser(path)))
