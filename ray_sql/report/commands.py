"""Commands for what comes after a run: look at it, ask it, serve it, publish it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from ray_sql.config import absolute, mask_password
from ray_sql.store.run_folder import RunFolder


def named(folder: RunFolder) -> str:
    """Return the flags by which a command of this folder finds a run."""
    root, _, name = folder.uri.rstrip("/").rpartition("/")
    place = "" if root == str(absolute("out")) else f"--output_dir {shlex.quote(root)} "
    return f"{place}--output_name {name}"


def ask(folder: RunFolder, metrics: Mapping[str, Any]) -> str:
    """Return the command that asks a run's model about a database that it was scored on."""
    database = _database(metrics)
    about = f" --database {shlex.quote(database)}" if database else ""
    return f'ray-sql ask "YOUR QUESTION" {named(folder)}{about}'


def serve(folder: RunFolder) -> str:
    """Return the command that serves a run's model over HTTP."""
    return f"ray-sql serve {named(folder)}"


def publish(folder: RunFolder) -> str:
    """Return the command that shows what would be published of a run."""
    return f"ray-sql publish {named(folder)} --hub.repo_id YOU/{folder.name} --dry_run"


def look(metrics: Mapping[str, Any]) -> str:
    """Return the command, or the address, that shows MLflow's record; empty where none was kept."""
    address = metrics.get("tracking_uri") or ""
    if not metrics.get("mlflow_run_id"):
        return ""
    if address.startswith("http"):
        return address
    elsewhere = address != f"sqlite:///{absolute('mlflow.db')}"
    return "ray-sql ui" + (f" --tracking.uri {shlex.quote(address)}" if elsewhere else "")


def watch(dashboard: str | None, run_id: str, uri: str) -> str:
    """Return where a run can be watched; empty where Ray has no dashboard."""
    if dashboard is None:
        return ""
    record = f"; MLflow run {run_id} of {mask_password(uri)}" if run_id else ""
    return f"watch     {dashboard}{record}"


def _database(metrics: Mapping[str, Any]) -> str:
    for scores in metrics.get("tuned", {}).values():
        for name in scores.get("by_database", {}):
            return str(name)
    return ""
