"""Files on a local disk or any storage that pyarrow knows (`s3://`, `gs://`, `hdfs://`).

Storage that fails is asked again for two minutes. A restart, or a network that stutters, must not
end a run of hours.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from ray_sql.config import files
from ray_sql.errors import DamagedFile, StoreError
from ray_sql.store.retry import retry

log = logging.getLogger(__name__)
T = TypeVar("T")

PATIENCE = 120.0
"""Seconds for which storage that fails is asked again."""
PART = ".part"
"""The end of a name under which a file is written. One that stays is of a process killed then."""
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 10.0
"""Seconds between two tries. Each pause is twice as long as the one before."""
FINAL = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS}
FINAL |= {errno.ENOENT, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG}
FINAL |= {errno.EINVAL, errno.ELOOP, errno.EFBIG}
"""Errors that another try would meet again: no room, no right, not there."""
REFUSED = (
    "is a directory",
    "ACCESS_DENIED",
    "NO_SUCH_BUCKET",
    "INVALID_ACCESS_KEY_ID",
    "SIGNATURE_DOES_NOT_MATCH",
    "UNAUTHENTICATED",
    "' not found",
    "Unable to load lib",
)
"""The same in the words of pyarrow and of object stores, whose errors have no number."""


def fetch(uri: str, target: Path) -> Path:
    """Copy a folder of storage to a local folder."""
    target.mkdir(parents=True, exist_ok=True)
    return fetch_file(uri, target)


def fetch_file(uri: str, target: Path) -> Path:
    """Copy one file of storage to a local path."""
    import pyarrow.fs as pafs

    filesystem, path = open_store(uri)
    local = pafs.LocalFileSystem()

    def copy() -> None:
        if isinstance(filesystem, pafs.LocalFileSystem):
            _require_files(Path(path))
        pafs.copy_files(
            path, str(target), source_filesystem=filesystem, destination_filesystem=local
        )

    _persist(uri, copy)
    return target


def _require_files(place: Path) -> None:
    """Raise `DamagedFile` for a pipe or device at a place or below: copying it might never end."""
    for path in (place, *place.rglob("*")):
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise DamagedFile(f"{path}: is a pipe or device, not a file; remove it")


def put_once(local: Path, uri: str) -> None:
    """Copy a large file to storage unless the same content lies there already.

    Its checksum is written beside it, and last.
    """
    record, current = f"{uri}.checksum", checksum(local)
    if read_text(record) != current:
        remove(record)
        put(local, uri)
        write_text(record, str(current))


def put(local: Path, uri: str) -> None:
    """Copy a local file or folder to storage, replacing what is there: whole or not at all."""
    remove(uri)
    try:
        _upload(local, uri)
    except StoreError:
        remove(uri)  # of a full disk: what is half-written takes the room that is wanted
        raise


def _upload(local: Path, uri: str) -> None:
    import pyarrow.fs as pafs

    filesystem, path = open_store(uri)
    source = pafs.LocalFileSystem()
    folder = path if local.is_dir() else str(Path(path).parent)

    def copy() -> None:
        filesystem.create_dir(folder, recursive=True)
        pafs.copy_files(
            str(local), path, source_filesystem=source, destination_filesystem=filesystem
        )

    _persist(uri, copy, writes=True)


def list_folder(uri: str, recursive: bool = False) -> list[Any]:
    """Return pyarrow's `FileInfo` of everything in a folder; none where there is no folder."""
    import pyarrow.fs as pafs

    filesystem, path = open_store(uri)
    inside = pafs.FileSelector(path, recursive=recursive, allow_not_found=True)
    return list(_persist(uri, lambda: filesystem.get_file_info(inside)))


def exists(uri: str) -> bool:
    """Tell whether there is a file, or a folder with anything in it."""
    import pyarrow.fs as pafs

    filesystem, path = open_store(uri)
    kind = _persist(uri, lambda: filesystem.get_file_info(path)).type
    if kind == pafs.FileType.Directory:
        return bool(list_folder(uri))
    return bool(kind == pafs.FileType.File)


def names(uri: str) -> list[str]:
    """Return the names of the files and folders in a folder; none where there is no folder."""
    return sorted(info.base_name for info in list_folder(uri))


def remove(uri: str) -> None:
    """Remove a file or folder of storage if it is there."""
    import pyarrow.fs as pafs

    filesystem, path = open_store(uri)

    def delete() -> None:
        kind = filesystem.get_file_info(path).type
        if kind == pafs.FileType.Directory:
            filesystem.delete_dir(path)
        elif kind == pafs.FileType.File:
            filesystem.delete_file(path)

    _persist(uri, delete, writes=True)


def read_text(uri: str, name: str = "") -> str | None:
    """Return the text of a file in storage; None if there is no file. `name` is for messages.

    Raises `DamagedFile` if it is not UTF-8, and `StoreError` if it cannot be read.
    """
    import pyarrow.fs as pafs

    filesystem, path = open_store(uri)

    def read_all() -> bytes:
        if isinstance(filesystem, pafs.LocalFileSystem):
            return files.read_bytes(path)
        with filesystem.open_input_file(path) as stream:
            return bytes(stream.read())

    try:
        content = _persist(name or uri, read_all)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return files.decode(content, name or uri, "restore it from a copy, or remove it")


def write_text(uri: str, text: str) -> None:
    """Write a text file to storage, whole or not at all.

    Raises `StoreError` naming the place if it is full or read-only.
    """
    import pyarrow.fs as pafs

    filesystem, path = open_store(uri)

    def write() -> None:
        if isinstance(filesystem, pafs.LocalFileSystem):
            with write_atomically(Path(path)) as part:
                part.write_bytes(text.encode("utf-8"))
            return
        # object stores show a file when it is complete
        filesystem.create_dir(str(Path(path).parent), recursive=True)
        with filesystem.open_output_stream(path) as stream:
            stream.write(text.encode("utf-8"))

    _persist(uri, write, writes=True)


@contextmanager
def write_atomically(file: Path) -> Iterator[Path]:
    """Yield a temporary name to write to, which becomes `file` if nothing was raised.

    Readers see the whole file or none, whoever else writes it at the same time, and even after a
    power cut. A file that could not be written leaves nothing.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f"{file.name}.{os.getpid()}{PART}")
    part.unlink(missing_ok=True)
    try:
        yield part
        with part.open("rb") as stream:
            os.fsync(stream.fileno())
        part.replace(file)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


@contextmanager
def write_to_cache(file: Path) -> Iterator[Path]:
    """Yield a temporary name for a file of the cache, as `write_atomically` does.

    Raises `StoreError` if it cannot be written.
    """
    try:
        with write_atomically(file) as part:
            yield part
    except OSError as error:
        raise StoreError(
            f"{file}: cannot be written ({error.strerror or error}); free space, or choose another "
            "--cache_dir"
        ) from None


def write_local_text(file: Path, text: str) -> None:
    """Write a local text file, whole or not at all. Raises `StoreError` if it cannot be written."""
    with write_to_cache(file) as part:
        part.write_text(text, encoding="utf-8")


def checksum(file: Path) -> str | None:
    """Return the BLAKE2 checksum of a local file; None if there is no file."""
    if not file.is_file():
        return None
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "blake2b").hexdigest()


def sha256(file: Path) -> str:
    """Return the SHA-256 of a local file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def absolute_uri(place: str) -> str:
    """Return a path made absolute, and a URI as it is."""
    return place if "://" in place else os.path.abspath(os.path.expanduser(place))


def open_store(uri: str) -> tuple[Any, str]:
    """Return (pyarrow filesystem, path) of an absolute path or URI.

    Raises `StoreError` for a scheme that pyarrow does not know.
    """
    import pyarrow as pa
    import pyarrow.fs as pafs

    # as patiently as any access: the network is asked for the region that a bucket's URI leaves out
    try:
        filesystem, path = _persist(uri, lambda: pafs.FileSystem.from_uri(uri))
    except (pa.ArrowInvalid, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise StoreError(f"{uri}: not a storage that can be opened ({reason})") from None
    return filesystem, path


def _persist(uri: str, access: Callable[[], T], writes: bool = False) -> T:
    """Return what `access` returns, asking storage that fails again for `PATIENCE` seconds.

    Raises `StoreError` if it fails until then, and at once if there is no room or no right. A read
    of what is not there raises that as it is.
    """
    started = time.monotonic()

    def wait(error: Exception, failures: int) -> float:
        if not isinstance(error, OSError):
            raise error
        reason = " ".join(str(error).split())
        final = error.errno in FINAL or any(words in reason for words in REFUSED)
        if not writes and isinstance(error, FileNotFoundError | NotADirectoryError):
            raise error
        pause = min(FIRST_PAUSE * 2.0 ** (failures - 1), LONGEST_PAUSE)
        if final or time.monotonic() - started + pause > PATIENCE:
            raise StoreError(_failed(uri, reason, writes, final)) from None
        if failures == 1:
            log.warning(
                "%s: storage fails (%s); asked again for up to %.0f seconds", uri, reason, PATIENCE
            )
        return pause

    return retry(access, wait)


def _failed(uri: str, reason: str, writes: bool, final: bool) -> str:
    if writes:
        return (
            f"{uri}: cannot be written ({reason}); free space, correct its rights, or choose "
            "another --output_dir"
        )
    way_out = "run the same command again when its storage answers"
    if final:
        way_out = "correct its rights, or give another place"
    return f"{uri}: cannot be read ({reason}); {way_out}"
