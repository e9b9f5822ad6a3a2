"""Compare our verdicts with those of Spider's and BIRD's official evaluators, row by row.

    RAY_SQL_SHARED=… python -m benchmarks.agreement            # all rows: a minute on 2 cores
    RAY_SQL_SHARED=… python -m benchmarks.agreement --quick    # every mutation, a fifth of the rest

Ours are those of `ray-sql evaluate --predictions_file`: each column is one evaluation of a file
that holds the pairs, and its `predictions.jsonl` is compared.

The reference (`$RAY_SQL_SHARED/data/agreement/README.md`) holds 7118 (gold, predicted) pairs with
the verdicts of the official code, called unchanged, and Spider's hardness grade and links of every
dev query. Two kinds are left out, as it says: verdicts that the official code did not reach, and
those that hang on an order which SQL leaves open.

The official code calls some predictions right that are not one read-only query (`DROP TABLE` where
gold is empty). They are refused here on purpose, and listed. So are the few rows where exact set
match differs, with the official mistake that each shows. SQL in a code fence or behind words is
officially wrong; here it is taken out and scored, and these rows are listed too.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from io import StringIO
from pathlib import Path
from typing import Any

from ray_sql import evaluate
from ray_sql.config import EvaluateConfig
from ray_sql.metrics import Semantics

Row = dict[str, Any]
JUDGEMENTS: dict[str, tuple[Semantics, bool]] = {
    "spider_exec": ("spider", False),
    "spider_exec_keep_distinct": ("spider", True),
    "bird_set": ("bird", True),
    "strict_list": ("strict", True),
}
"""Column of the reference -> our semantics and `keep_distinct`."""

OFFICIAL_MISTAKES = {
    "p06043": "a second WHERE, which no database accepts; the official parser stops before it",
    "m0568": "a comment after ORDER BY: the official parser knows no comments and stops before it",
    "m0573": "a comment after a join's ON a = b; the official parser takes its words for part of b",
    "m0584": "a comment after ORDER BY, as m0568",
    "m0585": "a comment after ORDER BY, as m0568",
    "m0586": "a comment that hides the WHERE clause; the official parser reads the clause",
}
"""Rows where `exact_set_match` differs on purpose: officially right, and why they should not be."""


@dataclass(frozen=True)
class Agreement:
    """Compare one column of the reference with ours; holds the ids of rows that differ."""

    column: str
    compared: int
    agree: int
    refused: tuple[str, ...]
    differing: tuple[str, ...]
    unwrapped: tuple[str, ...] = ()
    """Officially wrong, because the SQL is in a code fence or behind words; here it is scored."""


def read(path: Path) -> list[Row]:
    """Return the objects of a JSON lines file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def settled(row: Row, column: str) -> bool:
    """Return True where the official code reached a verdict that does not hang on chance."""
    left_out = {*row.get("official_error", {}), *row.get("order_dependent", [])}
    return row[column] is not None and column not in left_out


def judged(records: Iterable[Row], spider: Path, **settings: Any) -> dict[str, Row]:
    """Return the judged rows of a predictions file by id, as `ray-sql evaluate` writes them."""
    with tempfile.TemporaryDirectory(prefix="ray_sql-agreement-") as scratch:
        file = Path(scratch) / "predictions.jsonl"
        file.write_text("".join(f"{json.dumps(record)}\n" for record in records))
        config = EvaluateConfig(
            predictions_file=str(file),
            dataset_id=str(spider),
            output_name="agreement",
            output_dir=scratch,
            cache_dir=f"{scratch}/cache",
            **settings,
        )
        with redirect_stdout(StringIO()):
            evaluate.run(config)
        rows = read(Path(scratch) / "agreement" / "predictions.jsonl")
    return {row["id"]: row for row in rows}


def judge_reference(rows: Iterable[Row], spider: Path, column: str) -> dict[str, Row]:
    """Evaluate the pairs of the reference under the semantics of one column."""
    semantics, keep_distinct = JUDGEMENTS[column]
    pairs = [{name: row[name] for name in ("id", "db_id", "gold", "predicted")} for row in rows]
    settings = {"semantics": semantics, "keep_distinct": keep_distinct}
    return judged(pairs, spider, evaluate=settings)


def judge_dev(queries: Sequence[Row], spider: Path, task: str) -> list[Row]:
    """Evaluate the gold of the dev set as its own predictions, in order."""
    records = [{"id": place, "predicted": row["query"]} for place, row in enumerate(queries)]
    return list(judged(records, spider, task_type=task).values())


def compare_execution(rows: Iterable[Row], ours: Mapping[str, Row], column: str) -> Agreement:
    """Compare the verdicts of every settled row of one column."""
    compared = [row for row in rows if settled(row, column)]
    unequal = [row for row in compared if (ours[row["id"]]["verdict"] == "correct") != row[column]]
    refused = tuple(row["id"] for row in unequal if row[column] and is_refusal(ours[row["id"]]))
    unwrapped = tuple(row["id"] for row in unequal if not row[column] and "raw" in ours[row["id"]])
    differing = tuple(row["id"] for row in unequal if row["id"] not in {*refused, *unwrapped})
    equal = len(compared) - len(unequal)
    return Agreement(column, len(compared), equal, refused, differing, unwrapped)


def compare_hardness(rows: Iterable[Row], ours: Sequence[Row]) -> Agreement:
    """Compare the grade of every dev query."""
    grades = [(row["question_id"], row["hardness"]) for row in rows]
    differing = tuple(str(place) for place, grade in grades if ours[place]["hardness"] != grade)
    return Agreement("hardness", len(grades), len(grades) - len(differing), (), differing)


def compare_links(rows: Sequence[Row], ours: Sequence[Row]) -> Agreement:
    """Compare the tables and columns of every dev query.

    Where Spider's parser is known to err, the corrected columns count.
    """
    differing = []
    for number, (row, own) in enumerate(zip(rows, ours, strict=True)):
        links = json.loads(own["gold"])
        columns = sorted(
            f"{table}.{column}".lower() for table, names in links.items() for column in names
        )
        wanted = row["columns_corrected" if row["known_parser_error"] else "columns"]
        if (sorted(table.lower() for table in links), columns) != (row["tables"], wanted):
            differing.append(str(number))
    return Agreement("links", len(rows), len(rows) - len(differing), (), tuple(differing))


def compare_exact_set(rows: Iterable[Row], ours: Mapping[str, Row]) -> Agreement:
    """Compare the judgement by clauses wherever the official code reached a verdict."""
    compared = [row for row in rows if settled(row, "exact_set_match")]
    unequal = [
        row["id"]
        for row in compared
        if ours[row["id"]]["exact_set_match"] != bool(row["exact_set_match"])
    ]
    unwrapped = tuple(name for name in unequal if "raw" in ours[name])
    differing = tuple(name for name in unequal if name not in unwrapped)
    equal = len(compared) - len(unequal)
    return Agreement("exact_set_match", len(compared), equal, (), differing, unwrapped)


def is_refusal(row: Row) -> bool:
    """Return True where the prediction was not run because it is not one read-only query."""
    return row["verdict"] == "error" and (row["error"] or "").startswith("refused")


def table(agreements: Sequence[Agreement]) -> str:
    """Return the comparison for reading, with every row that is not equal."""
    lines = [f"{'column':28}{'compared':>10}{'agree':>10}{'refused':>10}{'differing':>10}"]
    for found in agreements:
        numbers = (found.compared, found.agree, len(found.refused), len(found.differing))
        lines.append(f"{found.column:28}" + "".join(f"{number:>10}" for number in numbers))
    for found in agreements:
        lines += [f"{found.column}: refused on purpose: {row}" for row in found.refused]
        lines += [f"{found.column}: SQL in a fence, scored: {row}" for row in found.unwrapped]
        reasons = OFFICIAL_MISTAKES if found.column == "exact_set_match" else {}
        lines += [
            f"{found.column}: DIFFERS: {row}: {reasons.get(row, 'unexplained')}"
            for row in found.differing
        ]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Compare, print the table, and one JSON object as the last line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="every mutation, but one prediction in five"
    )
    quick = parser.parse_args(argv).quick
    if "RAY_SQL_SHARED" not in os.environ:
        sys.exit(
            "RAY_SQL_SHARED is not set: it names the folder that holds data/agreement and "
            "data/spider"
        )
    data = Path(os.environ["RAY_SQL_SHARED"]) / "data"
    rows = read(data / "agreement" / "execution.jsonl")
    if quick:
        rows = [row for row in rows if "kind" in row or int(row["id"][1:]) % 5 == 0]
    started = time.monotonic()
    spider = data / "spider"
    ours = {column: judge_reference(rows, spider, column) for column in JUDGEMENTS}
    agreements = [compare_execution(rows, ours[column], column) for column in JUDGEMENTS]
    agreements.append(compare_exact_set(rows, ours["spider_exec"]))
    queries = json.loads((spider / "dev.json").read_text(encoding="utf-8"))
    grades, links = (read(data / "agreement" / f"{name}.jsonl") for name in ("hardness", "links"))
    agreements.append(compare_hardness(grades, judge_dev(queries, spider, "sql")))
    agreements.append(compare_links(links, judge_dev(queries, spider, "schema")))
    print(table(agreements))
    print(
        json.dumps(
            {
                "quick": quick,
                "seconds": round(time.monotonic() - started, 1),
                **by_column(agreements),
            }
        )
    )


def by_column(agreements: Sequence[Agreement]) -> dict[str, dict[str, Any]]:
    """Return the comparison for machines."""
    return {found.column: asdict(found) for found in agreements}


if __name__ == "__main__":
    main()
