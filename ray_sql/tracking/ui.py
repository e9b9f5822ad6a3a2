"""MLflow's pages, opened on this project's runs: the door of `ray-sql ui`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress

from ray_sql.config import UiConfig, mask_password
from ray_sql.config.ports import require_free_port
from ray_sql.errors import StoreError
from ray_sql.tracking.names import VIEW
from ray_sql.tracking.store import client_of, refusing, require_store

QUIET = {
    "PYTHONWARNINGS": "ignore",
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # of its own judges, in processes of their own
}
HOST = "127.0.0.1"
END_SECONDS = 10.0
"""Seconds in which the server may end in order."""


def run(config: UiConfig) -> None:
    """Say where the runs are shown, and serve MLflow's pages of a database until stopped.

    Raises `StoreError` if the store does not answer or the pages end, and `ConfigError` for a port
    that is taken.
    """
    uri = require_store(config.tracking.model_copy(update={"enabled": True})).rstrip("/")
    page = runs_page(uri, config.tracking.experiment)
    if uri.startswith("http"):
        print(f"{mask_password(uri)}/{page}")
        return
    require_free_port("--port", HOST, config.port)
    print(f"MLflow of {mask_password(uri)}: open http://{HOST}:{config.port}/{page}", flush=True)
    if config.dry_run:
        return
    command = [sys.executable, "-m", "mlflow", "server", "--workers", "1"]
    command += ["--host", HOST, "--port", str(config.port)]
    # by the environment, for an address may hold a password
    own = os.environ | QUIET | {"MLFLOW_BACKEND_STORE_URI": uri}
    with (
        tempfile.TemporaryFile("w+") as said,
        subprocess.Popen(
            command, env=own, start_new_session=True, stdout=said, stderr=said
        ) as server,
    ):
        try:
            server.wait()
        finally:
            _end(server)
        said.seek(0)
        lines = said.read().strip().splitlines()
        raise StoreError(f"MLflow's pages ended by themselves: {lines[-1] if lines else ''}")


def _end(server: subprocess.Popen[bytes]) -> None:
    """End a server with all its processes: alone, it would leave those that answer."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(server.pid, number)
        with suppress(subprocess.TimeoutExpired):
            server.wait(timeout=END_SECONDS)


def runs_page(uri: str, experiment: str) -> str:
    """Return the address of an experiment's runs below that of MLflow, with the scores as columns.

    It is empty where nothing was recorded yet.
    """
    with refusing(uri):
        known = client_of(uri).get_experiment_by_name(experiment)
    if known is None:
        return ""
    page = f"#/experiments/{known.experiment_id}/runs?workflowType=machine_learning"
    has_view = f"mlflow.sharedViewState.{VIEW}" in known.tags
    return page + f"&viewStateShareKey={VIEW}" * has_view
