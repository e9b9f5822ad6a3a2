"""Serve a tuned model until stopped: the door of `ray-sql serve`."""

from __future__ import annotations

import time

from ray import serve

from ray_sql import cluster
from ray_sql.config import ServeConfig
from ray_sql.display import Display
from ray_sql.serve import recipe, vllm
from ray_sql.serve.access import token_for
from ray_sql.serve.deployment import application, prompter


def run(config: ServeConfig) -> None:
    """Serve as the settings say, until a signal ends it."""
    section, display = config.serve, Display()
    token_for(section.host)
    asking = prompter(config)  # what is wrong is said before Ray starts
    recipe.find_linker(config)
    if section.gpu is not None:
        print(vllm.configuration(asking, section), end="")
        return
    display.line(f"{asking.name} on {', '.join(asking.databases)}; loading the model")
    cluster.start_ray()
    serve.start(http_options={"host": section.host, "port": section.port})
    try:
        serve.run(application(config.for_replicas()), name="ray_sql", route_prefix="/")
        display.line(f"answering at http://{section.host}:{section.port}/v1/sql")
        while True:
            time.sleep(1)
    finally:
        serve.shutdown()


def dry_run(config: ServeConfig) -> None:
    """Show the begin of each database's prompts, and what would be served."""
    display, asking, linker = Display(), prompter(config), recipe.find_linker(config)
    token_for(config.serve.host)
    for name, begin in asking.begins.items():
        display.line(f"--- {name} ---\n{asking.tokenizer.decode(begin)}")
    address = f"http://{config.serve.host}:{config.serve.port}"
    before = "" if linker is None else f", after {linker.adapter}"
    display.line(f"--- plan ---\nwould serve {asking.adapter}{before} at {address}")
