"""Paths with characters that shells and URIs read as something else."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from ray_sql import tracking

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
