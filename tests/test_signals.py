"""A job that is told to end is gone in seconds, with all its processes, and can be given again."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TextIO

import psutil
import pytest

from ray_sql.database import Executor, Limits
from ray_sql.errors import DataError
from ray_sql.evaluate.endpoint import PATIENCE
from tests import hub
from tests.conftest import make_spider_folder
from tests.test_hostile import make_database
from tests.test_publish import run_dir, trained, unproven  # noqa: F401  # fixtures
from tests.waiting import HANGS, wait_until

ROOT = Path(__file__).parent.parent
ENDLESS = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT max(i) FROM n"
ENDINGS = [signal.SIGINT, signal.SIGTERM, signal.SIGKILL]
GONE = HANGS / 4
"""Seconds within which a job is gone. An idle machine takes 5; other tests may want the cores."""
KIND = pytest.mark.kind("signals")


class Job:
    """A job in a session of its own, so that all its processes are found."""

    def __init__(
        self,
        words: Sequence[str],
        environment: dict[str, str] | None = None,
        output: int | TextIO = subprocess.DEVNULL,
    ) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", *words],
            cwd=ROOT,
            env=os.environ | (environment or {}),
            stdout=output,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            # a suite that was started in the background hands down an ignored Ctrl-C
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )

    def processes(self) -> list[int]:
        """Return the processes of the session that are alive."""
        found = []
        for process in psutil.process_iter():
            with suppress(ProcessLookupError, psutil.NoSuchProcess):
                alive = process.status() != psutil.STATUS_ZOMBIE
                if alive and os.getsid(process.pid) == self.process.pid:
                    found.append(process.pid)
        return found

    def tell(self, number: int) -> str:
        """Send a signal; return what the job said, once all its processes are gone in time."""
        began = time.monotonic()
        self.process.send_signal(number)
        said = self.process.communicate(timeout=HANGS)[1]
        wait_until(lambda: not self.processes())
        assert time.monotonic() - began < GONE, said
        return said

    def end(self) -> None:
        """Let nothing of a test that failed go on."""
        for pid in self.processes():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@pytest.fixture
def start() -> Iterator[Callable[..., Job]]:
    jobs: list[Job] = []

    def begin(*words: str, **environment: str) -> Job:
        jobs.append(Job(words, environment))
        return jobs[-1]

    yield begin
    for job in jobs:
        job.end()


def moments(seed: int, count: int, most: float) -> list[tuple[int, float]]:
    """Draw signals, each with the seconds after which it is sent."""
    draw = random.Random(seed)
    return [(ENDINGS[index % 3], draw.uniform(0.2, most)) for index in range(count)]


def complete(job: Job) -> None:
    said = job.process.communicate(timeout=HANGS)[1]
    assert job.process.returncode == 0, said


def evaluation(folder: Path, spider_folder: Path, timeout: float) -> list[str]:
    """Return the words of an evaluation of which some queries do not end by themselves."""
    gold = "SELECT name FROM customer"
    lines = [{"db_id": "mall", "gold": gold, "predicted": sql} for sql in (gold, ENDLESS, gold)]
    file = folder / "predictions.jsonl"
    file.write_text("\n".join(map(json.dumps, lines * 3)))
    return [
        *("jobs.evaluate", "--dataset_id", str(spider_folder), "--predictions_file", str(file)),
        *("--output_name", "e", "--output_dir", str(folder), "--evaluate.processes", "2"),
        *("--evaluate.timeout", str(timeout)),
    ]


def runs_sql(job: Job) -> bool:
    return any(
        "sqlite_worker" in " ".join(psutil.Process(pid).cmdline()) for pid in job.processes()
    )


@KIND
@pytest.mark.parametrize("number", ENDINGS)
def test_an_evaluation_ends_while_its_queries_run(
    start: Callable[..., Job], spider_folder: Path, tmp_path: Path, number: int
) -> None:
    job = start(*evaluation(tmp_path, spider_folder, 10 * HANGS))
    wait_until(lambda: runs_sql(job))
    said = job.tell(number)
    assert "Traceback" not in said
    assert job.process.returncode in (128 + number, -number)


@contextmanager
def silent_server(lists: bool) -> Iterator[tuple[str, threading.Event]]:
    """Serve an endpoint that answers nothing, but for its list of models if it `lists` them.

    Yields its address, and an event that is set once it is asked what it never answers.
    """
    asked, ended = threading.Event(), threading.Event()
    models = json.dumps({"data": [{"id": "mute"}]}).encode()

    class Silent(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if not lists:
                self.do_POST()
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(models)))
            self.end_headers()
            self.wfile.write(models)

        def do_POST(self) -> None:
            asked.set()
            ended.wait(HANGS)

    with ThreadingHTTPServer(("127.0.0.1", 0), Silent) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/v1", asked
        finally:
            ended.set()
            server.shutdown()


@KIND
@pytest.mark.parametrize("lists", [False, True], ids=["silent", "lists-its-models"])
def test_the_first_signal_ends_a_comparison_with_a_silent_endpoint(
    start: Callable[..., Job], tuned_run: Path, lists: bool
) -> None:
    words = ["--output_name", tuned_run.name, "--output_dir", str(tuned_run.parent)]
    with silent_server(lists) as (address, asked):
        job = start("jobs.verify", *words, "--evaluate.url", address)
        wait_until(asked.is_set)
        assert PATIENCE > GONE and job.tell(signal.SIGINT).endswith("interrupted\n")
    assert job.process.returncode == 128 + signal.SIGINT


@KIND
def test_a_second_signal_ends_a_job_at_once(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys, threading, time\nfrom ray_sql import cli\n"
        "signal.signal(signal.SIGTERM, cli.exit_on_signal)\n"
        "threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()\n"
        "threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()\n"
        "threading.Timer(2.0, os.kill, (os.getpid(), signal.SIGTERM)).start()\n"
        "try:\n    time.sleep(600)\n"
        "finally:\n    print('closing', flush=True)\n    time.sleep(600)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=HANGS
    )
    assert (done.returncode, done.stdout) == (128 + signal.SIGTERM, "closing\n")


@KIND
def test_processes_that_run_sql_end_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    code = (
        "import sqlite3, sys\nfrom ray_sql.database import Executor, Limits\n"
        f"sqlite3.connect('{tmp_path}/x.sqlite').execute('CREATE TABLE t (a)').connection.close()\n"
        "executor = Executor(1, Limits(seconds=3600))\n"
        f"executor.run('{tmp_path}/x.sqlite', 'SELECT 1')\nprint('ready', flush=True)\n"
        f"executor.run('{tmp_path}/x.sqlite', {ENDLESS!r})\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE)
    assert parent.stdout is not None and parent.stdout.readline() == b"ready\n"
    (worker,) = psutil.Process(parent.pid).children()
    parent.kill()
    parent.wait()
    wait_until(lambda: not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE)


@KIND
def test_a_signal_among_queries_leaves_no_answer_for_the_next(tmp_path: Path) -> None:
    make_database(tmp_path / "shop.sqlite")
    with Executor(1, Limits(seconds=HANGS)) as executor:
        executor.run(tmp_path / "shop.sqlite", "SELECT 1")
        before = signal.signal(signal.SIGALRM, signal.default_int_handler)
        signal.setitimer(signal.ITIMER_REAL, 0.5)
        with pytest.raises(KeyboardInterrupt):
            executor.run(tmp_path / "shop.sqlite", ENDLESS)
        signal.signal(signal.SIGALRM, before)
        assert executor.run(tmp_path / "shop.sqlite", "SELECT 2").rows == ((2,),)


@KIND
def test_nobody_waits_for_a_pipe_among_databases(start: Callable[..., Job], tmp_path: Path) -> None:
    folder = make_spider_folder(tmp_path / "data")
    pipe = folder / "database" / "mall" / "more.sqlite"
    os.mkfifo(pipe)
    complete(start(*evaluation(tmp_path, folder, 1)))  # beside a database: left out
    with Executor(1) as executor, pytest.raises(DataError, match=r"more.sqlite: is no file"):
        executor.run(pipe, "SELECT 1")
    with Executor(1) as executor, pytest.raises(DataError, match=r"^/dev/zero: is no file"):
        executor.run(Path("/dev/zero"), "SELECT 1")


@KIND
@pytest.mark.slow
def test_an_evaluation_is_gone_at_any_moment_and_goes_on(
    start: Callable[..., Job], spider_folder: Path, tmp_path: Path
) -> None:
    for number, seconds in moments(1, 4, 8):
        job = start(*evaluation(tmp_path, spider_folder, 10 * HANGS))
        time.sleep(seconds)  # any moment
        job.tell(number)
    complete(start(*evaluation(tmp_path, spider_folder, 1)))


@KIND
@pytest.mark.slow
def test_a_preparation_is_gone_at_any_moment_and_goes_on(
    start: Callable[..., Job], tiny_model: Path, spider_folder: Path, tmp_path: Path
) -> None:
    words = ["jobs.finetune", "--model_name", str(tiny_model), "--task_type", "sql", "--dry_run"]
    words += ["--dataset_id", str(spider_folder), "--output_name", "r", "--scaling.num_workers=0"]
    words += ["--output_dir", str(tmp_path), "--cache_dir", str(tmp_path / "cache")]
    words += ["--no-tracking.enabled"]
    for number, seconds in moments(2, 3, 10):
        job = start(*words)
        time.sleep(seconds)  # any moment
        job.tell(number)
    complete(start(*words))


@KIND
@pytest.mark.slow
def test_a_publication_is_gone_at_any_moment_and_goes_on(
    start: Callable[..., Job],
    run_dir: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    words = ["jobs.publish", "--output_name", run_dir.name, "--output_dir", str(run_dir.parent)]
    words += ["--hub.license", "mit"]
    with hub.running() as stand_in:
        environment = stand_in.environment(tmp_path / "home")
        stand_in.fail("POST .*/commit/", "silent")
        for number, seconds in moments(3, 3, 10):
            job = start(*words, **environment)
            time.sleep(seconds)  # any moment
            job.tell(number)
        stand_in.heal()
        complete(start(*words, **environment))
        (repo,) = stand_in.repos.values()
        assert len(repo.pushed()) == 1


def test_every_ending_is_drawn() -> None:
    drawn = [
        number for seed, count in ((1, 4), (2, 3), (3, 3)) for number, _ in moments(seed, count, 9)
    ]
    assert len(drawn) == 10 and set(drawn) == set(ENDINGS)
