"""Gold queries that do not run: found before training, once for the same data."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from ray_sql.config.files import read_json
from ray_sql.config.sections import EvaluateSection
from ray_sql.data import Corpus, LeftOut
from ray_sql.database import OVER_LIMITS
from ray_sql.errors import DamagedFile, DataError
from ray_sql.evaluate import scoring
from ray_sql.store import storage

Progress = Callable[[int, int], None]


class Failing(TypedDict):
    """A gold query that does not run."""

    id: str
    database: str
    gold: str
    error: str


class Known(TypedDict):
    """Queries that never run, and those that are asked again."""

    failing: list[Failing]
    again: list[str]


@dataclass(frozen=True)
class GoldQuery:
    """The gold query of an example that has a database; `place` is the database's path or URL."""

    split: str
    id: str
    place: str
    sql: str
    where: str
    """The file and the line of the example."""

    @property
    def key(self) -> str:
        """Name the example, ids being unique in a split only."""
        return f"{self.split}\0{self.id}"

    @property
    def is_on_server(self) -> bool:
        """Tell a database on a server, whose content may change unseen, from a file."""
        return "://" in self.place


def failing(
    corpus: Corpus, evaluate: EvaluateSection, cache: Path, progress: Progress | None = None
) -> list[dict[str, Any]]:
    """Return the gold queries that do not run: id, split, where, database, gold and error.

    The result is kept under `cache` for the same data. Queries that timed out or crashed are asked
    again every time, for that may have been the machine's fault. So are queries on a server.
    Examples without a database are not among them.
    """
    queries = _queries(corpus)
    limits = evaluate.model_dump(include={"timeout", "max_rows", "max_bytes", "max_sql_length"})
    file = cache / "gold_queries" / f"{_cache_key(corpus, queries, limits)}.json"
    known = _known(file)
    todo = [
        (query.key, query.place, query.sql)
        for query in queries
        if known is None or query.is_on_server or query.key in known["again"]
    ]
    errors = scoring.failing_gold(todo, evaluate, progress)
    on_files = [row for row in errors if "://" not in row["database"]]
    again = [row for row in on_files if row["error"].startswith(("timeout", "crash"))]
    lasting = [row for row in on_files if row not in again]
    if known:
        lasting = [*map(dict, known["failing"]), *lasting]
    cached = {"failing": lasting, "again": [row["id"] for row in again]}
    storage.write_local_text(file, json.dumps(cached))
    by_key = {row["id"]: row for row in [*lasting, *errors]}
    return [
        by_key[query.key] | {"split": query.split, "id": query.id, "where": query.where}
        for query in queries
        if query.key in by_key
    ]


def _known(file: Path) -> Known | None:
    """Return what is kept of the same data; None if nothing is, or a damaged file."""
    try:
        return read_json(Known, file, "")
    except DamagedFile:
        return None


def require_scorable(
    corpus: Corpus, splits: Sequence[str], failing: Sequence[dict[str, Any]]
) -> None:
    """Raise `DataError` if scored splits have gold queries and none of them runs."""
    golds = sum(
        corpus.trial(example.db_id) is not None
        for split in splits
        for example in corpus.splits[split]
    )
    wrong = [row for row in failing if row["split"] in splits]
    if golds and len(wrong) == golds:
        raise DataError(
            f"--split {','.join(splits)}: nothing could be scored, for none of its {golds} gold "
            f"queries runs; that of {wrong[0]['id']} fails with: {wrong[0]['error']}; check the "
            "databases and the gold SQL"
        )


def not_trained(corpus: Corpus, failing: Sequence[dict[str, Any]], bad_rows: str) -> list[LeftOut]:
    """Return the training examples whose gold does not run, which are left out.

    A query that took too long or returned too much may be right. Links of the dataset's own need no
    gold. Raises `DataError` if `bad_rows` is `error`, or if nothing is left to train on.
    """
    linked = {example.id for example in corpus.splits["train"] if example.links_text}
    wrong = [
        LeftOut("train", row["id"], row["where"], f"gold does not run: {row['error']}")
        for row in failing
        if row["split"] == "train"
        and row["id"] not in linked
        and not row["error"].startswith(OVER_LIMITS)
    ]
    if bad_rows == "keep" or not wrong:
        return []
    if bad_rows == "error" or len(wrong) == len(corpus.splits["train"]):
        shown = "; ".join(f"{row.place}: {row.reason}" for row in wrong[:3])
        raise DataError(
            f"{len(wrong)} of {len(corpus.splits['train'])} training examples cannot be used: "
            f"{shown}; correct them, check the databases, or train on them with --data.bad_rows "
            "keep"
        )
    return wrong


def _queries(corpus: Corpus) -> list[GoldQuery]:
    queries = []
    for split, examples in corpus.splits.items():
        for example in examples:
            place = corpus.trial(example.db_id)
            if place:
                queries.append(GoldQuery(split, example.id, place, example.gold, example.place))
    return queries


def _cache_key(corpus: Corpus, queries: Sequence[GoldQuery], limits: Mapping[str, Any]) -> str:
    """Return 24 hex digits over questions, schemas, limits and the state of every database file."""
    files = sorted({Path(query.place) for query in queries if not query.is_on_server})
    states = [(file.name, file.stat()) for file in files if file.is_file()]
    parts = [[name, state.st_size, state.st_mtime_ns] for name, state in states]
    content = json.dumps([corpus.fingerprint(), parts, limits])
    return hashlib.sha256(content.encode()).hexdigest()[:24]
