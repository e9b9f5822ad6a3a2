"""MLflow holds one run per training run and each point once; an outage costs the run nothing."""

import http.server
import json
import logging
import socketserver
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.mlflow_server import Server, free_port
from ray_sql import tracking
from ray_sql.config.sections import TrackingSection
from ray_sql.errors import StoreError
from ray_sql.tracking import LoggedModel, Run
from ray_sql.tracking import run as tracking_runs
from ray_sql.tracking.store import is_refusal
from tests.waiting import HANGS

SOME_TABLES = 60_000
"""Bytes of a store of which MLflow has made a part."""


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"


@pytest.fixture(autouse=True)
def own_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What a test forgot to place shows up here, and `check` sets nothing for other tests."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")


def in_store(uri: str | None) -> TrackingSection:
    return TrackingSection(uri=uri, experiment="tests")


def begin(
    uri: str | None, folder: Path, run_id: str | None = None, settings: dict[str, Any] | None = None
) -> Run:
    return tracking.start(
        in_store(uri),
        settings
        or {"seed": 14, "lora": {"r": 8, "target_modules": "all-linear"}, "data": {"columns": {}}},
        name="my run",
        tags={"task_type": "sql"},
        spool=folder / "spool" / "my-run.jsonl",
        run_id=run_id,
    )


def read(run: Run) -> Any:
    from mlflow.tracking import MlflowClient

    return MlflowClient(run.uri).get_run(run.run_id)


def as_model(name: str, split: str = "dev") -> LoggedModel:
    return LoggedModel(name, {"lora.r": "8"}, {"weights_sha256": name}, split)


def history(run: Run, key: str) -> list[tuple[int, float]]:
    from mlflow.tracking import MlflowClient

    return sorted(
        (point.step, point.value)
        for point in MlflowClient(run.uri).get_metric_history(run.run_id, key)
    )


def test_a_run_records_settings_tags_points_tables_figures_files_and_data(
    store: str, tmp_path: Path
) -> None:
    from matplotlib.figure import Figure
    from mlflow.artifacts import load_dict
    from mlflow.tracking import MlflowClient

    run = begin(store, tmp_path)
    run.log(1, {"train/loss": 2.0, "train/lr": 0.1})
    run.log(2, {"train/loss": 1.0})
    run.tag({"note": "seen"})
    run.table(
        [{"question": "q1", "verdict": "correct"}, {"question": "q2", "verdict": None}],
        "predictions.json",
    )
    figure = Figure()
    figure.subplots().plot([1, 2])
    run.figure(figure, "figures/loss.png")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "a.bin").write_text("x")
    (tmp_path / "config.json").write_text("{}")
    run.artifact(tmp_path / "config.json")
    run.artifact(tmp_path / "adapter", "adapter")
    run.dataset("spider", "0123456789abcdef", "/data/spider", "train")
    run.end("FINISHED")

    found = read(run)
    assert found.data.params == {
        "seed": "14",
        "lora.r": "8",
        "lora.target_modules": "all-linear",
        "data.columns": "{}",
    }
    assert (found.data.tags["task_type"], found.data.tags["note"]) == ("sql", "seen")
    assert (found.info.status, found.info.run_name) == ("FINISHED", "my run")
    assert history(run, "train/loss") == [(1, 2.0), (2, 1.0)] and history(run, "train/lr") == [
        (1, 0.1)
    ]
    (data,) = found.inputs.dataset_inputs
    assert (data.dataset.name, data.dataset.digest, data.tags[0].value) == (
        "spider",
        "0123456789abcdef",
        "train",
    )
    client = MlflowClient(store)
    paths = {
        file.path
        for folder in ("", "figures", "adapter")
        for file in client.list_artifacts(run.run_id, folder)
    }
    assert paths >= {"predictions.json", "figures/loss.png", "adapter/a.bin", "config.json"}
    table = load_dict(f"{found.info.artifact_uri}/predictions.json")
    assert table == {"columns": ["question", "verdict"], "data": [["q1", "correct"], ["q2", None]]}
    assert not (tmp_path / "spool").exists() and not (tmp_path / "mlruns").exists()


def test_a_run_that_goes_on_is_the_same_run_and_logs_no_step_twice(
    store: str, tmp_path: Path
) -> None:
    first = begin(store, tmp_path)
    for step in (1, 2, 3):
        first.log(step, {"train/loss": float(step)})
    first.dataset("d", "0", "/d", "train")
    first.end("FAILED")
    second = begin(
        store, tmp_path, first.run_id, settings={"seed": 14, "lora": {"r": 8}, "changed": True}
    )
    assert second.run_id == first.run_id and read(second).info.status == "RUNNING"
    second.dataset("d", "0", "/d", "train")
    for step in (2, 3, 4):
        second.log(step, {"train/loss": -1.0})
    second.log(4, {"validation/n": 8})
    second.end("FINISHED")
    assert history(second, "train/loss") == [(1, 1.0), (2, 2.0), (3, 3.0), (4, -1.0)]
    assert history(second, "validation/n") == [(4, 8.0)]
    assert read(second).info.status == "FINISHED" and len(read(second).inputs.dataset_inputs) == 1


def test_a_run_whose_record_is_gone_gets_a_new_one(store: str, tmp_path: Path) -> None:
    run = begin(store, tmp_path, run_id="0" * 32)
    assert run.run_id != "0" * 32 and read(run).info.status == "RUNNING"
    run.end("KILLED")
    assert read(run).info.status == "KILLED"


def test_more_settings_and_points_than_one_call_takes_all_arrive(
    store: str, tmp_path: Path
) -> None:
    run = begin(
        store, tmp_path, settings={f"s{n}": "x" * 7000 if n == 3 else n for n in range(150)}
    )
    run.log(0, {f"m{n}": n for n in range(1200)})
    found = read(run)
    assert len(found.data.params) == 150 and len(found.data.params["s3"]) == 6000
    assert len(found.data.metrics) == 1200
    run.end("FINISHED")


def test_what_mlflow_refuses_is_said_and_stops_nothing(
    store: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = begin(store, tmp_path)
    run.log(1, {"not a name!": 1.0})
    run.artifact(tmp_path / "nowhere.txt")
    run.log(1, {"fine": 1.0})
    run.end("FINISHED")
    assert history(run, "fine") == [(1, 1.0)] and read(run).info.status == "FINISHED"
    assert sum("refused a record" in record.message for record in caplog.records) == 2
    assert not (tmp_path / "spool" / "my-run.jsonl").exists()


def test_an_alias_goes_to_the_better_of_what_was_measured_alike(store: str, tmp_path: Path) -> None:
    from mlflow.tracking import MlflowClient

    client, versions = MlflowClient(store), []
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "a.bin").write_text("x")
    for score, measured_on, won in (
        ("0.4", "dev", True),
        ("0.3", "dev", True),  # worse on the same questions
        ("0.5", "dev", False),  # no winner of its own sweep, so it is not registered
        ("0.2", "other", True),  # scores on other questions do not compare
    ):
        run = begin(store, tmp_path)
        run.model(tmp_path / "adapter", as_model("adapter"))
        for _ in range(2):  # a second time, as after a restart, changes nothing
            run.register(
                "ray-sql-sql",
                "adapter",
                {"score": score, "measured_on": measured_on},
                "champion",
                won,
            )
        run.end("FINISHED")
        versions.append(str(client.get_model_version_by_alias("ray-sql-sql", "champion").version))
    assert versions == ["1", "1", "1", "3"]
    assert len(client.search_model_versions("name='ray-sql-sql'")) == 3
    assert client.get_model_version("ray-sql-sql", "1").tags == {
        "score": "0.4",
        "measured_on": "dev",
    }


def test_a_model_has_its_runs_scores_and_is_sent_once(store: str, tmp_path: Path) -> None:
    from mlflow.tracking import MlflowClient

    client, run = MlflowClient(store), begin(store, tmp_path)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "a.bin").write_text("x")
    run.dataset("shops: dev", "0123", "/data/shops", "dev")
    for score in (0.25, 0.5):  # measured again
        run.log(4, {"score/execution_accuracy": score, "train/loss": 1.0}, replace=True)
        run.model(tmp_path / "adapter", as_model("adapter"))
    of_run = f"name = 'adapter' AND source_run_id = '{run.run_id}'"
    (model,) = client.search_logged_models([read(run).info.experiment_id], of_run)
    assert (str(model.status), model.params, model.source_run_id) == (
        "READY",
        {"lora.r": "8"},
        run.run_id,
    )
    newest = model.metrics[-1]
    assert {point.key for point in model.metrics} == {"score/execution_accuracy"}
    assert (newest.value, newest.dataset_name, newest.dataset_digest) == (0.5, "shops: dev", "0123")
    assert len(history(run, "score/execution_accuracy")) == 2, "no point twice"
    names = {file.path for file in client.list_logged_model_artifacts(model.model_id)}
    assert names == {"a.bin", "MLmodel", "model.py"}
    assert [one.model_id for one in read(run).outputs.model_outputs] == [model.model_id]
    run.end("FINISHED")


def test_a_models_scores_stand_under_the_data_they_are_of(store: str, tmp_path: Path) -> None:
    from mlflow.tracking import MlflowClient

    client, run = MlflowClient(store), begin(store, tmp_path)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "a.bin").write_text("x")
    for split in ("dev", "test", "validation"):
        run.dataset(f"shops: {split}", "0123", "/data/shops", split)
    metric = "execution_accuracy"
    keys = {
        tracking.final(metric): "shops: dev",
        tracking.final(metric, model="base"): "shops: dev",
        tracking.final(metric, "test"): "shops: test",
        tracking.final(metric, "test", "base"): "shops: test",
        tracking.final(metric, "dev-oracle"): None,
        tracking.VALIDATED: "shops: validation",
    }
    run.log(4, dict.fromkeys(keys, 0.5))
    run.model(tmp_path / "adapter", as_model("adapter"))
    query = f"source_run_id = '{run.run_id}'"
    (model,) = client.search_logged_models([read(run).info.experiment_id], query)
    assert {point.key: point.dataset_name for point in model.metrics} == keys
    run.end("FINISHED")


def test_a_run_measured_again_replaces_what_it_said_of_itself(store: str, tmp_path: Path) -> None:
    from mlflow.artifacts import load_dict
    from mlflow.tracking import MlflowClient

    client, run = MlflowClient(store), begin(store, tmp_path)
    for folder in ("first", "second"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.bin").write_text(folder)
        run.model(tmp_path / folder, as_model(folder))

    def say(folder: str, score: float, won: bool) -> None:
        run.log(4, {"tuned/dev/execution_accuracy": score}, replace=True)
        run.table([{"trial": 0, "score": score}], "trials.json")
        run.table([{"trial": 0, "score": score}], "tables/trials.json")
        run.register(
            "again",
            folder,
            {"score": str(score), "measured_on": f"{score} of dev"},
            "champion",
            won,
        )

    say("first", 0.5, True)
    say("first", 0.25, True)
    versions = client.search_model_versions("name='again'")
    assert [(str(each.version), each.tags["score"]) for each in versions] == [("1", "0.25")]
    one = versions[0].version
    assert client.get_registered_model("again").aliases == {"champion": one}
    say("second", 0.75, False)
    assert client.get_registered_model("again").aliases == {"champion": one}, (
        "what was crowned is still there"
    )
    assert len(client.search_model_versions("name='again'")) == 1, "what lost is not registered"
    say("first", 0.125, False)
    assert client.get_registered_model("again").aliases == {}
    assert read(run).data.metrics["tuned/dev/execution_accuracy"] == 0.125
    for file in ("trials.json", "tables/trials.json"):
        table = load_dict(f"{read(run).info.artifact_uri}/{file}")
        assert table == {"columns": ["trial", "score"], "data": [[0, 0.125]]}
    run.end("FINISHED")


def test_a_run_whose_id_was_lost_is_found_by_its_own_tags(store: str, tmp_path: Path) -> None:
    def child(number: int, parent: Run) -> Run:
        own = {"mlflow.parentRunId": parent.run_id, "trial": str(number)}
        return tracking.start(
            in_store(store),
            {},
            name=f"trial {number}",
            tags={},
            own=own,
            spool=tmp_path / f"{number}.jsonl",
        )

    parent, other = begin(store, tmp_path), begin(store, tmp_path)
    first = child(0, parent)
    assert child(0, parent).run_id == first.run_id
    assert len({first.run_id, child(1, parent).run_id, child(0, other).run_id}) == 3
    first.end("FINISHED")
    parent.end_children("KILLED")
    assert [read(child_).info.status for child_ in (first, other)] == ["FINISHED", "RUNNING"]
    assert read(child(1, parent)).info.status == "RUNNING", "gone on with"
    tracking.close(in_store(store), parent.run_id, {})
    from mlflow.tracking import MlflowClient

    left = MlflowClient(store).search_runs(
        [read(parent).info.experiment_id], "attributes.status = 'RUNNING'"
    )
    family = {run.data.tags.get("mlflow.parentRunId", run.info.run_id) for run in left}
    assert parent.run_id not in family and other.run_id in family
    tracking.close(in_store(store), "0" * 32, {})  # of another store: nothing to do
    tracking.close(in_store(store), other.run_id, {})


def test_a_run_that_records_nothing_takes_everything(tmp_path: Path) -> None:
    off = TrackingSection(enabled=False)
    run = tracking.start(off, {}, name="none", tags={}, spool=tmp_path / "spool.jsonl")
    run.log(1, {"a": 1.0})
    run.table([{"a": 1}], "t.json")
    run.figure(None, "f.png")
    run.dataset("d", "0", "/d", "train")
    run.register("m", "adapter", {}, "champion", True)
    run.end("FINISHED")
    assert run.run_id == "" and list(tmp_path.iterdir()) == []


# Places


def test_the_default_store_is_an_absolute_file_in_the_folder_of_the_job(tmp_path: Path) -> None:
    assert tracking.require_store(TrackingSection()) == f"sqlite:///{tmp_path}/mlflow.db"
    assert tracking.store_uri("sqlite:///runs.db") == f"sqlite:///{tmp_path}/runs.db"
    assert tracking.store_uri("sqlite:////data/runs.db") == "sqlite:////data/runs.db"
    assert tracking.store_uri("http://host:5000") == "http://host:5000"


def test_a_run_killed_while_it_makes_the_store_leaves_none_or_a_whole_one(tmp_path: Path) -> None:
    code = (
        "from ray_sql import tracking; from ray_sql.config.sections import TrackingSection; "
        "tracking.require_store(TrackingSection())"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path)
    file = tmp_path / "mlflow.db"
    while process.poll() is None and not (file.exists() and file.stat().st_size > SOME_TABLES):
        time.sleep(0.002)
    process.kill()  # at the first moment at which there is something in it
    process.wait()
    assert file.exists()
    assert tracking.require_store(TrackingSection()) == f"sqlite:///{file}"


def test_a_store_that_does_not_answer_at_the_start_is_refused_with_the_way_out(
    tmp_path: Path,
) -> None:
    uri = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(StoreError) as caught:
        begin(uri, tmp_path)
    message = str(caught.value)
    assert (
        message.startswith(f"--tracking.uri {uri}: no MLflow server answers")
        and "\n" not in message
    )
    assert "MLFLOW_TRACKING_URI" in message and "--no-tracking.enabled" in message


def test_a_store_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.db").write_text("this is no database, however long it may be " * 30)
    for uri in (
        f"sqlite:///{tmp_path}/no/folder/mlflow.db",
        f"sqlite:///{tmp_path}/text.db",
        "carrier-pigeon://x",
    ):
        with pytest.raises(StoreError) as caught:
            begin(uri, tmp_path)
        assert str(caught.value).startswith(f"--tracking.uri {uri}: ") and "\n" not in str(
            caught.value
        )


def test_the_password_of_a_server_that_does_not_answer_is_not_repeated(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with socketserver.TCPServer(("127.0.0.1", 0), socketserver.BaseRequestHandler) as closes:
        threading.Thread(target=closes.serve_forever).start()
        uri = f"http://me:planted@127.0.0.1:{closes.server_address[1]}"
        with pytest.raises(StoreError) as caught:
            begin(uri, tmp_path)
        run = tracking.reopen(in_store(uri), "a-run", tmp_path / "spool" / "my-run.jsonl")
        run.log(1, {"loss": 1.0})
        closes.shutdown()
    assert "API request to http://me:***@127.0.0.1" in str(caught.value) and "planted" not in str(
        caught.value
    )
    assert (
        "stopped answering (--tracking.uri http://me:***@" in caplog.text
        and "planted" not in caplog.text
    )


# A real server, killed and started again


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path)
    server.start()
    yield server
    server.kill()


@pytest.mark.slow
def test_an_outage_of_the_server_costs_a_run_nothing(
    server: Server,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    from matplotlib.figure import Figure
    from mlflow.tracking import MlflowClient

    caplog.set_level(logging.WARNING, logger="ray_sql")
    spool = tmp_path / "spool" / "my-run.jsonl"
    uri = server.uri.replace("://", "://me:planted@")
    run = begin(uri, tmp_path)
    run.log(1, {"loss": 1.0})

    server.kill()
    started = time.monotonic()
    for step in range(2, 52):
        run.log(step, {"loss": float(step)})
    run.tag({"during": "outage"})
    run.table([{"q": 1}], "t.json")
    run.figure(Figure(), "figures/f.png")
    run.dataset("d", "0", "/d", "train")
    run.end("FINISHED")
    assert time.monotonic() - started < HANGS, "asking a dead server 55 times takes much longer"
    assert len([record for record in caplog.records if record.name == "ray_sql.tracking"]) == 1
    lines = spool.read_text().splitlines()
    assert len(lines) == 50 + 5 and all(json.loads(line)[0] == run.run_id for line in lines)
    with spool.open("a") as stream:
        stream.write('["cut off')  # as by a process killed while it wrote

    # the next attempt sends first what the last one kept, then goes on where that one stopped
    server.start()
    again = begin(uri, tmp_path, run.run_id)
    assert not spool.exists() and again.replay() == 0
    again.log(51, {"loss": -1.0})
    again.log(52, {"loss": 52.0})
    again.end("FINISHED")
    assert history(again, "loss") == [(step, float(step)) for step in range(1, 53)]
    found = read(again)
    assert (found.info.status, found.data.tags["during"]) == ("FINISHED", "outage")
    assert len(found.inputs.dataset_inputs) == 1
    client = MlflowClient(server.uri)
    assert {file.path for file in client.list_artifacts(run.run_id)} == {"figures", "t.json"}
    assert [file.path for file in client.list_artifacts(run.run_id, "figures")] == ["figures/f.png"]
    assert len(client.search_runs([found.info.experiment_id])) == 1
    assert "planted" not in "".join(capfd.readouterr()) + caplog.text


class Gate(http.server.BaseHTTPRequestHandler):
    """Stands before an MLflow server, as nginx would: takes no large file and no new model."""

    behind = ""
    shut = True

    def forward(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.shut and self.command == "PUT" and len(body) > 1000:
            self.reply(413, b"<html>too large</html>")
            return
        if self.shut and self.path.endswith("registered-models/create"):
            self.reply(403, b'{"error_code": "PERMISSION_DENIED", "message": "Permission denied"}')
            return
        headers = {"Content-Type": self.headers.get("Content-Type") or "application/json"}
        request = urllib.request.Request(
            self.behind + self.path, body or None, headers, method=self.command
        )
        try:
            with urllib.request.urlopen(request) as answer:
                self.reply(answer.status, answer.read())
        except urllib.error.HTTPError as error:
            self.reply(error.code, error.read())

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = forward

    def reply(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.slow
def test_a_refused_record_waits_and_holds_up_none_behind_it(
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from mlflow.tracking import MlflowClient

    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "a.bin").write_text("x" * 2000)
    (tmp_path / "small.txt").write_text("x")
    version = {"score": "1", "measured_on": "dev"}
    gate = type("OwnGate", (Gate,), {"behind": server.uri})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), gate) as before:
        threading.Thread(target=before.serve_forever, daemon=True).start()
        run = begin(f"http://127.0.0.1:{before.server_address[1]}", tmp_path)
        direct = MlflowClient(server.uri)
        direct.create_logged_model(
            read(run).info.experiment_id, "small", run.run_id, {}, {}, "adapter"
        )  # as an upload that was cut off left it
        (tmp_path / "fits").mkdir()
        (tmp_path / "fits" / "a.bin").write_text("x")
        run.model(tmp_path / "fits", as_model("small"))
        run.model(tmp_path / "adapter", as_model("adapter"))
        run.register("theirs", "small", version, "champion", won=True)
        run.artifact(tmp_path / "small.txt")
        run.log(1, {"loss": 1.0})
        run.end("FINISHED")
        spool = tmp_path / "spool" / "my-run.jsonl"
        kinds = [json.loads(line)[1] for line in spool.read_text().splitlines()]
        assert kinds == ["model", "version"], "what was refused waits"
        assert read(run).info.status == "FINISHED" and history(run, "loss") == [(1, 1.0)]
        assert [file.path for file in direct.list_artifacts(run.run_id)] == ["small.txt"]
        warned = " ".join(record.message for record in caplog.records)
        assert f"refused a record, which waits in {spool}: 413" in warned
        assert f"refused a record, which waits in {spool}: PERMISSION_DENIED" in warned
        assert "stopped answering" not in warned

        gate.shut = False
        assert tracking.replay(in_store(run.uri), spool) == 0 and not spool.exists()
        before.shutdown()
    experiment = direct.get_run(run.run_id).info.experiment_id
    models = direct.search_logged_models([experiment])
    assert sorted((model.name, str(model.status)) for model in models) == [
        ("adapter", "READY"),
        ("small", "READY"),
    ], "no try that failed stays"
    assert "champion" in direct.get_registered_model("theirs").aliases


def test_only_what_may_pass_counts_as_an_outage() -> None:
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import PERMISSION_DENIED, TEMPORARILY_UNAVAILABLE
    from requests import HTTPError, Response

    def answered(status: int) -> HTTPError:
        response = Response()
        response.status_code = status
        return HTTPError(response=response)

    refusals = [answered(403), answered(413), PermissionError("mlartifacts")]
    refusals += [MlflowException("no", PERMISSION_DENIED)]
    refusals += [MlflowException("API request failed with error code 413 != 200")]
    assert all(is_refusal(error) for error in refusals)
    outages = [answered(401), answered(429), answered(503), OSError("cut"), ValueError("x")]
    outages += [MlflowException("busy", TEMPORARILY_UNAVAILABLE)]
    assert not any(is_refusal(error) for error in outages)


@pytest.mark.slow
def test_a_run_that_is_not_required_begins_when_its_store_is_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from mlflow.tracking import MlflowClient

    server = Server(tmp_path)

    def trial(required: bool = False) -> Run:
        own = {"mlflow.parentRunId": "p", "trial": "3"}
        return tracking.start(
            in_store(server.uri),
            {"seed": 14},
            name="trial",
            tags={},
            own=own,
            required=required,
            spool=tmp_path / "spool" / "trial-003.jsonl",
        )

    run = trial()
    for step in (1, 2, 3):
        run.log(step, {"loss": float(step)})
    assert run.run_id == "" and (tmp_path / "spool" / "trial-003.jsonl").is_file()
    assert sum("stopped answering" in record.message for record in caplog.records) == 1
    server.start()
    try:
        monkeypatch.setattr(tracking_runs, "RETRY_SECONDS", 0.0)
        run._retry_at = 0.0
        run.log(4, {"loss": 4.0})  # the store is back: the run begins
        assert run.run_id and history(run, "loss") == [(4, 4.0)]
        # the driver dies with the spool; the next attempt logs again, and every point is there once
        after = trial()
        assert after.run_id == run.run_id
        after.log(3, {"loss": 3.0})
        after.log(5, {"loss": 5.0})
        after.end("FINISHED")
        assert history(after, "loss") == [(step, float(step)) for step in range(1, 6)]
        found = MlflowClient(server.uri).search_runs([read(after).info.experiment_id])
        assert [(one.info.status, one.data.params) for one in found] == [
            ("FINISHED", {"seed": "14"})
        ]
    finally:
        server.kill()


def test_a_server_that_fails_for_a_moment_has_not_lost_the_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient

    class Busy(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(503)

        def log_message(self, *_: object) -> None:
            pass

    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with socketserver.TCPServer(("127.0.0.1", 0), Busy) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        client = MlflowClient(f"http://127.0.0.1:{server.server_address[1]}")
        with pytest.raises(MlflowException, match="503"):
            tracking.run_exists(client, "a" * 32)
        with pytest.raises(StoreError, match="MLflow cannot use it"):
            tracking.close(in_store(client.tracking_uri), "a" * 32, {})
        server.shutdown()


def test_a_run_is_described_and_its_experiment_lists_the_main_score(
    make_config: Any, tmp_path: Path
) -> None:
    from mlflow.tracking import MlflowClient

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    config = make_config(**{"tracking.enabled": True, "tracking.uri": "http://127.0.0.1:9"})
    waiting = tmp_path / "spool.jsonl"
    own = {"mlflow.parentRunId": "p", "trial": "0"}

    def begin(settings: TrackingSection, required: bool) -> Run:
        return tracking.start(
            settings, {}, name="x", tags={}, own=own, spool=waiting, required=required
        )

    run = begin(config.tracking, required=False)
    run.describe(f"[Report]({tracking.THIS_RUN}/artifacts/report.html)", "strict_recall")
    assert "description" in waiting.read_text(), "it waits like any other record"
    back = config.changed({"tracking.uri": uri})
    run = begin(back.tracking, required=True)
    run.end("FINISHED")
    client = MlflowClient(uri)
    found = client.get_run(run.run_id)
    page = f"#/experiments/{found.info.experiment_id}/runs/{run.run_id}"
    assert found.data.tags["mlflow.note.content"] == f"[Report]({page}/artifacts/report.html)"
    (experiment,) = client.search_experiments(filter_string="name = 'ray_sql'")
    assert experiment.tags["mlflow.experiment.primaryMetric.name"] == "score/strict_recall"
    shown = json.loads(experiment.tags[f"mlflow.sharedViewState.{tracking.VIEW}"])
    assert shown["selectedColumns"] == [
        *("metrics.`score/strict_recall`", "metrics.`score/validation`"),
        *("tags.`scored`", "tags.`over_base`"),
    ]
    assert shown["orderByKey"] == shown["selectedColumns"][0] and not shown["orderByAsc"]
