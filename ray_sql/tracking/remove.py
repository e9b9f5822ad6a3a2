"""Runs removed from MLflow, with their children and models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from ray_sql.config.sections import TrackingSection
from ray_sql.tracking.questions import remove_questions
from ray_sql.tracking.store import client_of, has_held, refusing, require_store, run_exists


class Recorded(NamedTuple):
    """A run as a store knows it, deleted or not. `aliases` are as `ray-sql-sql@champion`."""

    running: bool
    tags: Mapping[str, str]
    aliases: list[str]


def find(settings: TrackingSection, run_id: str) -> Recorded | None:
    """Return what a store knows of a run; None where it never held it."""
    uri = require_store(settings)
    with refusing(uri):
        client = client_of(uri)
        if not has_held(client, run_id):
            return None
        run = client.get_run(run_id)
        active = run.info.lifecycle_stage == "active"
        aliases = [
            f"{version.name}@{alias}"
            for version in client.search_model_versions(f"run_id = '{run_id}'")
            for alias in client.get_model_version(version.name, version.version).aliases
        ]
    return Recorded(active and run.info.status == "RUNNING", run.data.tags, aliases)


def remove(settings: TrackingSection, run_id: str) -> int:
    """Delete a run, its children, their models and questions. Returns the number of runs deleted.

    MLflow keeps what is deleted until `mlflow gc`, and versions of registered models beyond that.
    A run that is not there counts as deleted. Its children go first: should this be cut off, the
    next call finds the rest.
    """
    uri = require_store(settings)
    with refusing(uri):
        client = client_of(uri)
        if not has_held(client, run_id):
            return 0
        experiment = client.get_run(run_id).info.experiment_id
        runs = _children(client, experiment, run_id)
        if run_exists(client, run_id):
            runs.append(run_id)
        for each in runs:
            _remove_one(client, experiment, each)
    return len(runs)


def _children(client: Any, experiment: str, run_id: str) -> list[str]:
    """Return the ids of all children that were not deleted, page by page."""
    query = f"tags.`mlflow.parentRunId` = '{run_id}'"
    runs: list[str] = []
    token: str | None = ""
    while token is not None:
        found = client.search_runs([experiment], query, page_token=token or None)
        runs += [run.info.run_id for run in found]
        token = found.token or None
    return runs


def _remove_one(client: Any, experiment: str, run_id: str) -> None:
    for model in client.search_logged_models([experiment], f"source_run_id = '{run_id}'"):
        client.delete_logged_model(model.model_id)
    remove_questions(client, experiment, run_id)
    client.delete_run(run_id)
