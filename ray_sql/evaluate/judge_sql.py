"""Judge SQL by executing it beside its gold query, and summarise the verdicts of a split."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from math import sqrt
from typing import Any

from ray_sql.config.sections import AnswersSection
from ray_sql.curate.flags import UNDETERMINED
from ray_sql.database import Executor, Limits, Schema
from ray_sql.errors import DataError
from ray_sql.evaluate.shares import (
    clustered,
    error_counts,
    gold_counts,
    interval,
    resampled,
    share,
    without_gold_errors,
)
from ray_sql.metrics import (
    Pair,
    Verdict,
    classify_error,
    exact_set_verdict,
    is_readable,
    judge_many,
    r_ves,
    time_pair,
)
from ray_sql.metrics.judged import HARDNESS, JudgedRow, grouped

Progress = Callable[[int, int], None]

NO_DATABASE = "there is no database to execute it on"


def executor(
    settings: AnswersSection, shared: Executor | None = None
) -> AbstractContextManager[Executor]:
    """Return the processes that execute SQL; with `shared`, those, which stay open.

    Several calls of `score` that share an executor execute their gold once.
    """
    if shared is not None:
        return nullcontext(shared)
    processes = settings.processes or min(8, os.cpu_count() or 1)
    return Executor(processes, limits(settings))


def limits(settings: AnswersSection) -> Limits:
    """Return the limits of a query; memory grows with the bytes that a result may have."""
    standard = Limits()
    return Limits(
        seconds=settings.timeout,
        rows=settings.max_rows,
        bytes=settings.max_bytes,
        memory=standard.memory * max(1, settings.max_bytes // standard.bytes),
        sql_length=settings.max_sql_length,
    )


def read(value: Any, where: str) -> str | None:
    """Return the SQL of a predictions file as it is. Raises `DataError` where it is no text."""
    if value is not None and not isinstance(value, str):
        raise DataError(f"{where} must be SQL as text, found {type(value).__name__}")
    return value


def judge(
    rows: Sequence[JudgedRow],
    databases: Sequence[str | None],
    schemas: Mapping[str, Schema],
    settings: AnswersSection,
    progress: Progress | None = None,
    shared: Executor | None = None,
) -> list[JudgedRow]:
    """Add the verdict of each row's `predicted`, executed on its database (a path or URL).

    Raises `DataError` if there are databases and no gold query runs: a score over nothing would
    read as 0.
    """
    pairs = {
        index: Pair(
            database, row["gold"], row["predicted"] or "", tuple(row.get("other_golds", ()))
        )
        for index, (row, database) in enumerate(zip(rows, databases, strict=True))
        if database is not None
    }
    verdicts: dict[int, Verdict] = {}
    rewards: dict[int, float] = {}
    if pairs:
        with executor(settings, shared) as running:
            judged = judge_many(
                running,
                list(pairs.values()),
                semantics=settings.semantics,
                keep_distinct=settings.keep_distinct,
                progress=progress,
            )
            verdicts = dict(zip(pairs, judged, strict=True))
            _check_gold(rows, verdicts)
            if settings.ves_iterations:
                rewards = _rewards(running, pairs, verdicts, settings.ves_iterations, progress)
    missing = Verdict("gold_error", NO_DATABASE, 0.0)
    return [
        row
        | _verdict_fields(row, verdicts.get(index, missing))
        | ({"ves_reward": rewards[index]} if index in rewards else {})
        | _exact_set_fields(row, schemas.get(row["db_id"]))
        for index, row in enumerate(rows)
    ]


def _check_gold(rows: Sequence[JudgedRow], verdicts: Mapping[int, Verdict]) -> None:
    if any(verdict.verdict != "gold_error" for verdict in verdicts.values()):
        return
    index, first = next(iter(verdicts.items()))
    raise DataError(
        f"nothing can be scored: the gold query of every question fails ({len(verdicts)} in all), "
        f"as that of {rows[index]['id']} on {rows[index]['db_id']}: {first.error}; check the "
        "databases and the gold SQL"
    )


def _rewards(
    running: Executor,
    pairs: Mapping[int, Pair],
    verdicts: Mapping[int, Verdict],
    iterations: int,
    progress: Progress | None,
) -> dict[int, float]:
    """Return R-VES rewards by row: correct queries are timed one after another, others get 0."""
    rewards = dict.fromkeys(pairs, 0.0)
    correct = [index for index in pairs if verdicts[index].verdict == "correct"]
    for done, index in enumerate(correct, start=1):
        rewards[index] = time_pair(running, pairs[index], iterations)
        if progress is not None:
            progress(done, len(correct))
    return rewards


def _verdict_fields(row: JudgedRow, verdict: Verdict) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "verdict": verdict.verdict,
        "error": verdict.error,
        "error_kind": classify_error(verdict),
        "seconds": round(verdict.seconds, 3),
    }
    if verdict.verdict == "error" and not row["predicted"]:
        fields |= {"error": "the answer holds no SQL", "error_kind": "unparsable"}
    if verdict.soft_f1 is not None:
        fields["soft_f1"] = round(verdict.soft_f1, 4)
    return fields


def _exact_set_fields(row: JudgedRow, schema: Schema | None) -> dict[str, bool]:
    """Return Spider's clause-by-clause judgement, where the schema is known."""
    if schema is None:
        return {}
    golds = [row["gold"], *row.get("other_golds", ())]
    verdicts = [exact_set_verdict(gold, row["predicted"] or "", schema) for gold in golds]
    is_unread = all(verdict is None for verdict in verdicts)
    fields = {"exact_set_match": any(verdicts), "exact_set_unread": is_unread}
    if is_unread and not any(is_readable(gold, schema) for gold in golds):
        fields["exact_set_gold_unread"] = True
    return fields


def summarise(rows: Sequence[JudgedRow], settings: AnswersSection) -> dict[str, Any]:
    """Return the scores of one split as plain JSON values, in all, by hardness and by database.

    Exact set match needs no database, so it counts the rows that have none, too.
    """
    unexecuted = [row for row in rows if row.get("error") == NO_DATABASE]
    counted = without_gold_errors(rows)
    valid = sum(row["verdict"] in ("correct", "wrong") for row in counted)
    by_hardness = grouped(counted, "hardness", HARDNESS)
    by_database = grouped(counted, "db_id")
    return {
        **_accuracy(counted),
        **_exact_set_scores([*counted, *unexecuted]),
        **clustered(counted, [row["verdict"] == "correct" for row in counted]),
        "semantics": settings.semantics,
        "keep_distinct": settings.keep_distinct,
        "valid_sql": share(valid, len(counted)),
        "valid_sql_interval": interval(valid, len(counted)),
        **_bird_scores(counted),
        **gold_counts(rows),
        **_unflagged(counted),
        "by_hardness": {level: _accuracy(group) for level, group in by_hardness.items()},
        "by_database": {db_id: _accuracy(group) for db_id, group in by_database.items()},
        "errors": error_counts(counted),
    }


def _unflagged(rows: Sequence[JudgedRow]) -> dict[str, Any]:
    """Return the scores without the questions that an audit flagged, where there was one.

    Those whose gold has several right results count apart: "determined" are the scores without
    them.
    """
    if not any("flags" in row for row in rows):
        return {}
    sound = [row for row in rows if not row.get("flags")]
    determined = [row for row in rows if not set(UNDETERMINED) & set(row.get("flags", ()))]
    return {
        "flagged": len(rows) - len(sound),
        "unflagged": _accuracy(sound),
        "undetermined": len(rows) - len(determined),
        "determined": _accuracy(determined),
    }


def _accuracy(rows: Sequence[JudgedRow]) -> dict[str, Any]:
    correct = sum(row["verdict"] == "correct" for row in rows)
    return {
        "execution_accuracy": share(correct, len(rows)),
        "interval": interval(correct, len(rows)),
        "n": len(rows),
        "correct": correct,
        **_exact_set_scores(rows),
    }


def _exact_set_scores(rows: Sequence[JudgedRow]) -> dict[str, Any]:
    """Return the share that matches clause by clause, over the gold queries that can be read.

    A gold query outside Spider's grammar matches nothing, so `exact_set_gold_unread` counts it
    apart. A prediction that cannot be read counts as no match; `exact_set_unread` counts those.
    """
    known = [row for row in rows if row.get("exact_set_match") is not None]
    readable = [row for row in known if not row.get("exact_set_gold_unread")]
    unread = len(known) - len(readable)
    scores: dict[str, Any] = {"exact_set_gold_unread": unread} if unread else {}
    if not readable:
        return scores
    matched = sum(row["exact_set_match"] for row in readable)
    return {
        "exact_set_match": share(matched, len(readable)),
        "exact_set_match_interval": interval(matched, len(readable)),
        "exact_set_match_n": len(readable),
        "exact_set_unread": sum(row["exact_set_unread"] for row in readable),
        **scores,
    }


def _bird_scores(rows: Sequence[JudgedRow]) -> dict[str, Any]:
    """Return BIRD's mean soft F1 (0 for what does not run) and R-VES as shares, where measured."""
    soft = [row["soft_f1"] for row in rows if "soft_f1" in row]
    rewards = [row["ves_reward"] for row in rows if "ves_reward" in row]
    scores: dict[str, Any] = {}
    if soft:
        scores["soft_f1"] = sum(soft) / len(soft)
        scores |= resampled("soft_f1", [(value, 1) for value in soft]) | {"soft_f1_n": len(soft)}
    if rewards:
        scores["r_ves"] = r_ves(rewards) / 100
        scores |= resampled("r_ves", [(sqrt(reward), 1) for reward in rewards])
        scores["r_ves_n"] = len(rewards)
    return scores
