"""A service of a run, on a free port of this machine, for tests."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import uvicorn

from ray_sql.config import ServeConfig, load
from ray_sql.config.sections import ServeSection
from ray_sql.serve.app import make_app
from ray_sql.serve.databases import registered
from ray_sql.serve.engine import Engine
from ray_sql.serve.opening import open_engine
from ray_sql.serve.prompter import Prompter
from ray_sql.serve.recipe import find, find_linker
from tests.waiting import HANGS, wait_until


def settings(run: Path, **given: Any) -> ServeConfig:
    """Return the settings of a service of a run."""
    return load(ServeConfig, [], output_name=run.name, output_dir=str(run.parent), **given)


def make_engine(run: Path, **given: Any) -> Engine:
    """Return an engine on all databases of a run."""
    config = settings(run, **given)
    found = find(config)
    prompter = Prompter(found, registered({}, found.config))
    return open_engine(prompter, find_linker(config))


@contextmanager
def serving(engine: Engine, token: str | None = None, **section: Any) -> Iterator[httpx2.Client]:
    """Serve on a free port of this machine; yield a client."""
    app = make_app(engine, ServeSection(**section), token)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="debug", log_config=None))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    wait_until(lambda: server.started)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        with httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=HANGS) as client:
            yield client
    finally:
        server.should_exit = True
        thread.join(HANGS)
