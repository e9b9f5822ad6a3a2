"""Open an engine: a model here or behind an endpoint, maybe after a linker."""

from __future__ import annotations

from ray_sql.serve.engine import Engine, Model
from ray_sql.serve.linker import Linker
from ray_sql.serve.local_model import SCHEMA_BYTES, LocalModel
from ray_sql.serve.prompter import Prompter
from ray_sql.serve.recipe import Recipe
from ray_sql.serve.remote_model import RemoteModel


def open_engine(
    prompter: Prompter, linker: Recipe | None = None, schema_bytes: int = SCHEMA_BYTES
) -> Engine:
    """Return the engine of a prompter's adapter, after a linker if one is given.

    The linker has a copy of the base model of its own, and keeps as many bytes of schemas.
    """
    first = None
    if linker is not None:
        asking = Prompter(linker, prompter.databases)
        first = Linker(open_engine(asking, schema_bytes=schema_bytes), prompter)
    settings = prompter.config.evaluate
    if settings.backend == "openai":
        model: Model = RemoteModel(settings)
    else:
        model = LocalModel(prompter, schema_bytes)
    return Engine(prompter, model, first)
