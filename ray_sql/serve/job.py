"""Serve a tuned model until stopped: the door of `ray-sql serve`."""

from __future__ import annotations

import logging
import os
import time
from typing import Any

from ray import serve
from ray.serve.exceptions import RayServeException

from ray_sql import cluster
from ray_sql.config import ServeConfig
from ray_sql.config.ports import require_free_port
from ray_sql.config.sections import ServeSection
from ray_sql.display import Display, loading
from ray_sql.errors import ConfigError, last_line
from ray_sql.serve import vllm
from ray_sql.serve.access import NO_TOKEN, token_for
from ray_sql.serve.deployment import bind, prompter
from ray_sql.serve.opening import find_linker, why_two_bases

PROXY_SECONDS = "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "60"
"""Seconds that Ray Serve waits for its own processes: by default 5, too few on a busy machine."""
NAME = "ray_sql"
"""The name of the application. A Ray Serve has one of each name."""


def run(config: ServeConfig) -> None:
    """Serve as the settings say, until a signal ends it."""
    section, display = config.serve, Display()
    token = token_for(section.host)
    asking = prompter(config)  # what is wrong is said before Ray starts
    linker = find_linker(config, asking)
    if section.gpu is not None:
        print(vllm.configuration(asking, section), end="")
        return
    if not cluster.joins():  # a cluster's own service may have the port: this joins it
        require_free_port("--serve.port", section.host, section.port)
    display.line(f"{asking.name} on {', '.join(asking.databases)}")
    if linker is not None and (why := why_two_bases(asking, linker)):
        display.line(f"note: {why}")
    os.environ.setdefault(*PROXY_SECONDS)  # Ray's processes inherit it
    logging.getLogger("ray.serve").setLevel(logging.WARNING)  # the lines below say the same
    with loading("Ray"):
        cluster.start_ray()
        others = _is_running()
        serve.start(http_options={"host": section.host, "port": section.port})
    if others:
        display.line("note: Ray Serve runs here already, and listens where it was told to before")
    try:
        with loading("model"):
            _deploy(bind(config.for_replicas(), needs_token=token is not None))
        display.line(f"answering at {_address(section)}/v1/sql")
        while True:
            time.sleep(1)
    finally:
        if others:
            serve.delete(NAME)
        else:
            serve.shutdown()


def _address(section: ServeSection) -> str:
    """Return the address below which the service answers."""
    host = f"[{section.host}]" if ":" in section.host else section.host
    return f"http://{host}:{section.port}"


def _is_running() -> bool:
    """Tell whether Ray Serve runs already. Raises `ConfigError` where it has our application."""
    status = serve.status()
    if NAME in status.applications:
        raise ConfigError(
            f"this Ray serves an application {NAME} already; end the `ray-sql serve` that began "
            f"it, or remove it: python -c \"from ray import serve; serve.delete('{NAME}')\""
        )
    return bool(status.proxies or status.applications)


def _deploy(application: Any) -> None:
    """Return once the application answers.

    Raises `ConfigError` where another one has its route, or where a node lacks the token.
    """
    try:
        serve.run(application, name=NAME, route_prefix="/")
    except RayServeException as error:
        raise ConfigError(
            f"{last_line(error)} Remove that one, or unset RAY_ADDRESS to serve on a Ray of its own"
        ) from None
    except RuntimeError:  # its text does not say why
        ours = serve.status().applications.get(NAME)
        reasons = [copy.message for copy in ours.deployments.values()] if ours else []
        if any(NO_TOKEN in reason for reason in reasons):
            raise ConfigError(NO_TOKEN) from None
        raise


def dry_run(config: ServeConfig) -> None:
    """Show the begin of each database's prompts, and what would be served."""
    display, asking = Display(), prompter(config)
    linker = find_linker(config, asking)
    token_for(config.serve.host)
    for name, begin in asking.begins.items():
        display.line(f"--- {name} ---\n{asking.tokenizer.decode(begin)}")
    before = "" if linker is None else f", after {linker.adapter}"
    display.line(f"--- plan ---\nwould serve {asking.adapter}{before} at {_address(config.serve)}")
    if linker is not None and (why := why_two_bases(asking, linker)):
        display.line(f"note: {why}")
