"""Measure how fast predictions are judged, and the cost of runaway queries.

    python -m benchmarks.scoring_speed            # 5 rounds, about 5 minutes on 2 cores
    python -m benchmarks.scoring_speed --quick    # 1 round, about a minute

The pairs are made here from the demo's databases and questions, always the same ones. `gold` judges
every gold query against itself, `mutated` against a changed copy of it (a condition dropped, a
number moved, a name misspelt, ...). `runaway` is `mutated` with 1 % of its predictions replaced by
queries that would never end or fill the memory. They are judged under Spider's semantics with
`--seconds` a query.

A round takes every set with one process and with two, in an order drawn anew, each with a new
executor, so that nothing is remembered from one measurement to the next. Figures are medians over
the rounds. The exit code is 1 if a runaway query was not stopped, or later than its limit and the
grace allow. The last line is one JSON object.
"""

import argparse
import json
import os
import platform
import random
import re
import sqlite3
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from statistics import median
from typing import Any

from ray_sql import data
from ray_sql.config import Config, load
from ray_sql.database import Executor, Limits
from ray_sql.database.pool import GRACE_SECONDS
from ray_sql.metrics import Pair, Verdict, judge

PROCESSES = (1, 2)
RUNAWAY_SHARE = 0.01
SLACK_SECONDS = 2.0
"""What starting a process anew and a busy machine may add to limit and grace."""

RUNAWAYS = (
    "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n",
    "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n LIMIT 3000) SELECT count(*) "
    "FROM n a, n b, n c",
    "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT i, randomblob(1000) "
    "FROM n ORDER BY 2",
    "WITH RECURSIVE n(s) AS (SELECT 'a' UNION ALL SELECT s || s FROM n) SELECT max(length(s)) FROM "
    "n",
    # No step of SQLite's machine ends here for minutes: only killing the process stops it.
    "SELECT hex(zeroblob(10000000)) LIKE '%' || hex(zeroblob(12000)) || '1'",
)
MUTATIONS: tuple[tuple[str, str], ...] = (
    (r"\bWHERE\b.*?(?=\b(GROUP|ORDER|LIMIT|UNION|INTERSECT|EXCEPT)\b|\)|$)", ""),
    (r"\b\d+\b", "0"),
    (r"\bDESC\b", "ASC"),
    (r"\bCOUNT\(\*\)", "MAX(1)"),
    (r"\b(AVG|SUM)\(", "MIN("),
    (r"\bDISTINCT\b", ""),
    (r"\bLIMIT \d+", ""),
    (r" > ", " <= "),
    (r" = ", " <> "),
    (r"^SELECT (?!\w+\()\w+", "SELECT no_such_column"),
    (r"\bFROM \w+", "FROM no_such_table"),
    (r"^SELECT ", "SELECT 1, "),
    (r"\)", ""),
    (r"^SELECT ", "SELECT  "),  # another text, the same result
)


@dataclass(frozen=True)
class Measurement:
    """Hold a set judged once: wall seconds, verdicts, and the longest time of a pair."""

    seconds: float
    verdicts: tuple[Verdict, ...]
    longest: float


def demo_pairs(cache: str) -> list[Pair]:
    """Return every question of the demo, its gold query judged against itself."""
    config = load(
        Config,
        [],
        model_name="demo",
        output_name="x",
        task_type="sql",
        dataset_id="demo",
        cache_dir=cache,
    )
    corpus = data.load_split(config, ("train", "seen", "unseen"))
    examples = [example for split in corpus.splits.values() for example in split]
    return [Pair(Path(corpus.databases[one.db_id]), one.gold, one.gold) for one in examples]


def mutated(pairs: Sequence[Pair], chance: random.Random) -> list[Pair]:
    """Return the same pairs, each prediction changed in one way that its text allows."""
    return [Pair(pair.database, pair.gold, mutate(pair.gold, chance)) for pair in pairs]


def mutate(sql: str, chance: random.Random) -> str:
    """Change a query once, by a draw among the changes that change its text."""
    ways = [re.sub(old, new, sql, count=1, flags=re.IGNORECASE) for old, new in MUTATIONS]
    return chance.choice([way for way in ways if way != sql])


def with_runaways(pairs: Sequence[Pair], chance: random.Random) -> list[Pair]:
    """Return the same pairs with 1 % of the predictions replaced."""
    changed = list(pairs)
    for number, place in enumerate(
        chance.sample(range(len(pairs)), round(len(pairs) * RUNAWAY_SHARE))
    ):
        # The comment makes each a query of its own, so that none is answered from memory.
        runaway = f"{RUNAWAYS[number % len(RUNAWAYS)]} -- {number}"
        changed[place] = Pair(pairs[place].database, pairs[place].gold, runaway)
    return changed


def measure(pairs: Sequence[Pair], processes: int, limits: Limits) -> Measurement:
    """Judge a set with a new executor."""

    def timed(pair: Pair) -> tuple[Verdict, float]:
        started = time.monotonic()
        return judge(executor, pair, semantics="spider"), time.monotonic() - started

    started = time.monotonic()
    with Executor(processes, limits) as executor:
        judged = executor.map(timed, pairs)
    verdicts = tuple(verdict for verdict, _ in judged)
    return Measurement(time.monotonic() - started, verdicts, max(seconds for _, seconds in judged))


def not_stopped(pairs: Sequence[Pair], measurement: Measurement, latest: float) -> list[str]:
    """List runaway queries that no limit ended, and pairs that took longer than limits allow."""
    runaway = [place for place, pair in enumerate(pairs) if pair.predicted.startswith(RUNAWAYS)]
    ended = [(pairs[place].predicted, measurement.verdicts[place]) for place in runaway]
    found = [
        f"{sql}: {verdict.verdict}, {verdict.error}"
        for sql, verdict in ended
        if not by_a_limit(verdict)
    ]
    if measurement.longest > latest:
        found.append(
            f"a pair took {measurement.longest:.2f} s; limit and grace allow {latest:.2f} s"
        )
    return found


def by_a_limit(verdict: Verdict) -> bool:
    """Return True where a query was ended from outside."""
    return verdict.verdict == "timeout" or (verdict.error or "").startswith("too large")


def summary(pairs: Sequence[Pair], runs: dict[int, list[Measurement]]) -> dict[str, Any]:
    """Return one set's figures for machines."""
    per_minute = {
        n: round(median(60 * len(pairs) / run.seconds for run in each)) for n, each in runs.items()
    }
    ratios = [one.seconds / two.seconds for one, two in zip(runs[1], runs[2], strict=True)]
    return {
        "pairs": len(pairs),
        "runaways": sum(pair.predicted.startswith(RUNAWAYS) for pair in pairs),
        "verdicts": dict(Counter(verdict.verdict for verdict in runs[1][0].verdicts)),
        "pairs_per_minute": {str(n): rate for n, rate in per_minute.items()},
        "two_over_one": round(median(ratios), 2),
        "longest_pair_seconds": round(
            max(run.longest for each in runs.values() for run in each), 2
        ),
    }


def table(sets: dict[str, dict[str, Any]]) -> str:
    """Return the figures for reading."""
    lines = [
        f"{'set':10}{'pairs':>8}{'1 process':>12}{'2 processes':>14}{'ratio':>8}{'longest s':>12}"
    ]
    for name, found in sets.items():
        rates = found["pairs_per_minute"]
        lines.append(
            f"{name:10}{found['pairs']:>8}{rates['1']:>12}{rates['2']:>14}"
            f"{found['two_over_one']:>8}{found['longest_pair_seconds']:>12}"
        )
    return "\n".join([*lines, "(pairs judged per minute)"])


def machine() -> dict[str, Any]:
    """Return where the figures were taken, and how busy that machine was."""
    return {
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "sqlite": sqlite3.sqlite_version,
    }


def main(argv: Sequence[str] | None = None, say: Callable[[str], None] = print) -> None:
    """Measure, print the table, and one JSON object as the last line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one round")
    parser.add_argument("--seconds", type=float, default=1.0, help="limit of one query")
    arguments = parser.parse_args(argv)
    limits = Limits(seconds=arguments.seconds)
    latest = limits.seconds + GRACE_SECONDS + SLACK_SECONDS
    started, load_before = time.monotonic(), machine()["load"]
    with tempfile.TemporaryDirectory() as cache:
        gold = demo_pairs(cache)
        changed = mutated(gold, random.Random(14))
        sets = {
            "gold": gold,
            "mutated": changed,
            "runaway": with_runaways(changed, random.Random(14)),
        }
        runs: dict[str, dict[int, list[Measurement]]] = {
            name: {n: [] for n in PROCESSES} for name in sets
        }
        order, chance = [(name, n) for name in sets for n in PROCESSES], random.Random()
        for _ in range(1 if arguments.quick else 5):
            for name, n in chance.sample(order, len(order)):
                runs[name][n].append(measure(sets[name], n, limits))
    problems = []
    for name, pairs in sets.items():
        for run in chain.from_iterable(runs[name].values()):
            problems += not_stopped(pairs, run, latest)
    found = {name: summary(pairs, runs[name]) for name, pairs in sets.items()}
    say("\n".join([table(found), *problems]))
    result = {
        "quick": arguments.quick,
        "limit_seconds": limits.seconds,
        "latest_seconds": latest,
        **found,
    }
    seconds = round(time.monotonic() - started, 1)
    say(
        json.dumps(
            {
                **result,
                **machine(),
                "load_before": load_before,
                "problems": problems,
                "seconds": seconds,
            }
        )
    )
    if problems:
        sys.exit(1)


if __name__ == "__main__":
    main()
