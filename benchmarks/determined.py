"""Give scores with all golds, without those an audit flags, and without the undetermined ones.

    ray-sql audit --dataset_id … --split dev --output_name golds
    python -m benchmarks.determined --audit out/golds/audit.json out/demo out/stages-cut-full …

A place is a run's folder or a file of judged rows, such as `benchmarks.candidates --rows` writes.
Rows with several ways to choose an answer have a line for each. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ray_sql.curate import UNDETERMINED
from ray_sql.display import percent
from ray_sql.evaluate.audit import Flagged, flags_of, read_flagged
from ray_sql.evaluate.shares import interval
from ray_sql.metrics.judged import is_right
from ray_sql.report.scores import WAYS


def main(argv: list[str] | None = None) -> None:
    """Print a table, then the same as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("places", nargs="+", type=Path, help="folders of runs, or files of rows")
    parser.add_argument("--audit", required=True, help="audit.json of the golds of their questions")
    arguments = parser.parse_args(argv)
    flagged = read_flagged(arguments.audit)
    found = {
        f"{place}{name}": scores(marks)
        for place in arguments.places
        for name, marks in ways(rows_of(place), flagged).items()
    }
    print("| predictions | n | all | not flagged | determined |")
    print("|---|---|---|---|---|")
    for name, columns in found.items():
        cells = [f"{one['score']}, n = {one['n']}" for one in columns.values()]
        print(f"| {name} | {' | '.join(cells)} |")
    print(json.dumps(found))


def rows_of(place: Path) -> list[dict[str, Any]]:
    """Return judged rows, without those whose gold cannot be executed."""
    file = place / "predictions.jsonl" if place.is_dir() else place
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return [row for row in rows if row["verdict"] != "gold_error"]


def ways(
    rows: Sequence[dict[str, Any]], flagged: Flagged
) -> dict[str, list[tuple[bool, Sequence[str]]]]:
    """Return by way of answering, for each question, whether it is right and its gold's flags."""
    flags = [flags_of(row, flagged) for row in rows]
    answers = {
        f", {WAYS[way]}": [row["ways"][way]["right"] for row in rows]
        for way in rows[0].get("ways", ())
    } or {"": [is_right(row) for row in rows]}
    return {name: list(zip(right, flags, strict=True)) for name, right in answers.items()}


def scores(marks: Sequence[tuple[bool, Sequence[str]]]) -> dict[str, dict[str, Any]]:
    """Return the share of right answers over all questions, and over the two parts of them."""
    parts = {
        "all": [right for right, _ in marks],
        "not_flagged": [right for right, flags in marks if not flags],
        "determined": [right for right, flags in marks if not set(UNDETERMINED) & set(flags)],
    }
    return {name: share(part) for name, part in parts.items()}


def share(part: Sequence[bool]) -> dict[str, Any]:
    """Return the share of right answers with its interval, as text and as counts."""
    right, n = sum(part), len(part)
    return {"right": right, "n": n, "score": percent(right / n, interval(right, n), n)}


if __name__ == "__main__":
    main()
