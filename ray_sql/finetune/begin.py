"""One line to begin: pairs and a database become a dataset, and the settings of a run on it.

    ray-sql finetune pairs.csv shop.db

The settings are chosen by the number of pairs. They are written as a file of settings beside the
dataset, and whatever the command line says wins over them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from ray_sql.config import Config, PrepareConfig, absolute, load
from ray_sql.curate import prepare
from ray_sql.curate.choices import as_yaml, choose
from ray_sql.data.databases import SUFFIXES
from ray_sql.errors import ConfigError
from ray_sql.store.storage import write_local_text

FILE = "finetune.yaml"
OF_PAIRS = {"data.columns"} | (PrepareConfig.model_fields.keys() - Config.model_fields.keys())
"""Settings that say how the raw pairs are read and judged."""


def begin(words: Sequence[str]) -> list[str]:
    """Prepare the dataset that a command line begins with; return the command line of its run.

    Raises `ConfigError` for words that are no pairs and database, and what `prepare` raises.
    """
    count = next((n for n, word in enumerate(words) if word.startswith("-")), len(words))
    given, flags = list(words[:count]), list(words[count:])
    databases = [word for word in given if _is_database(word)]
    pairs = [word for word in given if word not in databases]
    if len(pairs) != 1 or len(databases) > 1:
        raise ConfigError(
            f"{' '.join(given)}: give one file of pairs, and the database that they are about, as "
            "in `ray-sql finetune pairs.csv shop.db`"
        )
    own = ["--pairs", pairs[0], *(["--url", databases[0]] if databases else [])]
    asked = load(PrepareConfig, [*own, *flags])
    name = asked.output_name
    if "output_name" not in asked.model_fields_set:
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(pairs[0]).stem).strip("-._") or "run"
    # a dry run needs the dataset, but leaves nothing in the place for runs
    place = str(asked.cache / "dry_run") if asked.dry_run else asked.output_dir
    changes = {"output_name": f"{name}-data", "output_dir": place, "dry_run": False}
    if asked.dry_run:
        changes["overwrite"] = True
    record = prepare(asked.changed(changes), goes_on=True)
    folder = absolute(place) / f"{name}-data"
    said = {flag.removeprefix("--").partition("=")[0] for flag in flags if flag.startswith("--")}
    chosen = choose(record["counts"].get("train", 0), record["splits"], name, folder)
    choices = [choice for choice in chosen if choice[0] not in said]
    for setting, value, why in choices:
        print(f"chosen    {setting} {value}: {why}")
    file = folder / FILE
    write_local_text(file, as_yaml(choices))
    print(f"          all of it is in {file}; flags win over it")
    return ["--config", str(file), *_of_run(flags)]


def _of_run(flags: Sequence[str]) -> list[str]:
    """Leave out flags about the raw pairs: the dataset that is made of them has its own columns."""
    kept: list[str] = []
    is_kept = True
    for word in flags:
        if word.startswith("-"):
            name = word.partition("=")[0].removeprefix("--").removeprefix("no-")
            is_kept = name not in OF_PAIRS
        if is_kept:
            kept.append(word)
    return kept


def _is_database(word: str) -> bool:
    return "://" in word or word.lower().endswith(SUFFIXES) or _holds_databases(Path(word))


def _holds_databases(folder: Path) -> bool:
    if not folder.is_dir():
        return False
    return any(path.suffix.lower() in SUFFIXES for path in [*folder.iterdir(), *folder.glob("*/*")])
