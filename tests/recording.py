"""A command as it is seen: on a terminal, or in a file."""

from __future__ import annotations

import os
import re
import subprocess
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.waiting import HANGS

BEGINNINGS = (
    *("starting: ", "reading data", "data  ", "gold  ", "rows  ", "compute  ", "sharing  "),
    *("training", "scoring  ", "run  ", "watch  ", "first step after ", "step ", "best  "),
    *("          ", "answering with ", "executing ", "base: ", "tuned: ", "dev: "),
    *("time  ", "adapter  ", "predictions  ", "report  ", "MLflow run  "),
    *("look  ", "ask  ", "publish  ", "┏", "┃", "┡", "│", "├", "└"),
)
"""The beginnings of all lines that a run of SQL on a split `dev` writes, where nothing fails."""
TITLE = re.compile(r"\S+: execution accuracy, ")
SPINNER = re.compile(r"^[\u2800-\u28ff ] (?=\S)")
"""What stands before a bar; a blank once it is full."""
COMMANDS = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def record(command: Sequence[str], folder: Path, env: Mapping[str, str], terminal: bool) -> str:
    """Return all that a command writes, on a terminal of 120 columns or into a pipe.

    Raises `AssertionError` if it fails.
    """
    reads, writes = os.openpty() if terminal else os.pipe()
    own = {**env, "COLUMNS": "120"} if terminal else {**env}
    with subprocess.Popen(command, cwd=folder, env=own, stdout=writes, stderr=writes) as process:
        os.close(writes)
        late = threading.Timer(5 * HANGS, process.kill)
        late.start()
        written = bytearray()
        while part := _read(reads):
            written += part
    late.cancel()
    os.close(reads)
    text = written.decode()
    assert process.returncode == 0, text[-3000:]
    return text


def _read(place: int) -> bytes:
    try:
        return os.read(place, 65536)
    except OSError:  # a terminal that nobody writes to any more
        return b""


def foreign(written: str) -> list[str]:
    """Return the lines that are no run's own: what libraries write."""
    lines = re.split(r"[\r\n]+", COMMANDS.sub("", written))
    shown = [SPINNER.sub("", line) for line in lines]
    return [
        line
        for line in shown
        if line.strip() and not line.startswith(BEGINNINGS) and not TITLE.match(line)
    ]
