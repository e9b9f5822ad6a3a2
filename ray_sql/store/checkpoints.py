"""Checkpoints of a run: complete or absent.

A checkpoint's files are copied first, and `checkpoint.json` with their sizes and checksums last. A
checkpoint without that file, or with other sizes, is passed over: the run falls back to the one
before. Fetched files are compared with the checksums before they are used.

Ray Train's own checkpoint manager is not used. It keeps nothing in local mode, and a run must be
readable without the state of the driver that made it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray_sql.config.files import parse_json, read_json
from ray_sql.errors import DamagedFile
from ray_sql.store import storage
from ray_sql.store.run_folder import RunFolder
from ray_sql.store.shapes import Marker

MARKER = "checkpoint.json"


@dataclass(frozen=True)
class Checkpoint:
    """One complete checkpoint.

    `objective` and `tie_break` order checkpoints: higher is better, None was not measured.
    """

    uri: str
    step: int
    objective: float | None
    tie_break: float | None
    metrics: dict[str, float]

    @property
    def name(self) -> str:
        """Return `checkpoint-<step>`."""
        return self.uri.rpartition("/")[2]

    @property
    def rank(self) -> tuple[float, float, int]:
        """Sort the best last: by objective, then by tie-break, then by step."""
        worst = float("-inf")
        return (
            worst if self.objective is None else self.objective,
            worst if self.tie_break is None else self.tie_break,
            self.step,
        )


def save(local: Path, folder: RunFolder, step: int, scores: Mapping[str, Any]) -> Checkpoint:
    """Copy the files of `local` to a run's checkpoint.

    `scores` has objective, tie_break and metrics, or nothing yet.
    """
    uri = folder.checkpoint(step).uri
    files = {
        str(file.relative_to(local)): file for file in sorted(local.rglob("*")) if file.is_file()
    }
    storage.put(local, uri)
    marker: dict[str, Any] = {
        "step": step,
        "files": {name: file.stat().st_size for name, file in files.items()},
        "checksums": {name: storage.checksum(file) for name, file in files.items()},
        **{"objective": None, "tie_break": None, "metrics": {}},
        **scores,
    }
    storage.write_text(f"{uri}/{MARKER}", json.dumps(marker, indent=1))
    return Checkpoint(uri, step, marker["objective"], marker["tie_break"], marker["metrics"])


def damaged(folder: Path) -> str | None:
    """Return the first file of a fetched checkpoint that is not as it was saved.

    None means that all are intact, or that the marker of an earlier version has no checksums.
    """
    if not (folder / MARKER).is_file():
        return MARKER
    try:
        marker = read_json(Marker, folder / MARKER, "")
    except DamagedFile:
        return MARKER
    checksums = marker.get("checksums", {})
    return next(
        (name for name, known in checksums.items() if storage.checksum(folder / name) != known),
        None,
    )


def set_aside(uri: str) -> None:
    """Take the marker from a checkpoint, so that it is passed over from now on.

    Its files stay to be looked at, until later checkpoints are complete.
    """
    storage.remove(f"{uri}/{MARKER}")


def score(uri: str, scores: Mapping[str, Any]) -> None:
    """Add scores to a complete checkpoint: objective, tie_break and metrics."""
    marker = _marker(uri)
    storage.write_text(f"{uri}/{MARKER}", json.dumps({**marker, **scores}, indent=1))


def complete(folder: RunFolder) -> list[Checkpoint]:
    """Return all complete checkpoints of a run, by step."""
    found = [read(folder.checkpoint(step).uri) for step in _steps(folder)]
    return [checkpoint for checkpoint in found if checkpoint]


def read(uri: str) -> Checkpoint | None:
    """Return the checkpoint at `uri`; None if it is incomplete.

    An incomplete one has no whole marker, or lacks a file of the size that the marker gives.
    """
    try:
        marker = _marker(uri)
    except DamagedFile:
        return None
    files = marker["files"]
    checkpoint = Checkpoint(
        uri, marker["step"], marker["objective"], marker["tie_break"], marker["metrics"]
    )
    path = storage.open_store(uri)[1]
    infos = storage.list_folder(uri, recursive=True)
    sizes = {info.path.removeprefix(path).lstrip("/"): info.size for info in infos if info.is_file}
    intact = all(sizes.get(name) == size for name, size in files.items())
    return checkpoint if intact else None


def _marker(uri: str) -> Marker:
    """Return a checkpoint's marker. Raises `DamagedFile` if there is none, or a damaged one."""
    place = f"{uri}/{MARKER}"
    return parse_json(Marker, storage.read_text(place) or "", place, "give another checkpoint")


def best(checkpoints: Iterable[Checkpoint]) -> Checkpoint | None:
    """Return the checkpoint with the highest objective; the last one if none was measured."""
    return max(checkpoints, key=lambda checkpoint: checkpoint.rank, default=None)


def prune(folder: RunFolder) -> list[int]:
    """Remove all checkpoints but the best and the last two: the last may turn out to be damaged.

    Earlier ones that were left half-written, or were set aside, go too. Returns the steps of those
    that are kept.
    """
    checkpoints = complete(folder)
    top = best(checkpoints)
    if top is None:
        return []
    kept = {top.step, *(checkpoint.step for checkpoint in checkpoints[-2:])}
    for step in _steps(folder):
        if step < checkpoints[-1].step and step not in kept:
            storage.remove(folder.checkpoint(step).uri)
    return sorted(kept)


def _steps(folder: RunFolder) -> list[int]:
    """Return the steps of a run's checkpoints, complete or not."""
    names = [re.fullmatch(r"checkpoint-(\d+)", name) for name in storage.names(folder.uri)]
    return sorted(int(name[1]) for name in names if name)
