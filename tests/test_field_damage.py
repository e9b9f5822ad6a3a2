"""Damaged files: every file that a run reads, broken in twelve ways, ends in a line or is healed.

The jobs run in this process through the door that the command line takes. A file that is damaged is
either named in one line, with exit code 2, or is a cache, which is made again.
"""

from __future__ import annotations

import gzip
import json
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ray_sql import cli, data, finetune, models
from ray_sql.config import Config, files, load
from ray_sql.config.sections import LoraSection
from ray_sql.errors import DamagedFile, ModelError, RaySqlError
from ray_sql.evaluate import prediction_forms, scored
from ray_sql.store import checkpoints, storage
from ray_sql.store.run_folder import RunFolder
from ray_sql.train.resume import starting_point
from tests.test_publish import settings

KIND = "damaged files"


def cut(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: len(content) * 2 // 3])


def without_keys(file: Path) -> None:
    lines = file.read_text().splitlines() if file.suffix == ".jsonl" else [file.read_text()]
    file.write_text("\n".join(json.dumps(_without_first(json.loads(line))) for line in lines))


def _without_first(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_first(part) for part in value]
    return dict(list(value.items())[1:]) if isinstance(value, dict) else value


def wrong_types(file: Path) -> None:
    lines = file.read_text().splitlines() if file.suffix == ".jsonl" else [file.read_text()]
    file.write_text("\n".join(json.dumps(_wrong(json.loads(line))) for line in lines))


def _wrong(value: Any) -> Any:
    if isinstance(value, list):
        return [_wrong(part) for part in value]
    return {key: [[]] for key in value} if isinstance(value, dict) else value


def as_link(file: Path) -> None:
    file.unlink()
    file.symlink_to(file.parent / "nowhere")


def as_pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def write(content: bytes) -> Callable[[Path], object]:
    return lambda file: file.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "empty": write(b""),
    "cut": cut,
    "a list": write(b"[1]"),
    "without a key": without_keys,
    "wrong types": wrong_types,
    "deep": write(b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "huge integer": write(b'{"step": ' + b"9" * 5000 + b', "n": ' + b"9" * 4000 + b"}"),
    "bad UTF-8": write(b'{"a": "\xff\xfe"}'),
    "NUL": write(b"\0" * 64),
    "half a character": write(rb'{"a": "caf\ud83d"}'),
    "link": as_link,
    "pipe": as_pipe,
}


@pytest.fixture(scope="module")
def made(tiny_model: Path, spider_folder: Path, tmp_path_factory: Any) -> Path:
    """A place with data, a model, a finished run, its checkpoint, and a cache that is full."""
    place: Path = tmp_path_factory.mktemp("made")
    shutil.copytree(tiny_model, place / "model")
    shutil.copytree(spider_folder, place / "data")
    given = settings(place / "model", place / "data", place)
    finetune.run(load(Config, [], **given | {"save_steps": 1}))
    return place


@pytest.fixture
def place(made: Path) -> Iterator[Path]:
    """The same place, whole again afterwards."""
    kept = made.parent / "kept"
    if not kept.exists():
        shutil.copytree(made, kept, symlinks=True)
    yield made
    shutil.rmtree(made)
    shutil.copytree(kept, made, symlinks=True)


def hang(*_: object) -> None:
    raise AssertionError("the job hangs")


def end(job: str, place: Path, capsys: Any, *words: str) -> tuple[int, str]:
    """Run a job as the command line does; return its exit code and what it said as an error."""
    given: dict[str, Any] = settings(place / "model", place / "data", place)
    common = {"output_name", "output_dir", "cache_dir"}
    if job == "publish":
        given = {name: given[name] for name in common}
    flags = []
    for name, value in given.items():
        if value is False:
            flags.append(f"--no-{name}")
        else:
            flags += [f"--{name}", str(value)]
    code = 0
    terminated = signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGALRM, hang)
    signal.alarm(100)
    try:
        cli.main(job, [*flags, *words])
    except SystemExit as stop:
        code = int(str(stop.code))
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGTERM, terminated)
    return code, capsys.readouterr().err


def assert_named_or_healed(found: tuple[int, str], name: str) -> None:
    code, said = found
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in said
    assert code in (0, 2)
    if code == 2:
        assert len(errors) == 1 and name in errors[0] and len(errors[0]) < 1600, said


@pytest.mark.kind(KIND)
@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", ["tables.json", "train_spider.json", "dev.json"])
def test_data_are_named(place: Path, capsys: Any, file: str, damage: str) -> None:
    DAMAGES[damage](place / "data" / file)
    shutil.rmtree(place / "out")
    code, said = end("finetune", place, capsys, "--dry_run")
    assert_named_or_healed((code, said), "data")
    if damage in ("link", "pipe"):  # a split would be made of other questions in its place
        assert code == 2 and file in said


@pytest.mark.kind(KIND)
@pytest.mark.parametrize("packed", [False, True])
def test_a_file_that_memory_would_not_hold_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packed: bool
) -> None:
    file = tmp_path / ("data.jsonl.gz" if packed else "data.jsonl")
    if packed:
        monkeypatch.setattr(files, "LARGEST", 2**20)
        file.write_bytes(gzip.compress(bytes(2**20)) * 2)
    else:
        file.touch()
        os.truncate(file, 50 * 2**30)
    with pytest.raises(DamagedFile, match=rf"{file}: (has|unpacks to) .*; divide it"):
        data.read_file(file)


@pytest.mark.kind(KIND)
@pytest.mark.parametrize("dataset_id", [5, ["a"], {"a": 1}, None])
def test_an_adapter_that_names_no_dataset_is_measured(
    tmp_path: Path, make_config: Any, dataset_id: Any
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"dataset_id": dataset_id}))
    assert scored.load_scored(make_config(), str(tmp_path)).has_splits


@pytest.mark.kind(KIND)
@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "tokenizer_config.json"])
def test_a_models_files_are_named(place: Path, capsys: Any, file: str, damage: str) -> None:
    DAMAGES[damage](place / "model" / file)
    shutil.rmtree(place / "out")
    assert_named_or_healed(end("finetune", place, capsys, "--dry_run"), "model")


@pytest.mark.kind(KIND)
@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("job", ["finetune", "publish"])
@pytest.mark.parametrize(
    "file",
    [
        *("config.json", "contract.json", "metrics.json"),
        *("adapter/contract.json", "adapter/adapter_config.json"),
        "adapter/adapter_model.safetensors",
    ],
)
def test_a_runs_files_are_named(place: Path, capsys: Any, file: str, job: str, damage: str) -> None:
    target = place / "out" / "run" / file
    if target.suffix == ".safetensors" and damage in ("without a key", "wrong types"):
        target.write_bytes(b"\x80\x04\x95" + damage.encode() * 9)  # a pickle
    else:
        DAMAGES[damage](target)
    words = ["--dry_run"] if job == "publish" else []
    code, said = end(job, place, capsys, *words)
    assert_named_or_healed((code, said), "out/run")
    if job == "publish":
        assert code == 2
        assert list(target.parent.glob("*.part")) == []


@pytest.mark.kind(KIND)
@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", ["contract.json", "adapter_config.json"])
def test_an_adapter_that_is_measured_is_named(
    place: Path, capsys: Any, file: str, damage: str
) -> None:
    adapter = place / "out" / "run" / "adapter"
    DAMAGES[damage](adapter / file)
    words = ["--output_name", "e", "--adapter", str(adapter)]
    code, said = end("evaluate", place, capsys, *words)
    assert_named_or_healed((code, said), str(adapter))
    assert code == 2 or damage == "without a key"  # PEFT has a default for the first


@pytest.mark.kind(KIND)
@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("files", ["gold_queries/*", "rows/*.json", "rows/*.parquet", "answers/*"])
def test_a_cache_is_made_again(place: Path, capsys: Any, files: str, damage: str) -> None:
    found = sorted((place / "cache").glob(files))
    assert found
    for file in found:
        if file.suffix == ".parquet" and damage in ("without a key", "wrong types"):
            file.write_bytes(file.read_bytes()[::-1])
        else:
            DAMAGES[damage](file)
    shutil.rmtree(place / "out")
    if files == "answers/*":
        shutil.copytree(place.parent / "kept" / "out", place / "out")
        words = ["--output_name", "e", "--adapter", str(place / "out" / "run" / "adapter")]
        assert end("evaluate", place, capsys, *words)[0] == 0
    else:
        assert end("finetune", place, capsys, "--dry_run")[0] == 0


@pytest.mark.kind(KIND)
@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", ["checkpoint.json", "trainer_state.json", "adapter_config.json"])
def test_a_checkpoint_that_is_damaged_is_passed_over(place: Path, file: str, damage: str) -> None:
    run = RunFolder(str(place / "out" / "run"))
    newest = Path(run.checkpoint(2).uri)
    contract, lora = run.read_contract() or {}, LoraSection(r=4, lora_alpha=8)
    DAMAGES[damage](newest / file)
    with pytest.raises(ModelError, match=rf"{newest}.*(no complete checkpoint|is damaged)"):
        starting_point(str(newest), run, contract, lora)
    if file == "checkpoint.json":
        assert [checkpoint.step for checkpoint in checkpoints.complete(run)] == [1]


@pytest.fixture
def unreadable() -> Iterator[Path]:
    """A folder of files that this process may not read, for it is another user's."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        place.chmod(0o755)
        for name in ("config.json", "data.jsonl", "p.sql"):
            (place / name).write_text("{}\n")
            (place / name).chmod(0)
        (place / "closed").mkdir(mode=0)
        user = os.geteuid()
        if not user:
            os.seteuid(65534)
        yield place
        os.seteuid(user)


READERS: dict[str, Callable[[Path], object]] = {
    "settings": lambda place: load(Config, ["--config", str(place / "config.json")]),
    "a run": lambda place: RunFolder(str(place)).read_settings(),
    "a closed run": lambda place: RunFolder(str(place / "closed")).read_settings(),
    "data": lambda place: data.read_file(place / "data.jsonl"),
    "predictions": lambda place: prediction_forms.read(place / "p.sql", 1, []),
    "a model": lambda place: models.resolve(str(place), place),
    "a folder to write to": lambda place: RunFolder(str(place / "new")).require_writable(),
    "a closed folder": lambda place: RunFolder(str(place / "closed")).require_ours(),
}


@pytest.mark.kind(KIND)
@pytest.mark.parametrize("reader", READERS)
def test_what_may_not_be_read_is_named(unreadable: Path, reader: str) -> None:
    with pytest.raises(RaySqlError, match=rf"{unreadable}.*Permission denied") as caught:
        READERS[reader](unreadable)
    assert "\n" not in str(caught.value)


@pytest.mark.kind(KIND)
@pytest.mark.parametrize("name", ["itself", "one", "other", "x" * 300])
def test_a_place_that_is_none_is_not_waited_for(tmp_path: Path, name: str) -> None:
    for link, target in (("itself", "itself"), ("one", "other"), ("other", "one")):
        (tmp_path / link).symlink_to(target)
    started = time.monotonic()
    with pytest.raises(RaySqlError, match="cannot be read"):
        RunFolder(str(tmp_path / name)).read_settings()
    assert time.monotonic() - started < storage.PATIENCE / 2


@pytest.mark.kind(KIND)
@pytest.mark.parametrize("damage", DAMAGES)
def test_predictions_are_named(place: Path, capsys: Any, damage: str) -> None:
    rows = [{"id": str(row), "predicted": "SELECT 1"} for row in range(8)]
    file = place / "p.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    DAMAGES[damage](file)
    words = ["--output_name", "e", "--predictions_file", str(file)]
    code, said = end("evaluate", place, capsys, *words)
    assert_named_or_healed((code, said), "p.jsonl")
    # lines without an id are matched by their order, and whole lines of a cut file by their id
    assert code == 2 or damage in ("without a key", "cut")
    if code == 2:
        assert not (place / "out" / "e").exists()


@pytest.mark.kind(KIND)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_file_of_settings_is_named(place: Path, capsys: Any, damage: str) -> None:
    file = place / "out" / "run" / "config.json"
    copy = shutil.copy(file, place / "saved.json")
    DAMAGES[damage](Path(copy))
    words = ["--config", str(copy), "--output_name", "other", "--dry_run"]
    code, said = end("finetune", place, capsys, *words)
    assert "Traceback" not in said and (code == 0 or "saved.json" in said)
