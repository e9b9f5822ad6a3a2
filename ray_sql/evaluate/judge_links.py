"""Judge schema links by comparing names with those of the gold SQL, and summarise a split."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from ray_sql.config.sections import AnswersSection
from ray_sql.data import linking
from ray_sql.database import Executor, Schema, complete
from ray_sql.evaluate.judge_sql import Progress
from ray_sql.evaluate.shares import (
    clustered,
    error_counts,
    gold_counts,
    interval,
    resampled,
    share,
    without_gold_errors,
)
from ray_sql.metrics import PRF, Counts, LinkingScore, score_links, spare_names, summarise_links
from ray_sql.metrics.judged import HARDNESS, JudgedRow, grouped, is_right


def parse(text: str) -> str | None:
    """Return the links in an answer as JSON text; None where there are none to read."""
    links = linking.parse_links(text)
    return None if links is None else json.dumps(links)


def read(value: Any, where: str) -> str | None:
    """Return the links of a predictions file, JSON or text, as JSON text; None as for `parse`."""
    return parse(value if isinstance(value, str) else json.dumps(value))


def judge(
    rows: Sequence[JudgedRow],
    databases: Sequence[str | None],
    schemas: Mapping[str, Schema],
    settings: AnswersSection,
    progress: Progress | None = None,
    shared: Executor | None = None,
) -> list[JudgedRow]:
    """Add the verdict and the link counts of each row; nothing is executed."""
    return [row | _verdict_fields(row, schemas.get(row["db_id"])) for row in rows]


def _verdict_fields(row: JudgedRow, schema: Schema | None) -> dict[str, Any]:
    if not row["gold"]:
        return {
            "verdict": "gold_error",
            "error": "the gold SQL cannot be linked to the schema",
            "error_kind": "gold error",
        }
    predicted = json.loads(row["predicted"]) if row["predicted"] is not None else None
    names = {table.name: table.column_names for table in schema.tables} if schema else None
    gold = json.loads(row["gold"])
    score = score_links(gold, predicted, names)
    fields: dict[str, Any] = {"linking": asdict(score)}
    if schema and names and predicted is not None:
        fields["linking_completed"] = asdict(score_links(gold, complete(predicted, schema)))
        fields["spare"] = asdict(spare_names(gold, predicted, names))
    verdict, error, kind = "wrong", None, "missing names"
    if not score.parsed:
        verdict, error, kind = "error", "no JSON object of tables and columns", "unparsable"
    elif score.exact:
        verdict, kind = "correct", "none"
    elif score.strict_recall:
        kind = "extra names"
    return {"verdict": verdict, "error": error, "error_kind": kind, **fields}


def summarise(rows: Sequence[JudgedRow], settings: AnswersSection) -> dict[str, Any]:
    """Return the scores of one split as plain JSON values, in all, by hardness and by database."""
    counted = without_gold_errors(rows)
    by_hardness = grouped(counted, "hardness", HARDNESS)
    by_database = grouped(counted, "db_id")
    return {
        **_recall(counted),
        **_name_scores(counted),
        **_completed_scores(counted),
        **gold_counts(rows),
        "by_hardness": {level: _recall(group) for level, group in by_hardness.items()},
        "by_database": {db_id: _recall(group) for db_id, group in by_database.items()},
        "errors": error_counts(counted),
    }


def _recall(rows: Sequence[JudgedRow]) -> dict[str, Any]:
    """Return the shares of questions with all of gold, and with gold exactly."""
    recalled, n = sum(map(is_right, rows)), len(rows)
    exact = sum(row["verdict"] == "correct" for row in rows)
    return {
        "strict_recall": share(recalled, n),
        "interval": interval(recalled, n),
        "n": n,
        "exact_match": share(exact, n),
        "exact_match_interval": interval(exact, n),
    }


def _name_scores(rows: Sequence[JudgedRow]) -> dict[str, Any]:
    """Return precision, recall and F1 of tables and columns, and the questions that go astray."""
    if not rows:
        return {"table_f1": 0.0, "column_f1": 0.0, "unparsable": 0.0}
    scores = [_linking_score(row) for row in rows]
    total, n = summarise_links(scores), len(scores)
    tables, columns = [score.tables for score in scores], [score.columns for score in scores]
    shares = {
        "table_strict_recall": sum(score.table_strict_recall for score in scores),
        "questions_hallucinating": total.questions_hallucinating,
        "unparsable": total.unparsable,
    }
    return {
        **clustered(rows, [score.strict_recall for score in scores]),
        **{name: share(part, n) for name, part in shares.items()},
        **{f"{name}_interval": interval(part, n) for name, part in shares.items()},
        **_with_intervals("table", total.table_micro, total.table_macro, tables),
        **_with_intervals("column", total.column_micro, total.column_macro, columns),
        "hallucinated_names": total.hallucinated,
    }


def _with_intervals(kind: str, micro: PRF, macro: PRF, counts: Sequence[Counts]) -> dict[str, Any]:
    """Return precision, recall and F1 over all names, then as means over questions."""
    ratios = {
        "precision": [(each.shared, each.predicted) for each in counts],
        "recall": [(each.shared, each.gold) for each in counts],
        "f1": [(2 * each.shared, each.gold + each.predicted) for each in counts],
    }
    scores = {f"{kind}_{key}": value for key, value in asdict(micro).items()}
    scores |= {f"{kind}_{key}_macro": value for key, value in asdict(macro).items()}
    for key, parts in ratios.items():
        means = [(getattr(each.scores, key), 1) for each in counts]
        scores |= resampled(f"{kind}_{key}", parts)
        scores |= resampled(f"{kind}_{key}_macro", means)
    return scores


def _completed_scores(rows: Sequence[JudgedRow]) -> dict[str, Any]:
    """Return the strict recall of completed links, and how many names too many a linker gives.

    `spare_tables` is the chance that an unneeded table is named, `spare_columns` the same of an
    unneeded column of a named table. Empty where no schema is known.
    """
    completed = [row["linking_completed"] for row in rows if "linking_completed" in row]
    if not completed:
        return {}
    tables, columns = ([Counts(**one[kind]) for one in completed] for kind in ("tables", "columns"))
    recalled = sum(
        table.shared == table.gold and column.shared == column.gold
        for table, column in zip(tables, columns, strict=True)
    )
    spare = [row["spare"] for row in rows if "spare" in row]
    return {
        "completed_strict_recall": share(recalled, len(rows)),
        "completed_strict_recall_interval": interval(recalled, len(rows)),
        "completed_table_precision": sum(tables, Counts(0, 0, 0)).scores.precision,
        "completed_column_precision": sum(columns, Counts(0, 0, 0)).scores.precision,
        **{
            f"spare_{kind}": share(
                sum(one[kind] for one in spare), sum(one[f"of_{kind}"] for one in spare)
            )
            for kind in ("tables", "columns")
        },
    }


def _linking_score(row: JudgedRow) -> LinkingScore:
    stored = row["linking"]
    return LinkingScore(
        Counts(**stored["tables"]),
        Counts(**stored["columns"]),
        stored["hallucinated"],
        stored["parsed"],
    )
