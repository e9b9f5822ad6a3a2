"""The command `ray-sql <job>`: the table of jobs, and how every job begins and ends.

A job reads its settings, calls one function, and ends with exit code 0. A mistake that the user can
fix is one line and exit code 2. A bug is a traceback and exit code 1.
"""

from __future__ import annotations

import difflib
import errno
import importlib
import io
import logging
import os
import re
import signal
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray_sql import __version__, cluster
from ray_sql.config import (
    AskConfig,
    AuditConfig,
    CheckConfig,
    CompareConfig,
    Config,
    EvaluateConfig,
    JobConfig,
    McpConfig,
    PipelineConfig,
    PrepareConfig,
    PublishConfig,
    ResultsConfig,
    RunsConfig,
    ServeConfig,
    SweepConfig,
    UiConfig,
    VerifyConfig,
    help_text,
    load,
    mask_password,
    mask_secrets,
)
from ray_sql.display import loading, printable
from ray_sql.errors import ConfigError, RaySqlError

LONGEST_LINE = 1500
"""Characters of a line of an error; of a longer one, its beginning and end are shown."""
_ROOM = "make room, or choose another --output_dir or --cache_dir"
_RIGHTS = "correct its rights, or choose another place"
_NAME = "give the path of an ordinary file or folder, with a shorter name"
FIXABLE = dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), _ROOM)
FIXABLE |= dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), _RIGHTS)
FIXABLE |= dict.fromkeys((errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.ELOOP), _NAME)
"""Errors of a file system that the user can fix wherever they are met, and how."""
TOKEN_FLAGS = {"--read_token", "--write_token"}
SAME_SIGNAL_SECONDS = 1.0
"""Seconds in which a further signal counts as the first: `timeout` sends two at a time."""
_SIGNALS: list[int] = []
"""The signal that ended this process, if one did."""


@dataclass(frozen=True)
class Job:
    """A job: its line in `--help`, its settings, and its function as "module:function".

    `plan` is the function that `--dry_run` calls, if it is another one. `files` is the setting that
    takes words before the first flag. `begin` is a function that turns a command line with such
    words into one of flags. `defaults` is a YAML file of the package, read first.
    `extra` is the extra whose packages it needs. `is_light` tells that its module loads no
    libraries of models and clusters, which takes seconds.
    """

    summary: str
    settings: type[JobConfig]
    run: str
    plan: str = ""
    files: str = ""
    begin: str = ""
    defaults: str = ""
    extra: str = ""
    is_light: bool = False


JOBS = {
    "demo": Job(
        "Train and measure a small model on this machine, with data that comes along.",
        Config,
        run="ray_sql.finetune.demo:run",
        plan="ray_sql.finetune:dry_run",
        defaults="demo_data/demo.yaml",
    ),
    "prepare": Job(
        "Make a checked dataset of your pairs and your database.",
        PrepareConfig,
        run="ray_sql.curate:prepare",
        files="pairs",
        is_light=True,
    ),
    "check": Job(
        "Check settings, data, machines and tokens before a run.",
        CheckConfig,
        run="ray_sql.preflight:run",
    ),
    "finetune": Job(
        "Train an adapter, and measure it by executing its SQL.",
        Config,
        run="ray_sql.finetune:run",
        plan="ray_sql.finetune:dry_run",
        begin="ray_sql.finetune.begin:begin",
    ),
    "evaluate": Job(
        "Score a model, its adapter, or a file of predictions.",
        EvaluateConfig,
        run="ray_sql.evaluate:run",
    ),
    "audit": Job(
        "Find gold queries, or predictions, whose result is empty, open or by chance.",
        AuditConfig,
        run="ray_sql.evaluate.audit:audit",
        is_light=True,
    ),
    "compare": Job(
        "Compare two scored files question by question.",
        CompareConfig,
        run="ray_sql.evaluate.compare:run",
        files="files",
        is_light=True,
    ),
    "ask": Job(
        "Ask a tuned model a question about a database.",
        AskConfig,
        run="ray_sql.serve.ask:run",
        plan="ray_sql.serve.ask:dry_run",
        files="question",
    ),
    "serve": Job(
        "Serve a tuned model over HTTP.",
        ServeConfig,
        run="ray_sql.serve.job:run",
        plan="ray_sql.serve.job:dry_run",
        extra="serve",
    ),
    "mcp": Job(
        "Offer a tuned model to an assistant as a tool, by MCP.",
        McpConfig,
        run="ray_sql.serve.mcp:run",
        plan="ray_sql.serve.mcp:dry_run",
        extra="mcp",
    ),
    "verify": Job(
        "Check that an endpoint answers as the run that was measured.",
        VerifyConfig,
        run="ray_sql.serve.verify:run",
        plan="ray_sql.serve.verify:dry_run",
    ),
    "tune": Job(
        "Sweep settings, and measure the best adapter.",
        SweepConfig,
        run="ray_sql.tune:run",
        plan="ray_sql.tune:dry_run",
    ),
    "pipeline": Job(
        "Sweep, measure and publish one task, or both and what links do for SQL.",
        PipelineConfig,
        run="ray_sql.tune.pipeline:run",
        plan="ray_sql.tune.pipeline:dry_run",
    ),
    "publish": Job(
        "Push a finished run's adapter to the Hub.",
        PublishConfig,
        run="ray_sql.publish:publish",
        plan="ray_sql.publish:dry_run",
        is_light=True,
    ),
    "ui": Job(
        "Open MLflow's pages on this project's runs.",
        UiConfig,
        run="ray_sql.tracking.ui:run",
        is_light=True,
    ),
    "runs": Job(
        "List runs, and remove old ones with their MLflow runs.",
        RunsConfig,
        run="ray_sql.finetune.runs:run",
        is_light=True,
    ),
    "results": Job(
        "Gather answers and scores of runs into one folder, for the Hub as a dataset.",
        ResultsConfig,
        run="ray_sql.publish.results:run",
        files="runs",
        is_light=True,
    ),
}


def main(name: str | None = None, argv: Sequence[str] | None = None) -> None:
    """Run a job: the one that is named, or the one that the command line names first.

    Ends the process with exit code 2 for what the user can fix, and with 1 for a bug.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if name is None:
        name = _job_name(words)
        words, program = words[1:], f"ray-sql {name}"
    else:
        program = f"python -m jobs.{name}"
    if name == "evaluate" and any(word.partition("=")[0] == "--compare" for word in words):
        print("note: `ray-sql compare A B` compares two scored files now", file=sys.stderr)
        words = [re.sub("^--compare", "--files", word) for word in words]
        name = "compare"
    job = JOBS[name]
    if {"-h", "--help"} & set(words):
        _print_help(help_text(program, job.summary, job.settings))
        return
    _run(job, words)


def _print_help(text: str) -> None:
    """Print a text of which a reader such as `head` may take a part only.

    The signal SIGPIPE stays ignored: left to its default, any socket that a peer closes would end
    the process without a word.
    """
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at the end


def _job_name(words: Sequence[str]) -> str:
    """Return the job that a command line begins with; print help or the nearest name otherwise."""
    if not words or words[0] in ("-h", "--help"):
        lines = [f"  {name:<10}{job.summary}" for name, job in JOBS.items()]
        print("usage: ray-sql <job> [--setting value ...]", "", *lines, "", sep="\n")
        print("`ray-sql <job> --help` lists the settings of a job.")
        raise SystemExit(0 if words else 2)
    if words[0] == "--version":
        print(f"ray-sql {__version__}")
        raise SystemExit(0)
    if words[0] not in JOBS:
        (near,) = difflib.get_close_matches(words[0], JOBS, 1, cutoff=0)
        way_out = f"did you mean {near}? `ray-sql --help` lists all"
        _say(f"error: {words[0]}: no such job; {way_out}")
        raise SystemExit(2)
    return words[0]


def _run(job: Job, words: list[str]) -> None:
    """Run a job with its settings from the command line.

    A full disk, and a cache that cannot be written, are for the user to fix wherever they are met.
    """
    _silence_libraries()
    _print_anything()
    _SIGNALS.clear()  # those of an earlier job in this process
    for number in (signal.SIGTERM, signal.SIGINT):  # as exceptions, so that runs are closed
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, exit_on_signal)
    _warn_of_secrets(words)
    if job.files and words and not words[0].startswith("-"):
        words = [f"--{job.files}", *words]
    if job.defaults:
        words = ["--config", str(Path(__file__).parent / job.defaults), *words]
    config = None
    try:
        if job.begin and words and not words[0].startswith("-"):
            words = _import(job.begin, job.extra)(words)
        config = load(job.settings, words)
        with _first_line(job, config):
            run = _import(job.plan if config.dry_run and job.plan else job.run, job.extra)
        run(config)
    except SystemExit:
        if _SIGNALS:  # on its way through Ray's core the exception loses its code
            raise SystemExit(128 + _SIGNALS[0]) from None
        raise
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(128 + signal.SIGINT) from None
    except RaySqlError as error:
        _say(f"error: {error}")
        raise SystemExit(2) from None
    except OSError as error:
        if error.errno not in FIXABLE:
            raise
        where = error.filename or "disk"
        _say(f"error: {where}: {error.strerror}; {FIXABLE[error.errno]}")
        raise SystemExit(2) from None
    finally:
        cluster.leave_ray()  # at the interpreter's exit its processes would die under it


def _silence_libraries() -> None:
    """Leave the screen to ray_sql's own words: of other packages only errors are shown."""
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # it says every retry of the network twice
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    handler = logging.StreamHandler()
    handler.setFormatter(MaskingFormatter("%(levelname)s %(name)s: %(message)s"))
    handler.addFilter(
        lambda record: record.name.startswith("ray_sql") or record.levelno >= logging.ERROR
    )
    logging.basicConfig(handlers=[handler])


def _print_anything() -> None:
    """Show as \\u2026 what the terminal's encoding lacks, in place of falling over it."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _import(door: str, extra: str) -> Callable[[Any], Any]:
    """Return the function that "module:function" names. Imported late, so that --help is fast.

    Raises `ConfigError` where a package of the extra is missing.
    """
    module, _, function = door.partition(":")
    try:
        job: Callable[[Any], Any] = getattr(importlib.import_module(module), function)
    except ModuleNotFoundError as error:
        if not extra:
            raise
        raise ConfigError(f"{error.name} is not installed; pip install -e '.[{extra}]'") from None
    return job


def _first_line(job: Job, config: JobConfig) -> AbstractContextManager[None]:
    """Say that a job has begun, before its libraries are imported."""
    if job.is_light or "torch" in sys.modules or _begins_quietly(config):
        return nullcontext()
    return loading("libraries")


def _begins_quietly(config: JobConfig) -> bool:
    """Tell whether a program reads what a job prints, or none of its imports takes long."""
    match config:
        case McpConfig():
            return True
        case AskConfig():
            return config.json
        case EvaluateConfig():
            return config.predictions_file is not None
        case _:
            return False


def _warn_of_secrets(words: Sequence[str]) -> None:
    """Say where secrets on the command line show, and where they would not."""
    shows = "shows in the process list, the shell's history, and Ray's list and log of jobs"
    for flag in sorted({word.partition("=")[0] for word in words} & TOKEN_FLAGS):
        print(f"warning: {flag} {shows}; HF_TOKEN in the environment does not", file=sys.stderr)
    for word in words:
        if mask_password(word) != word:
            way_out = "give it in the environment (docs/secrets.md)"
            _say(f"warning: the password in {mask_password(word)} {shows}; {way_out}")


class MaskingFormatter(logging.Formatter):
    """Write what libraries log as fit for a terminal, without secrets."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(mask_secrets(super().format(record)))


def _say(text: str) -> None:
    """Print lines to the terminal: of bounded length, without secrets and control characters."""
    for line in text.split("\n"):
        shown = printable(mask_secrets(line))
        if len(shown) > LONGEST_LINE:
            shown = f"{shown[: LONGEST_LINE // 2]} … {shown[-LONGEST_LINE // 2 :]}"
        print(shown, file=sys.stderr)


def exit_on_signal(signum: int, frame: object) -> None:
    """End the process by an exception with the exit code of a signal.

    Another exception would break into what this one sets off, so a second signal ends it at once.
    """
    began = time.monotonic()

    def end_at_once(signum: int, frame: object) -> None:
        if time.monotonic() - began > SAME_SIGNAL_SECONDS:
            os._exit(128 + signum)

    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is exit_on_signal:
            signal.signal(number, end_at_once)
    _SIGNALS.append(signum)
    raise KeyboardInterrupt if signum == signal.SIGINT else SystemExit(128 + signum)
