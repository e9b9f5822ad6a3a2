"""vLLM, started with the configuration that we print, is the measured model.

It needs an environment of its own, because it wants older transformers than we do. Its command is
named by `RAY_SQL_VLLM`: CONTRIBUTING.md says how to make one for a CPU.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from ray_sql import cli, finetune
from ray_sql.config import Config, load
from ray_sql.store.run_folder import RunFolder
from tests.conftest import make_model
from tests.waiting import HANGS

VLLM = os.environ.get("RAY_SQL_VLLM", "")
ALONE = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
"""No network, and a GiB of keys and values, which is more than a tiny model needs."""


@pytest.fixture(scope="module")
def wide_run(tuned_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Share a run over heads of 32 numbers: vLLM's attention on a CPU knows no smaller ones."""
    saved = RunFolder(str(tuned_run)).read_settings() or {}
    root = tmp_path_factory.mktemp("wide")
    (root / "model").mkdir()
    model = make_model(root / "model", num_attention_heads=2)
    own = {"output_name": "wide", "model_name": str(model), "output_dir": str(root)}
    finetune.run(load(Config, [], **(saved | own)))
    return root / "wide"


@contextmanager
def running(file: Path) -> Iterator[None]:
    """Run vLLM with a configuration, from when it answers until the block ends."""
    command = [VLLM, "serve", "--config", str(file), "--enforce-eager"]
    streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    process = psutil.Popen(command, **streams, text=True, env=os.environ | ALONE)
    try:
        said = []
        for line in process.stdout:
            said.append(line)
            if "Application startup complete" in line:
                break
        else:
            pytest.fail("".join(said[-40:]))
        threading.Thread(target=process.stdout.read, daemon=True).start()
        yield
    finally:
        begun = process.children(recursive=True)
        process.terminate()
        _, left = psutil.wait_procs([process, *begun], HANGS)
        assert not left


@pytest.mark.cluster
@pytest.mark.skipif(not VLLM, reason="RAY_SQL_VLLM names no command of vLLM")
def test_vllm_with_our_configuration_is_the_measured_model(
    wide_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    named = ["--output_name", "wide", "--output_dir", str(wide_run.parent)]

    def verify(model: str) -> tuple[int, str]:
        place = ["--evaluate.url", f"http://127.0.0.1:{port}/v1", "--evaluate.served_model", model]
        code = 0
        try:
            cli.main("verify", [*named, *place])
        except SystemExit as stop:
            code = int(stop.code or 0)
        return code, json.loads(capsys.readouterr().out.splitlines()[-1])["verdict"]

    cli.main("serve", [*named, "--serve.gpu", "vllm", "--serve.port", str(port)])
    file = tmp_path / "vllm.yaml"
    file.write_text(capsys.readouterr().out)
    with running(file):
        assert verify("wide") == (0, "equal")
        assert verify("wide-base") == (3, "no adapter")
