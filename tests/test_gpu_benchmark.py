"""benchmarks.gpu in miniature, without a GPU: it runs, and its last line has the figures."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.cluster  # no cluster, but most of a minute of the gate's time
def test_a_rehearsal_gives_every_figure() -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "benchmarks.gpu",
            "--tiny",
            "--quick",
            "--parts",
            "gradients,checkpointing",
        ],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    said = json.loads(done.stdout.splitlines()[-1])
    assert (
        said["gradients"]["fp32 shared_rows"] < 1e-5
        and said["gradients"]["fp32 masked_rows"] < 1e-5
    )
    measured = said["checkpointing"]
    assert list(measured) == ["plain", "packing", "ours 8", "ours 32"], "none failed"
    assert all(
        each["examples_per_second"] > 0 and len(each["ratios"]["plain"]) == 3
        for each in measured.values()
    )
    assert said["tests"] == "not run"
