"""How every job begins and ends: settings from the command line, one line for what the user can fix, the right exit code."""

from __future__ import annotations

import errno
import logging
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from ray_sql import cluster
from ray_sql.config import C, Config, load, without_password
from ray_sql.errors import RaySqlError

TOKENS = {"--read_token", "--write_token"}
_TOLD: list[int] = []
"""The signal that ended this process, if one did."""


def main(
    job: Callable[[C], object], kind: type[C], argv: Sequence[str] | None = None, **overrides: Any
) -> None:
    """Run `job` with its settings. Exit code 0 when done, 2 for what the user can fix, 1 (with a traceback) for our bugs.

    A full disk, and a cache that cannot be written, are for the user to fix wherever they are met.
    """
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    signal.signal(
        signal.SIGTERM, _terminated
    )  # as an exception, so that runs are closed on the way out
    config = None
    _warn(sys.argv[1:] if argv is None else argv)
    try:
        config = load(kind, argv, **overrides)
        job(config)
    except SystemExit:
        if _TOLD:  # on its way through Ray's core the exception loses its code
            raise SystemExit(128 + _TOLD[0]) from None
        raise
    except RaySqlError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except OSError as error:
        if config is None or not _full_or_closed(error, config):
            raise
        print(
            f"error: {error.filename or 'disk'}: {error.strerror}; make room, or choose another --output_dir or --cache_dir",
            file=sys.stderr,
        )
        raise SystemExit(2) from None
    finally:
        cluster.leave_ray()  # at the interpreter's exit its processes would die under it


def _warn(words: Sequence[str]) -> None:
    """Say of secrets on the command line where they show, and where they would not."""
    shows = "shows in the process list, the shell's history, and Ray's list and log of jobs"
    for flag in sorted({word.partition("=")[0] for word in words} & TOKENS):
        print(f"warning: {flag} {shows}; HF_TOKEN in the environment does not", file=sys.stderr)
    for word in words:
        if without_password(word) != word:
            print(
                f"warning: the password in {without_password(word)} {shows}; give it in the environment (docs/cluster.md, Tokens)",
                file=sys.stderr,
            )


def _full_or_closed(error: OSError, config: Config) -> bool:
    """Whether an error says that there is no room, or that our own folders cannot be written."""
    ours = error.filename is not None and Path(str(error.filename)).is_relative_to(config.cache)
    return error.errno in {errno.ENOSPC, errno.EDQUOT} or (
        ours and isinstance(error, PermissionError | NotADirectoryError)
    )


def _terminated(number: int, frame: object) -> NoReturn:
    signal.signal(
        number, signal.SIG_IGN
    )  # a second one must not break into what the first has set off
    _TOLD.append(number)
    raise SystemExit(128 + number)
