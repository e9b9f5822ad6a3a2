"""Adapters as models of MLflow, which `mlflow.pyfunc.load_model` and `mlflow models serve` load.

A model's folder is the adapter's, with `MLmodel` and a script beside. So PEFT reads it, too. The
base model is named in it, not copied.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ray_sql import __version__
from ray_sql.tracking.names import SCORE, split_of

CODE = '''"""How MLflow loads this adapter: with the package ray_sql, which must be installed."""

from mlflow.models import set_model

from ray_sql.serve.pyfunc import TunedModel

set_model(TunedModel())
'''
INPUTS = {"question": True, "database": False, "schema": False, "evidence": False}
"""Columns of questions; True for those that are needed."""
OUTPUTS = ("sql", "links")


class LoggedModel(NamedTuple):
    """A model of a run. `split` is the first one that it was scored on."""

    name: str
    params: dict[str, str]
    tags: dict[str, str]
    split: str


def send_model(
    client: Any,
    run_id: str,
    path: str,
    name: str,
    params: Mapping[str, str],
    tags: Mapping[str, str],
    split: str,
) -> None:
    """Log an adapter's folder as a model of a run, with the run's final scores.

    One of the same weights is not logged a second time.
    """
    run = client.get_run(run_id)
    model = find_model(client, run_id, name)
    if model is None or model.tags.get("weights_sha256") != tags.get("weights_sha256"):
        _delete_begun(client, run, name)
        model = client.create_logged_model(
            run.info.experiment_id, name, run_id, dict(tags), dict(params), "adapter"
        )
        client.log_model_artifacts(model.model_id, path)
        with tempfile.TemporaryDirectory(prefix="ray_sql-") as folder:
            _write_loader(Path(folder), run_id, model.model_id)
            client.log_model_artifacts(model.model_id, folder)
        client.finalize_logged_model(model.model_id, "READY")
        _name_as_output(client, run_id, model.model_id)
    else:
        client.set_logged_model_tags(model.model_id, dict(tags))
    _log_scores(client, run_id, model.model_id, split)


def find_model(client: Any, run_id: str, name: str) -> Any:
    """Return the newest complete model of a run that has this name; None where there is none."""
    found = _named(client, client.get_run(run_id), name)  # the newest first
    return next((model for model in found if str(model.status) == "READY"), None)


def _delete_begun(client: Any, run: Any, name: str) -> None:
    """Delete what an upload that failed left of a model: it would stay in MLflow's list."""
    for model in _named(client, run, name):
        if str(model.status) != "READY":
            client.delete_logged_model(model.model_id)


def _named(client: Any, run: Any, name: str) -> list[Any]:
    query = f"name = '{name}' AND source_run_id = '{run.info.run_id}'"
    return list(client.search_logged_models([run.info.experiment_id], query))


def _write_loader(folder: Path, run_id: str, model_id: str) -> None:
    """Write what MLflow needs to load the adapter's folder as a function."""
    from mlflow import pyfunc
    from mlflow.models import Model, ModelSignature
    from mlflow.types import ColSpec, Schema

    inputs = [ColSpec("string", name, required=needed) for name, needed in INPUTS.items()]
    outputs = [ColSpec("string", name, required=False) for name in OUTPUTS]
    model = Model(
        run_id=run_id,
        model_id=model_id,
        signature=ModelSignature(Schema(inputs), Schema(outputs)),
        metadata={"ray_sql": __version__},
    )
    (folder / "model.py").write_text(CODE)
    pyfunc.add_to_model(
        model,
        loader_module="mlflow.pyfunc.model",
        model_code_path="model.py",
        artifacts={"adapter": {"path": ".", "uri": ""}},
    )
    model.save(str(folder / "MLmodel"))


def _name_as_output(client: Any, run_id: str, model_id: str) -> None:
    from mlflow.entities import LoggedModelOutput

    client.log_outputs(run_id, [LoggedModelOutput(model_id, step=0)])


def data_of(run: Any, split: str) -> dict[str, str]:
    """Return what names the data of a split in a metric; nothing where the run has no such data."""
    for known in run.inputs.dataset_inputs:
        if split in [tag.value for tag in known.tags]:
            return {"dataset_name": known.dataset.name, "dataset_digest": known.dataset.digest}
    return {}


def _log_scores(client: Any, run_id: str, model_id: str, split: str) -> None:
    """Give a model the newest final scores of its run, as the same points, each with its data.

    `split` is the first one that was scored, whose scores name none.
    """
    from mlflow.entities import Metric

    run = client.get_run(run_id)
    points = []
    for key in run.data.metrics:
        if key.startswith(f"{SCORE}/"):
            history = client.get_metric_history(run_id, key)
            newest = max(history, key=lambda point: (point.step, point.timestamp))
            point = (key, newest.value, newest.timestamp, newest.step)
            data = data_of(run, split_of(key) or split)
            points.append(Metric(*point, model_id=model_id, run_id=run_id, **data))
    client.log_batch(run_id, metrics=points)
