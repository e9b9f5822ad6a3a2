"""Find an adapter and the settings that it was trained with."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import SecretStr

from ray_sql import models
from ray_sql.config import AskingConfig, Config, TunedConfig
from ray_sql.config.sections import AnswersSection
from ray_sql.errors import ConfigError
from ray_sql.store import storage
from ray_sql.store.run_folder import ADAPTER_SETTINGS, AdapterFolder, RunFolder
from ray_sql.tasks import SCHEMA

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
    adapter = _adapter(config.adapter, config.run_dir, config.read_token)
    saved = adapter.read_settings()
    if saved is None:
        raise ConfigError(
            f"{adapter}: no adapter of a ray_sql run (no {ADAPTER_SETTINGS}); give --output_name "
            "of a finished run, or --adapter with its folder or Hub id"
        )
    places = {name: config.setting(name) for name in PLACES}
    places["output_name"] = config.output_name or "adapter"
    try:
        run = Config(**({"output_name": "adapter"} | saved))
    except ValueError:  # of another version
        raise ConfigError(
            f"{adapter.place(ADAPTER_SETTINGS)} cannot be read by this version; use the one that "
            "wrote it"
        ) from None
    name = config.adapter or config.output_name
    given = _given(config.evaluate, config.read_token)
    return Recipe(run.changed(places | given), adapter, name)


def find_linker(config: AskingConfig) -> Recipe | None:
    """Return the linker that a job's settings name; None where they name none.

    It has its own settings for answers. Raises `ConfigError` as `find` does, and for an adapter
    that finds no links.
    """
    if config.linker is None:
        return None
    named = {"output_name": "", "adapter": config.linker, "evaluate": AnswersSection()}
    found = find(config.model_copy(update=named))
    if found.config.task_type != SCHEMA.name:
        raise ConfigError(
            f"--linker {config.linker}: is no adapter that finds links; give one of --task_type "
            "schema"
        )
    return found


def _given(evaluate: AnswersSection, token: SecretStr | None) -> dict[str, Any]:
    """Return the settings for answers, and the token, that this command was given."""
    answers = evaluate.model_dump(exclude_unset=True)
    given = {"read_token": token} if token else {}
    return {f"evaluate.{name}": value for name, value in answers.items()} | given


def _adapter(named: str | None, run_dir: str, token: SecretStr | None) -> AdapterFolder:
    """Return the folder of the adapter: a run's, one that is named, or one from the Hub."""
    if named is None:
        return RunFolder(run_dir).adapter
    place = storage.absolute_uri(named)
    if HUB_ID.fullmatch(named) and not Path(place).exists():
        return AdapterFolder(models.fetch_adapter(named, token))
    run = RunFolder(place)
    return run.adapter if run.adapter.exists() else AdapterFolder(place)
