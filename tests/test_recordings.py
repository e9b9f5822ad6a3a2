"""A run says what it does, on a terminal and in a file; no library says anything."""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path

import pytest

from tests.recording import COMMANDS, foreign, record

ROOT = Path(__file__).parent.parent
LONGEST_WAIT = "workers and model"
"""What is waited for before the first step, for seconds on every machine."""


@pytest.mark.slow
@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.cluster)])
def test_a_run_shows_its_own_lines_only(
    terminal: bool,
    workers: int,
    tiny_model: Path,
    spider_folder: Path,
    empty_mlflow: Path,
    tmp_path: Path,
) -> None:
    shutil.copy(empty_mlflow, tmp_path / "mlflow.db")
    command = f"""-m ray_sql finetune --model_name {tiny_model} --output_name run --task_type sql
        --dataset_id {spider_folder} --cache_dir {tmp_path}/cache --data.split_by question
        --lora.r 4 --lora.lora_alpha 8 --train.max_steps 4 --train.logging_steps 1 --save_steps 2
        --scaling.num_workers {workers} --evaluate.limit 3 --evaluate.max_new_tokens 8
        --evaluate.select_examples 2 --evaluate.processes 1"""
    # as a user has it: nothing is switched off for the tests
    env = {name: value for name, value in os.environ.items() if name != "TOKENIZERS_PARALLELISM"}
    env |= {"PYTHONPATH": str(ROOT), "TERM": "xterm-256color"}
    written = record([sys.executable, *command.split()], tmp_path, env, terminal)
    assert foreign(written) == []
    assert "training" in written and "4/4" in written and "checkpoint saved" in written
    text = COMMANDS.sub("", written)
    lines = [line for line in text.splitlines() if line.strip()]
    assert [line.split()[0] for line in lines[-3:]] == ["look", "ask", "publish"]
    if terminal:
        moving = re.findall("[\u2800-\u28ff] starting: ([a-zA-Z ]+)", text)
        assert LONGEST_WAIT in moving, "a wait is a line that moves"
    else:
        assert "\x1b" not in written and "\r" not in written


def test_a_line_of_a_library_is_found() -> None:
    own = "data      x\n\x1b[2K⠋ starting: MLflow, 2 s\rrun: execution accuracy, spider semantics\n"
    assert foreign(own) == []
    theirs = "Loading weights: 100%|███| 2/2\nUserWarning: x\n(pid=3) a\n2026/11/30 INFO mlflow: y"
    assert foreign(own + theirs) == theirs.splitlines()
