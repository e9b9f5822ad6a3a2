"""Open an engine: a model here or behind an endpoint, maybe after a linker."""

from __future__ import annotations

import logging

from ray_sql.config import AskingConfig
from ray_sql.models.twin import twin
from ray_sql.serve import recipe
from ray_sql.serve.engine import Engine, Model
from ray_sql.serve.linker import Linker
from ray_sql.serve.local_model import SCHEMA_BYTES, Base, LocalModel
from ray_sql.serve.prompter import Prompter
from ray_sql.serve.remote_model import RemoteModel

log = logging.getLogger(__name__)


def find_linker(config: AskingConfig, generator: Prompter) -> Prompter | None:
    """Return the prompts of the linker that settings name, on the databases of a generator.

    Raises `ConfigError` and `ContractError` for one that cannot be used.
    """
    found = recipe.find_linker(config)
    return None if found is None else Prompter(found, generator.databases)


def why_two_bases(generator: Prompter, linker: Prompter) -> str | None:
    """Return why a linker needs a base model of its own in memory; None where both share one."""
    if generator.config.evaluate.backend == "openai":
        return None
    differing = Base.of(generator).differing(Base.of(linker))
    if not differing:
        return None
    return f"two base models are in memory: the linker's has another {' and '.join(differing)}"


def open_engine(
    prompter: Prompter, linker: Prompter | None = None, schema_bytes: int = SCHEMA_BYTES
) -> Engine:
    """Return the engine of a prompter's adapter, after a linker if one is given.

    The linker shares the base model in memory, where both were trained over the same one. It keeps
    as many bytes of schemas.
    """
    settings, shared = prompter.config.evaluate, None
    if settings.backend == "openai":
        model: Model = RemoteModel(settings)
    else:
        base = Base.of(prompter).load(prompter.config.cache)
        if linker is not None and (why := why_two_bases(prompter, linker)):
            log.warning(why)
        elif linker is not None:
            shared = twin(base)
        model = LocalModel(prompter, base, schema_bytes)
    if linker is None:
        return Engine(prompter, model)
    own = shared or Base.of(linker).load(linker.config.cache)
    first = Engine(linker, LocalModel(linker, own, schema_bytes))
    return Engine(prompter, model, Linker(first, prompter))
