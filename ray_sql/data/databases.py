"""Find databases as people have them: one file, files in a folder, a folder each, or a server."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

from ray_sql.config import absolute
from ray_sql.errors import DataError

SUFFIXES = (".sqlite", ".db", ".sqlite3", ".duckdb")
"""Endings of databases' files; where one database has several, the first is taken."""

FILE_URLS = ("sqlite:///", "duckdb:///")
"""Beginnings of a URL of a file."""

LAYOUTS = (
    "give a file (.sqlite, .db, .sqlite3, .duckdb), a folder of such files, a folder with a folder "
    "each (shop/shop.sqlite), or a URL"
)


def find(where: str) -> dict[str, str]:
    """Return db_id → database file of what `data.databases` names, which is no URL.

    Raises `DataError` where nothing is there, or no database is in it.
    """
    place = absolute(where)
    if place.exists() and not place.is_dir():
        return {place.stem: str(place)}
    if not place.exists():
        raise DataError(f"--data.databases {where}: no such file or folder; {LAYOUTS}")
    found = within(place)
    if not found:
        raise DataError(f"--data.databases {where}: holds no database; {LAYOUTS}")
    return found


def within(folder: Path) -> dict[str, str]:
    """Return db_id → file of the databases that lie in a folder, or in folders of their own.

    Pipes and the like count too: whoever opens one in a database's place names it.
    """
    found: dict[str, str] = {}
    if not folder.is_dir():
        return found
    for path in visible(folder):
        file = _own_file(path) if path.is_dir() else path
        if file is not None and file.suffix.lower() in SUFFIXES and file.exists():
            name = path.name if path.is_dir() else path.stem
            known = found.get(name)
            if known is None or _rank(file) < _rank(Path(known)):
                found[name] = str(file)
    return found


def visible(folder: Path) -> list[Path]:
    """Return what lies in a folder, without the hidden files that macOS and others add.

    Raises `DataError` if it cannot be listed.
    """
    try:
        names = sorted(folder.iterdir())
    except OSError as error:
        raise DataError(
            f"{folder}: cannot be listed ({error.strerror}); give a file or a folder that may be "
            "read"
        ) from None
    return [path for path in names if not path.name.startswith(".") and path.name != "__MACOSX"]


def _rank(file: Path) -> int:
    return SUFFIXES.index(file.suffix.lower())


def _own_file(folder: Path) -> Path | None:
    """Return the database of a folder: the file of the folder's name, or its only one."""
    files = [folder / f"{folder.name}{suffix}" for suffix in SUFFIXES]
    named = next((file for file in files if file.exists()), None)
    if named is not None:
        return named
    others = [path for path in visible(folder) if path.suffix.lower() in SUFFIXES]
    return others[0] if len(others) == 1 else None


def on_server(url: str, db_ids: Iterable[str]) -> dict[str, str]:
    """Return db_id → URL; the URL's own database where there are no ids."""
    named = sorted({db_id for db_id in db_ids if db_id})
    if url.startswith(FILE_URLS):
        return {db_id: _file(url.replace("{db_id}", db_id)) for db_id in named}
    return {db_id: url.replace("{db_id}", quote(db_id, safe="")) for db_id in named}


def _file(url: str) -> str:
    """Return the file that a URL names, as it is called or else with what is encoded in it."""
    literal = url.partition(":///")[2]
    if absolute(literal).is_file():
        return str(absolute(literal))
    return str(absolute(unquote(literal.partition("?")[0])))


def called(name: str, known: Iterable[str]) -> str:
    """Return the database that is meant by a name, which is the name itself where it is known.

    It may be a file's name or path, or differ in case. Its letters may be composed in another way:
    a file from macOS writes é as two.
    """
    names = tuple(known)
    if name in names:
        return name
    alike = [one for one in names if _plain(one) == _plain(name)]
    return alike[0] if len(alike) == 1 else name


@cache
def _plain(name: str) -> str:
    plain = unicodedata.normalize("NFC", re.split(r"[/\\]", name)[-1]).casefold()
    ending = next((suffix for suffix in SUFFIXES if plain.endswith(suffix)), "")
    return plain.removesuffix(ending)


def only_name(url: str) -> str | None:
    """Return the name of the one database that a URL leads to; None for one of several."""
    if "{db_id}" in url:
        return None
    if url.startswith(FILE_URLS):
        return Path(_file(url)).stem
    return Path(urlsplit(url).path).stem or urlsplit(url).hostname or "database"
