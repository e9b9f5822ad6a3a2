"""Calls that bring a record to MLflow, by the record's kind."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ray_sql.config import flatten
from ray_sql.tracking.checkpoints import send_checkpoints
from ray_sql.tracking.models import find_model, send_model
from ray_sql.tracking.names import THIS_RUN, VIEW, final, view
from ray_sql.tracking.questions import send_questions

PARAMS_PER_CALL = 100
"""Params that MLflow takes in one call."""


def create(
    client: Any, experiment_id: str, name: str, tags: Mapping[str, str], settings: Mapping[str, Any]
) -> str:
    """Create a run with its settings as params. Returns its id."""
    from mlflow.entities import Param, RunTag

    run_id = str(client.create_run(experiment_id, run_name=name, tags=dict(tags)).info.run_id)
    params = [Param(key, str(value)[:6000]) for key, value in flatten(settings).items()]
    for first in range(0, len(params), PARAMS_PER_CALL):
        client.log_batch(run_id, params=params[first : first + PARAMS_PER_CALL])
    client.log_batch(run_id, tags=[RunTag("mlflow.source.name", "ray_sql")])
    return run_id


def logged_points(client: Any, run_id: str) -> set[tuple[str, int]]:
    """Return (name, step) of every metric that the run already has."""
    keys = client.get_run(run_id).data.metrics
    return {(key, point.step) for key in keys for point in client.get_metric_history(run_id, key)}


def _send_metrics(client: Any, run_id: str, *points: Sequence[Any]) -> None:
    from mlflow.entities import Metric

    client.log_batch(run_id, metrics=[Metric(*point) for point in points])


def _send_dataset(
    client: Any, run_id: str, name: str, digest: str, source: str, split: str
) -> None:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    place = json.dumps({"uri": source})
    dataset = Dataset(name=name, digest=digest, source_type="local", source=place)
    client.log_inputs(run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", split)])])


def _send_artifact(client: Any, run_id: str, path: str, folder: str) -> None:
    send = client.log_artifacts if Path(path).is_dir() else client.log_artifact
    send(run_id, path, folder or None)


def _send_description(client: Any, run_id: str, text: str, metric: str | None) -> None:
    experiment = client.get_run(run_id).info.experiment_id
    page = f"#/experiments/{experiment}/runs/{run_id}"
    client.set_tag(run_id, "mlflow.note.content", text.replace(THIS_RUN, page))
    if metric:
        main, state = "mlflow.experiment.primaryMetric.name", f"mlflow.sharedViewState.{VIEW}"
        earlier = client.get_experiment(experiment).tags.get(state)
        client.set_experiment_tag(experiment, main, final(metric))
        client.set_experiment_tag(experiment, state, view(metric, earlier))


def _send_table(client: Any, run_id: str, columns: Mapping[str, list[Any]], file: str) -> None:
    """Write a table. MLflow's own call would add the rows to those of an earlier table."""
    folder = str(Path(file).parent).strip(".")
    if file in {artifact.path for artifact in client.list_artifacts(run_id, folder)}:
        rows = list(zip(*columns.values(), strict=True))
        client.log_text(run_id, json.dumps({"columns": list(columns), "data": rows}), file)
    else:
        client.log_table(run_id, columns, file)


def end_children(client: Any, run_id: str, status: str) -> None:
    """End the child runs of a run that were left running."""
    running = f"attributes.status = 'RUNNING' and tags.`mlflow.parentRunId` = '{run_id}'"
    for run in client.search_runs([client.get_run(run_id).info.experiment_id], running):
        client.set_terminated(run.info.run_id, status)


def _send_version(
    client: Any,
    run_id: str,
    model: str,
    folder: str,
    tags: Mapping[str, str],
    alias: str,
    won: bool,
) -> None:
    versions = client.search_model_versions(f"name='{model}'")
    logged = find_model(client, run_id, folder)
    if logged is None:
        raise FileNotFoundError(f"the run has no model {folder}")
    # of an attempt that was cut off, or was measured otherwise
    source = logged.artifact_location
    version = next((version for version in versions if version.source == source), None)
    if version is None:
        if not won:
            return  # nobody should load it by mistake
        _ensure_registered(client, model)
        version = client.create_model_version(
            model, source, run_id=run_id, tags=dict(tags), model_id=logged.model_id
        )
    else:
        for key, value in tags.items():
            client.set_model_version_tag(model, version.version, key, value)
    holder = str(client.get_registered_model(model).aliases.get(alias))
    if not won:
        if holder == str(version.version):
            client.delete_registered_model_alias(model, alias)
        return
    rival: Mapping[str, str] = next(
        (other.tags for other in versions if str(other.version) == holder), {}
    )
    comparable = rival.get("measured_on") == tags["measured_on"]
    if not comparable or float(rival["score"]) <= float(tags["score"]):
        client.set_registered_model_alias(model, alias, version.version)


def _ensure_registered(client: Any, model: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(model)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


SENDERS: dict[str, Callable[..., object]] = {
    "metrics": _send_metrics,
    "tag": lambda client, run_id, key, value: client.set_tag(run_id, key, value),
    "description": _send_description,
    "table": _send_table,
    "artifact": _send_artifact,
    "model": send_model,
    "checkpoints": send_checkpoints,
    "questions": send_questions,
    "dataset": _send_dataset,
    "version": _send_version,
    "children": end_children,
    "running": lambda client, run_id: client.update_run(run_id, status="RUNNING"),
    "end": lambda client, run_id, status: client.set_terminated(run_id, status),
}
