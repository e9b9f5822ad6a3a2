"""A user of a cluster submits, reads the log and the exit code, stops, and submits again.

The head is real and asks for a token. It has secrets in its environment, and MLflow is a server
behind a password in its address. Nothing that a run leaves behind may hold them.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import unicodedata
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
from mlflow.tracking import MlflowClient
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from benchmarks.mlflow_server import Server, free_port
from ray_sql.store import checkpoints
from ray_sql.store.run_folder import RunFolder
from tests.recording import foreign
from tests.test_cluster_files import LEFT

pytestmark = [pytest.mark.slow, pytest.mark.cluster]

ROOT = Path(__file__).parent.parent
STEPS = 24
SECRETS = {
    "HF_TOKEN": "hf_plantedForTheHub",
    "MLFLOW_TRACKING_PASSWORD": "plantedForMlflow",
    "MLFLOW_TRACKING_URI": "plantedInTheAddress",
    "RAY_AUTH_TOKEN_PATH": "plantedForRayItself0123456789abcdef",
}
"""Must not be found anywhere; by the variable that each comes from."""


class Head:
    """`ray start --head` on free ports, in folders of its own.

    Jobs run in `runs`, from a copy of the project with the files of `LEFT` in it.
    """

    def __init__(self, folder: Path, temp: Path, mlflow: Server, settings: dict[str, Any]) -> None:
        self.runs, self.temp, self.mlflow = folder / "runs", temp, mlflow
        self.project, self._folder = folder / "project", folder
        self.address = f"http://127.0.0.1:{free_port()}"
        self.tracking = MlflowClient(mlflow.uri)
        (folder / "home").mkdir()
        self._token = folder / "token"
        self._token.write_text(SECRETS["RAY_AUTH_TOKEN_PATH"])
        for name in ("ray_sql", "jobs"):
            shutil.copytree(
                ROOT / name, self.project / name, ignore=shutil.ignore_patterns("__pycache__")
            )
        for name in (".rayignore", ".gitignore"):
            shutil.copy(ROOT / name, self.project)
        settings |= {
            "scaling": {"storage_path": str(self.runs), "resources_per_worker": {"CPU": 1}}
        }
        settings |= {"cache_dir": str(folder / "cache")}
        (self.project / "tiny.yaml").write_text(json.dumps(settings))
        self.sent = {
            str(path.relative_to(self.project))
            for path in self.project.rglob("*")
            if path.is_file()
        }
        for name in LEFT:
            (self.project / name).parent.mkdir(parents=True, exist_ok=True)
            (self.project / name).write_text("x" * 1000)
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, and return once it takes jobs."""
        self._process = self._launched()
        # by its header, for the token of this process is another one, and Ray reads that once
        headers = {"Authorization": f"Bearer {SECRETS['RAY_AUTH_TOKEN_PATH']}"}
        deadline = time.monotonic() + 120
        while True:
            try:
                self.client = JobSubmissionClient(self.address, headers=headers)
                return
            except (ConnectionError, RuntimeError):
                assert self._process.poll() is None and time.monotonic() < deadline, self._log()
                time.sleep(0.3)

    def environment(self, **more: str) -> dict[str, str]:
        """Return the environment of a shell on the head, without any secret."""
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("RAY_", "PYTHONPATH"))
        }
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        return kept | {
            "PATH": path,
            "HOME": str(self._folder / "home"),
            "RAY_AUTH_MODE": "token",
            **more,
        }

    def _launched(self) -> subprocess.Popen[bytes]:
        ports = (
            "dashboard-agent-listen-port",
            "dashboard-agent-grpc-port",
            "runtime-env-agent-port",
        )
        command = ["ray", "start", "--head", "--block", "--num-cpus=2", "--port=0"]
        command += [f"--temp-dir={self.temp}"]
        command += [f"--dashboard-port={self.address.rpartition(':')[2]}", "--disable-usage-stats"]
        command += [f"--{name}={free_port()}" for name in (*ports, "ray-client-server-port")]
        command += ["--object-store-memory=100000000"]
        secrets = {
            "HF_TOKEN": SECRETS["HF_TOKEN"],
            "MLFLOW_TRACKING_USERNAME": "me",
            "MLFLOW_TRACKING_PASSWORD": SECRETS["MLFLOW_TRACKING_PASSWORD"],
            "MLFLOW_TRACKING_URI": self.mlflow.uri.replace(
                "://", f"://me:{SECRETS['MLFLOW_TRACKING_URI']}@"
            ),
        }
        given = self.environment(
            RAY_AUTH_TOKEN_PATH=str(self._token), RAY_JOB_STOP_WAIT_TIME_S="60", **secrets
        )
        with (self._folder / "head.log").open("wb") as log:
            return subprocess.Popen(
                command, cwd=self._folder, env=given, stdout=log, stderr=log, start_new_session=True
            )

    def _log(self) -> str:
        return (self._folder / "head.log").read_text()[-3000:]

    def end(self) -> None:
        """End every process of this head by its id, and nothing else on the machine."""
        if self._process is None or self._process.poll() is not None:
            return
        ours = [
            psutil.Process(self._process.pid),
            *psutil.Process(self._process.pid).children(recursive=True),
        ]
        self._process.terminate()
        _, alive = psutil.wait_procs(
            ours, timeout=3
        )  # Ray itself would drain the node for half a minute
        for process in alive:
            process.kill()
        self._process.wait()

    def submit(self, *flags: str) -> str:
        """Submit a fine-tuning with `tiny.yaml` and these flags; return the job's id."""
        command = " ".join(["python -m jobs.finetune --config tiny.yaml", *flags])
        return str(
            self.client.submit_job(
                entrypoint=command, runtime_env={"working_dir": str(self.project)}
            )
        )

    def wait(self, job: str, until: Callable[[], bool] = lambda: False) -> JobDetails:
        """Return the job once it has ended, or `until` is true."""
        deadline = time.monotonic() + 300
        while not ((info := self.client.get_job_info(job)).status.is_terminal() or until()):
            assert time.monotonic() < deadline, self.client.get_job_logs(job)[-3000:]
            time.sleep(0.1)
        return info

    def files(self) -> Iterator[Path]:
        """Yield every file that this head and its jobs have left, except that of Ray's token."""
        for folder in (self._folder, self.temp):
            yield from (
                path for path in folder.rglob("*") if path.is_file() and path != self._token
            )

    def states(self, name: str) -> dict[str, str]:
        """Return MLflow's runs of this name: id and state."""
        experiments = [found.experiment_id for found in self.tracking.search_experiments()]
        found = self.tracking.search_runs(experiments, f"params.output_name = '{name}'")
        return {run.info.run_id: run.info.status for run in found}

    def curve(self, run_id: str, key: str) -> dict[int, float]:
        """Return a metric of an MLflow run by step; it must have each step once."""
        points = self.tracking.get_metric_history(run_id, key)
        assert points and len({point.step for point in points}) == len(points)
        return {point.step: point.value for point in points}


@dataclass
class Watched:
    """Every command line on this machine while a job ran, and the environment of its driver."""

    commands: set[str] = field(default_factory=set)
    driver: dict[str, str] = field(default_factory=dict)

    def look(self) -> None:
        for process in psutil.process_iter(["cmdline"]):
            command = " ".join(process.info["cmdline"] or ())
            self.commands.add(command)
            if command.startswith("python -m jobs.finetune") and not self.driver:
                try:
                    self.driver = process.environ()
                except psutil.Error:
                    continue

    def until(self, ended: threading.Event) -> None:
        while not ended.wait(0.1):
            self.look()


@dataclass(frozen=True)
class Stopped:
    """A job after `ray job stop`: the step of its newest checkpoint, and its MLflow runs."""

    info: JobDetails
    log: str
    step: int
    runs: dict[str, str]


@dataclass(frozen=True)
class Submitted:
    """The same command again, shown by `ray job submit` to its end."""

    code: int
    shown: str
    log: str
    info: JobDetails
    watched: Watched


@pytest.fixture(scope="module")
def head(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, spider_folder: Path
) -> Iterator[Head]:
    settings = {
        "model_name": str(tiny_model),
        "task_type": "sql",
        "dataset_id": str(spider_folder),
        "seed": 14,
        "save_steps": 4,
        "grad_accum_steps": 2,
        "learning_rate": 1e-2,
        "prompt": {"serializer": "compact"},
        "lora": {"r": 4, "lora_alpha": 8},
        "train": {"max_steps": STEPS, "logging_steps": 1, "bf16": False},
        "data": {"split_by": "question", "validation_fraction": 0.1},
        "evaluate": {
            "limit": 2,
            "max_new_tokens": 64,
            "select_examples": 2,
            "processes": 1,
            "baseline": False,
        },
    }
    folder = tmp_path_factory.mktemp("submit")
    (folder / "mlflow").mkdir()
    mlflow = Server(folder / "mlflow")
    # a folder with a short name: the path of a socket may have 107 characters
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as temp:
        head = Head(folder, Path(temp), mlflow, settings)
        try:
            mlflow.start()
            head.start()
            yield head
        finally:
            head.end()
            mlflow.kill()


@pytest.fixture(scope="module")
def stopped(head: Head) -> Stopped:
    """A run that was stopped after its first checkpoint."""
    job = head.submit("--output_name run")
    head.wait(job, lambda: bool(checkpoints.complete(RunFolder(str(head.runs / "run")))))
    assert head.client.stop_job(job)
    info, log = head.wait(job), head.client.get_job_logs(job)
    assert not (head.runs / "run" / "adapter").exists(), log
    return Stopped(
        info,
        log,
        checkpoints.complete(RunFolder(str(head.runs / "run")))[-1].step,
        head.states("run"),
    )


@pytest.fixture(scope="module")
def submitted(head: Head, stopped: Stopped) -> Submitted:
    """The run submitted as the page says."""
    command = ["ray", "job", "submit", "--address", head.address, "--submission-id", "again"]
    job = "python -m jobs.finetune --config tiny.yaml --output_name run"
    command += ["--working-dir", ".", "--", *job.split()]
    watched, ended = Watched(), threading.Event()
    looking = threading.Thread(target=watched.until, args=(ended,))
    looking.start()
    given = head.environment(RAY_AUTH_TOKEN=SECRETS["RAY_AUTH_TOKEN_PATH"])
    try:
        done = subprocess.run(
            command, cwd=head.project, env=given, capture_output=True, text=True, timeout=300
        )
    finally:
        ended.set()
        looking.join()
    log = head.client.get_job_logs("again")
    return Submitted(
        done.returncode, done.stdout + done.stderr, log, head.client.get_job_info("again"), watched
    )


def steps(log: str) -> list[int]:
    """Return the optimizer steps that a log shows, in its order."""
    return [int(step) for step in re.findall(rf"^training: (\d+)/{STEPS}\b", log, re.MULTILINE)]


def weights(folder: Path) -> str:
    """Return the hash of an adapter's file."""
    return hashlib.sha256(
        (folder / "adapter" / "adapter_model.safetensors").read_bytes()
    ).hexdigest()


def test_a_stopped_job_ends_in_order(stopped: Stopped) -> None:
    assert (stopped.info.status, stopped.info.driver_exit_code) == (JobStatus.STOPPED, None)
    assert "Traceback" not in stopped.log and "error: " not in stopped.log
    assert 0 < stopped.step < STEPS and steps(stopped.log)[0] == 1
    assert stopped.step == steps(stopped.log)[-1], (
        "the last step that was made is the one that was saved"
    )
    assert (
        f"stopped; checkpoint-{stopped.step} is saved: the same command goes on from there"
        in stopped.log
    )
    assert list(stopped.runs.values()) == ["KILLED"]


def test_the_same_command_goes_on_and_its_log_is_plain_lines(
    head: Head, stopped: Stopped, submitted: Submitted
) -> None:
    assert submitted.code == 0, submitted.shown[-3000:]
    assert submitted.info.status == JobStatus.SUCCEEDED and submitted.info.driver_exit_code == 0
    assert steps(submitted.log) == list(range(stopped.step + 1, STEPS + 1))
    own = submitted.log.partition("Running entrypoint")[2].splitlines()
    assert not [line for line in own if any(unicodedata.category(sign) == "Cc" for sign in line)], (
        "nothing moves"
    )
    assert foreign("\n".join(own[1:])) == [], "no line of a library"
    assert submitted.log.rstrip("\n") in submitted.shown, "ray job submit shows the same lines"
    assert f"/#/jobs/{submitted.info.submission_id}; MLflow run " in submitted.log
    assert head.states("run") == dict.fromkeys(stopped.runs, "FINISHED"), (
        "one run in MLflow, whatever happened to it"
    )


@pytest.mark.parametrize("workers", [1, 0])
def test_the_same_command_never_stopped_trains_the_same_adapter_here(
    head: Head, submitted: Submitted, workers: int
) -> None:
    name = f"here-{workers}"
    command = [sys.executable, "-m", "jobs.finetune", "--config", "tiny.yaml"]
    command += ["--output_name", name]
    command += ["--scaling.num_workers", str(workers), "--tracking.uri", head.mlflow.uri]
    shell = head.environment(RAY_AUTH_TOKEN="ofAnotherClusterThatStartsHere0123456789")
    done = subprocess.run(
        command, cwd=head.project, env=shell, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert weights(head.runs / name) == weights(head.runs / "run")
    (here,), (there,) = head.states(name), head.states("run")
    for key in ("train/loss", "validation/loss"):
        assert head.curve(here, key) == pytest.approx(head.curve(there, key), rel=1e-4)


def test_what_the_user_can_fix_is_exit_code_2_and_one_line(head: Head) -> None:
    job = head.submit(
        "--output_name wrong --dataset_id /nowhere/at/all --write_token hf_onTheCommandLine"
    )
    info, log = head.wait(job), head.client.get_job_logs(job)
    assert info.status == JobStatus.FAILED and info.driver_exit_code == 2
    own = [line for line in log.splitlines() if line.startswith(("error: ", "warning: "))]
    assert len(own) == 2 and own[0].startswith("warning: --write_token shows in")
    assert "/nowhere/at/all" in own[1] and "Traceback" not in log


@pytest.mark.parametrize(
    "token,status", [(None, 401), ("a-token-of-another-cluster-0123456789", 403)]
)
def test_without_the_heads_token_nothing_is_submitted(
    head: Head, token: str | None, status: int
) -> None:
    before = [job.submission_id for job in head.client.list_jobs()]
    command = ["ray", "job", "submit", "--address", head.address]
    command += ["--", "python", "-c", "print('done')"]
    given = head.environment(RAY_AUTH_TOKEN=token) if token else head.environment()
    done = subprocess.run(
        command, cwd=head.project, env=given, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1 and "done" not in done.stdout
    request = urllib.request.Request(
        f"{head.address}/api/jobs/",
        json.dumps({"entrypoint": "true"}).encode(),
        {"Content-Type": "application/json"}
        | ({"Authorization": f"Bearer {token}"} if token else {}),
    )
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=10)
    assert refused.value.code == status
    assert [job.submission_id for job in head.client.list_jobs()] == before


def test_the_code_travels_and_nothing_else(head: Head, submitted: Submitted) -> None:
    (arrived,) = head.temp.glob("session_*_*/runtime_resources/working_dir_files/_ray_pkg_*/")
    files = {str(path.relative_to(arrived)): path for path in arrived.rglob("*") if path.is_file()}
    assert {name for name in files if not name.endswith(".pyc")} == head.sent
    assert sum(files[name].stat().st_size for name in head.sent) < 5e6


def test_no_secret_of_the_environment_is_left_anywhere(head: Head, submitted: Submitted) -> None:
    driver = submitted.watched.driver
    for name in ("HF_TOKEN", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_URI"):
        assert SECRETS[name] in driver[name], "it was there to be leaked"
    assert any("RayTrainWorker" in command for command in submitted.watched.commands)
    left = {f"{path}": path.read_bytes() for path in head.files()}
    assert any(name.endswith("mlflow.db") for name in left) and any(
        "job-driver-again.log" in name for name in left
    )
    left |= {f"command {command}": command.encode() for command in submitted.watched.commands}
    left["job records"] = repr(head.client.list_jobs()).encode()
    left["job log"], left["ray job submit"] = submitted.log.encode(), submitted.shown.encode()
    found = {
        (name, secret)
        for name, data in left.items()
        for secret in SECRETS.values()
        if secret.encode() in data
    }
    assert not found
