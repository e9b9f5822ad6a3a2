"""The file of records that wait while MLflow does not answer."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ray_sql.config.files import parse_json, read_text
from ray_sql.errors import DamagedFile

_Kind = Literal[
    "metrics",
    "tag",
    "description",
    "table",
    "artifact",
    "model",
    "checkpoints",
    "questions",
    "dataset",
    "version",
    "children",
    "running",
    "end",
]


class Record(NamedTuple):
    """A line of the file of records that wait."""

    run_id: str
    kind: _Kind
    values: list[Any]


def run_ids_waiting(spool: Path) -> set[str]:
    """Return the ids of the runs whose records wait in a spool."""
    runs = set()
    for line in spooled(spool):
        with suppress(DamagedFile):  # the process was killed while it wrote this line
            runs.add(parse_json(Record, line, str(spool), "")[0])
    return {run_id for run_id in runs if " " not in run_id}


def spooled(spool: Path) -> list[str]:
    """Return the lines of a file of records that wait."""
    return read_text(spool, "remove it: its records are lost").splitlines()
