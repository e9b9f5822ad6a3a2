"""A run's folder: every file that a run keeps, each named in this one place.

    out/<output_name>/
      config.json contract.json metrics.json        settings, what the adapter was made for, scores
      predictions.jsonl base_predictions.jsonl      judged answers, by model
      gold_errors.jsonl left_out.jsonl              gold queries that do not run, unused rows
      report.html sweep.html                        pages for people
      checkpoint-<step>/ adapter/ merged/           weights
      inputs/                                       what workers read
      logs/ ray/ run.json                           TensorBoard, Ray's own state, the MLflow run
      study.json trials/<trial>/                    of a sweep

A new file of a run is a name and a method here. A file for MLflow to keep is in `ARTIFACTS` too.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ray_sql.config.files import parse_json
from ray_sql.errors import DamagedFile, StoreError
from ray_sql.store import storage
from ray_sql.store.shapes import AdapterConfig, Contract, JudgedAnswer, MlflowRun, RunMetrics

T = TypeVar("T")

RESTORE = "restore it from a copy, or train again with --overwrite"
"""The way out where a run's own file is damaged."""
CONFIG = "config.json"
ADAPTER_SETTINGS = "ray_sql_config.json"
"""The settings beside an adapter. transformers takes a `config.json` there for a base model's."""
CONTRACT = "contract.json"
METRICS = "metrics.json"
PREDICTIONS = "predictions.jsonl"
GOLD_ERRORS = "gold_errors.jsonl"
LEFT_OUT = "left_out.jsonl"
REPORT, SWEEP_REPORT = "report.html", "sweep.html"
ADAPTER = "adapter"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
STUDY = "study.json"
COMPARISON = "compare.json"
AUDIT = "audit.json"
STAGES = "stages.json"
README = "README.md"
"""Files by which a folder of a comparison, an audit, both stages, or a study's results is known."""

ARTIFACTS = (CONFIG, CONTRACT, METRICS, PREDICTIONS, GOLD_ERRORS, LEFT_OUT, REPORT, ADAPTER)
"""The files that MLflow keeps, where the run has them."""

_INPUTS = "inputs"
DATABASES = f"{_INPUTS}/databases"
"""The databases that validation SQL is executed on, where workers see no others."""
_DATA_FINGERPRINT = f"{_INPUTS}/data_fingerprint"
_ROWS = f"{_INPUTS}/rows.parquet"
_VALIDATION_ROWS = f"{_INPUTS}/validation_rows.parquet"
_VALIDATION_QUESTIONS = f"{_INPUTS}/validation.jsonl"
_VALIDATION_SCHEMAS = f"{_INPUTS}/validation_schemas.json"
_FINISHED = f"{_INPUTS}/finished"
_START = f"{_INPUTS}/start"
_DRIVER = f"{_INPUTS}/driver"
_HALVINGS = f"{_INPUTS}/halvings"
_COMPUTE_TYPE = f"{_INPUTS}/compute_type"
_MLFLOW_RUN = "run.json"
_TRIALS = "trials"
_TRIAL_MEASURES = "measured.json"
_RAY = "ray"
_TRIED = "tried-by-ray_sql"
_REMOVED = "removed-by-ray_sql"
"""Marks a folder whose removal has begun. Written first and removed last."""
_MAIN_MODELS = ("tuned", "file")
"""Models whose answers lie in `predictions.jsonl`. Other files have the model's name in front."""


@dataclass(frozen=True)
class _Folder:
    """A folder of storage. `uri` is an absolute path, or a URI that pyarrow knows."""

    uri: str

    def __str__(self) -> str:
        return self.uri

    @property
    def name(self) -> str:
        """The last part of the place."""
        return self.uri.rstrip("/").rpartition("/")[2]

    def place(self, name: str) -> str:
        """Return the place of a file or folder inside."""
        return f"{self.uri}/{name}"

    def exists(self) -> bool:
        """Tell whether there is anything in the folder."""
        return storage.exists(self.uri)

    def read_contract(self) -> dict[str, Any] | None:
        """Return the contract: what the adapter was made for. None where there is none."""
        contract = self._read_json(Contract, CONTRACT)
        return contract and dict(contract)

    def _read_json(self, shape: type[T], name: str, way_out: str = RESTORE) -> T | None:
        """Return a JSON file of the folder; None where there is none. Raises `DamagedFile`."""
        text = storage.read_text(self.place(name))
        return None if text is None else parse_json(shape, text, self.place(name), way_out)


@dataclass(frozen=True)
class AdapterFolder(_Folder):
    """An adapter and its recipe: a run's `adapter/`, a checkpoint, or a copy of either."""

    def read_adapter_config(self) -> dict[str, Any] | None:
        """Return PEFT's configuration; None if there is none."""
        config = self._read_json(AdapterConfig, ADAPTER_CONFIG)
        return config and dict(config)

    def read_settings(self) -> dict[str, Any] | None:
        """Return the settings of the run that trained the adapter; None where there are none."""
        return self._read_json(dict[str, Any], ADAPTER_SETTINGS)

    def fetch_files(self, target: Path) -> None:
        """Copy the adapter and its contract to a local folder, without what only training reads."""
        for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS, CONTRACT):
            storage.fetch_file(self.place(name), target / name)


@dataclass(frozen=True)
class RunFolder(_Folder):
    """The folder of a run, a sweep, a trial or an evaluation."""

    # Settings, contract, results

    def has_settings(self) -> bool:
        """Tell whether a run, or an evaluation, wrote its settings here."""
        return storage.exists(self.place(CONFIG))

    def read_settings(self) -> dict[str, Any] | None:
        """Return the settings; None where there is no file.

        Raises `DamagedFile` if they are cut off.
        """
        return self._read_json(dict[str, Any], CONFIG)

    def write_settings(self, settings: Mapping[str, Any]) -> None:
        """Write `config.json`."""
        self._write_json(CONFIG, settings)

    def write_contract(self, contract: Mapping[str, Any]) -> None:
        """Write `contract.json`."""
        self._write_json(CONTRACT, contract)

    def holds_training_run(self) -> bool:
        """Tell a training run from an evaluation, which has no contract."""
        return storage.exists(self.place(CONTRACT))

    def read_metrics(self, shape: Any = RunMetrics) -> dict[str, Any] | None:
        """Return the scores, by default a finished run's; None where nothing was scored."""
        metrics: dict[str, Any] | None = self._read_json(shape, METRICS)
        return metrics

    def write_metrics(self, metrics: Mapping[str, Any]) -> None:
        """Write `metrics.json`."""
        self._write_json(METRICS, metrics)

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write the few numbers of the demo."""
        self._write_json("summary.json", summary)

    def predictions(self, model: str = "tuned", alone: bool = False) -> str:
        """Return the place of a model's judged answers.

        A model that is `alone` in its run has the main file.
        """
        prefix = "" if alone or model in _MAIN_MODELS else f"{model}_"
        return self.place(f"{prefix}{PREDICTIONS}")

    def read_predictions(self, model: str = "tuned") -> list[dict[str, Any]]:
        """Return a model's judged answers; none where there is no file."""
        place = self.predictions(model)
        # not splitlines: a question may hold a line separator of Unicode
        lines = enumerate((storage.read_text(place) or "").split("\n"), 1)
        return [
            dict(parse_json(JudgedAnswer, line, place, RESTORE, number))
            for number, line in lines
            if line
        ]

    def write_predictions(self, model: str, rows: Iterable[Mapping[str, Any]], alone: bool) -> None:
        """Write a model's judged answers, one JSON object a line."""
        storage.write_text(self.predictions(model, alone), json_lines(rows))

    def write_gold_errors(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write the gold queries that do not run."""
        storage.write_text(self.place(GOLD_ERRORS), json_lines(rows))

    def write_left_out(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write `left_out.jsonl`: rows of the dataset that are not used, with their reasons."""
        storage.write_text(self.place(LEFT_OUT), json_lines(rows))

    @property
    def audit(self) -> str:
        """The place of what an audit found."""
        return self.place(AUDIT)

    @property
    def report(self) -> str:
        """The place of the page about the run."""
        return self.place(REPORT)

    @property
    def sweep_report(self) -> str:
        """The place of the page about a sweep."""
        return self.place(SWEEP_REPORT)

    def write_stages(self, result: Mapping[str, Any]) -> None:
        """Write what links do for SQL."""
        self._write_json(STAGES, result)

    @property
    def comparison(self) -> str:
        """The place of a comparison as JSON."""
        return self.place(COMPARISON)

    @property
    def comparison_text(self) -> str:
        """The place of a comparison as text to read."""
        return self.place("compare.txt")

    def artifacts(self, scratch: Path) -> list[Path]:
        """Return local paths of what MLflow keeps.

        Files of a remote store are copied to `scratch`.
        """
        if self.is_local:
            return [path for name in ARTIFACTS if (path := Path(self.place(name))).exists()]
        scratch.mkdir(parents=True, exist_ok=True)
        present = [name for name in ARTIFACTS if storage.exists(self.place(name))]
        for name in present:
            fetch = storage.fetch if name == ADAPTER else storage.fetch_file
            fetch(self.place(name), scratch / name)
        return [scratch / name for name in present]

    # Weights

    @property
    def adapter(self) -> AdapterFolder:
        """The best checkpoint's adapter."""
        return AdapterFolder(self.place(ADAPTER))

    def write_adapter(self, local: Path) -> None:
        """Write `adapter/` from a local folder, with the run's recipe.

        An adapter carries its recipe wherever it is copied to, and the SHA-256 of its weights.
        """
        storage.fetch_file(self.place(CONFIG), local / ADAPTER_SETTINGS)
        if not (local / CONTRACT).exists():
            storage.fetch_file(self.place(CONTRACT), local / CONTRACT)
        contract = AdapterFolder(str(local)).read_contract() or {}
        contract["weights_sha256"] = storage.sha256(local / ADAPTER_WEIGHTS)
        if kind := storage.read_text(self.place(_COMPUTE_TYPE)):
            contract["compute_type"] = kind
        (local / CONTRACT).write_text(json.dumps(contract, indent=2) + "\n")
        storage.put(local, self.adapter.uri)

    def checkpoint(self, step: int) -> AdapterFolder:
        """Return the checkpoint of an optimizer step."""
        return AdapterFolder(self.place(f"checkpoint-{step}"))

    @property
    def merged(self) -> RunFolder:
        """The merged model, with metrics of its own."""
        return RunFolder(self.place("merged"))

    # What workers read

    @property
    def rows(self) -> str:
        """The place of the tokenised training examples."""
        return self.place(_ROWS)

    @property
    def validation_rows(self) -> str:
        """The place of the tokenised validation examples, for their loss."""
        return self.place(_VALIDATION_ROWS)

    @property
    def validation_questions(self) -> str:
        """The place of the validation questions."""
        return self.place(_VALIDATION_QUESTIONS)

    @property
    def validation_schemas(self) -> str:
        """The place of the schemas by database, where names in answers are mended."""
        return self.place(_VALIDATION_SCHEMAS)

    def database(self, db_id: str) -> str:
        """Return the place of the copy of a database file that travels with the run.

        A dataset may give a database any name, and none may lead out of the folder.
        """
        is_path = "/" in db_id or "\\" in db_id
        name = hashlib.sha256(db_id.encode()).hexdigest() if is_path else db_id
        return self.place(f"{DATABASES}/{name}.sqlite")

    def has_inputs(self) -> bool:
        """Tell whether a run was laid out here."""
        return storage.exists(self.place(_INPUTS))

    def copy_inputs(self, source: RunFolder) -> None:
        """Take over the contract, the data and the questions of another run."""
        names = [CONTRACT, _DATA_FINGERPRINT, _ROWS]
        names += [_VALIDATION_ROWS, _VALIDATION_QUESTIONS, _VALIDATION_SCHEMAS]
        with tempfile.TemporaryDirectory(prefix="ray_sql-") as scratch:
            for name in names:
                if storage.exists(source.place(name)):
                    local = storage.fetch_file(source.place(name), Path(scratch) / Path(name).name)
                    storage.put(local, self.place(name))

    # How far a run has come

    def read_data_fingerprint(self) -> str | None:
        """Return the fingerprint of the data that the run was started on."""
        return storage.read_text(self.place(_DATA_FINGERPRINT))

    def write_data_fingerprint(self, fingerprint: str) -> None:
        """Keep the fingerprint of the data, so that the same name never continues on other data."""
        storage.write_text(self.place(_DATA_FINGERPRINT), fingerprint)

    def is_finished(self) -> bool:
        """Tell whether the run came to its end. A finished run is shown and not continued."""
        return storage.exists(self.place(_FINISHED))

    def mark_finished(self) -> None:
        """Record that the run came to its end. Written last of all."""
        storage.write_text(self.place(_FINISHED), "")

    def read_start(self) -> str | None:
        """Return the checkpoint that `prev_checkpoint` named, once the run has gone back to it."""
        return storage.read_text(self.place(_START))

    def write_start(self, name: str) -> None:
        """Keep which checkpoint the run went back to; one of its own by name."""
        storage.write_text(self.place(_START), name)

    def read_driver(self) -> str | None:
        """Return the name of the driver that the run belongs to: the one started last."""
        return storage.read_text(self.place(_DRIVER))

    def write_driver(self, name: str) -> None:
        """Keep which driver the run belongs to."""
        storage.write_text(self.place(_DRIVER), name)

    def read_halvings(self) -> int:
        """Return how often the run halved its forward passes to fit into memory."""
        text = storage.read_text(self.place(_HALVINGS))
        return parse_json(int, text, self.place(_HALVINGS), "remove it") if text else 0

    def write_halvings(self, halvings: int) -> None:
        """Keep how often the run halved its forward passes. The adapter does not depend on it."""
        storage.write_text(self.place(_HALVINGS), str(halvings))

    def read_bf16(self) -> bool | None:
        """Return whether the run began in bfloat16; None before its first worker had a model."""
        kind = storage.read_text(self.place(_COMPUTE_TYPE))
        return None if kind is None else kind.strip() == "bfloat16"

    def write_compute_type(self, kind: str) -> None:
        """Keep the type that the run computes in, `float32` or `bfloat16`, wherever it goes on."""
        storage.write_text(self.place(_COMPUTE_TYPE), kind)

    def read_mlflow_run_id(self) -> str | None:
        """Return the MLflow run that an earlier attempt began."""
        way_out = "remove it, and a new MLflow run is begun"
        run = self._read_json(MlflowRun, _MLFLOW_RUN, way_out)
        return run and run["mlflow_run_id"]

    def write_mlflow_run(self, run_id: str, tracking_uri: str | None) -> None:
        """Keep the MLflow run, so that a restarted driver continues it."""
        run = {"mlflow_run_id": run_id, "tracking_uri": tracking_uri}
        storage.write_text(self.place(_MLFLOW_RUN), json.dumps(run) + "\n")

    # A sweep

    def has_study(self) -> bool:
        """Tell whether a sweep wrote its study here."""
        return storage.exists(self.place(STUDY))

    def read_study(self, shape: type[T]) -> T | None:
        """Return what a sweep knows of its trials; None where there is no study."""
        way_out = "restore it from a copy, or replace the study with --overwrite"
        return self._read_json(shape, STUDY, way_out)

    def write_study(self, study: Mapping[str, Any]) -> None:
        """Write `study.json`."""
        storage.write_text(self.place(STUDY), json.dumps(study, indent=1) + "\n")

    @property
    def trials(self) -> str:
        """The folder of all trials."""
        return self.place(_TRIALS)

    @property
    def full_name(self) -> str:
        """The name of the run; of a trial, with that of its sweep: `sweep/trial-003`."""
        study, _, trial = self.uri.rstrip("/").rpartition(f"/{_TRIALS}/")
        return f"{RunFolder(study).name}/{trial}" if study else self.name

    def trial(self, name: str) -> RunFolder:
        """Return the folder of a trial, which is a run's."""
        return RunFolder(f"{self.trials}/{name}")

    def read_trial_measures(self, shape: type[T]) -> list[T]:
        """Return what was measured of the trial whose folder this is.

        A file that is damaged counts as none: what it held is measured again, or is known from
        checkpoints.
        """
        try:
            return self._read_json(list[shape], _TRIAL_MEASURES) or []  # type: ignore[valid-type]
        except DamagedFile:
            return []

    def write_trial_measures(self, measures: Iterable[Mapping[str, Any]]) -> None:
        """Keep what was measured of the trial whose folder this is."""
        storage.write_text(self.place(_TRIAL_MEASURES), json.dumps(list(measures)))

    # Other programs' files

    @property
    def tensorboard(self) -> str:
        """The folder of TensorBoard's logs."""
        return self.place("logs")

    @property
    def ray(self) -> str:
        """The folder of Ray's own state."""
        return self.place(_RAY)

    # The folder as a whole

    def contents(self) -> set[str]:
        """Return the names of what jobs or others put here.

        Ray's state is none of it, nor is the beginning of a file whose writer was killed.
        """
        names = set(storage.names(self.uri)) - {_RAY, _TRIED}
        return {name for name in names if not name.endswith(storage.PART)}

    def require_ours(self, mark: str = CONFIG) -> None:
        """Raise `StoreError` if the folder holds anything, and not the `mark` of a job of ours.

        A model's folder, say, has a `config.json` too. Raises it, too, if nothing can be written.
        """
        found = self.contents()
        settings = self.read_settings() if CONFIG in found else None
        foreign = settings is not None and not {"output_name", "output_dir"} <= set(settings)
        if foreign or (found and mark not in found):
            raise StoreError(
                f"{self.uri}: exists, and is not of ray_sql (no {mark} of a job); choose another "
                "--output_name"
            )
        self.require_writable()

    def require_writable(self) -> None:
        """Raise `StoreError` if nothing can be written here: tried before the work, not after."""
        is_new = not self.exists()
        storage.write_text(self.place(_TRIED), "")
        storage.remove(self.uri if is_new else self.place(_TRIED))

    @property
    def is_local(self) -> bool:
        """True for a folder of this machine, False for one of a remote store."""
        return "://" not in self.uri

    def remove(self) -> None:
        """Remove the folder. If that is cut off, `finish_removal` completes it.

        A link inside is removed, not what it leads to. A folder that is a link itself is emptied.
        """
        if not self.exists():
            return
        storage.write_text(self.place(_REMOVED), "")
        storage.remove(self.place(_INPUTS))  # first: with what it holds, the run can be published
        for name in storage.names(self.uri):
            if name != _REMOVED:
                storage.remove(self.place(name))
        is_link = os.path.islink(self.uri)
        storage.remove(self.place(_REMOVED) if is_link else self.uri)

    def finish_removal(self) -> None:
        """Complete a removal that was cut off. Called before a folder is taken for a run."""
        if storage.exists(self.place(_REMOVED)):
            self.remove()

    def _write_json(self, name: str, value: Mapping[str, Any]) -> None:
        storage.write_text(self.place(name), json.dumps(value, indent=2) + "\n")


def json_lines(rows: Iterable[Mapping[str, Any]]) -> str:
    """Return rows as JSON lines."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
