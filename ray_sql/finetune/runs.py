"""Runs listed, and old ones removed with their MLflow runs: the door of `ray-sql runs`."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

from ray_sql import tracking
from ray_sql.config import RunsConfig, absolute
from ray_sql.config.sections import TrackingSection
from ray_sql.display import Display
from ray_sql.errors import ConfigError, DamagedFile
from ray_sql.store import storage
from ray_sql.store.run_folder import RunFolder

SECONDS = {"h": 3600, "d": 86400, "w": 7 * 86400}


@dataclass(frozen=True)
class Kept:
    """A run's folder: the bytes in it, and the seconds since anything in it changed."""

    folder: RunFolder
    bytes: int
    age: float
    run_id: str | None

    def line(self) -> str:
        """Say what there is."""
        record = f", MLflow run {self.run_id}" if self.run_id else ""
        days = self.age / SECONDS["d"]
        return f"{self.folder.name}: {self.bytes / 1e9:.2f} GB, {days:.0f} days old{record}"


def run(config: RunsConfig) -> None:
    """List the runs in a folder; with `delete`, remove those that are older than asked for.

    A run whose model has an alias in MLflow's registry is kept. Raises `ConfigError` for `delete`
    without an age.
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
    for kept in sorted(old, key=lambda kept: -kept.age):
        held = _aliases(config.tracking, kept.run_id) if config.older_than else []
        if held:
            display.line(f"{kept.line()}: stays, for it is {', '.join(held)}")
            continue
        display.line(kept.line())
        removed += 1
        if deletes:
            if kept.run_id and config.tracking.enabled:
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
        try:
            run_id = folder.read_mlflow_run_id()
        except DamagedFile:
            run_id = None
        yield Kept(folder, sum(info.size or 0 for info in files), time.time() - newest, run_id)


def _aliases(settings: TrackingSection, run_id: str | None) -> list[str]:
    return tracking.aliases_of(settings, run_id) if run_id and settings.enabled else []
