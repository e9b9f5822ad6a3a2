"""Paths, addresses and texts as users give them: made absolute, and shown without secrets."""

from __future__ import annotations

import os
import re
from pathlib import Path

_MORE = r"""(?:(?:(?!\?[\w.-]+=|://)[^\s"'<>,;]){0,200}@)?"""
"""The rest of a password that holds an @: up to the last one of the same address.

A host before an @ of the path is hidden with it. The bound keeps the time linear.
"""
DEEPEST_ADDRESS = 3
"""Addresses within each other, as in `s3://…?endpoint_override=http://…`, that are looked into."""


def _replace_password(text: str, replacement: str, depth: int = DEEPEST_ADDRESS) -> str:
    """Return `text` with `replacement` in place of `:password` in every URI in it."""

    def inner(rest: str) -> str:
        return _replace_password(rest, replacement, depth - 1) if depth else rest

    def replace(match: re.Match[str]) -> str:
        scheme, user, rest = match.groups()
        if scheme in {"http", "https", "hdfs"} and re.match(r"\d+(?:[/?#]|$)", rest):
            return f"{scheme}{user}:{inner(rest)}"  # a port
        # An @ or a slash that nobody encoded may stand in the password, so it ends at the last @
        # before quotes, a comma, another address or a query. A slash before any @ belongs to the
        # password of a bucket's address too.
        password = re.match(rf"[^/?#]*@{_MORE}", rest) or re.match(rf"[^@]*@{_MORE}", rest)
        if password is None:
            return f"{scheme}{user}:{inner(rest)}"
        return f"{scheme}{user}{replacement}@{inner(rest[password.end() :])}"

    return re.sub(r"([\w+.-]{0,30})(://[^:/@\s\[]*):(\S*)", replace, text)


_TOKEN = re.compile(
    r"\bhf_(?=[a-z0-9]*[A-Z])[A-Za-z0-9]{14,}"  # of the Hub
    r"|\b(?:gh[opsur]_|github_pat_|glpat-|xox[abprs]-)[\w-]{16,}|\bAKIA[A-Z0-9]{12,}"  # of others
    r"|\bsk-(?=[\w-]*[A-Z])(?=[\w-]*\d)[\w-]{20,}"
    r"|\beyJ[\w-]{8,}\.[\w-]+\.[\w-]+"  # a JSON web token
    r"|(?<=[Bb]earer )\S+|(?<='Basic )\S+"  # in a header that an error repeats
)
_SECRET_ARGUMENT = re.compile(
    r"([?&](?:sig|pwd|[\w-]{0,30}(?:passw|token|secret|key|signature|credential)[\w-]{0,30})=)"
    r"[^&\s]*",
    re.IGNORECASE,
)
_WITHOUT_SCHEME = re.compile(
    rf"(?<![\w:/@.-])([\w.+-]+):[^\s/@:]+@{_MORE}(?=[\w-]+(?:\.[\w.-]+|:\d)|localhost\b)"
)
"""`user:password@host.name`, an address that somebody forgot the beginning of."""


def mask_secrets(text: str) -> str:
    """Return a text with `***` in place of tokens, and of the passwords of addresses in it."""
    return _TOKEN.sub("***", mask_password(text) or "")


def mask_password(uri: str | None) -> str | None:
    """Return a URI with `***` in place of its password: `postgresql://user:***@host/db`."""
    masked = uri and _WITHOUT_SCHEME.sub(r"\1:***@", _replace_password(uri, ":***"))
    return masked and _SECRET_ARGUMENT.sub(r"\1***", masked)


def strip_password(uri: str | None) -> str | None:
    """Return a URI without its password, to be written into a file and still be opened.

    PGPASSWORD or ~/.pgpass gives the password then, or MYSQL_PWD.
    """
    bare = uri and _replace_password(uri, "")
    return bare and re.sub(r"(?<=[?&])password=[^&]*&?", "", bare).rstrip("?&")


def absolute(path: str | Path) -> Path:
    """Return the absolute path, with `~` expanded. Symbolic links stay as the user wrote them."""
    return Path(os.path.abspath(os.path.expanduser(path)))
