"""Open MLflow's pages of runs and of a study in headless Chromium: seconds, pictures, records.

    python -m benchmarks.mlflow_pages --run demo --study demo-sweep --pictures out/pictures

It starts `ray-sql ui` on the store of the runs, on a free port of this machine. Each page is opened
--rounds times with a new profile of the browser, so nothing is cached. A page is open when its text
has not changed for a second; this second is not counted. Traces are there for a run that recorded
its questions (`--tracking.questions`). Needs `chromium`. The last line is one JSON object: the most
seconds of each page, and how many params, metrics, tags and artifacts each run has.
"""

from __future__ import annotations

import argparse
import json
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any
from urllib.parse import quote

import mlflow
import psutil
from playwright.sync_api import Browser, ViewportSize, sync_playwright

from benchmarks.mlflow_server import free_port
from ray_sql.store.run_folder import RunFolder
from tests.waiting import wait_until

STILL_SECONDS = 1.0
"""A page is open when its text has not changed for so long."""
PATIENCE_SECONDS = 60.0
FEW = 200
"""Letters of a page that shows nothing but its frame."""
SIZE = ViewportSize(width=1800, height=1000)


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output_dir", default="out")
    parser.add_argument("--run", default="demo", help="a finished run")
    parser.add_argument("--study", help="a finished sweep")
    parser.add_argument("--model", help="a registered model")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pictures", type=Path, help="a folder for pictures of the pages")
    given = parser.parse_args(argv)
    chromium = shutil.which("chromium")
    assert chromium, "install chromium"
    root = Path(given.output_dir).absolute()
    named = {"run": given.run} | ({"study": given.study} if given.study else {})
    store, _ = recorded(root / given.run)
    ids = {kind: recorded(root / name)[1] for kind, name in named.items()}
    client = mlflow.MlflowClient(store)
    with interface(store) as address, sync_playwright() as started:
        browser = started.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        pages = dict(addresses(address, client, ids))
        if given.model:
            pages["registered model"] = f"{address}/#/models/{quote(given.model)}"
        print("| page | seconds | at most |\n|---|---|---|")
        most = {}
        for name, place in pages.items():
            file = f"{name.replace(': ', ' ').replace(' ', '-')}.png"
            picture = given.pictures and given.pictures / file
            seconds = [opened(browser, place, picture) for _ in range(given.rounds)]
            most[name] = round(max(seconds), 1)
            print(f"| {name} | {median(seconds):.1f} | {most[name]} |", flush=True)
    records = {kind: counted(client, run) for kind, run in ids.items()}
    print(json.dumps({"seconds": most, "records": records}))


def recorded(run: Path) -> tuple[str, str]:
    """Return the store and the id of a run's record in MLflow."""
    saved = json.loads(Path(RunFolder(str(run)).place("run.json")).read_text())
    return saved["tracking_uri"], saved["mlflow_run_id"]


@contextmanager
def interface(store: str) -> Iterator[str]:
    """Run `ray-sql ui` on a store; yield its address."""
    port = free_port()
    command = [sys.executable, "-m", "jobs.ui", "--tracking.uri", store, "--port", str(port)]
    process = psutil.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    address = f"http://127.0.0.1:{port}"
    try:
        wait_until(lambda: is_listening(port) or process.poll() is not None)
        yield address
    finally:
        process.terminate()
        process.wait()


def is_listening(port: int) -> bool:
    """Tell whether something listens on a port of this machine."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def addresses(
    address: str, client: mlflow.MlflowClient, ids: dict[str, str]
) -> Iterator[tuple[str, str]]:
    """Yield the pages of runs by what they show."""
    experiment = client.get_run(ids["run"]).info.experiment_id
    runs = f"{address}/#/experiments/{experiment}"
    yield "list of runs", f"{runs}/runs?workflowType=machine_learning&viewStateShareKey=scores"
    yield "models", f"{runs}/models"
    for kind, run in ids.items():
        yield kind, f"{runs}/runs/{run}"
        yield f"{kind}: metrics", f"{runs}/runs/{run}/model-metrics"
        yield f"{kind}: system metrics", f"{runs}/runs/{run}/system-metrics"
        yield f"{kind}: traces", f"{runs}/runs/{run}/traces"
        yield f"{kind}: artifacts", f"{runs}/runs/{run}/artifacts"
    table = next(
        one.path for one in client.list_artifacts(ids["run"]) if one.path.endswith("dictions.json")
    )
    yield "table of questions", f"{runs}/runs/{ids['run']}/artifacts/{quote(table)}"
    if "study" in ids:
        trials = [
            one.info.run_id
            for one in client.search_runs([experiment])
            if one.data.tags.get("mlflow.parentRunId") == ids["study"]
        ]
        compared = quote(json.dumps(trials))
        yield (
            "trials side by side",
            f"{address}/#/compare-runs?runs={compared}&experiments=[%22{experiment}%22]",
        )


def opened(browser: Browser, place: str, picture: Path | None) -> float:
    """Open a page with a new profile; return the seconds until its text stood still."""
    context = browser.new_context(viewport=SIZE)
    page = context.new_page()
    text, began = "", time.perf_counter()
    page.goto(place, wait_until="commit")
    changed = began
    while time.perf_counter() - changed < STILL_SECONDS or len(text) < FEW:
        assert time.perf_counter() - began < PATIENCE_SECONDS, f"{place} shows {text!r}"
        now = page.evaluate("document.body ? document.body.innerText : ''")
        if now != text:
            text, changed = now, time.perf_counter()
        page.wait_for_timeout(50)
    seconds = changed - began
    if picture:
        picture.parent.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=picture)
    context.close()
    return seconds


def counted(client: mlflow.MlflowClient, run: str) -> dict[str, int]:
    """Return the numbers of what a run has in MLflow."""
    found: Any = client.get_run(run).data
    return {
        "params": len(found.params),
        "metrics": len(found.metrics),
        "tags": len(found.tags),
        "artifacts": sum(1 for _ in client.list_artifacts(run)),
    }


if __name__ == "__main__":
    main()
