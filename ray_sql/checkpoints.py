"""Checkpoints and other files of a run, on a local disk or any storage pyarrow knows (`s3://`, `gs://`, `hdfs://`).

A checkpoint is complete or absent: its files are copied first, and `checkpoint.json` with their sizes last. Whatever lacks it, or does
not match it, is passed over, so that a run falls back to the checkpoint before. Ray Train's own checkpoint manager is not
used because it keeps nothing in local mode, and because a run must be readable without the state of the driver that made it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray_sql.errors import StoreError

MARKER = "checkpoint.json"


@dataclass(frozen=True)
class Checkpoint:
    """One complete checkpoint. `objective` and `tie_break` order checkpoints, higher is better; None where not measured."""

    uri: str
    step: int
    objective: float | None
    tie_break: float | None
    metrics: dict[str, float]

    @property
    def rank(self) -> tuple[float, float, int]:
        """Sorts the best last: by objective, then by tie-break, then the later one."""
        worst = float("-inf")
        return (
            worst if self.objective is None else self.objective,
            worst if self.tie_break is None else self.tie_break,
            self.step,
        )


def save(local: Path, run_dir: str, step: int, scores: Mapping[str, Any]) -> Checkpoint:
    """Copy the files of `local` to `<run_dir>/checkpoint-<step>`; `scores` has objective, tie_break and metrics, or nothing yet."""
    uri = f"{run_dir}/checkpoint-{step}"
    remove(uri)
    files = {str(file.relative_to(local)): file.stat().st_size for file in sorted(local.rglob("*")) if file.is_file()}
    _upload(local, uri)
    marker: dict[str, Any] = {"step": step, "files": files, "objective": None, "tie_break": None, "metrics": {}} | dict(
        scores
    )
    write_text(f"{uri}/{MARKER}", json.dumps(marker, indent=1))
    return Checkpoint(uri, step, marker["objective"], marker["tie_break"], marker["metrics"])


def score(uri: str, scores: Mapping[str, Any]) -> None:
    """Add to a complete checkpoint what it was measured at: objective, tie_break and metrics."""
    marker = json.loads(read_text(f"{uri}/{MARKER}") or "")
    write_text(f"{uri}/{MARKER}", json.dumps(marker | dict(scores), indent=1))


def complete(run_dir: str) -> list[Checkpoint]:
    """All complete checkpoints of a run, by step."""
    import pyarrow.fs as pafs

    filesystem, path = open_store(run_dir)
    folders = filesystem.get_file_info(pafs.FileSelector(path, allow_not_found=True))
    uris = (f"{run_dir}/{info.base_name}" for info in folders if info.base_name.startswith("checkpoint-"))
    return sorted((found for uri in uris if (found := read(uri))), key=lambda checkpoint: checkpoint.step)


def read(uri: str) -> Checkpoint | None:
    """The checkpoint at `uri`, or None if it is incomplete: no whole marker, or a file missing or of another size than it says."""
    import pyarrow.fs as pafs

    try:
        marker = json.loads(read_text(f"{uri}/{MARKER}") or "")
    except json.JSONDecodeError:  # none, or one that was cut off while it was written
        return None
    filesystem, path = open_store(uri)
    infos = filesystem.get_file_info(pafs.FileSelector(path, recursive=True))
    sizes = {info.path.removeprefix(path).lstrip("/"): info.size for info in infos if info.is_file}
    if any(sizes.get(name) != size for name, size in marker["files"].items()):
        return None
    return Checkpoint(uri, marker["step"], marker["objective"], marker["tie_break"], marker["metrics"])


def best(checkpoints: Iterable[Checkpoint]) -> Checkpoint | None:
    """The checkpoint with the highest measured objective; the last one where none was measured."""
    return max(checkpoints, key=lambda checkpoint: checkpoint.rank, default=None)


def prune(run_dir: str) -> None:
    """Remove all complete checkpoints but the best and the last."""
    found = complete(run_dir)
    top = best(found)
    for checkpoint in found[:-1]:
        if top is None or checkpoint.step != top.step:
            remove(checkpoint.uri)


def fetch(uri: str, target: Path) -> Path:
    """Copy a folder of storage to a local folder."""
    import pyarrow.fs as pafs

    filesystem, path = open_store(uri)
    target.mkdir(parents=True, exist_ok=True)
    pafs.copy_files(path, str(target), source_filesystem=filesystem, destination_filesystem=pafs.LocalFileSystem())
    return target


def fetch_file(uri: str, target: Path) -> Path:
    """Copy one file of storage to a local path."""
    import pyarrow.fs as pafs

    filesystem, path = open_store(uri)
    pafs.copy_files(path, str(target), source_filesystem=filesystem, destination_filesystem=pafs.LocalFileSystem())
    return target


def put(local: Path, uri: str) -> None:
    """Copy a local file or folder to storage, replacing what is there."""
    remove(uri)
    _upload(local, uri)


def _upload(local: Path, uri: str) -> None:
    import pyarrow.fs as pafs

    filesystem, path = open_store(uri)
    with _writing(uri):
        filesystem.create_dir(path if local.is_dir() else str(Path(path).parent), recursive=True)
        pafs.copy_files(str(local), path, source_filesystem=pafs.LocalFileSystem(), destination_filesystem=filesystem)


def exists(uri: str) -> bool:
    """Whether there is a file, or a folder with anything in it."""
    import pyarrow.fs as pafs

    filesystem, path = open_store(uri)
    if filesystem.get_file_info(path).type == pafs.FileType.Directory:
        return bool(filesystem.get_file_info(pafs.FileSelector(path)))
    return bool(filesystem.get_file_info(path).type == pafs.FileType.File)


def remove(uri: str) -> None:
    """Remove a file or folder of storage if it is there."""
    import pyarrow.fs as pafs

    filesystem, path = open_store(uri)
    info = filesystem.get_file_info(path)
    if info.type == pafs.FileType.Directory:
        filesystem.delete_dir(path)
    elif info.type == pafs.FileType.File:
        filesystem.delete_file(path)


def read_text(uri: str) -> str | None:
    """The text of a file in storage, or None if it is not there."""
    filesystem, path = open_store(uri)
    try:
        with filesystem.open_input_file(path) as stream:
            return bytes(stream.read()).decode("utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return None


def write_text(uri: str, text: str) -> None:
    """Write a text file to storage, complete or not at all; `StoreError` names the place if it is full or read-only."""
    import pyarrow.fs as pafs

    filesystem, path = open_store(uri)
    local = isinstance(filesystem, pafs.LocalFileSystem)  # object stores show a file when it is complete
    half = f"{path}.{os.getpid()}.part" if local else path
    with _writing(uri):
        filesystem.create_dir(str(Path(path).parent), recursive=True)
        with filesystem.open_output_stream(half) as stream:
            stream.write(text.encode("utf-8"))
        if local:
            os.replace(half, path)


@contextmanager
def _writing(uri: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = " ".join(str(error).split())
        raise StoreError(
            f"{uri}: cannot be written ({reason}); free space, correct its rights, or choose another --output_dir"
        ) from None


def absolute_uri(place: str) -> str:
    """A path made absolute; a URI as it is."""
    return place if "://" in place else os.path.abspath(os.path.expanduser(place))


def write_whole(file: Path, text: str) -> None:
    """Write a local file complete or not at all, whoever else writes it at the same time."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        half = file.with_suffix(f".{os.getpid()}.part")
        half.write_text(text, encoding="utf-8")
        half.replace(file)
    except OSError as error:
        raise StoreError(
            f"{file}: cannot be written ({error.strerror}); free space, or choose another --cache_dir"
        ) from None


def open_store(uri: str) -> tuple[Any, str]:
    """(pyarrow filesystem, path) of an absolute path or URI; `StoreError` for a scheme it does not know."""
    import pyarrow as pa
    import pyarrow.fs as pafs

    try:
        filesystem, path = pafs.FileSystem.from_uri(uri)
    except (pa.ArrowInvalid, OSError) as error:
        raise StoreError(f"{uri}: not a storage that can be opened ({' '.join(str(error).split())[:200]})") from None
    return filesystem, path
