"""Runs listed, and old ones removed with their MLflow runs: the door of `ray-sql runs`."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

from ray_sql import tracking
from ray_sql.config import RunsConfig, absolute
from ray_sql.display import Display
from ray_sql.errors import ConfigError, DamagedFile
from ray_sql.finetune.session import FOLDER_TAG, still_holds
from ray_sql.store import storage
from ray_sql.store.run_folder import RunFolder

SECONDS = {"h": 3600, "d": 86400, "w": 7 * 86400}
ALONE = "--no-tracking.enabled removes the folder alone"


@dataclass(frozen=True)
class Kept:
    """A run's folder: the bytes in it, and the seconds since anything in it changed."""

    folder: RunFolder
    bytes: int
    age: float
    run_id: str | None
    damaged: bool
    """Nobody knows its MLflow run."""

    def line(self) -> str:
        """Say what there is."""
        record = f", MLflow run {self.run_id}" if self.run_id else ""
        days = self.age / SECONDS["d"]
        return f"{self.folder.name}: {self.bytes / 1e9:.2f} GB, {days:.0f} days old{record}"


def run(config: RunsConfig) -> None:
    """List the runs in a folder; with `delete`, remove those that are older than asked for.

    A run is kept where MLflow says that it is needed, or cannot be asked about it. Of a copied
    folder only the copy goes. Raises `ConfigError` for `delete` without an age.
    """
    if config.delete and not config.older_than:
        raise ConfigError("--delete: needs an age, as --older_than 30d")
    least = 0.0
    if config.older_than:
        least = float(config.older_than[:-1]) * SECONDS[config.older_than[-1]]
    root = config.scaling.storage_path or config.output_dir
    place = root if "://" in root else str(absolute(root))
    display, old = Display(), [kept for kept in _runs(place) if kept.age >= least]
    removed, deletes = 0, config.delete and not config.dry_run
    asks = bool(config.older_than) and config.tracking.enabled
    for kept in sorted(old, key=lambda kept: -kept.age):
        known = tracking.find(config.tracking, kept.run_id) if asks and kept.run_id else None
        if asks and (why := _why_it_stays(kept, known)):
            display.line(f"{kept.line()}: stays, {why}")
            continue
        is_copy = known is not None and _is_copy(kept, known)
        display.line(kept.line() + ", which stays: the folder is a copy" * is_copy)
        removed += 1
        if deletes:
            if known and kept.run_id and not is_copy:
                tracking.remove(config.tracking, kept.run_id)
            kept.folder.remove()
    if not old:
        display.line(f"{place}: has no such runs")
    elif deletes:
        display.line(f"{removed} removed; `mlflow gc` frees what MLflow kept of them")
    elif config.older_than:
        display.line(f"{removed} would be removed, with their MLflow runs: add --delete")


def _runs(root: str) -> Iterator[Kept]:
    for name in storage.names(root):
        folder = RunFolder(f"{root.rstrip('/')}/{name}")
        if not (folder.holds_training_run() or folder.has_study()):
            continue
        files = [info for info in storage.list_folder(folder.uri, recursive=True) if info.is_file]
        newest = max(info.mtime.timestamp() for info in files if info.mtime)
        run_id, damaged = None, False
        try:
            run_id = folder.read_mlflow_run_id()
        except DamagedFile:
            damaged = True
        size, age = sum(info.size or 0 for info in files), time.time() - newest
        yield Kept(folder, size, age, run_id, damaged)


def _why_it_stays(kept: Kept, known: tracking.Recorded | None) -> str | None:
    """Say why a run must not be removed; None where it may be. `known` is what MLflow knows."""
    if kept.damaged:
        return f"for its run.json is damaged, so its MLflow run is unknown: {ALONE}"
    if known is None:
        elsewhere = "for this store never held its MLflow run: give --tracking.uri of the one that"
        return f"{elsewhere} its run.json names, or {ALONE}" if kept.run_id else None
    if known.aliases:
        return f"for it is {', '.join(known.aliases)}"
    if known.running and not _is_copy(kept, known):
        return "for MLflow says that it is running: if it was killed, delete it in MLflow first"
    return None


def _is_copy(kept: Kept, known: tracking.Recorded) -> bool:
    """Tell whether another folder is the one that the MLflow run is the record of."""
    place = known.tags.get(FOLDER_TAG)
    return place is not None and still_holds(RunFolder(place), str(kept.run_id), kept.folder)
