"""A run's checkpoints as models of MLflow, with their scores; the weights stay in the run's folder.

They stand in the list of models beside finished adapters, to be sorted by a validation score.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from ray_sql.tracking.models import data_of

KIND = "checkpoint"
"""The type of such a model in MLflow."""
VALIDATION = "validation"
"""The split that checkpoints are measured on, and the group of its metrics."""


def send_checkpoints(client: Any, run_id: str, *kept: Sequence[Any]) -> None:
    """Make a run's checkpoints in MLflow those that are `kept`, each a step and its folder.

    Whatever an earlier attempt sent is completed, and not sent twice. Others are deleted.
    """
    run = client.get_run(run_id)
    known = {model.name: model for model in _models(client, run)}
    names = {step: f"checkpoint-{step}" for step, _ in kept}
    for name in known.keys() - set(names.values()):
        client.delete_logged_model(known[name].model_id)
    for step, folder in kept:
        model = known.get(names[step])
        if model is None:
            tags = {"folder": folder, "mlflow.model.isExternal": "true"}
            experiment, params = run.info.experiment_id, {"step": str(step)}
            model = client.create_logged_model(
                experiment, names[step], run_id, tags, params, model_type=KIND
            )
            known[names[step]] = model
        if str(model.status) != "READY":
            client.finalize_logged_model(model.model_id, "READY")
    points = list(_scores(client, run, {step: known[name] for step, name in names.items()}))
    if points:
        client.log_batch(run_id, metrics=points)


def remove_checkpoints(client: Any, run_id: str) -> None:
    """Delete the checkpoints of a run whose folder is removed."""
    for model in _models(client, client.get_run(run_id)):
        client.delete_logged_model(model.model_id)


def _models(client: Any, run: Any) -> list[Any]:
    query = f"source_run_id = '{run.info.run_id}' AND model_type = '{KIND}'"
    return list(client.search_logged_models([run.info.experiment_id], query))


def _scores(client: Any, run: Any, models: dict[int, Any]) -> Iterator[Any]:
    """Yield the run's own points of validation with the models that were measured and lack them."""
    from mlflow.entities import Metric

    data, run_id = data_of(run, VALIDATION), run.info.run_id
    for key in run.data.metrics:
        if not key.startswith(f"{VALIDATION}/"):
            continue
        for point in client.get_metric_history(run_id, key):
            model = models.get(point.step)
            if model is None or math.isnan(point.value):  # MLflow would keep it as 0
                continue
            if key not in {metric.key for metric in model.metrics or ()}:
                values = (key, point.value, point.timestamp, point.step)
                yield Metric(*values, model_id=model.model_id, run_id=run_id, **data)
