"""Find the question files, tables files and databases of a place, in the layouts people have.

Known are one file, and any folder of files named by split. So are Spider's folder and those of its
followers: SParC, CoSQL, Spider-DK, -Syn, -Realistic, KaggleDBQA. So are BIRD's, its mini-dev, and
the Hub's. A folder that holds nothing but another one is looked into.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ray_sql.config import absolute
from ray_sql.data import databases, formats
from ray_sql.data.corpus import join_some
from ray_sql.data.databases import visible
from ray_sql.errors import DataError

SPLITS = ("train", "dev", "test")

NO_QUESTIONS = re.compile(
    r"(?:.*_)?tables|dataset(?:_infos?|_dict)?|state|config|audit|rejected|README|package", re.I
)
"""Names of files that lie beside questions and hold none."""

LONGEST_NAME = 100
"""Bytes of a split's name, for files that are named after it."""
_NO_FILE = re.compile(
    r'[.\s].*|.*[.\s]|.*[\\/:*?"<>|].*|'
    r"(?:con|prn|aux|nul|conin\$|conout\$|(?:com|lpt)[\d¹²³])\s*(?:\..*)?",
    re.I,
)
"""Names that some system hides, reserves or cannot write; Windows reserves `con.x`, too."""
_NO_FLAG = re.compile(r"-.*|.*[,\[\]{}].*|true|false|null", re.I)
"""Names that --split reads otherwise."""

_TOKENS = {"train": "train", "fewshot": "train", "dev": "dev", "validation": "dev", "test": "test"}
_DIALECTS = ("sqlite", "postgresql", "mysql")
_SHARD = re.compile(r"-\d{5}-of-\d{5}$")
_QUESTION_FOLDERS = ("examples", "sql_state_tracking", "data")
"""Folders of questions in published datasets: KaggleDBQA's, CoSQL's, and the Hub's."""

Splits = dict[str, list[Path]]


@dataclass(frozen=True)
class Layout:
    """The files of a dataset by split ("" where one file is not split yet), and what goes along."""

    files: Splits
    tables: list[Path]
    """Files like tables.json; of two entries for a database the first counts."""
    databases: dict[str, str]
    notes: list[str]


def find(place: Path, dialect: str) -> Layout:
    """Return the layout of a file or a folder; `dialect` chooses among files that differ by it.

    Raises `DataError` where no question file is recognised.
    """
    if not place.is_dir():
        return _layout({"": [place]}, [place.parent], [])
    folder, notes = _descend(place), list[str]()
    if folder != place:
        notes.append(f"the questions lie in {folder}")
    files = _bird(folder)
    if files:
        return _layout(files, [path.parent for paths in files.values() for path in paths], notes)
    places = [folder, *_question_folders(folder)]
    named = [path for where in places for path in _question_files(where)]
    files = _by_stem(named)
    if any(map(_tables, places)):
        published = {split: paths for split, paths in files.items() if split in SPLITS}
        files = published or _by_token(named, dialect, notes)
    files = files or _by_folder(folder)
    if not files:
        there = ", ".join(sorted(path.name for path in visible(folder))[:8]) or "nothing"
        raise DataError(
            f"--dataset_id {place}: the folder is in no known form; expected files of questions by "
            f"split (train.json, dev.json, or *.jsonl, *.csv, …), Spider's (tables.json, "
            f"train_spider.json, dev.json, database/) or BIRD's (dev.json, dev_tables.json, "
            f"dev_databases/); found {there}"
        )
    return _layout(files, places, notes)


def _layout(files: Splits, places: Iterable[Path], notes: list[str]) -> Layout:
    tables, found = list[Path](), dict[str, str]()
    for place in dict.fromkeys(places):
        tables += _tables(place)
        found = _databases(place, notes) | found
    return Layout(files, tables, found, notes)


def _question_files(folder: Path) -> list[Path]:
    """Return the files of a folder that may hold questions.

    Pipes, and links to nowhere, count too: whoever reads one names it.
    """
    return [
        path
        for path in visible(folder)
        if not path.is_dir()
        and formats.form(path)
        and not NO_QUESTIONS.fullmatch(formats.stem(path))
    ]


def _tables(folder: Path) -> list[Path]:
    """Return tables.json and files like it, the plain name first."""
    found = [path for path in visible(folder) if re.fullmatch(r"(.*_)?tables\.json", path.name)]
    return sorted(found, key=lambda path: (path.name != "tables.json", path.name))


def tables_beside(where: str) -> list[Path]:
    """Return the tables files that lie beside the databases of `data.databases`."""
    place = absolute(where)
    return _tables(place.parent) if where and "://" not in where and place.is_dir() else []


def _databases(folder: Path, notes: list[str]) -> dict[str, str]:
    """Return the databases of the folders of databases in a folder, or those flat in itself."""
    names = re.compile(r"databases?|.*_databases?|sqlite_dbs?")
    found: dict[str, str] = {}
    for path in visible(folder):
        if path.is_dir() and names.fullmatch(path.name):
            found = databases.within(path) | found
    if found:
        return found
    # MLflow's own store lies in the folder where people work
    beside = {
        path.stem: str(path)
        for path in visible(folder)
        if path.is_file() and path.suffix.lower() in databases.SUFFIXES and path.name != "mlflow.db"
    }
    if beside:
        notes.append(f"databases beside the questions: {', '.join(sorted(beside))}")
    return beside


def _descend(place: Path) -> Path:
    """Return the folder with the files, where those above it hold nothing but one folder."""
    folder = place
    while not _question_files(folder):
        inside = visible(folder)
        if len(inside) != 1 or not inside[0].is_dir() or inside[0].name in _QUESTION_FOLDERS:
            break
        folder = inside[0]
    return folder


def _question_folders(folder: Path) -> list[Path]:
    """Return the folder below that has the questions, where they lie in one."""
    if _question_files(folder):
        return []
    inside = [path for path in visible(folder) if path.is_dir() and _question_files(path)]
    known = [path for path in inside if path.name in _QUESTION_FOLDERS]
    return known[:1] or (inside if len(inside) == 1 and inside[0].name not in SPLITS else [])


def _bird(folder: Path) -> Splits:
    """Return BIRD's question files: each split has a tables file beside it, in one folder or two.

    A folder with Spider's tables.json is none.
    """
    files: Splits = {}
    if (folder / "tables.json").is_file():
        return files
    for split in ("train", "dev"):
        for path in [folder / f"{split}.json", *sorted(folder.glob(f"{split}*/{split}.json"))]:
            is_there = path.exists() or path.is_symlink()
            if is_there and list(path.parent.glob("*_tables.json")):
                files.setdefault(split, [path])
    return files


def _by_stem(paths: Iterable[Path]) -> Splits:
    """Return the files by their names; Spider's two files of training questions are one split."""
    files: Splits = {}
    for path in paths:
        split = _SHARD.sub("", formats.stem(path))
        files.setdefault(split, []).append(path)
    for split, found in files.items():
        if len({formats.stem(path) for path in found}) < len(found):
            raise DataError(
                f"{found[0].parent}: {' and '.join(path.name for path in found)} are both split "
                f"{split}; keep one of them"
            )
    spider = [path for name in ("train_spider", "train_others") for path in files.pop(name, [])]
    if spider:
        files = {"train": spider} | {
            split: found for split, found in files.items() if split != "train"
        }
    return files


def is_file_name(name: str) -> bool:
    """Tell whether a file or a folder can have a name on every system."""
    is_short = 0 < len(name.encode()) <= LONGEST_NAME
    return is_short and name.isprintable() and not _NO_FILE.fullmatch(name)


def is_found_again(split: str) -> bool:
    """Tell whether a file named after a split is read as that split, and --split can name it."""
    if not is_file_name(split) or _NO_FLAG.fullmatch(split):
        return False
    named = _by_stem([Path(f"{split}.jsonl")])
    return list(named) == [split] and not NO_QUESTIONS.fullmatch(split)


def alike(split: str, splits: Iterable[str]) -> str:
    """Return another split whose name is the same on some systems; "" where there is none."""
    folded = _folded(split)
    return next((one for one in splits if one != split and _folded(one) == folded), "")


def how_unlike(one: str, other: str) -> str:
    """Say in what alone two names differ that are `alike`."""
    composed = [unicodedata.normalize("NFC", name) for name in (one, other)]
    return "in case alone" if len(set(composed)) > 1 else "in how its letters are composed alone"


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def no_such_split(split: str, flag: str, splits: Iterable[str]) -> DataError:
    """Return the error for a split that a dataset, named by its flag, does not have."""
    names = list(splits)
    meant = alike(split, names)
    hint = f"; {meant} differs {how_unlike(split, meant)}: give --split {meant}" if meant else ""
    return DataError(f"--split {split}: {flag} has no such split; it has {join_some(names)}{hint}")


def _by_token(paths: Iterable[Path], dialect: str, notes: list[str]) -> Splits:
    """Return the files of a published dataset by the word for a split in their names.

    Left aside are copies without values, files that others divide, and those of other dialects. A
    dataset without any such word is for evaluation.
    """
    files: Splits = {}
    by_stem = {formats.stem(path): path for path in paths}
    unsplit = []
    for stem, path in by_stem.items():
        words = re.split(r"[-_.]", stem.lower())
        divided = any(f"{stem}_{part}" in by_stem for part in ("fewshot", "test"))
        if "value" in words or divided:
            continue
        others = [word for word in words if word in _DIALECTS and word != dialect]
        if others and stem.replace(others[0], dialect) in by_stem:
            continue
        target = next((_TOKENS[word] for word in reversed(words) if word in _TOKENS), None)
        if target is None:
            unsplit.append(path)
        else:
            files.setdefault(target, []).append(path)
    if not files and unsplit:
        files = {"dev": unsplit}
    for split, found in files.items():
        notes.append(f"{split}: {', '.join(path.name for path in found)}")
    return files


def _by_folder(folder: Path) -> Splits:
    """Return the files of folders that are called after a split."""
    return {
        path.name: files
        for path in visible(folder)
        if path.is_dir()
        and path.name in (*SPLITS, "validation")
        and (files := _question_files(path))
    }
