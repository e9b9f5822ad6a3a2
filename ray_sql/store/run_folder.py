"""A run's folder: every file that a run keeps, each named in this one place.

    out/<output_name>/
      config.json contract.json metrics.json        settings, what the adapter was made for, scores
      predictions.jsonl base_predictions.jsonl      judged answers, by model
      gold_errors.jsonl                             gold queries that do not run
      report.html sweep.html                        pages for people
      checkpoint-<step>/ adapter/ merged/           weights
      inputs/                                       what workers read
      logs/ ray/ run.json                           TensorBoard, Ray's own state, the MLflow run
      study.json trials/<trial>/                    of a sweep

A new file of a run is a name and a method here. `uri` is an absolute path, or a URI of any storage that pyarrow knows.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray_sql.store import storage

CONFIG = "config.json"
CONTRACT = "contract.json"
METRICS = "metrics.json"
PREDICTIONS = "predictions.jsonl"
GOLD_ERRORS = "gold_errors.jsonl"
REPORT = "report.html"
ADAPTER = "adapter"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
MERGED = "merged"
STUDY = "study.json"

_REMOVED = "removed-by-ray_sql"
"""Marks a folder whose removal has begun. Written first and removed last."""
_MAIN_MODELS = ("tuned", "file")
"""Models whose answers lie in `predictions.jsonl`; those of others lie beside it, as in `base_predictions.jsonl`."""


@dataclass(frozen=True)
class AdapterFolder:
    """A folder with an adapter and its recipe: a run's `adapter/`, one of its checkpoints, or a copy of either."""

    uri: str

    def read_contract(self) -> dict[str, Any] | None:
        """Return what the adapter was made for; None if the folder holds no contract."""
        return _read_json(f"{self.uri}/{CONTRACT}")

    def read_adapter_config(self) -> dict[str, Any] | None:
        """Return PEFT's configuration; None if there is none."""
        return _read_json(f"{self.uri}/{ADAPTER_CONFIG}")

    @property
    def weights(self) -> str:
        """The place of the weights."""
        return f"{self.uri}/{ADAPTER_WEIGHTS}"


@dataclass(frozen=True)
class RunFolder:
    """The folder of a run, a sweep or an evaluation."""

    uri: str

    # Settings, contract, results

    def read_settings(self) -> dict[str, Any] | None:
        """Return the settings that the run was started with. Raises `ValueError` if they are cut off."""
        return _read_json(f"{self.uri}/{CONFIG}")

    def write_settings(self, settings: Mapping[str, Any]) -> None:
        """Write `config.json`."""
        self._write_json(CONFIG, settings)

    def read_contract(self) -> dict[str, Any] | None:
        """Return the run's contract."""
        return _read_json(f"{self.uri}/{CONTRACT}")

    def write_contract(self, contract: Mapping[str, Any]) -> None:
        """Write `contract.json`."""
        self._write_json(CONTRACT, contract)

    def holds_training_run(self) -> bool:
        """Tell a training run from an evaluation, which has no contract."""
        return storage.exists(f"{self.uri}/{CONTRACT}")

    def read_metrics(self) -> dict[str, Any] | None:
        """Return the run's scores."""
        return _read_json(f"{self.uri}/{METRICS}")

    def write_metrics(self, metrics: Mapping[str, Any]) -> None:
        """Write `metrics.json`."""
        self._write_json(METRICS, metrics)

    def predictions(self, model: str = "tuned", alone: bool = False) -> str:
        """The place of a model's judged answers; a model that is `alone` in its run has the main file."""
        prefix = "" if alone or model in _MAIN_MODELS else f"{model}_"
        return f"{self.uri}/{prefix}{PREDICTIONS}"

    def read_predictions(self, model: str = "tuned") -> list[dict[str, Any]]:
        """Return a model's judged answers; none where there is no file."""
        lines = (storage.read_text(self.predictions(model)) or "").splitlines()
        return [json.loads(line) for line in lines]

    def write_predictions(
        self, model: str, rows: Iterable[Mapping[str, Any]], alone: bool = False
    ) -> None:
        """Write a model's judged answers, one JSON object a line."""
        storage.write_text(self.predictions(model, alone), json_lines(rows))

    def write_gold_errors(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write the gold queries that do not run."""
        storage.write_text(f"{self.uri}/{GOLD_ERRORS}", json_lines(rows))

    @property
    def report(self) -> str:
        """The place of the page about the run."""
        return f"{self.uri}/{REPORT}"

    @property
    def sweep_report(self) -> str:
        """The place of the page about a sweep."""
        return f"{self.uri}/sweep.html"

    @property
    def comparison(self) -> str:
        """The place of a comparison as JSON."""
        return f"{self.uri}/compare.json"

    @property
    def comparison_text(self) -> str:
        """The place of a comparison as text to read."""
        return f"{self.uri}/compare.txt"

    # Weights

    @property
    def adapter(self) -> AdapterFolder:
        """The best checkpoint's adapter."""
        return AdapterFolder(f"{self.uri}/{ADAPTER}")

    def checkpoint(self, step: int) -> AdapterFolder:
        """The checkpoint of an optimizer step."""
        return AdapterFolder(f"{self.uri}/checkpoint-{step}")

    @property
    def merged(self) -> RunFolder:
        """The merged model, with metrics of its own."""
        return RunFolder(f"{self.uri}/{MERGED}")

    # What workers read

    @property
    def rows(self) -> str:
        """The place of the tokenised training examples."""
        return f"{self.uri}/inputs/rows.parquet"

    @property
    def validation_rows(self) -> str:
        """The place of the tokenised validation examples, for their loss."""
        return f"{self.uri}/inputs/validation_rows.parquet"

    @property
    def validation_questions(self) -> str:
        """The place of the validation questions."""
        return f"{self.uri}/inputs/validation.jsonl"

    @property
    def databases(self) -> str:
        """The folder of the databases that validation SQL is executed on, where workers see no others."""
        return f"{self.uri}/inputs/databases"

    def has_inputs(self) -> bool:
        """Tell whether a run was laid out here."""
        return storage.exists(f"{self.uri}/inputs")

    # How far a run has come

    def read_data_fingerprint(self) -> str | None:
        """Return the fingerprint of the data that the run was started on."""
        return storage.read_text(f"{self.uri}/inputs/data_fingerprint")

    def write_data_fingerprint(self, fingerprint: str) -> None:
        """Keep the fingerprint of the data, so that the same name never continues on other data."""
        storage.write_text(f"{self.uri}/inputs/data_fingerprint", fingerprint)

    def is_finished(self) -> bool:
        """Tell whether the run came to its end."""
        return storage.exists(f"{self.uri}/inputs/finished")

    def mark_finished(self) -> None:
        """Say that the run came to its end; written last of all."""
        storage.write_text(f"{self.uri}/inputs/finished", "")

    def read_start(self) -> str | None:
        """Return the checkpoint that `prev_checkpoint` named, once the run has gone back to it."""
        return storage.read_text(f"{self.uri}/inputs/start")

    def write_start(self, uri: str) -> None:
        """Keep which checkpoint the run went back to."""
        storage.write_text(f"{self.uri}/inputs/start", uri)

    def read_driver(self) -> str | None:
        """Return the name of the driver that the run belongs to: the one started last."""
        return storage.read_text(f"{self.uri}/inputs/driver")

    def write_driver(self, name: str) -> None:
        """Keep which driver the run belongs to."""
        storage.write_text(f"{self.uri}/inputs/driver", name)

    def read_halvings(self) -> int:
        """Return how often the run halved its forward passes to fit into memory."""
        return int(storage.read_text(f"{self.uri}/inputs/halvings") or 0)

    def write_halvings(self, halvings: int) -> None:
        """Keep how often the run halved its forward passes. The adapter does not depend on it."""
        storage.write_text(f"{self.uri}/inputs/halvings", str(halvings))

    def read_mlflow_run_id(self) -> str | None:
        """Return the MLflow run that an earlier attempt began."""
        saved = _read_json(f"{self.uri}/run.json")
        return saved["mlflow_run_id"] if saved else None

    def write_mlflow_run(self, run_id: str, tracking_uri: str | None) -> None:
        """Keep the MLflow run, so that a restarted driver goes on with it."""
        run = {"mlflow_run_id": run_id, "tracking_uri": tracking_uri}
        storage.write_text(f"{self.uri}/run.json", json.dumps(run) + "\n")

    # A sweep

    @property
    def study(self) -> str:
        """The place of what a sweep knows of its trials."""
        return f"{self.uri}/{STUDY}"

    def trial(self, name: str) -> RunFolder:
        """The folder of a trial, which is a run's."""
        return RunFolder(f"{self.trials}/{name}")

    @property
    def trials(self) -> str:
        """The folder of all trials."""
        return f"{self.uri}/trials"

    @property
    def trial_measures(self) -> str:
        """The place of what was measured of a trial, in the trial's own folder."""
        return f"{self.uri}/measured.json"

    # Other programs' files

    @property
    def tensorboard(self) -> str:
        """The folder of TensorBoard's logs."""
        return f"{self.uri}/logs"

    @property
    def ray(self) -> str:
        """The folder of Ray's own state."""
        return f"{self.uri}/ray"

    # The folder as a whole

    def exists(self) -> bool:
        """Tell whether there is anything in the folder."""
        return storage.exists(self.uri)

    @property
    def is_local(self) -> bool:
        """Tell a folder of this machine from one of a remote store."""
        return "://" not in self.uri

    def remove(self) -> None:
        """Remove the folder. Should that be cut off, `finish_removal` comes to its end."""
        if not self.exists():
            return
        storage.write_text(f"{self.uri}/{_REMOVED}", "")
        storage.remove(
            f"{self.uri}/inputs/finished"
        )  # at once: with it, the run could be published
        for name in storage.names(self.uri):
            if name != _REMOVED:
                storage.remove(f"{self.uri}/{name}")
        storage.remove(self.uri)

    def finish_removal(self) -> None:
        """Remove what a removal that was cut off left; called before a folder is taken for a run."""
        if storage.exists(f"{self.uri}/{_REMOVED}"):
            self.remove()

    def fetch(self, name: str, target: Path) -> Path:
        """Copy a file or folder of the run to a local path."""
        place = f"{self.uri}/{name}"
        return (
            storage.fetch(place, target) if name == ADAPTER else storage.fetch_file(place, target)
        )

    def _write_json(self, name: str, value: Mapping[str, Any]) -> None:
        storage.write_text(f"{self.uri}/{name}", json.dumps(value, indent=2) + "\n")


def json_lines(rows: Iterable[Mapping[str, Any]]) -> str:
    """Write rows as JSON lines."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _read_json(uri: str) -> dict[str, Any] | None:
    text = storage.read_text(uri)
    return None if text is None else dict(json.loads(text))
