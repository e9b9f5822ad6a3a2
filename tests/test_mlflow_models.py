"""A run's adapter in MLflow answers as it was measured, from a run, the registry and a server."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from benchmarks.mlflow_server import free_port
from ray_sql import tracking
from ray_sql.config.sections import TrackingSection
from ray_sql.errors import DataError
from ray_sql.store.run_folder import RunFolder
from tests.conftest import SHOP
from tests.waiting import HANGS


@pytest.fixture(scope="module")
def champion(
    tuned_run: Path, empty_mlflow: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, str]]:
    """The tuned run's adapter, logged and registered: the store's address and the run's id."""
    root = tmp_path_factory.mktemp("registry")
    shutil.copy(empty_mlflow, root / "mlflow.db")
    settings = TrackingSection(uri=f"sqlite:///{root}/mlflow.db")
    run = tracking.start(settings, {}, name="tuned", tags={}, spool=root / "spool.jsonl")
    run.log(80, {"score/execution_accuracy": 0.5})
    run.model(tuned_run / "adapter", tracking.LoggedModel("adapter", {}, {}, "dev"))
    tags = {"score": "0.5", "measured_on": "dev"}
    run.register("ray-sql-sql", "adapter", tags, "champion", won=True)
    run.end("FINISHED")
    before = os.environ.get("MLFLOW_TRACKING_URI")
    os.environ["MLFLOW_TRACKING_URI"] = run.uri
    yield run.uri, run.run_id
    del os.environ["MLFLOW_TRACKING_URI"]
    if before:
        os.environ["MLFLOW_TRACKING_URI"] = before


@pytest.fixture(scope="module")
def loaded(champion: tuple[str, str]) -> Any:
    from mlflow import pyfunc

    return pyfunc.load_model("models:/ray-sql-sql@champion")


def measured(tuned_run: Path) -> list[dict[str, Any]]:
    rows = RunFolder(str(tuned_run)).read_predictions()
    assert sum(row["verdict"] == "correct" for row in rows) > 3
    return rows


def test_loading_it_prints_nothing(champion: tuple[str, str]) -> None:
    code = "from mlflow import pyfunc; pyfunc.load_model('models:/ray-sql-sql@champion')"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "Warning" not in done.stdout + done.stderr


def test_the_champion_answers_as_it_was_measured(loaded: Any, tuned_run: Path) -> None:
    from pandas import DataFrame

    rows = measured(tuned_run)
    asked = DataFrame({"question": [row["question"] for row in rows], "database": "mall"})
    assert loaded.predict(asked)["sql"].tolist() == [row["predicted"] for row in rows]
    assert loaded.predict(asked)["links"].tolist() == [None] * len(rows)


def test_a_runs_own_model_answers_alike(
    champion: tuple[str, str], loaded: Any, tuned_run: Path
) -> None:
    from mlflow import pyfunc
    from pandas import DataFrame

    asked = DataFrame([{"question": measured(tuned_run)[0]["question"], "database": "mall"}])
    again = pyfunc.load_model(f"runs:/{champion[1]}/adapter")
    assert again.predict(asked).equals(loaded.predict(asked))


def test_a_database_may_be_a_file_or_a_text(
    loaded: Any, tuned_run: Path, spider_folder: Path
) -> None:
    from pandas import DataFrame

    row = measured(tuned_run)[0]
    file = str(spider_folder / "database" / "mall" / "mall.sqlite")
    schema = SHOP.partition("INSERT")[0]
    asked = DataFrame([{"question": row["question"], "database": file}])
    assert loaded.predict(asked)["sql"].tolist() == [row["predicted"]]
    asked = DataFrame([{"question": row["question"], "schema": schema}])
    assert loaded.predict(asked)["sql"].tolist() == [row["predicted"]]


def test_no_sql_is_executed_where_a_run_votes(tuned_run: Path) -> None:
    from pandas import DataFrame

    from ray_sql.serve.pyfunc import TunedModel

    voting = {"samples": 3, "temperature": 0.5, "choose": "vote"}
    model, before = TunedModel(), set(psutil.Process().children())
    model.load_context(
        SimpleNamespace(
            artifacts={"adapter": str(tuned_run / "adapter")}, model_config={"evaluate": voting}
        )
    )
    rows = measured(tuned_run)
    asked = DataFrame({"question": [row["question"] for row in rows], "database": "mall"})
    answers = model.predict(None, asked)["sql"].tolist()
    started = set(psutil.Process().children()) - before
    model._engine.close()
    assert not started, "processes that execute SQL were started"
    assert answers == [row["predicted"] for row in rows]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"question": "", "database": "mall"}, "a row has no question"),
        ({"question": "How many?", "database": "nowhere"}, "no such database of the run"),
        ({"question": "How many?"}, "--database is missing"),
        ({"question": "How many?", "schema": "DROP TABLE x"}, "creates no table"),
    ],
)
def test_a_row_that_cannot_be_asked_is_refused(
    loaded: Any, row: dict[str, str], words: str
) -> None:
    from pandas import DataFrame

    with pytest.raises(DataError, match=words):
        loaded.predict(DataFrame([row]))


@pytest.mark.slow
def test_mlflows_own_server_answers(
    champion: tuple[str, str], tuned_run: Path, tmp_path: Path
) -> None:
    row, port = measured(tuned_run)[0], free_port()
    command = [sys.executable, "-m", "mlflow", "models", "serve", "--env-manager", "local"]
    command += ["-m", "models:/ray-sql-sql@champion", "--port", str(port)]
    log = tmp_path / "server.log"
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # it calls uvicorn
    own = os.environ | {"PATH": path}
    server = subprocess.Popen(command, stdout=log.open("w"), stderr=subprocess.STDOUT, env=own)
    body = {"dataframe_records": [{"question": row["question"], "database": "mall"}]}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/invocations",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    try:
        until = time.monotonic() + HANGS
        while True:
            try:
                answered = json.load(urllib.request.urlopen(request, timeout=60))
                break
            except OSError:
                assert time.monotonic() < until and server.poll() is None, log.read_text()
                time.sleep(0.5)
        assert answered["predictions"][0]["sql"] == row["predicted"]
    finally:
        server.terminate()
        server.wait(timeout=30)
