"""`ray-sql`: its jobs, their help, and what each accepts, shows and refuses."""

from __future__ import annotations

import ast
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from ray_sql import cli
from ray_sql.config import (
    CheckConfig,
    CompareConfig,
    Config,
    EvaluateConfig,
    PublishConfig,
    SweepConfig,
    groups,
    load,
)
from ray_sql.errors import ConfigError

ROOT = Path(__file__).parent.parent
RUN = "--model_name m --task_type sql --lora.r 8 --train.max_steps 3 --tune.num_samples 2".split()
"""Flags of a run, most of which other jobs do not use."""


def ray_sql(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """Return (exit code, stdout, stderr) of `ray-sql WORDS`, in this process."""
    code = 0
    try:
        cli.main(argv=words)
    except SystemExit as stop:
        code = int(stop.code or 0)
    out, err = capsys.readouterr()
    return code, out, err


def test_help_lists_every_job_with_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = ray_sql(capsys, "--help")
    assert code == 0
    for name, job in cli.JOBS.items():
        assert f"  {name:<10}{job.summary}\n" in out
    assert max(map(len, out.splitlines())) <= 100
    code, again, _ = ray_sql(capsys)
    assert (code, again) == (2, out)


def test_an_unknown_job_is_refused_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    for word, near in (("finetun", "finetune"), ("eval", "evaluate"), ("nonsense", "")):
        code, out, err = ray_sql(capsys, word, "--output_name", "o")
        assert (code, out) == (2, "")
        assert err.startswith(f"error: {word}: no such job; did you mean {near}")
        assert err.endswith("? `ray-sql --help` lists all\n")


def test_the_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    from ray_sql import __version__

    assert ray_sql(capsys, "--version")[:2] == (0, f"ray-sql {__version__}\n")


@pytest.mark.parametrize("name", cli.JOBS)
def test_every_job_has_a_pointer_that_runs_nothing_on_import(name: str) -> None:
    text = (ROOT / "jobs" / f"{name}.py").read_text()
    assert text.count("\n") <= 40
    docstring, *imports, guard = ast.parse(text).body
    assert isinstance(docstring, ast.Expr)
    assert [ast.unparse(node) for node in imports] == ["from ray_sql.__main__ import main"]
    assert ast.unparse(guard) == f"if __name__ == '__main__':\n    main('{name}')"
    assert f"python -m jobs.{name}" in text


def test_jobs_that_are_pointed_to_exist() -> None:
    pointers = {path.stem for path in (ROOT / "jobs").glob("*.py")} - {"__init__"}
    assert pointers == set(cli.JOBS)


def test_every_door_can_be_imported() -> None:
    for job in cli.JOBS.values():
        for door in filter(None, (job.run, job.plan)):
            module, _, function = door.partition(":")
            assert callable(getattr(importlib.import_module(module), function)), door


@pytest.mark.parametrize(
    ("name", "shown", "hidden"),
    [
        ("finetune", ["lora.r", "tune.objective", "hub.repo_id"], ["tune.space", "resume"]),
        ("tune", ["lora.r", "tune.space", "resume"], ["adapter", "replay"]),
        ("check", ["lora.r", "tune.space", "replay"], ["resume"]),
        ("evaluate", ["adapter", "evaluate.limit", "train.bf16"], ["lora.r", "hub.repo_id"]),
        ("evaluate", ["data.test_fraction"], ["evaluate.select_examples", "train.optim"]),
        ("compare", ["files", "output_name"], ["lora.r", "model_name", "evaluate.limit"]),
        ("publish", ["hub.repo_id", "scaling.storage_path"], ["lora.r", "hub.push_checkpoints"]),
    ],
)
def test_help_of_a_job_shows_what_it_uses_and_nothing_else(
    capsys: pytest.CaptureFixture[str], name: str, shown: list[str], hidden: list[str]
) -> None:
    code, out, _ = ray_sql(capsys, name, "--help")
    assert code == 0
    flags = {word.strip(",") for word in out.split() if word.startswith("--")}
    assert {f"--{setting}" for setting in shown} <= flags
    assert not {f"--{setting}" for setting in hidden} & flags


def test_help_may_be_cut_by_head_and_leaves_the_signal_of_broken_pipes_alone() -> None:
    # with SIGPIPE at its default, a server that closes a connection would end a run without a word
    script = (
        "import signal; from ray_sql import cli; cli.main(argv=['finetune', '--help']); "
        "assert signal.getsignal(signal.SIGPIPE) == signal.SIG_IGN"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 0


def test_help_has_headings_with_everyday_settings_first(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = ray_sql(capsys, "finetune", "--help")
    headings = [line for line in out.splitlines() if line[:1].isalpha()][2:-2]
    assert headings[:3] == ["Everyday settings", "Batches and checkpoints", "Folders and tokens"]
    assert "lora: Configure the adapter, in PEFT's words." in headings
    assert out.index("--model_name") < out.index("--seed") < out.index("--data.databases")
    assert max(map(len, out.splitlines())) <= 100


def test_every_setting_has_a_sentence_that_ends() -> None:
    for job in cli.JOBS.values():
        for field in job.settings.model_fields.values():
            nested = getattr(field.annotation, "model_fields", None)
            for setting in nested.values() if nested else [field]:
                assert str(setting.description).endswith((".", ")"))


def test_settings_of_a_run_that_a_job_does_not_use_are_ignored(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("lora: {r: 8}\nscaling: {num_workers: 2, storage_path: /runs}\nsplit: [a]\n")
    given = ["--config", str(file), "--output_name", "o", *RUN]
    published = load(PublishConfig, [*given, "--hub.push_checkpoints", "all", "--hub.merge"])
    assert published.hub.merge and published.run_dir == "/runs/o"
    compared = load(CompareConfig, ["--files", "a", "b", *given])
    assert (compared.files, compared.output_name) == (("a", "b"), "o")
    for kind in (CheckConfig, SweepConfig, Config, EvaluateConfig):
        assert load(kind, given).lora.r == 8


@pytest.mark.parametrize("kind", [PublishConfig, CompareConfig, EvaluateConfig])
def test_what_no_job_knows_is_refused_everywhere(kind: type[Config], tmp_path: Path) -> None:
    file = tmp_path / "wrong.yaml"
    file.write_text("hub: {rpo_id: me/x}\nlora: {rank: 8}\nlearnin_rate: 1\n")
    with pytest.raises(ConfigError, match=r"learnin_rate: unknown setting"):
        load(kind, ["--config", str(file), "--output_name", "o"])
    with pytest.raises(ConfigError, match=r"--lora\.rank: unknown flag"):
        load(kind, ["--lora.rank", "8", "--output_name", "o"])


def test_an_evaluation_has_all_settings_of_its_run(tmp_path: Path) -> None:
    """Else it would set other examples aside, and refuse workers that the run had."""
    given = ["--data.validation_fraction", "0.3", "--data.limit", "9", "--scaling.num_workers"]
    given += ["1,4", "--train.global_batch_size", "24", "--lora.r", "8"]
    run = load(Config, ["--output_name", "o", *RUN, *given])
    saved = tmp_path / "config.json"
    saved.write_text(json.dumps(run.public()))
    evaluation = load(EvaluateConfig, ["--config", str(saved), "--adapter", "a"])
    assert evaluation.for_workers() == run.for_workers()
    shown = {setting.name for group in groups(EvaluateConfig) for setting in group.settings}
    assert {"adapter", "data.validation_fraction"} <= shown and "lora.r" not in shown
    with pytest.raises(ConfigError, match=r"train\.max_steps"):
        load(EvaluateConfig, ["--output_name", "o", *RUN, "--train.max_steps", "nonsense"])


def test_a_removed_setting_may_have_the_value_it_always_had() -> None:
    for flags in (["--evaluate.backend", "transformers"], ["--evaluate.backend=transformers"]):
        assert load(Config, ["--output_name", "o", *RUN, *flags]).output_name == "o"
    with pytest.raises(ConfigError, match=r"--evaluate\.backend: .*'transformers' or 'openai'"):
        load(Config, ["--output_name", "o", *RUN, "--evaluate.backend", "vllm"])


def test_ctrl_c_ends_a_job_in_one_line(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.settimeout(120)
        uri = f"http://127.0.0.1:{silent.getsockname()[1]}"
        process = subprocess.Popen(
            [sys.executable, "-m", "jobs.finetune", "--output_name", "o", *RUN]
            + ["--output_dir", str(tmp_path), "--tracking.uri", uri],
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
            # a suite that was started in the background hands down an ignored Ctrl-C
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
        with silent.accept()[0]:  # the job waits for an answer, so the signal meets it at work
            process.send_signal(signal.SIGINT)
            _, said = process.communicate()
    assert process.returncode == 128 + signal.SIGINT
    assert said == "starting: libraries\ninterrupted\n"


def test_words_before_the_first_flag_are_the_files_to_compare(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for words in (["compare", "a", "b"], ["evaluate", "--compare", "a", "b"]):
        code, out, err = ray_sql(capsys, *words, "--dry_run", "--output_dir", str(tmp_path))
        assert code == 0
        assert out.startswith("would compare ") and out.endswith(f"write {tmp_path}/comparison\n")
        assert ("`ray-sql compare A B` compares" in err) == (words[0] == "evaluate")


def test_a_pasted_python_example_reads_settings_and_finds_the_door() -> None:
    code = (
        "from ray_sql import Config, finetune\n"
        "config = Config(model_name='demo', output_name='mine', task_type='sql', lora={'r': 8})\n"
        "print(config.lora.r, callable(finetune.run))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "8 True\n"


def test_a_module_and_the_command_name_themselves_in_help() -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    for command, name in (
        (["-m", "jobs.publish"], "python -m jobs.publish"),
        (["-c", "from ray_sql import cli; cli.main()", "publish"], "ray-sql publish"),
    ):
        done = subprocess.run(
            [sys.executable, *command, "--help"],
            capture_output=True,
            text=True,
            check=True,
            cwd=ROOT,
            env=environment,
        )
        assert done.stdout.startswith(f"usage: {name} [")


@pytest.mark.parametrize("command", ["-m ray_sql ask", "-m jobs.ask"])
def test_a_job_says_that_it_has_begun_before_it_loads_models(command: str, tmp_path: Path) -> None:
    words = ["Who?", "--output_name", "none", "--output_dir", str(tmp_path)]
    watched = [sys.executable, "-X", "importtime", *command.split(), *words]
    done = subprocess.run(watched, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 2 and done.stdout == ""
    lines = done.stderr.splitlines()
    imported = [line.rpartition("|")[2].strip().partition(".")[0] for line in lines]
    assert lines.index("starting: libraries") < imported.index("torch")
    assert lines.count("starting: libraries") == 1 and lines[-1].startswith("error: ")


def test_a_job_whose_output_a_program_reads_begins_quietly(tmp_path: Path) -> None:
    words = ["ask", "Who?", "--json", "--output_name", "none", "--output_dir", str(tmp_path)]
    command = [sys.executable, "-m", "ray_sql", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
