"""Paths and addresses as users give them: made absolute, and shown or stored without passwords."""

from __future__ import annotations

import os
import re
from pathlib import Path


def _replace_password(text: str, replacement: str) -> str:
    """Return `text` with `replacement` in place of `:password` in every URI in it."""

    def replace(match: re.Match[str]) -> str:
        scheme, user, rest = match.groups()
        if scheme in {"http", "https", "hdfs"} and re.match(r"\d+(?:[/?#]|$)", rest):
            return match[0]  # a port
        # A password ends at the last @ before the path. If it holds a slash, it ends at the first
        # @, or at the last one if the scheme is followed by a bucket.
        holds_slash = r".*@" if scheme in {"s3", "gs"} else r"[^@]*@"
        password = re.match(r"[^/?#]*@", rest) or re.match(holds_slash, rest)
        if password is None:
            return match[0]
        return f"{scheme}{user}{replacement}@{rest[password.end() :]}"

    return re.sub(r"([\w+.-]*)(://[^:/@\s\[]*):(\S*)", replace, text)


def mask_password(uri: str | None) -> str | None:
    """Return a URI with `***` in place of its password: `postgresql://user:***@host/db`."""
    masked = uri and _replace_password(uri, ":***")
    return masked and re.sub(r"([?&]password=)[^&\s]*", r"\1***", masked)


def strip_password(uri: str | None) -> str | None:
    """Return a URI without its password, to be written into a file and still be opened.

    PGPASSWORD or ~/.pgpass gives the password then.
    """
    bare = uri and _replace_password(uri, "")
    return bare and re.sub(r"(?<=[?&])password=[^&]*&?", "", bare).rstrip("?&")


def absolute(path: str | Path) -> Path:
    """Return the absolute path, with `~` expanded. Symbolic links stay as the user wrote them."""
    return Path(os.path.abspath(os.path.expanduser(path)))
