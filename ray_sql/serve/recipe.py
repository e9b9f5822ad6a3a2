"""Find an adapter and the settings that it was trained with."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray_sql import models
from ray_sql.config import Config, TunedConfig
from ray_sql.errors import ConfigError
from ray_sql.store import storage
from ray_sql.store.run_folder import CONFIG, AdapterFolder, RunFolder

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
PLACES = ("output_dir", "output_name", "cache_dir", "scaling.storage_path")
"""Settings that say where a run lies, which is no part of what it is."""


@dataclass(frozen=True)
class Recipe:
    """An adapter, with the settings of its run. Settings for answers may be this command's."""

    config: Config
    adapter: AdapterFolder
    name: str


def find(config: TunedConfig) -> Recipe:
    """Return the adapter that a job's settings name.

    Raises `ConfigError` if there is none, or if its settings cannot be read.
    """
    adapter = _adapter(config)
    saved = RunFolder(adapter.uri).read_settings()
    if saved is None:
        raise ConfigError(
            f"{adapter}: no adapter of a ray_sql run (no {CONFIG}); give --output_name of a "
            "finished run, or --adapter with its folder or Hub id"
        )
    places = {name: config.setting(name) for name in PLACES}
    places["output_name"] = config.output_name or "adapter"
    try:
        run = Config(**({"output_name": "adapter"} | saved))
    except ValueError:  # of another version
        raise ConfigError(
            f"{adapter.place(CONFIG)} cannot be read by this version; use the one that wrote it"
        ) from None
    name = config.adapter or config.output_name
    return Recipe(run.changed(places | _given(config)), adapter, name)


def _given(config: TunedConfig) -> dict[str, Any]:
    """Return the settings for answers, and the token, that this command was given."""
    answers = config.evaluate.model_dump(exclude_unset=True)
    token = {"read_token": config.read_token} if config.read_token else {}
    return {f"evaluate.{name}": value for name, value in answers.items()} | token


def _adapter(config: TunedConfig) -> AdapterFolder:
    """Return the folder of the adapter: a run's, one that is named, or one from the Hub."""
    if config.adapter is None:
        return RunFolder(config.run_dir).adapter
    place = storage.absolute_uri(config.adapter)
    if HUB_ID.fullmatch(config.adapter) and not Path(place).exists():
        return AdapterFolder(models.fetch_adapter(config.adapter, config.read_token))
    named = RunFolder(place)
    return named.adapter if named.adapter.exists() else AdapterFolder(place)
