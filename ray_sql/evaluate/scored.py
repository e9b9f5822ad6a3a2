"""Load the questions that an evaluation scores."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ray_sql import data
from ray_sql.config import Config
from ray_sql.data import Corpus
from ray_sql.errors import DataError
from ray_sql.store import storage
from ray_sql.store.run_folder import AdapterFolder


def load_scored(config: Config, adapter: str | None = None) -> Corpus:
    """Return the corpus of `config.split`.

    All of one file without splits is scored. Where `data.test_fraction` is given, as by the
    settings of a run, only the part that training set aside is. So it is where the adapter may have
    been trained on the rest.

    Raises `DataError` where there is no question to score.
    """
    is_given = "test_fraction" in config.data.model_fields_set
    undivided = not is_given and not (adapter and _may_have_seen(adapter, config.dataset_id))
    corpus = data.load_split(config, config.split, undivided=undivided)
    count = sum(len(corpus.splits[split]) for split in config.split)
    if not count:
        raise DataError(
            f"--split {','.join(config.split)}: there is no question to score in --dataset_id "
            f"{config.dataset_id}; leave data.test_fraction out to score all of one file"
        )
    if corpus.has_splits:
        return corpus
    part = "the part that training sets aside (data.test_fraction)"
    if undivided or "train" in config.split:
        part = "all of it"
    note = f"{config.dataset_id} has no splits: {part}, {count} questions, is scored"
    return replace(corpus, notes=(*corpus.notes, note))


def _may_have_seen(adapter: str, dataset_id: str) -> bool:
    """Tell whether an adapter was trained on a dataset of this name, or does not say on which."""
    settings = AdapterFolder(storage.absolute_uri(adapter)).read_settings() or {}
    trained_on = settings.get("dataset_id")
    if not isinstance(trained_on, str):
        return True
    return Path(trained_on).name == Path(dataset_id).name
