"""Find what is planted, count false alarms, and count open golds of a public set.

    python -m benchmarks.curation            # minutes: the demo, and Spider's dev if it is there
    python -m benchmarks.curation --quick    # every fault, and a tenth of the rest

The last line is one JSON object. `planted` has found and all by kind. `demo` has the flags of golds
that were written to be sound. With RAY_SQL_SHARED set, `spider_dev` counts by kind the golds of
Spider's dev split that are flagged; which ones they are is not printed.
"""

from __future__ import annotations

import argparse
import json
import os
import sqlite3
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ray_sql.config.sections import DataSection
from ray_sql.curate import UNDETERMINED, Subject, bench, examine_all, near, pairs
from ray_sql.data.columns import Source
from ray_sql.data.corpus import Example, sample
from ray_sql.database import Executor, reflect
from ray_sql.display import Display

SEED = 14
QUICK = 0.1
"""Share of the golds that are judged with --quick."""

STORE = """
CREATE TABLE item (id INTEGER PRIMARY KEY, name TEXT, price REAL, size TEXT, shelf TEXT, age INT);
CREATE TABLE note (item_id INTEGER REFERENCES item (id), word TEXT COLLATE NOCASE);
CREATE INDEX by_shelf ON item (shelf);
INSERT INTO item VALUES
  (1, 'lamp', 0.1, '9', 'a', 3), (2, 'desk', 1e16, '10', 'b', 5), (3, 'chair', 0.7, '100', 'a', 5),
  (4, 'sofa', -1e16, '20', 'b', NULL), (5, 'stool', 0.3, '8', 'c', 2);
INSERT INTO note VALUES (1, 'Red'), (2, 'red'), (3, 'blue');
CREATE TABLE spare (id INTEGER);
CREATE TABLE code (k TEXT PRIMARY KEY, v INTEGER) WITHOUT ROWID;
INSERT INTO code VALUES ('x', 1), ('y', 2);
CREATE TABLE part (id INTEGER PRIMARY KEY, length TEXT);
INSERT INTO part VALUES (1, '9'), (2, '10'), (3, 'null'), (4, NULL);
CREATE VIEW red AS SELECT item_id FROM note WHERE word = 'red';
"""

PLANTED = {
    "SELECT nam FROM item": "does_not_run",
    "DELETE FROM item": "does_not_run",
    "SELECT name FROM item WHERE age > 90": "empty",
    "SELECT max(id) FROM spare": "empty",
    "SELECT count(*) FROM item WHERE name = 'Lamp'": "constant",
    "SELECT 42": "constant",
    "SELECT name FROM item WHERE age IS NOT NULL ORDER BY age DESC LIMIT 1": "limit_tie",
    "SELECT shelf FROM item GROUP BY shelf ORDER BY count(*) DESC LIMIT 1": "limit_tie",
    "SELECT name FROM item WHERE id = (SELECT id FROM item ORDER BY age DESC LIMIT 1)": "limit_tie",
    "SELECT name FROM item WHERE shelf = (SELECT shelf FROM item GROUP BY shelf "
    "ORDER BY count(*) DESC LIMIT 1)": "limit_tie",
    "SELECT name FROM item LIMIT 2": "limit_tie",
    "SELECT shelf, name FROM item GROUP BY shelf": "row_order",
    "SELECT word, item_id FROM note GROUP BY word ORDER BY count(*) DESC LIMIT 1": "row_order",
    "SELECT group_concat(name) FROM item": "row_order",
    "SELECT name, shelf FROM item ORDER BY shelf": "tie_order",
    "SELECT sum(price) FROM item WHERE id IN (1, 3, 5)": "float_sum",
    "SELECT name FROM item ORDER BY age LIMIT 1": "nulls_first",
    "SELECT name, age FROM item ORDER BY age, name": "nulls_first",
    "SELECT name FROM item ORDER BY size": "text_numbers",
    "SELECT max(size) FROM item": "text_numbers",
    "SELECT name FROM item WHERE size > 9": "text_numbers",
    "SELECT id FROM part WHERE length > 9": "text_numbers",
    "SELECT id FROM part WHERE length IS NOT NULL ORDER BY length DESC LIMIT 1": "text_numbers",
    "SELECT name FROM item WHERE '2020-01-01' < date('now')": "clock",
    "SELECT name FROM item ORDER BY random()": "clock",
    "SELECT name, shelf, name FROM item": "duplicate_columns",
}


ALIKE = [
    ("How many lamps are there?", "SELECT count(*) FROM item WHERE name = 'lamp'"),
    ("How many desks do we have?", "SELECT count(*) FROM item WHERE name = 'desk'"),
    ("List all items.", "SELECT name FROM item"),
    ("Please show me the items", "SELECT item.name FROM item"),
]
"""Pairs of which each is near to one other."""


def planted_faults() -> dict[str, list[int]]:
    """Return kind → [found, planted]."""
    found: dict[str, list[int]] = {}
    with tempfile.TemporaryDirectory(prefix="ray_sql-") as scratch:
        store = Path(scratch) / "store.sqlite"
        connection = sqlite3.connect(store)
        connection.executescript(STORE)
        connection.close()
        schema = reflect(store, "store")
        with Executor() as executor, bench(executor, [store], lambda done, total: None) as tried:
            subjects = [Subject(store, sql, schema) for sql in PLANTED]
            flagged = examine_all(tried, subjects)
    for kind, flags in zip(PLANTED.values(), flagged, strict=True):
        counts = found.setdefault(kind, [0, 0])
        counts[0] += kind in [flag.kind for flag in flags]
        counts[1] += 1
    alike = [Example(str(n), "store", q, sql) for n, (q, sql) in enumerate(ALIKE)]
    groups = near.groups(alike, {})
    found["near_duplicate"] = [sum(groups.count(group) == 2 for group in groups), len(ALIKE)]
    known = set(near.hash_lines(alike).splitlines())
    lower = [Example(one.id, "", one.question.upper(), one.gold) for one in alike]
    public = [any(key in known for key in near.hashes(one)) for one in lower]
    found["public"] = [sum(public), len(public)]
    return found


def judged(
    dataset_id: str, splits: Sequence[str], share: float, display: Display
) -> dict[str, Any]:
    """Return counts of a dataset's golds by kind of flag."""
    cache = Path("~/.cache/ray_sql").expanduser()
    corpus = pairs.read(Source(dataset_id, "sql", DataSection(), cache, None))
    examples = [one for split in splits or corpus.splits for one in corpus.splits[split]]
    examples = list(sample(examples, round(share * len(examples)), SEED))
    usable = [one for one in examples if corpus.executable(one.db_id)]
    places = [corpus.executable(one.db_id) or "" for one in usable]
    subjects = [
        Subject(place, one.gold, corpus.schemas[one.db_id])
        for one, place in zip(usable, places, strict=True)
    ]
    counter = display.counter(f"judging {Path(dataset_id).name}")
    with Executor() as executor, bench(executor, places, lambda done, total: None) as tried:
        flagged = examine_all(tried, subjects, counter)
    kinds = Counter(flag.kind for flags in flagged for flag in flags)
    is_open = sum(any(flag.kind in UNDETERMINED for flag in flags) for flags in flagged)
    return {
        "n": len(usable),
        "flagged": sum(map(bool, flagged)),
        "undetermined": is_open,
        "by_kind": dict(kinds.most_common()),
    }


def main() -> None:
    """Print what was found, for people and then as JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tenth of the golds: a minute")
    share = QUICK if parser.parse_args().quick else 1.0
    shared = os.environ.get("RAY_SQL_SHARED")
    with Display() as display:
        result: dict[str, Any] = {"planted": planted_faults()}
        for kind, (found, all_) in result["planted"].items():
            display.line(f"{kind:<20} {found} of {all_}")
        result["demo"] = judged("demo", (), share, display)
        if shared:
            spider = str(Path(shared) / "data" / "spider")
            result["spider_dev"] = judged(spider, ("dev",), share, display)
        for name in ("demo", "spider_dev"):
            if name in result:
                display.line(f"{name:<20} {result[name]}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
