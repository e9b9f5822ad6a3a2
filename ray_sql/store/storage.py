"""Files on a local disk or any storage pyarrow knows (`s3://`, `gs://`, `hdfs://`).

Storage that fails is asked again for two minutes: one that is restarted, or a network that stutters, must not end a run of hours.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from ray_sql.errors import StoreError

log = logging.getLogger(__name__)
T = TypeVar("T")

PATIENCE = 120.0
"""Seconds for which storage that fails is asked again."""
FINAL = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS}
FINAL |= {errno.ENOENT, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.EINVAL}
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
"""The same in the words of pyarrow and of object stores, where errors have no number."""


def fetch(uri: str, target: Path) -> Path:
    """Copy a folder of storage to a local folder."""
    target.mkdir(parents=True, exist_ok=True)
    return fetch_file(uri, target)


def fetch_file(uri: str, target: Path) -> Path:
    """Copy one file of storage to a local path."""
    import pyarrow.fs as pafs

    filesystem, path = open_store(uri)
    local = pafs.LocalFileSystem()
    _persist(
        uri,
        lambda: pafs.copy_files(
            path, str(target), source_filesystem=filesystem, destination_filesystem=local
        ),
    )
    return target


def put_once(local: Path, uri: str) -> None:
    """`put` a large file, unless it lies there already as it is; its checksum is written beside it, and last."""
    record, found = f"{uri}.checksum", checksum(local)
    if read_text(record) != found:
        remove(record)
        put(local, uri)
        write_text(record, str(found))


def put(local: Path, uri: str) -> None:
    """Copy a local file or folder to storage, replacing what is there."""
    remove(uri)
    upload(local, uri)


def upload(local: Path, uri: str) -> None:
    import pyarrow.fs as pafs

    filesystem, path = open_store(uri)

    def copy() -> None:
        filesystem.create_dir(path if local.is_dir() else str(Path(path).parent), recursive=True)
        pafs.copy_files(
            str(local),
            path,
            source_filesystem=pafs.LocalFileSystem(),
            destination_filesystem=filesystem,
        )

    _persist(uri, copy, writes=True)


def list_folder(uri: str, recursive: bool = False) -> list[Any]:
    """What pyarrow knows of everything in a folder; nothing where it is not there."""
    import pyarrow.fs as pafs

    filesystem, path = open_store(uri)
    inside = pafs.FileSelector(path, recursive=recursive, allow_not_found=True)
    return list(_persist(uri, lambda: filesystem.get_file_info(inside)))


def exists(uri: str) -> bool:
    """Whether there is a file, or a folder with anything in it."""
    import pyarrow.fs as pafs

    filesystem, path = open_store(uri)
    kind = _persist(uri, lambda: filesystem.get_file_info(path)).type
    return (
        bool(list_folder(uri))
        if kind == pafs.FileType.Directory
        else bool(kind == pafs.FileType.File)
    )


def names(uri: str) -> list[str]:
    """The names of the files and folders in a folder; none where it is not there."""
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


def read_text(uri: str) -> str | None:
    """The text of a file in storage, or None if it is not there."""
    filesystem, path = open_store(uri)

    def read_all() -> str:
        with filesystem.open_input_file(path) as stream:
            return bytes(stream.read()).decode("utf-8")

    try:
        return _persist(uri, read_all)
    except (FileNotFoundError, NotADirectoryError):
        return None


def write_text(uri: str, text: str) -> None:
    """Write a text file to storage, complete or not at all; `StoreError` names the place if it is full or read-only."""
    import pyarrow.fs as pafs

    filesystem, path = open_store(uri)
    local = isinstance(
        filesystem, pafs.LocalFileSystem
    )  # object stores show a file when it is complete
    half = f"{path}.{os.getpid()}.part" if local else path

    def write() -> None:
        filesystem.create_dir(str(Path(path).parent), recursive=True)
        with filesystem.open_output_stream(half) as stream:
            stream.write(text.encode("utf-8"))
        if local:
            os.replace(half, path)

    _persist(uri, write, writes=True)


def _persist(uri: str, access: Callable[[], T], writes: bool = False) -> T:
    """What `access` returns. Storage that fails is asked again, less and less often, for `PATIENCE` seconds.

    Raises `StoreError` where it fails until then, and where it `writes`, at once if there is no room or no right; what cannot be read
    for such a reason raises what it raises.
    """
    started, pause = time.monotonic(), 0.5
    while True:
        try:
            return access()
        except OSError as error:
            reason = " ".join(str(error).split())
            final = error.errno in FINAL or any(said in reason for said in REFUSED)
            if final and not writes:
                raise
            if final or time.monotonic() - started + pause > PATIENCE:
                raise StoreError(
                    f"{uri}: cannot be written ({reason}); free space, correct its rights, or choose another --output_dir"
                    if writes
                    else f"{uri}: cannot be read ({reason}); run the same command again when its storage answers"
                ) from None
        if pause == 0.5:
            log.warning(
                "%s: storage fails (%s); asked again for up to %.0f seconds", uri, reason, PATIENCE
            )
        time.sleep(pause)
        pause = min(2 * pause, 10.0)


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


def checksum(file: Path) -> str | None:
    if not file.is_file():
        return None
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "blake2b").hexdigest()


def open_store(uri: str) -> tuple[Any, str]:
    """(pyarrow filesystem, path) of an absolute path or URI; `StoreError` for a scheme it does not know."""
    import pyarrow as pa
    import pyarrow.fs as pafs

    try:  # as patiently as any access: of a bucket without a region in its URI, the network is asked for it
        filesystem, path = _persist(uri, lambda: pafs.FileSystem.from_uri(uri))
    except (pa.ArrowInvalid, OSError) as error:
        raise StoreError(
            f"{uri}: not a storage that can be opened ({' '.join(str(error).split())[:200]})"
        ) from None
    return filesystem, path
