"""A curated dataset's folder: every file that `ray-sql prepare` writes, named in this one place.

    out/<output_name>/
      train.jsonl dev.jsonl      pairs by split, each with what the audit says of it
      databases/<db_id>/         copies of the SQLite and DuckDB files
      descriptions.yaml          tables and columns in words, filled by hand
      rejected.jsonl             pairs that are not used: place, reason, nearest fix
      audit.json report.html     what was found, for programs and for people
      dataset.json               sources, counts, fingerprint, settings; written last

A new file of a dataset is a name and a method here.
"""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray_sql.config.files import read_json
from ray_sql.database.places import sqlite_uri
from ray_sql.errors import DamagedFile, DataError, StoreError
from ray_sql.store.storage import PART, write_atomically

MADE_BY = "ray-sql prepare"
_DATASET = "dataset.json"
_AGAIN = "prepare the dataset again"


@dataclass(frozen=True)
class DatasetFolder:
    """The folder of a curated dataset, on this machine."""

    path: Path

    @property
    def report(self) -> Path:
        """The place of the page about the dataset."""
        return self.path / "report.html"

    @property
    def rejected(self) -> Path:
        """The place of the pairs that are not used."""
        return self.path / "rejected.jsonl"

    @property
    def audit(self) -> Path:
        """The place of the audit's findings."""
        return self.path / "audit.json"

    @property
    def descriptions(self) -> Path:
        """The place of the descriptions, which people fill."""
        return self.path / "descriptions.yaml"

    def split(self, name: str) -> Path:
        """Return the place of a split's pairs."""
        return self.path / f"{name}.jsonl"

    def database(self, db_id: str, suffix: str = ".sqlite") -> Path:
        """Return the place of a database's copy."""
        return self.path / "databases" / db_id / f"{db_id}{suffix}"

    def read_record(self) -> dict[str, Any] | None:
        """Return `dataset.json`; None where the folder is no curated dataset."""
        try:
            record = read_json(dict[str, Any], self.path / _DATASET, _AGAIN)
        except DamagedFile:
            return None
        return record if record.get("made_by") == MADE_BY else None

    def require_ours(self, sources: Mapping[str, Any], overwrite: bool) -> None:
        """Raise `StoreError` for a folder that holds anything but a dataset of these sources.

        With `overwrite`, a dataset of other sources may be there.
        """
        if not self.path.exists() or (self.path.is_dir() and not self._contents()):
            return
        record = self.read_record()
        if record is None:
            raise StoreError(
                f"{self.path}: exists, and is no dataset of ray-sql prepare (no {_DATASET} of it); "
                "choose another --output_name"
            )
        before = record.get("sources")
        if before != dict(sources) and not overwrite:
            raise StoreError(
                f"{self.path} holds a dataset of other sources ({_listed(before)}); choose another "
                "--output_name, or replace it with --overwrite"
            )

    def _contents(self) -> list[Path]:
        """Return what is here, but for the beginning of a file whose writer was killed."""
        return [path for path in self.path.iterdir() if path.suffix != PART]

    def begin(self, sources: Mapping[str, Any], splits: Iterable[str]) -> None:
        """Mark the folder as one that is being written; whoever reads it is told.

        The splits of an earlier dataset go, whatever they were called.
        """
        before = (self.read_record() or {}).get("splits", [])
        known = list(dict.fromkeys([*before, *splits, "train", "dev"]))
        self.write_record({"sources": dict(sources), "finished": False, "splits": known})
        for file in self.path.glob("*.jsonl"):
            if file.stem in known:
                file.unlink()
        shutil.rmtree(self.path / "databases", ignore_errors=True)

    def write_record(self, record: Mapping[str, Any]) -> None:
        """Write `dataset.json`."""
        self._write(self.path / _DATASET, _json({"made_by": MADE_BY, **record}))

    def write_lines(self, file: Path, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write rows into a file of the folder, one JSON object a line."""
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        self._write(file, "".join(lines))

    def write_audit(self, found: Mapping[str, Any]) -> None:
        """Write `audit.json`."""
        self._write(self.audit, _json(found))

    def write_report(self, page: str) -> None:
        """Write `report.html`."""
        self._write(self.report, page)

    def offer_descriptions(self, template: str) -> None:
        """Write `descriptions.yaml` to be filled; one that is there stays as it is."""
        if not self.descriptions.exists():
            self._write(self.descriptions, template)

    def copy_database(self, db_id: str, source: Path) -> None:
        """Copy a database's file in one state of it, whoever writes it meanwhile.

        Raises `DataError` where it cannot be read whole.
        """
        uri = sqlite_uri(source)
        if uri is None:
            self._copy_file(source, self.database(db_id, ".duckdb"))
            return
        try:
            with (
                write_atomically(self.database(db_id)) as part,
                closing(sqlite3.connect(uri, uri=True)) as old,
                closing(sqlite3.connect(part)) as new,
            ):
                old.backup(new)
                new.execute("PRAGMA journal_mode = DELETE")
        except sqlite3.Error as error:
            raise DataError(f"{source}: cannot be copied ({error}); give a whole file") from None

    def _copy_file(self, source: Path, target: Path) -> None:
        """Copy a file, of which only one program may have changes that are not in it."""
        before = source.stat()
        with write_atomically(target) as part:
            shutil.copyfile(source, part)
        after = source.stat()
        if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
            raise DataError(f"{source}: changed while it was copied; give the command again")

    def _write(self, file: Path, text: str) -> None:
        with write_atomically(file) as part:
            part.write_text(text, encoding="utf-8")


def server_of(folder: Path) -> str | None:
    """Return the URL of the server that a curated dataset's databases lie on, if they do.

    Raises `DataError` for a dataset that was not written to its end.
    """
    record = DatasetFolder(folder).read_record()
    if record is None:
        return None
    if not record.get("finished"):
        raise DataError(
            f"{folder}: was not written to its end; give the same prepare command again"
        )
    url = record.get("server")
    return url if isinstance(url, str) else None


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def _listed(sources: Any) -> str:
    values = sources.values() if isinstance(sources, dict) else []
    return ", ".join(str(value) for value in values if value) or "unknown"
