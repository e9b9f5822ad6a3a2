"""Nothing on the screen is a library's: only ray_sql's own words, and errors."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ray_sql.models import demo

kind = pytest.mark.kind("noise of libraries")
ROOT = Path(__file__).parent.parent

JOB = """
import logging, sys, types, warnings
from ray_sql import cli

def job(config):
    {body}

cli._import = lambda *door: job
cli.main('compare', ['--output_name', 'x', '--files', 'a', 'b'])
"""


@kind
@pytest.mark.parametrize(
    ("body", "shown"),
    [
        ("warnings.warn('a kernel is missing')", ""),
        ("warnings.warn('old', DeprecationWarning)", ""),
        ("logging.getLogger('bitsandbytes.ops').warning('no CPU kernel')", ""),
        ("logging.getLogger('urllib3').warning('retrying')", ""),
        ("logging.getLogger('sqlglot').error('cannot read')", "ERROR sqlglot: cannot read\n"),
        (
            "logging.getLogger('ray_sql.tracking').warning('MLflow is away')",
            "WARNING ray_sql.tracking: MLflow is away\n",
        ),
        ("import huggingface_hub.utils._http as h; h.logger.warning('Retrying in 1s')", ""),
        ("import datasets as d; d.Dataset.from_dict({'a': [1, 2]}).map(lambda row: row)", ""),
        (
            "from matplotlib.figure import Figure; f = Figure(); f.subplots().set_title('问题')\n"
            "    f.savefig('/dev/null', format='png')",
            "",
        ),
    ],
)
def test_the_screen_is_left_to_our_own_words(body: str, shown: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", JOB.format(body=body)],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    assert done.stdout + done.stderr == shown


@kind
def test_the_demos_model_is_converted_without_a_bar(
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    import transformers
    from tqdm.auto import tqdm

    def from_file(loader: Any) -> Any:
        load = loader.from_pretrained

        def read(folder: str, gguf_file: str, **settings: Any) -> Any:
            list(tqdm(range(3), desc="Converting and de-quantizing GGUF tensors..."))
            found = load(str(tiny_model), **settings)
            if hasattr(found, "config"):
                found.config.quantization_config = {}
            return found

        return read

    for loader in (transformers.AutoModelForCausalLM, transformers.AutoTokenizer):
        monkeypatch.setattr(loader, "from_pretrained", from_file(loader))
    demo.convert_gguf(tmp_path / "model.gguf", tmp_path / "model")
    assert (tmp_path / "model" / "config.json").is_file()
    assert capfd.readouterr() == ("", "")


@kind
def test_make_says_in_our_words_what_it_does() -> None:
    def commands(*words: str) -> str:
        # -W: as if nothing were installed
        told = subprocess.run(
            ["make", "-n", "-W", "pyproject.toml", *words],
            capture_output=True,
            text=True,
            check=True,
            cwd=ROOT,
        )
        return told.stdout

    assert "minutes the first time" in commands("setup")
    assert "--quiet --disable-pip-version-check" in commands("setup")
    assert "ray-sql ui --port 5000" in commands("ui")  # test_runs.py holds what it starts
    told = commands("ui", "TRACKING=sqlite:///a b.db")
    assert "--tracking.uri 'sqlite:///a b.db'" in told


@pytest.mark.kind("terminals that lack a character")
@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp437", "utf-8"])
@pytest.mark.parametrize("body", ["print('98 ± 2 … 中')", "Display().line('98 ± 2 … 中')"])
def test_what_a_terminal_lacks_is_shown_otherwise(body: str, encoding: str) -> None:
    body = f"from ray_sql.display import Display; {body}"
    done = subprocess.run(
        [sys.executable, "-c", JOB.format(body=body)],
        capture_output=True,
        check=False,
        cwd=ROOT,
        env=os.environ | {"PYTHONIOENCODING": encoding},
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout == "98 ± 2 … 中\n".encode(encoding, "backslashreplace")
