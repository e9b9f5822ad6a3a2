"""Turn answers and gold into verdicts and scores: the numbers that a run is judged by.

Every score comes with n and a 95 % interval; gold queries that do not run are counted apart. The
same functions choose checkpoints, evaluate models after training, and score a predictions file.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ray_sql.config import mask_password
from ray_sql.config.sections import AnswersSection
from ray_sql.data.answers import FENCE_SIGNS, is_complete, parse_sql
from ray_sql.database import Executor, Schema
from ray_sql.evaluate import candidates, judge_links, judge_sql
from ray_sql.evaluate.judge_sql import Progress, executor
from ray_sql.evaluate.shares import without_gold_errors
from ray_sql.generate import Answer, Question
from ray_sql.metrics.judged import JudgedRow, is_right
from ray_sql.tasks import Task, TaskName


@dataclass(frozen=True)
class Judge:
    """Functions that read, judge and summarise the answers of one task."""

    parse: Callable[[str], str | None]
    """Find the SQL or the links in a model's text; None where there are none."""
    read: Callable[[Any, str], str | None]
    """Take a value of a predictions file, at a place that errors name."""
    judge: Callable[..., list[JudgedRow]]
    """Add verdicts to rows; the arguments are those of `judge_rows` without the task."""
    summarise: Callable[[Sequence[JudgedRow], AnswersSection], dict[str, Any]]
    """Return the scores of one split."""


JUDGES: Mapping[TaskName, Judge] = {
    "sql": Judge(parse_sql, judge_sql.read, judge_sql.judge, judge_sql.summarise),
    "schema": Judge(judge_links.parse, judge_links.read, judge_links.judge, judge_links.summarise),
}


def score(
    questions: Sequence[Question],
    answers: Sequence[Answer],
    task: Task,
    settings: AnswersSection,
    schemas: Mapping[str, Schema] | None = None,
    progress: Progress | None = None,
    shared: Executor | None = None,
) -> list[JudgedRow]:
    """Return one judged row of `predictions.jsonl` per question."""
    known = schemas or {}
    rows = [
        _row(question, answer, task, settings.max_new_tokens)
        for question, answer in zip(questions, answers, strict=True)
    ]
    databases = [question.database for question in questions]
    several = any(answer.candidates or answer.constrained for answer in answers)
    if not several and settings.ground == "none":
        return judge_rows(rows, databases, known, task, settings, progress, shared)
    parse, mend = JUDGES[task.name].parse, settings.ground == "repair"
    options = [
        candidates.options(answer, question.database, known.get(question.db_id), parse, mend)
        for question, answer in zip(questions, answers, strict=True)
    ]
    with executor(settings, shared) as running:
        choices = candidates.choose(options, task, settings, running)

        def judge(part: Sequence[JudgedRow], places: Sequence[str | None]) -> list[JudgedRow]:
            return judge_rows(part, places, known, task, settings, progress, running)

        return candidates.add_verdicts(rows, options, choices, judge, settings.way, task)


def judge_rows(
    rows: Sequence[JudgedRow],
    databases: Sequence[str | None],
    schemas: Mapping[str, Schema],
    task: Task,
    settings: AnswersSection,
    progress: Progress | None = None,
    shared: Executor | None = None,
) -> list[JudgedRow]:
    """Add `verdict`, `error` and `error_kind` to rows that have `gold` and `predicted`.

    `databases` are paths or URLs, None where a row has none; `shared` is an open executor to use.
    """
    judged = JUDGES[task.name].judge(rows, databases, schemas, settings, progress, shared)
    return [_with_cut(row, settings.max_new_tokens) for row in judged]


def _with_cut(row: JudgedRow, max_new_tokens: int) -> JudgedRow:
    """Name the reason of a wrong answer that was not written to its end."""
    if not row.get("cut_off") or is_right(row) or row["verdict"] == "gold_error":
        return row
    reason = f"cut off at max_new_tokens {max_new_tokens}: {row['error'] or row['error_kind']}"
    return row | {"error": reason, "error_kind": "cut off"}


def summarise(rows: Sequence[JudgedRow], task: Task, settings: AnswersSection) -> dict[str, Any]:
    """Return the scores of one split as plain JSON values; the first key is the main score."""
    by_way = candidates.scores(without_gold_errors(rows), task)
    whole = Counter(row["full_schema"] for row in rows if "full_schema" in row)
    shown = {"full_schema": dict(whole.most_common())} if whole else {}
    return JUDGES[task.name].summarise(rows, settings) | by_way | shown | _room(rows)


def _room(rows: Sequence[JudgedRow]) -> dict[str, Any]:
    """Say how many prompts had no room for all tables, and the share of gold's that they show."""
    short = [row["room"] for row in rows if "room" in row]
    if not short:
        return {}
    needed = sum(room["gold_tables"] for room in short)
    missing = sum(len(room["gold_left_out"]) for room in short)
    recall = 1 - missing / needed if needed else None
    return {"no_room": {"prompts": len(short), "gold_table_recall": recall}}


def _row(question: Question, answer: Answer, task: Task, max_new_tokens: int) -> JudgedRow:
    ends_in_fence = is_complete(answer.raw) and answer.raw.rstrip()[-1] in FENCE_SIGNS
    is_cut = answer.new_tokens >= max_new_tokens and not ends_in_fence
    row = {
        "id": question.id,
        "split": question.split,
        "db_id": question.db_id,
        "hardness": question.hardness,
        "question": question.question,
        "gold": question.gold,
        "predicted": JUDGES[task.name].parse(answer.raw),
        "raw": answer.raw,
        "prompt_tokens": answer.prompt_tokens,
        "new_tokens": answer.new_tokens,
        "generation_seconds": round(answer.seconds, 3),
    }
    if is_cut:
        row["cut_off"] = True
    others = [*answer.candidates, *([answer.constrained] if answer.constrained else [])]
    if others:
        row["all_new_tokens"] = answer.new_tokens + sum(other.new_tokens for other in others)
    shown = {
        "other_golds": list(question.other_golds) or None,
        "links": question.links,
        "full_schema": question.full_schema,
        "room": asdict(question.room) if question.room else None,
    }
    return row | {name: value for name, value in shown.items() if value is not None}


def headline(scores: Mapping[str, Any], task: Task) -> dict[str, float]:
    """Return the few scores of a summary that are followed in MLflow, the main one first.

    These are the secondary ones, that of each way to choose an answer, and pass@k. Characters that
    MLflow allows in no name become `_`. Counts, levels and databases stay in the files.
    """
    ways = [key for key in scores if key.startswith((f"{task.metric}_", "pass@"))]
    names = dict.fromkeys([task.metric, task.tie_break, *task.secondary, *ways])
    return {legal(name): scores[name] for name in names if isinstance(scores.get(name), float)}


def legal(name: str) -> str:
    """Return a dataset's own word as a part of a metric's name in MLflow."""
    return re.sub(r"[^\w. -]", "_", name)


def failing_gold(
    golds: Sequence[tuple[str, str, str]],
    settings: AnswersSection,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Return the gold queries that do not run; `golds` are (example id, path or URL, SQL)."""
    with executor(settings) as running:
        results = running.run_many(
            [(database, sql) for _, database, sql in golds], progress=progress
        )
    return [
        {"id": name, "database": mask_password(database), "gold": sql, "error": result.error}
        for (name, database, sql), result in zip(golds, results, strict=True)
        if result.status != "ok"
    ]
