"""The service as an application of Ray Serve.

`ray-sql serve` runs it on this machine. `serve deploy jobs/serve.yaml` runs it on a cluster, with
Ray Serve's own settings for replicas and autoscaling.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from ray import serve

from ray_sql import cluster
from ray_sql.config import ServeConfig, load
from ray_sql.serve import databases, recipe
from ray_sql.serve.access import token_for
from ray_sql.serve.app import make_app
from ray_sql.serve.opening import find_linker, open_engine
from ray_sql.serve.prompter import Prompter


def prompter(config: ServeConfig) -> Prompter:
    """Return the prompts of the adapter on all registered databases."""
    found = recipe.find(config)
    return Prompter(found, databases.registered(config.serve.databases, found.config))


@serve.deployment(max_ongoing_requests=10_000)  # the service itself refuses what is too much
@serve.ingress()
class Service:
    """A copy of the model, and the service over it."""

    def __init__(self, settings: dict[str, Any], needs_token: bool = False) -> None:
        config = load(ServeConfig, [], **settings)
        self._section = config.serve
        self._token = token_for(config.serve.host, needs_token)
        if "num_cpus" not in config.serve.ray_actor_options:
            # Ray allows one thread to an actor that reserves nothing
            cluster.set_threads(config.serve.num_replicas)
        asking = prompter(config)
        linker = find_linker(config, asking)
        self._engine = open_engine(asking, linker, config.serve.schema_bytes)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return make_app(self._engine, self._section, self._token)


def application(settings: dict[str, Any]) -> Any:
    """Return the application for settings of `ray-sql serve`, which `serve deploy` calls."""
    return bind(settings, needs_token=False)


def bind(settings: dict[str, Any], needs_token: bool) -> Any:
    """Return the application for settings; where it `needs_token`, no copy starts without one."""
    section = load(ServeConfig, [], **settings).serve
    deployment: Any = Service  # what the decorators made of the class
    options: dict[str, Any] = {}  # what is not set here, a file of `serve deploy` may set
    if section.num_replicas > 1:
        options["num_replicas"] = section.num_replicas
    if section.ray_actor_options:
        options["ray_actor_options"] = section.ray_actor_options
    return deployment.options(**options).bind(settings, needs_token)
