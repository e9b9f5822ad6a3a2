"""How every job begins and ends: settings from the command line, one line for what the user can fix, the right exit code."""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from ray_sql.config import C, load
from ray_sql.errors import RaySqlError


def main(job: Callable[[C], object], kind: type[C], argv: Sequence[str] | None = None, **overrides: Any) -> None:
    """Run `job` with its settings. Exit code 0 when done, 2 for what the user can fix, 1 (with a traceback) for our bugs."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    signal.signal(signal.SIGTERM, _terminated)  # as an exception, so that runs are closed on the way out
    try:
        job(load(kind, argv, **overrides))
    except RaySqlError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def _terminated(number: int, frame: object) -> NoReturn:
    raise SystemExit(128 + number)
