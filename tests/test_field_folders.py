"""Folders of others are left alone, the output folder is tried first, a full disk is named."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from ray_sql import rows
from ray_sql.config import CompareConfig, EvaluateConfig, load
from ray_sql.display import Display
from ray_sql.errors import ConfigError, DamagedFile, RaySqlError, StoreError
from ray_sql.evaluate import compare
from ray_sql.evaluate import run as evaluate
from ray_sql.finetune.earlier import finished_metrics
from ray_sql.finetune.session import Session
from ray_sql.generate import Answer, AnswerCache
from ray_sql.store import storage
from ray_sql.store.dataset_folder import DatasetFolder
from ray_sql.store.run_folder import RunFolder
from ray_sql.tune import study

KIND = "folders of others"
ROOT = Path(__file__).parent.parent


@pytest.fixture
def predictions(tmp_path: Path) -> str:
    """A file of predictions for the split `dev` of the shop's questions."""
    file = tmp_path / "p.sql"
    file.write_text("SELECT 1\n" * 8)
    return str(file)


FOREIGN = {
    "a model": {"config.json": '{"model_type": "llama"}'},
    "another program's settings": {"config.json": "{}"},
    "a list": {"config.json": "[1]"},
    "an empty file": {"config.json": ""},
    "a picture": {"holiday.jpg": "x"},
    "a model and its tokenizer": {"config.json": '{"model_type": "x"}', "metrics.json": "{}"},
}


@pytest.mark.kind(KIND)
@pytest.mark.parametrize("kind", FOREIGN)
@pytest.mark.parametrize("job", ["evaluate", "finetune", "finetune over it", "compare"])
def test_a_folder_of_others_stays_as_it_is(
    make_config: Any, tmp_path: Path, predictions: str, kind: str, job: str
) -> None:
    folder = tmp_path / "out" / "run"
    folder.mkdir(parents=True)
    for name, text in FOREIGN[kind].items():
        (folder / name).write_text(text)
    with pytest.raises(RaySqlError, match=r"out/run.*(choose another --output_name|restore it)"):
        if job == "evaluate":
            evaluate(make_config(EvaluateConfig, predictions_file=predictions))
        elif job == "compare":
            place = ["--output_dir", str(tmp_path / "out"), "--output_name", "run"]
            compare.run(load(CompareConfig, ["--files", predictions, predictions, *place]))
        else:
            finished_metrics(make_config(overwrite=job.endswith("over it")))
    assert {file.name: file.read_text() for file in folder.iterdir()} == FOREIGN[kind]


def test_an_evaluation_may_be_made_again(make_config: Any, predictions: str) -> None:
    config = make_config(EvaluateConfig, predictions_file=predictions, **{"evaluate.limit": None})
    assert evaluate(config) == evaluate(config)
    assert not list(Path(config.run_dir).glob("tried-*"))


@pytest.fixture
def locked(tmp_path: Path) -> Iterator[Path]:
    """A place under which no folder can be made, even by root: below a file."""
    place = tmp_path / "file"
    place.write_text("")
    yield place / "out"


@pytest.mark.kind(KIND)
@pytest.mark.parametrize("job", ["evaluate", "finetune"])
def test_the_output_folder_is_tried_before_the_work(
    make_config: Any, locked: Path, predictions: str, job: str, monkeypatch: Any
) -> None:
    given = {"output_dir": str(locked), "dataset_id": "/nowhere/at/all"}  # read only afterwards
    with pytest.raises(StoreError, match=f"^{locked}.*: cannot be written"):
        if job == "evaluate":
            evaluate(make_config(EvaluateConfig, predictions_file=predictions, **given))
        else:
            with Session(make_config(**given), Display()):
                pass


@contextmanager
def full_disk() -> Iterator[None]:
    """Let no file of this process grow over 4,000 bytes: writing further fails.

    pytest writes its own report outside of this, for that may be a large file.
    """
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.kind(KIND)
@pytest.mark.parametrize("what", ["a text", "a local text", "a folder", "an answer", "rows"])
def test_a_full_disk_leaves_nothing_half_written(tmp_path: Path, what: str) -> None:
    target, large = tmp_path / "new" / "file.json", "x" * 50_000
    source = tmp_path / "source"
    source.mkdir()
    for part in range(20):
        (source / f"part{part}").write_text("x" * 3000)
    (source / "z").write_text("x" * 1_000_000)
    refused = pytest.raises(StoreError, match=rf"{target}.*: cannot be written")
    with full_disk(), refused:
        if what == "a text":
            storage.write_text(str(target), large)
        elif what == "a local text":
            storage.write_local_text(target, large)
        elif what == "rows":
            rows.write([rows.TokenizedExample("a", large, list(range(9000)), 1)], target)
        elif what == "an answer":
            AnswerCache(target).add(0, Answer("SELECT 1", 1, 1, 0.0))
            AnswerCache(target).add(1, Answer(large, 1, 1, 0.0))
        else:
            storage.put(source, str(target))
    if what == "an answer":
        assert len(AnswerCache(target).read()) == 1 and target.read_text().endswith("}\n")
    else:
        assert not target.parent.exists() or list(target.parent.iterdir()) == []


@pytest.mark.kind(KIND)
@pytest.mark.parametrize("name", ["inputs", "adapter", "checkpoint-5", "metrics.json", ""])
def test_what_a_link_in_a_removed_run_leads_to_stays(tmp_path: Path, name: str) -> None:
    run, theirs = tmp_path / "out" / "run", tmp_path / "theirs"
    for file in ("inputs/finished", "adapter/weights", "checkpoint-5/state", "metrics.json"):
        (run / file).parent.mkdir(parents=True, exist_ok=True)
        (run / file).write_text(file)
    (run / name).rename(theirs)
    (run / name).symlink_to(theirs)
    RunFolder(str(run)).remove()
    if name:
        assert not run.exists()
        assert theirs.is_file() or [file.read_text() for file in theirs.iterdir()]
    else:  # the run is in another place, and so will be the next one
        assert run.is_symlink() and list(run.iterdir()) == []


@pytest.mark.kind(KIND)
@pytest.mark.parametrize("use", [rows.read, rows.largest_token])
@pytest.mark.parametrize("state", ["gone", "empty", "cut", "text"])
def test_rows_that_somebody_removed_are_named(tmp_path: Path, use: Any, state: str) -> None:
    file = tmp_path / "rows.parquet"
    rows.write([rows.TokenizedExample("a", "shop", [1, 2], 1)], file)
    content = file.read_bytes()
    file.unlink()
    if state != "gone":
        file.write_bytes({"empty": b"", "cut": content[:90], "text": b"rows"}[state])
    with pytest.raises(DamagedFile, match=rf"^{file}: cannot be read .* makes it anew"):
        use(file)


@pytest.mark.kind(KIND)
def test_a_cache_that_is_removed_meanwhile_is_named(tmp_path: Path) -> None:
    file = tmp_path / "cache" / "file"
    refused = pytest.raises(StoreError, match=rf"^{file}: cannot be written")
    with refused, storage.write_to_cache(file) as part:
        part.write_text("x")
        shutil.rmtree(tmp_path / "cache")


@pytest.mark.kind(KIND)
def test_a_job_on_a_full_disk_names_the_file(tmp_path: Path, spider_folder: Path) -> None:
    """A small file system of its own, where this user may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=24k", "tmpfs", str(disk)]
    if os.geteuid() or subprocess.run(words, capture_output=True, check=False).returncode:
        pytest.skip("this user may not mount a file system")
    try:
        file = tmp_path / "p.sql"
        file.write_text("SELECT 1\n" * 8)
        done = subprocess.run(
            [sys.executable, "-m", "jobs.evaluate", "--predictions_file", str(file)]
            + ["--dataset_id", str(spider_folder), "--output_name", "e", "--output_dir", str(disk)]
            + ["--split", "dev", "--cache_dir", str(tmp_path / "cache")],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 2, done.stderr
        assert f"error: {disk}/e/" in done.stderr and "free space" in done.stderr
        assert not list(disk.rglob("*.part"))
        for written in disk.rglob("*.json"):
            json.loads(written.read_text())
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.kind(KIND)
@pytest.mark.parametrize("name", ["o" * 300, "a" * 256])
def test_a_name_that_no_file_system_takes_is_named(
    make_config: Any, predictions: str, name: str
) -> None:
    with pytest.raises((ConfigError, StoreError), match=name[:200]):
        evaluate(make_config(EvaluateConfig, predictions_file=predictions, output_name=name))


FIRST_FILES = [
    ("storage.remove", "RunFolder({place!r}).require_writable()"),
    ("os.fsync", "RunFolder({place!r}).write_settings({{}})"),
    ("os.fsync", "DatasetFolder(Path({place!r})).begin({{}}, [])"),
]
"""What a command that begins is killed at, and what it is doing then."""


@pytest.mark.parametrize(("moment", "work"), FIRST_FILES)
def test_a_command_that_was_killed_at_its_first_file_can_be_given_again(
    make_config: Any, moment: str, work: str
) -> None:
    config = make_config()
    place = Path(config.run_dir)
    code = (
        "import os, signal\nfrom pathlib import Path\nfrom ray_sql.store import storage\n"
        "from ray_sql.store.dataset_folder import DatasetFolder\n"
        "from ray_sql.store.run_folder import RunFolder\n"
        f"{moment} = lambda _: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"{work.format(place=str(place))}\n"
    )
    killed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False)
    assert killed.returncode == -signal.SIGKILL and list(place.iterdir())
    assert finished_metrics(config) is None
    study.require_free(RunFolder(config.run_dir))
    RunFolder(config.run_dir).require_ours()
    DatasetFolder(place).require_ours({}, overwrite=False)


def test_a_part_that_another_process_wrote_is_not_in_the_way(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path / "run"))
    folder.write_settings({"a": 1})
    with pytest.raises(KeyError), storage.write_atomically(tmp_path / "run" / "config.json"):
        raise KeyError
    assert folder.read_settings() == {"a": 1} and len(list((tmp_path / "run").iterdir())) == 1
