"""Paths with characters that shells and URIs read as something else."""

from __future__ import annotations

import io
import shlex
import shutil
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from rich.console import Console

from ray_sql import tracking
from ray_sql.data import databases
from ray_sql.display import Display
from ray_sql.finetune import prepare
from ray_sql.report import terminal
from ray_sql.store.run_folder import RunFolder

kind = pytest.mark.kind("paths with odd characters")
ODD = ["m%20y", "100 %", "a #b", "what?", 'it\'s "so"', "Käse & Brot", "$HOME; x", "a:b@c"]


@kind
@pytest.mark.parametrize("name", ODD)
def test_a_tracking_database_lies_in_the_folder_that_was_named(
    name: str, make_config: Any, tmp_path: Path, empty_mlflow: Path
) -> None:
    folder = tmp_path / name
    folder.mkdir()
    shutil.copy(empty_mlflow, folder)
    config = make_config(
        **{"tracking.enabled": True, "tracking.uri": f"sqlite:///{folder}/mlflow.db"}
    )
    (folder / "note.txt").write_text("kept")
    run = tracking.start(config.tracking, {}, name="x", tags={}, spool=tmp_path / "spool")
    run.artifact(folder / "note.txt")
    run.end("FINISHED")
    assert not (tmp_path / "spool").exists(), "everything was taken"
    assert (folder / "mlflow.db").read_bytes() != empty_mlflow.read_bytes()
    assert [path.read_text() for path in folder.glob("mlartifacts/**/note.txt")] == ["kept"]
    assert {path.name for path in tmp_path.iterdir()} <= {name, "spool"}


@kind
@pytest.mark.parametrize("name", ODD)
def test_data_and_runs_lie_in_folders_of_any_name(
    name: str, make_config: Any, spider_folder: Path, tmp_path: Path
) -> None:
    root = tmp_path / name
    shutil.copytree(spider_folder, root / "data")
    config = make_config(
        **{
            "dataset_id": str(root / "data"),
            "output_dir": str(root / "out"),
            "cache_dir": str(root / "cache"),
        }
    )
    prepared = prepare.prepare(config)
    prepare.write_inputs(prepared)
    assert RunFolder(config.run_dir).has_inputs() and Path(config.run_dir, "inputs").is_dir()
    assert [path.name for path in tmp_path.iterdir()] == [name] and not prepared.gold_errors


@kind
@pytest.mark.parametrize("encoded", [False, True])
@pytest.mark.parametrize("name", ODD)
def test_a_sqlite_url_names_a_file_of_any_name(
    name: str, encoded: bool, spider_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / name).mkdir()
    file = tmp_path / name / "shop.db"
    shutil.copy(spider_folder / "database" / "shop" / "shop.sqlite", file)
    url = f"sqlite:///{quote(str(file)) if encoded else file}"
    assert databases.on_server(url, ["shop"]) == {"shop": str(file)}
    assert databases.only_name(url) == "shop"


@kind
@pytest.mark.parametrize("name", ODD)
def test_the_command_that_shows_a_run_can_be_pasted(name: str, tmp_path: Path) -> None:
    out = io.StringIO()
    uri = tracking.store_uri(f"sqlite:///{tmp_path}/{name}/mlflow.db")
    scores = {"n": 4, "execution_accuracy": 0.25, "interval": [0.0, 0.7], "gold_errors": 0}
    metrics = {
        "task_type": "sql",
        "tuned": {"dev": scores},
        "seconds": 2.0,
        "training_seconds": 1.0,
        "mlflow_run_id": "run",
        "tracking_uri": uri,
    }
    display = Display(Console(file=out, soft_wrap=True))
    terminal.show(RunFolder(str(tmp_path)), "x", metrics, display)
    command = out.getvalue().partition("ray-sql ui ")[2].partition("\n")[0]
    assert shlex.split(command) == ["--tracking.uri", uri]
