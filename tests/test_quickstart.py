"""The notebook runs from data to an answer, here with a tiny model and a few steps."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parent.parent / "docs" / "quickstart.ipynb"


@pytest.mark.slow
def test_the_cells_of_the_notebook_run_in_order(tiny_model: Path, tmp_path: Path) -> None:
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    smaller = {
        'model_name="demo"': f'model_name="{tiny_model}", cache_dir="{tmp_path}/cache"',
        "num_epochs=2": "num_epochs=0.02",
        '"max_new_tokens": 96': '"max_new_tokens": 8, "limit": 4',
    }
    for whole, part in smaller.items():
        assert whole in code
        code = code.replace(whole, part)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "seen: " in done.stdout and "unseen: " in done.stdout
    assert (tmp_path / "out" / "quickstart" / "report.html").exists()
