"""Ask a run's adapter as MLflow has it: loaded from the registry, and by `mlflow models serve`.

    python -m benchmarks.registered_model --output_name demo     (--bfloat16: as the run computed)

The adapter is scored by `ray-sql evaluate`, in float32, where no answer depends on those beside it.
It is registered as `models:/ray-sql-sql@champion` in a new store, loaded, and served on a free port
of this machine. Both are asked the same questions, the server --batch at a time. The last line is
one JSON object: how many answers equal those of `predictions.jsonl`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import requests
from mlflow import pyfunc
from pandas import DataFrame

from benchmarks.mlflow_server import free_port
from benchmarks.verify_endpoint import is_up
from ray_sql import tracking
from ray_sql.config.sections import TrackingSection
from ray_sql.store.run_folder import RunFolder
from tests.planted import computed_in_float32
from tests.waiting import HANGS, wait_until

MODEL = "models:/ray-sql-sql@champion"


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output_name", default="demo", help="a finished run for task sql")
    parser.add_argument("--output_dir", default="out")
    parser.add_argument("--questions", type=int, default=64)
    parser.add_argument("--batch", type=int, default=16, help="questions of a request")
    parser.add_argument("--bfloat16", action="store_true", help="compute as the run did")
    given = parser.parse_args(argv)
    run = Path(given.output_dir).absolute() / given.output_name
    with tempfile.TemporaryDirectory(prefix="ray_sql-") as folder:
        scratch = Path(folder)
        adapter, rows = run / "adapter", RunFolder(str(run)).read_predictions()
        if not given.bfloat16:
            adapter = computed_in_float32(run, scratch / "adapter")
            rows = scored(run, adapter, scratch)
        rows = random.Random(14).sample(rows, k=min(given.questions, len(rows)))
        asked = [{"question": row["question"], "database": row["db_id"]} for row in rows]
        measured = [row["predicted"] for row in rows]
        register(adapter, scratch)
        loaded = pyfunc.load_model(MODEL).predict(DataFrame(asked))["sql"].tolist()
        served = by_server(asked, given.batch, scratch)
    equal = {
        name: sum(map(str.__eq__, answers, measured))
        for name, answers in {"loaded": loaded, "served": served}.items()
    }
    print(json.dumps({"n": len(rows), **equal}))


def scored(run: Path, adapter: Path, scratch: Path) -> list[dict[str, Any]]:
    """Return the judged answers of an adapter to the questions of its run."""
    command = [sys.executable, "-m", "jobs.evaluate", "--config", str(run / "config.json")]
    command += ["--adapter", str(adapter), "--output_dir", str(scratch), "--output_name", "again"]
    off = ["--train.bf16", "false", "--no-evaluate.baseline", "--no-tracking.enabled"]
    subprocess.run([*command, *off], check=True, stdout=sys.stderr)
    return RunFolder(str(scratch / "again")).read_predictions()


def register(adapter: Path, scratch: Path) -> None:
    """Register an adapter as the champion of a new store, which MLflow takes from now on."""
    settings = TrackingSection(uri=f"sqlite:///{scratch}/mlflow.db")
    run = tracking.start(settings, {}, name="run", tags={}, spool=scratch / "spool.jsonl")
    run.log(1, {"score/execution_accuracy": 0.5})
    run.model(adapter, tracking.LoggedModel("adapter", {}, {}, "dev"))
    run.register("ray-sql-sql", "adapter", {"measured_on": "dev"}, "champion", won=True)
    run.end("FINISHED")
    os.environ["MLFLOW_TRACKING_URI"] = run.uri


def by_server(asked: Sequence[dict[str, str]], batch: int, scratch: Path) -> list[str]:
    """Return the answers of `mlflow models serve`."""
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "models", "serve", "--env-manager", "local"]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # it calls uvicorn
    with (scratch / "server.log").open("w") as log:
        server = subprocess.Popen(
            [*command, "-m", MODEL, "--port", str(port)],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | {"PATH": path},
        )
    address = f"http://127.0.0.1:{port}"
    try:
        wait_until(lambda: is_up(f"{address}/ping") or server.poll() is not None)
        answers = []
        for start in range(0, len(asked), batch):
            body = {"dataframe_records": asked[start : start + batch]}
            response = requests.post(f"{address}/invocations", json=body, timeout=HANGS)
            response.raise_for_status()
            answers += [one["sql"] for one in response.json()["predictions"]]
        return answers
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main()
