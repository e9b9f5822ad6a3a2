"""Ctrl-C ends without a traceback at any moment, and the last line is true."""

from __future__ import annotations

import io
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from mlflow.tracking import MlflowClient
from rich.console import Console

import ray_sql
from ray_sql import cli, cluster, finetune, tracking, train
from ray_sql.cluster import stop
from ray_sql.cluster.events import Event, Note
from ray_sql.config import Config, load
from ray_sql.display import Display
from ray_sql.errors import ConfigError
from ray_sql.finetune import prepare
from ray_sql.store import checkpoints
from ray_sql.store.run_folder import RunFolder
from ray_sql.tune import space, study
from ray_sql.tune.session import StudySession
from tests.test_tune import one
from tests.waiting import wait_until

kind = pytest.mark.kind("interrupted runs")
DEMO = Path(ray_sql.__file__).parent / "demo_data" / "demo.yaml"


def told(code: str, handler: Any = signal.default_int_handler) -> tuple[int, str]:
    """Run code in a process that has this handler of Ctrl-C; return its exit code and its words."""

    def begin() -> None:
        signal.signal(signal.SIGINT, handler)

    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=begin,
        cwd=Path(ray_sql.__file__).parent.parent,
    )
    return done.returncode, done.stdout + done.stderr


INTERRUPTED = (
    "import os, signal, types\n"
    "from ray_sql import __main__ as command\n"
    "def import_module(name):\n"
    "    os.kill(os.getpid(), signal.SIGINT)\n"
    "    return types.SimpleNamespace(main=lambda job: print('ran', job))\n"
    "command.import_module = import_module\n"
    "command.main('check')\n"
)


@kind
def test_ctrl_c_while_modules_are_imported_says_nothing() -> None:
    assert told(INTERRUPTED) == (-signal.SIGINT, "")


@kind
def test_what_a_shell_runs_in_the_background_ignores_ctrl_c() -> None:
    assert told(INTERRUPTED, signal.SIG_IGN) == (0, "ran check\n")


@kind
def test_what_imports_the_package_keeps_its_own_handler() -> None:
    code = (
        "import signal; before = signal.getsignal(signal.SIGINT)\n"
        "import ray_sql, ray_sql.__main__, ray_sql.cli; ray_sql.Config\n"
        "print(signal.getsignal(signal.SIGINT) is before)"
    )
    assert told(code) == (0, "True\n")


@kind
@pytest.mark.parametrize("name", ["finetune", "tune", "publish", "evaluate", "check"])
def test_ctrl_c_in_a_job_is_one_word(
    name: str, make_config: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(_: Any) -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(cli, "_import", lambda *door: interrupted)
    given = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    words = ["--output_name", "x", "--model_name", "m", "--task_type", "sql"]
    try:
        with pytest.raises(SystemExit) as ended:
            cli.main(name, words)
    finally:
        for number, handler in given.items():
            signal.signal(number, handler)
    said = capsys.readouterr().err.removeprefix("starting: libraries\n")
    assert (ended.value.code, said) == (130, "interrupted\n")


def test_a_signal_of_an_earlier_job_is_not_that_of_a_later_one(monkeypatch: Any) -> None:
    words = ["--output_name", "x", "--model_name", "m", "--task_type", "sql"]

    def interrupted(_: Any) -> None:
        cli.exit_on_signal(signal.SIGINT, None)

    def ended(_: Any) -> None:
        raise SystemExit(3)

    given = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    codes = []
    try:
        for job in (interrupted, ended):
            monkeypatch.setattr(cli, "_import", lambda *_, job=job: job)
            with pytest.raises(SystemExit) as caught:
                cli.main("finetune", words)
            codes.append(caught.value.code)
    finally:
        for number, handler in given.items():
            signal.signal(number, handler)
    assert codes == [130, 3]


@kind
@pytest.mark.parametrize(
    ("saved", "overwrite", "words"),
    [
        (True, False, "stopped; checkpoint-2 is saved: the same command goes on from there"),
        (
            True,
            True,
            "stopped; checkpoint-2 is saved: the same command without --overwrite goes on from "
            "there",
        ),
        (False, False, "stopped; no checkpoint yet: the same command begins again"),
        (False, True, "stopped; no checkpoint yet: the same command begins again"),
    ],
)
def test_the_last_line_names_the_command_that_goes_on(
    saved: bool,
    overwrite: bool,
    words: str,
    make_config: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = make_config(overwrite=overwrite)
    folder = RunFolder(config.run_dir)
    if saved:
        (tmp_path / "weights").mkdir()
        (tmp_path / "weights" / "adapter_model.safetensors").write_text("w")
        checkpoints.save(tmp_path / "weights", folder, 2, {})

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cluster, "run_workers", interrupted)
    said: list[Event] = []
    with pytest.raises(KeyboardInterrupt):
        train.fit(config, str(tmp_path), said.append)
    assert said[-1] == Note(words)


@kind
def test_the_demo_goes_on_and_does_not_overwrite_itself() -> None:
    assert not load(Config, ["--config", str(DEMO)]).overwrite


@kind
def test_a_demo_of_other_settings_is_not_removed(make_config: Any) -> None:
    config = make_config()
    RunFolder(config.run_dir).write_settings(config.public())
    RunFolder(config.run_dir).write_contract({"task": "sql"})
    with pytest.raises(ConfigError, match=r"num_epochs 1.* there, 2.* here.*--overwrite"):
        finetune.finished_metrics(config.changed({"num_epochs": 2}))


class Told(finetune.Session):
    """A session that is told to stop once MLflow has begun its run."""

    def begin_record(self) -> tracking.Run:
        record = super().begin_record()
        signal.raise_signal(signal.SIGTERM)
        return record


@kind
def test_a_run_that_has_just_begun_does_not_stay_open_in_mlflow(
    make_config: Any, empty_mlflow: Path, tmp_path: Path
) -> None:
    uri = f"sqlite:///{shutil.copy(empty_mlflow, tmp_path / 'mlflow.db')}"
    settings = {"tracking.enabled": True, "tracking.uri": uri, "scaling.num_workers": 0}
    told = Told(make_config(**settings), Display())
    before = signal.signal(signal.SIGTERM, cli.exit_on_signal)
    try:
        with pytest.raises(SystemExit), told:
            pytest.fail("the run goes on")
    finally:
        signal.signal(signal.SIGTERM, before)
    assert MlflowClient(uri).get_run(told.record.run_id).info.status == "KILLED"


class Slow(finetune.Session):
    """A session whose MLflow answers once people were told what is waited for.

    A signal comes while it begins a run, if that is what `told` says.
    """

    told = False
    out: io.StringIO

    def begin_record(self) -> tracking.Run:
        if self.told:
            signal.raise_signal(signal.SIGINT)
            self.wait_until_said()
        return super().begin_record()

    def end(self, status: tracking.Status) -> None:
        self.wait_until_said()
        super().end(status)

    def wait_until_said(self) -> None:
        wait_until(lambda: "ending the MLflow run" in self.out.getvalue())


@kind
@pytest.mark.parametrize("told", [False, True], ids=["at work", "at the begin"])
def test_a_signal_that_waits_for_mlflow_says_so(
    make_config: Any, told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stop, "SAY_SECONDS", 0.1)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    out = io.StringIO()
    session = Slow(make_config(), Display(Console(file=out, soft_wrap=True)))
    session.told, session.out = told, out
    try:
        with pytest.raises(KeyboardInterrupt), session:
            raise KeyboardInterrupt
    finally:
        signal.signal(signal.SIGINT, before)
    assert out.getvalue().count("ending the MLflow run …; once more stops at once\n") == 1


@kind
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_sweep_that_is_stopped_names_the_flag_that_goes_on(
    overwrite: bool, make_config: Any
) -> None:
    config = one(make_config, overwrite=overwrite)
    out = io.StringIO()
    display = Display(Console(file=out, soft_wrap=True))
    session = StudySession(config, display, study.begin(config), space.read(config))
    session.prepared = prepare.prepare(config)
    session.capacity = cluster.Capacity(1, 1, {"CPU": 1.0}, {"CPU": 1.0}, "")
    session.lay_out()
    session.record = session.begin_record()
    session.end("KILLED")
    command = "--resume in place of --overwrite goes on" if overwrite else "--resume goes on"
    assert out.getvalue().endswith(f"the same command with {command}\n")


@kind
def test_no_bar_stands_below_the_last_line() -> None:
    out = io.StringIO()
    with (
        pytest.raises(KeyboardInterrupt),
        Display(Console(file=out, force_terminal=True, width=100)) as display,
    ):
        display.update("training", 4, 30)
        display.line("stopped; checkpoint-4 is saved")
        raise KeyboardInterrupt
    shown = screen(out.getvalue())
    assert shown == ["stopped; checkpoint-4 is saved"]


def screen(written: str) -> list[str]:
    """Return the lines that a terminal shows in the end."""
    lines, row = [""], 0
    for part in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|\r|\n|[^\x1b\r\n]+", written):
        if part == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif part.endswith("A") and part.startswith("\x1b"):
            row -= int(part[2:-1] or 1)
        elif part == "\x1b[2K":
            lines[row] = ""
        elif not part.startswith("\x1b") and part != "\r":
            lines[row] += part
    return [line.rstrip() for line in lines if line.strip()]
