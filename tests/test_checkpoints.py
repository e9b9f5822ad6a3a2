"""A checkpoint is complete or absent. The best and the last two survive."""

import errno
import json
import logging
from pathlib import Path
from typing import Any

import pytest

from ray_sql.errors import StoreError
from ray_sql.store import checkpoints, storage
from ray_sql.store.checkpoints import Checkpoint
from ray_sql.store.run_folder import RunFolder


@pytest.fixture
def run_dir(tmp_path: Path) -> str:
    return str(tmp_path / "out" / "a run")  # with a space, as people name things


@pytest.fixture
def local(tmp_path: Path) -> Path:
    folder = tmp_path / "local"
    (folder / "deep").mkdir(parents=True)
    (folder / "adapter.bin").write_bytes(bytes(range(256)))
    (folder / "deep" / "state.json").write_text("{}")
    return folder


def save(
    local: Path,
    run_dir: str,
    step: int,
    objective: float | None = None,
    tie_break: float | None = None,
) -> Checkpoint:
    scores = (
        {}
        if objective is None
        else {"objective": objective, "tie_break": tie_break, "metrics": {"n": 4.0}}
    )
    return checkpoints.save(local, RunFolder(run_dir), step, scores)


def steps(run_dir: str) -> list[int]:
    return [checkpoint.step for checkpoint in checkpoints.complete(RunFolder(run_dir))]


def test_what_was_saved_comes_back_whole(local: Path, run_dir: str, tmp_path: Path) -> None:
    saved = save(local, run_dir, 10, 0.5, 0.75)
    assert checkpoints.complete(RunFolder(run_dir)) == [saved] == [checkpoints.read(saved.uri)]
    assert (saved.step, saved.objective, saved.tie_break, saved.metrics) == (
        10,
        0.5,
        0.75,
        {"n": 4.0},
    )
    fetched = storage.fetch(saved.uri, tmp_path / "fetched" / "here")
    for file in ("adapter.bin", "deep/state.json"):
        assert (fetched / file).read_bytes() == (local / file).read_bytes()


def test_checkpoints_come_by_step_and_a_run_without_any_has_none(local: Path, run_dir: str) -> None:
    assert checkpoints.complete(RunFolder(run_dir)) == []
    for step in (100, 20, 3):
        save(local, run_dir, step)
    assert steps(run_dir) == [3, 20, 100]


def test_saving_a_step_again_replaces_it(local: Path, run_dir: str) -> None:
    save(local, run_dir, 1)
    (local / "adapter.bin").write_bytes(b"new")
    (local / "deep" / "state.json").unlink()
    saved = save(local, run_dir, 1, 0.5)
    assert checkpoints.complete(RunFolder(run_dir)) == [saved]
    assert Path(saved.uri, "adapter.bin").read_bytes() == b"new"
    assert not Path(saved.uri, "deep", "state.json").exists()


def test_a_half_written_checkpoint_is_passed_over_for_the_one_before(
    local: Path, run_dir: str
) -> None:
    for step in (1, 2):
        save(local, run_dir, step)
    newest = Path(run_dir, "checkpoint-2")
    whole = {file: file.read_bytes() for file in newest.rglob("*") if file.is_file()}
    marker = newest / checkpoints.MARKER
    for file, content in whole.items():
        for damage in (content[: len(content) // 2], b"", None):
            file.unlink() if damage is None else file.write_bytes(damage)
            assert steps(run_dir) == [1], (
                f"{file.name} {'missing' if damage is None else len(damage)}"
            )
        file.write_bytes(content)
    assert steps(run_dir) == [1, 2] and marker in whole


def test_changed_bytes_are_found_in_what_was_fetched(
    local: Path, run_dir: str, tmp_path: Path
) -> None:
    saved = save(local, run_dir, 1)
    assert checkpoints.damaged(storage.fetch(saved.uri, tmp_path / "intact")) is None
    file = Path(saved.uri, "deep", "state.json")
    file.write_text("[]")
    assert checkpoints.complete(RunFolder(run_dir)) == [saved], "its size is as it was"
    fetched = storage.fetch(saved.uri, tmp_path / "changed")
    assert checkpoints.damaged(fetched) == "deep/state.json"
    (fetched / "adapter.bin").unlink()
    assert checkpoints.damaged(fetched) == "adapter.bin"
    checkpoints.set_aside(saved.uri)
    assert steps(run_dir) == [] and file.exists(), "what is left may be looked at"
    save(local, run_dir, 1)
    assert steps(run_dir) == [1] and file.read_text() == "{}"


def test_a_checkpoint_of_an_earlier_version_has_no_checksums_and_is_valid(
    local: Path, run_dir: str, tmp_path: Path
) -> None:
    saved = save(local, run_dir, 1)
    marker = Path(saved.uri, checkpoints.MARKER)
    known = json.loads(marker.read_text())
    del known["checksums"]
    marker.write_text(json.dumps(known))
    assert checkpoints.complete(RunFolder(run_dir)) == [saved]
    assert checkpoints.damaged(storage.fetch(saved.uri, tmp_path / "fetched")) is None


def test_a_damaged_marker_is_no_marker(local: Path, run_dir: str) -> None:
    saved = save(local, run_dir, 1)
    marker = Path(saved.uri, checkpoints.MARKER)
    for damage in ('{"step": 1}', "[]", b"\xff{}"):
        marker.write_bytes(damage if isinstance(damage, bytes) else damage.encode())
        assert steps(run_dir) == []


class Outage:
    """Make a storage whose every access fails in the kernel: a link that leads to itself.

    Such a link is an error for good, and here stands for one that may pass.
    """

    def __init__(self, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(storage, "FINAL", storage.FINAL - {errno.ELOOP})
        self._link, self._behind = place / "store", place / "behind"
        self._behind.mkdir()
        self._point_to(self._behind)
        self.run_dir = f"{self._link}/run"

    def _point_to(self, target: Path) -> None:
        new = self._link.with_name("new")
        new.symlink_to(target)
        new.replace(self._link)

    def begin(self) -> None:
        """Fail from now on."""
        self._point_to(self._link)

    def end(self) -> None:
        """Answer again."""
        self._point_to(self._behind)


def test_storage_that_fails_for_a_while_is_waited_for(
    local: Path, tmp_path: Path, caplog: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    outage = Outage(tmp_path, monkeypatch)
    save(local, outage.run_dir, 1)
    handler = logging.Handler()
    monkeypatch.setattr(handler, "emit", lambda _: outage.end())  # once the failure is said
    logger = logging.getLogger("ray_sql")
    monkeypatch.setattr(logger, "handlers", [*logger.handlers, handler])
    for number, access in enumerate(
        (
            lambda: save(local, outage.run_dir, 2),
            lambda: steps(outage.run_dir) == [1, 2] or pytest.fail("it has both"),
            lambda: storage.fetch(f"{outage.run_dir}/checkpoint-2", tmp_path / "fetched"),
            lambda: (
                storage.read_text(f"{outage.run_dir}/none") is None or pytest.fail("there is none")
            ),
        ),
        start=1,
    ):
        outage.begin()
        access()
        assert caplog.text.count("storage fails") == number, "said once a time"
    assert checkpoints.damaged(tmp_path / "fetched") is None


def test_storage_that_never_answers_is_named(
    local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "PATIENCE", 0.0)
    outage = Outage(tmp_path, monkeypatch)
    outage.begin()
    with pytest.raises(
        StoreError, match=r"store/run/checkpoint-1: cannot be written .*; free space"
    ):
        save(local, outage.run_dir, 1)
    with pytest.raises(
        StoreError, match=r"store/run: cannot be read .*; run the same command again"
    ):
        steps(outage.run_dir)


def test_what_is_no_checkpoint_is_no_obstacle(local: Path, run_dir: str) -> None:
    save(local, run_dir, 1)
    Path(run_dir, "checkpoint-new").mkdir()
    Path(run_dir, "config.json").write_text("{}")
    assert steps(run_dir) == [1]


def made(step: int, objective: float | None, tie_break: float | None = None) -> Checkpoint:
    return Checkpoint(f"checkpoint-{step}", step, objective, tie_break, {})


@pytest.mark.parametrize(
    ("found", "step"),
    [
        ([made(1, 0.2), made(2, 0.9), made(3, 0.5)], 2),
        ([made(1, 0.5, 0.9), made(2, 0.5, 0.1)], 1),
        ([made(1, 0.5, 0.9), made(2, 0.5, 0.9), made(3, 0.4, 1.0)], 2),
        ([made(1, None), made(2, None)], 2),
        ([made(1, 0.0), made(2, None)], 1),
    ],
)
def test_the_best_has_the_highest_objective_then_tie_break_then_step(
    found: list[Checkpoint], step: int
) -> None:
    best = checkpoints.best(reversed(found))
    assert best and best.step == step


def test_no_checkpoint_is_the_best_of_none() -> None:
    assert checkpoints.best([]) is None


def test_pruning_keeps_the_best_the_last_and_the_one_before_it(local: Path, run_dir: str) -> None:
    for step, objective in ((1, 0.1), (2, 0.7), (3, 0.7), (4, 0.2), (5, 0.6), (6, 0.5)):
        save(local, run_dir, step, objective)
    checkpoints.prune(RunFolder(run_dir))
    assert steps(run_dir) == [3, 5, 6]
    assert not Path(run_dir, "checkpoint-1").exists()


def test_pruning_keeps_the_last_two_where_nothing_was_measured(local: Path, run_dir: str) -> None:
    checkpoints.prune(RunFolder(run_dir))
    for step in (1, 2, 3):
        save(local, run_dir, step)
    checkpoints.prune(RunFolder(run_dir))
    assert steps(run_dir) == [2, 3]


def test_pruning_removes_what_is_half_written_or_set_aside_but_not_what_is_being_saved(
    local: Path, run_dir: str
) -> None:
    for step in (1, 2, 3, 4, 5):
        save(local, run_dir, step)
    checkpoints.set_aside(f"{run_dir}/checkpoint-2")
    for step in (3, 5):  # cut off, and still on its way
        Path(run_dir, f"checkpoint-{step}", checkpoints.MARKER).unlink()
    Path(run_dir, "checkpoint-notes").mkdir()
    checkpoints.prune(RunFolder(run_dir))
    assert sorted(path.name for path in Path(run_dir).iterdir()) == [
        "checkpoint-1",
        "checkpoint-4",
        "checkpoint-5",
        "checkpoint-notes",
    ]


def test_texts_files_and_folders_are_put_read_and_removed(
    local: Path, run_dir: str, tmp_path: Path
) -> None:
    assert storage.read_text(f"{run_dir}/a.json") is None and not storage.exists(run_dir)
    storage.write_text(f"{run_dir}/a.json", "é\n")
    assert storage.read_text(f"{run_dir}/a.json") == "é\n" and storage.exists(run_dir)
    storage.put(local, f"{run_dir}/adapter")
    storage.put(local / "adapter.bin", f"{run_dir}/inputs/one.bin")
    target = storage.fetch_file(f"{run_dir}/inputs/one.bin", tmp_path / "one.bin")
    assert target.read_bytes() == (local / "adapter.bin").read_bytes()
    storage.put(local / "deep", f"{run_dir}/adapter")
    assert [file.name for file in Path(run_dir, "adapter").iterdir()] == ["state.json"]
    storage.remove(f"{run_dir}/adapter")
    storage.remove(f"{run_dir}/adapter")
    assert not storage.exists(f"{run_dir}/adapter")


def test_what_lies_there_already_is_not_put_again_unless_it_has_changed(
    run_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, uri, written = tmp_path / "shop.sqlite", f"{run_dir}/inputs/shop.sqlite", []
    put = storage.put
    monkeypatch.setattr(storage, "put", lambda local, to: (written.append(to), put(local, to)))
    for content, times in ((b"1 row ", 1), (b"1 row ", 1), (b"2 rows", 2)):
        source.write_bytes(content)
        storage.put_once(source, uri)
        assert storage.fetch_file(uri, tmp_path / "copy").read_bytes() == content
        assert len(written) == times


def test_a_place_that_cannot_be_written_is_named_at_once_with_the_way_out(
    local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    place = str(tmp_path / "file" / "run")
    monkeypatch.setattr(storage.time, "sleep", lambda _: pytest.fail("waiting makes no room"))
    for write in (
        lambda: storage.write_text(f"{place}/config.json", "{}"),
        lambda: storage.put(local, f"{place}/adapter"),
        lambda: save(local, place, 1),
    ):
        with pytest.raises(StoreError) as caught:
            write()
        assert str(caught.value).startswith(f"{place}/") and "\n" not in str(caught.value)
        assert "free space" in str(caught.value) and "or choose another" in str(caught.value)


def test_a_scheme_that_no_storage_has_is_refused() -> None:
    with pytest.raises(StoreError, match=r"^carrier-pigeon://x: not a storage"):
        storage.open_store("carrier-pigeon://x")


def test_paths_become_absolute_and_uris_stay(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert storage.absolute_uri("out/x") == str(tmp_path / "out" / "x")
    assert storage.absolute_uri("s3://bucket/x") == "s3://bucket/x"


def test_a_marker_says_what_a_reader_needs(local: Path, run_dir: str) -> None:
    saved = save(local, run_dir, 7, 0.5, 0.25)
    marker = json.loads(Path(saved.uri, checkpoints.MARKER).read_text())
    assert (
        marker["files"] == {"adapter.bin": 256, "deep/state.json": 2}
        and marker["checksums"].keys() == marker["files"].keys()
    )
    assert (marker["step"], marker["objective"], marker["tie_break"]) == (7, 0.5, 0.25)
