"""Answers + gold → verdicts, scores and files: the numbers that a run is judged by.

Every score comes with n, a 95 % interval (and one clustered by database), its semantics, hardness and databases. Gold queries that
do not run are counted apart, never silently. The same functions choose checkpoints during training, measure base and tuned models
after it, and score a predictions file with no model loaded.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from math import sqrt
from typing import Any

from ray_sql.config import Config, mask_password
from ray_sql.data import linking, prompts
from ray_sql.database import Executor, Limits, Schema
from ray_sql.errors import DataError
from ray_sql.generate import Answer, Question
from ray_sql.metrics import (
    Counts,
    LinkingScore,
    Pair,
    Verdict,
    classify_error,
    clustered_interval,
    exact_set_verdict,
    judge_many,
    r_ves,
    score_links,
    summarise_links,
    time_pair,
    wilson_interval,
)
from ray_sql.metrics.judged import HARDNESS, grouped, is_right

Row = dict[str, Any]
Progress = Callable[[int, int], None]


def score(
    asked: Sequence[Question],
    answers: Sequence[Answer],
    config: Config,
    schemas: Mapping[str, Schema] | None = None,
    progress: Progress | None = None,
    runs: Executor | None = None,
) -> list[Row]:
    """One row of `predictions.jsonl` per question, judged: by executing its SQL, or by comparing its links."""
    if config.evaluate.first_executable:
        answers = first_executable(asked, answers, config, runs)
    rows = [_row(question, answer, config) for question, answer in zip(asked, answers, strict=True)]
    return judge_rows(
        rows, [question.database for question in asked], config, schemas or {}, progress, runs
    )


def executor(config: Config) -> Executor:
    """What runs the SQL of one evaluation; shared by several calls of `score`, it runs their gold once."""
    processes = config.evaluate.processes or min(8, os.cpu_count() or 1)
    return Executor(processes, Limits(seconds=config.evaluate.timeout))


def first_executable(
    asked: Sequence[Question],
    answers: Sequence[Answer],
    config: Config,
    runs: Executor | None = None,
) -> list[Answer]:
    """The answers, each with the first of its candidates that runs on its question's database; as they are where none does."""
    tries = [
        (number, text, sql)
        for number, (question, answer) in enumerate(zip(asked, answers, strict=True))
        for text in answer.candidates
        if question.database is not None and (sql := prompts.parse_sql(text))
    ]
    with nullcontext(runs) if runs else executor(config) as running:
        results = running.run_many(
            [(asked[number].database or "", sql) for number, _, sql in tries]
        )
    chosen = list(answers)
    for (number, text, _), result in reversed(
        list(zip(tries, results, strict=True))
    ):  # the first one is written last
        if result.status == "ok":
            chosen[number] = replace(chosen[number], raw=text)
    return chosen


def judge_rows(
    rows: list[Row],
    databases: Sequence[str | None],
    config: Config,
    schemas: Mapping[str, Schema],
    progress: Progress | None = None,
    runs: Executor | None = None,
) -> list[Row]:
    """Add `verdict`, `error` and `error_kind` to rows that have `gold` and `predicted`.

    Raises `DataError` if there are databases and no gold query runs on its own: a score over nothing would read as 0.
    """
    if config.task_type == "schema":
        return [_judge_links(row, schemas.get(row["db_id"])) for row in rows]
    with_database = [index for index, database in enumerate(databases) if database is not None]
    verdicts: dict[int, Verdict] = {}
    rewards: dict[int, float] = {}
    if with_database:
        pairs = [
            Pair(databases[i] or "", rows[i]["gold"], rows[i]["predicted"] or "")
            for i in with_database
        ]
        with nullcontext(runs) if runs else executor(config) as running:
            judged = judge_many(
                running,
                pairs,
                semantics=config.evaluate.semantics,
                keep_distinct=config.evaluate.keep_distinct,
                progress=progress,
            )
            verdicts = dict(zip(with_database, judged, strict=True))
            _check_gold(rows, verdicts)
            if config.evaluate.ves_iterations:
                rewards = _rewards(
                    running,
                    dict(zip(with_database, pairs, strict=True)),
                    verdicts,
                    config,
                    progress,
                )
    missing = Verdict("gold_error", "there is no database to execute it on", 0.0)
    return [
        _judged(row, verdicts.get(index, missing))
        | ({"ves_reward": rewards[index]} if index in rewards else {})
        | _matched(row, schemas.get(row["db_id"]))
        for index, row in enumerate(rows)
    ]


def _check_gold(rows: Sequence[Row], verdicts: Mapping[int, Verdict]) -> None:
    number, first = next(iter(verdicts.items()))
    if all(verdict.verdict == "gold_error" for verdict in verdicts.values()):
        raise DataError(
            f"nothing can be scored: the gold query of every question fails ({len(verdicts)} in all), as that of "
            f"{rows[number]['id']} on {rows[number]['db_id']}: {first.error}; check the databases and the gold SQL"
        )


def _rewards(
    runs: Executor,
    pairs: Mapping[int, Pair],
    verdicts: Mapping[int, Verdict],
    config: Config,
    progress: Progress | None,
) -> dict[int, float]:
    """What every prediction earns for its speed, one after the other, so that none is timed beside another."""
    rewards = dict.fromkeys(pairs, 0.0)
    right = [number for number in pairs if verdicts[number].verdict == "correct"]
    for done, number in enumerate(right, start=1):
        rewards[number] = time_pair(runs, pairs[number], config.evaluate.ves_iterations)
        if progress is not None:
            progress(done, len(right))
    return rewards


def summarise(rows: Sequence[Row], config: Config) -> dict[str, Any]:
    """The scores of one split as plain JSON values; the first key is the metric that selects models."""
    if config.task_type == "schema":
        return _summarise_links(rows)
    counted = [row for row in rows if row["verdict"] != "gold_error"]
    valid = sum(row["verdict"] in ("correct", "wrong") for row in counted)
    return {
        **accuracy(counted),
        **clustered(counted, [row["verdict"] == "correct" for row in counted]),
        "semantics": config.evaluate.semantics,
        "keep_distinct": config.evaluate.keep_distinct,
        "valid_sql": _share(valid, len(counted)),
        "valid_sql_interval": _interval(valid, len(counted)),
        **_birds(counted),
        "gold_errors": len(rows) - len(counted),
        "by_hardness": {
            level: accuracy(group)
            for level, group in grouped(counted, "hardness", HARDNESS).items()
        },
        "by_database": {
            db_id: accuracy(group) for db_id, group in grouped(counted, "db_id").items()
        },
        "errors": _error_counts(counted),
    }


def objective(scores: Mapping[str, Any]) -> tuple[float, float]:
    """(what to maximise, tie-break): execution accuracy then valid SQL, or strict recall then column F1."""
    if "execution_accuracy" in scores:
        return scores["execution_accuracy"], scores["valid_sql"]
    return scores["strict_recall"], scores["column_f1"]


def flat(scores: Mapping[str, Any], prefix: str) -> dict[str, float]:
    """The numbers of a summary as MLflow metrics, e.g. `tuned/seen/execution_accuracy`; databases stay in the files.

    Splits and hardness levels are a dataset's own words, so what MLflow allows in no name becomes `_`.
    """
    metrics = {}
    for key, value in scores.items():
        if key == "by_hardness":
            for level, group in value.items():
                for name in {"execution_accuracy", "exact_set_match", "strict_recall"} & set(group):
                    metrics[f"{prefix}/{level}/{name}"] = group[name]
        elif isinstance(value, int | float) and not isinstance(value, bool):
            metrics[f"{prefix}/{key}"] = float(value)
    return {re.sub(r"[^\w./ -]", "_", name): value for name, value in metrics.items()}


def dump(rows: Iterable[Row]) -> str:
    """Rows as `predictions.jsonl`."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def failing_gold(
    golds: Sequence[tuple[str, str, str]], config: Config, progress: Progress | None = None
) -> list[Row]:
    """Which gold queries do not run; `golds` are (example id, path or URL, SQL). One row each: id, database, gold, error."""
    with executor(config) as running:
        results = running.run_many(
            [(database, sql) for _, database, sql in golds], progress=progress
        )
    return [
        {"id": name, "database": mask_password(database), "gold": sql, "error": result.error}
        for (name, database, sql), result in zip(golds, results, strict=True)
        if result.status != "ok"
    ]


def _row(question: Question, answer: Answer, config: Config) -> Row:
    parse = prompts.parse_sql if config.task_type == "sql" else _parse_links
    return {
        "id": question.id,
        "split": question.split,
        "db_id": question.db_id,
        "hardness": question.hardness,
        "question": question.question,
        "gold": question.gold,
        "predicted": parse(answer.raw),
        "raw": answer.raw,
        "prompt_tokens": answer.prompt_tokens,
        "new_tokens": answer.new_tokens,
        "generation_seconds": round(answer.seconds, 3),
        **({"candidates": answer.candidates} if answer.candidates else {}),
    }


def _parse_links(text: str) -> str | None:
    links = linking.parse_links(text)
    return None if links is None else json.dumps(links)


def _judged(row: Row, verdict: Verdict) -> Row:
    unparsable = verdict.verdict == "error" and not row["predicted"]
    return row | {
        "verdict": verdict.verdict,
        "error": "the answer holds no SQL" if unparsable else verdict.error,
        "error_kind": "unparsable" if unparsable else classify_error(verdict),
        "seconds": round(verdict.seconds, 3),
        **({} if verdict.soft_f1 is None else {"soft_f1": round(verdict.soft_f1, 4)}),
    }


def _matched(row: Row, schema: Schema | None) -> Row:
    """Spider's other judgement of a row, where its schema is known: `exact_set_match`, and whether both could be read for it."""
    if schema is None:
        return {}
    verdict = exact_set_verdict(row["gold"], row["predicted"] or "", schema)
    return {"exact_set_match": bool(verdict), "exact_set_unread": verdict is None}


def _judge_links(row: Row, schema: Schema | None) -> Row:
    """Adds the link counts of a row; `correct` means exactly the gold tables and columns."""
    if not row["gold"]:
        return row | {
            "verdict": "gold_error",
            "error": "the gold SQL cannot be linked to the schema",
            "error_kind": "gold error",
        }
    predicted = None if row["predicted"] is None else json.loads(row["predicted"])
    names = None if schema is None else {table.name: table.column_names for table in schema.tables}
    scored = score_links(json.loads(row["gold"]), predicted, names)
    if not scored.parsed:
        verdict, error, kind = "error", "no JSON object of tables and columns", "unparsable"
    elif scored.exact:
        verdict, error, kind = "correct", None, "none"
    else:
        verdict, error, kind = (
            "wrong",
            None,
            "extra names" if scored.strict_recall else "missing names",
        )
    return row | {"verdict": verdict, "error": error, "error_kind": kind, "linking": asdict(scored)}


def _summarise_links(rows: Sequence[Row]) -> dict[str, Any]:
    counted = [row for row in rows if row["verdict"] != "gold_error"]
    scores = [_linking(row) for row in counted]
    if not scores:
        nothing = {**_recalled([]), "by_hardness": {}, "by_database": {}, "errors": {}}
        return nothing | {
            "table_f1": 0.0,
            "column_f1": 0.0,
            "unparsable": 0.0,
            "gold_errors": len(rows),
        }
    total, n = summarise_links(scores), len(scores)
    shares = {
        "table_strict_recall": sum(score.table_strict_recall for score in scores),
        "questions_hallucinating": total.questions_hallucinating,
        "unparsable": total.unparsable,
    }
    return {
        **_recalled(counted),
        **clustered(counted, [score.strict_recall for score in scores]),
        **{name: _share(part, n) for name, part in shares.items()},
        **{f"{name}_interval": _interval(part, n) for name, part in shares.items()},
        **{f"table_{key}": value for key, value in asdict(total.table_micro).items()},
        **{f"column_{key}": value for key, value in asdict(total.column_micro).items()},
        **{f"table_{key}_macro": value for key, value in asdict(total.table_macro).items()},
        **{f"column_{key}_macro": value for key, value in asdict(total.column_macro).items()},
        **_drawn(
            "table_f1",
            [(2 * one.tables.shared, one.tables.gold + one.tables.predicted) for one in scores],
        ),
        **_drawn(
            "column_f1",
            [(2 * one.columns.shared, one.columns.gold + one.columns.predicted) for one in scores],
        ),
        "hallucinated_names": total.hallucinated,
        "gold_errors": len(rows) - n,
        "by_hardness": {
            level: _recalled(group)
            for level, group in grouped(counted, "hardness", HARDNESS).items()
        },
        "by_database": {
            db_id: _recalled(group) for db_id, group in grouped(counted, "db_id").items()
        },
        "errors": _error_counts(counted),
    }


def _recalled(rows: Sequence[Row]) -> dict[str, Any]:
    """The shares of questions with all of gold, and with gold exactly, with their intervals."""
    recalled, exact, n = (
        sum(map(is_right, rows)),
        sum(row["verdict"] == "correct" for row in rows),
        len(rows),
    )
    return {
        "strict_recall": _share(recalled, n),
        "interval": _interval(recalled, n),
        "n": n,
        "exact_match": _share(exact, n),
        "exact_match_interval": _interval(exact, n),
    }


def _linking(row: Row) -> LinkingScore:
    stored = row["linking"]
    return LinkingScore(
        Counts(**stored["tables"]),
        Counts(**stored["columns"]),
        stored["hallucinated"],
        stored["parsed"],
    )


def _error_counts(rows: Sequence[Row]) -> dict[str, int]:
    return dict(
        Counter(row["error_kind"] for row in rows if row["verdict"] != "correct").most_common()
    )


def accuracy(rows: Sequence[Row]) -> dict[str, Any]:
    """The share of correct rows with its interval and counts; rows of failing gold must have been left out."""
    correct = sum(row["verdict"] == "correct" for row in rows)
    return {
        "execution_accuracy": _share(correct, len(rows)),
        "interval": _interval(correct, len(rows)),
        "n": len(rows),
        "correct": correct,
        **_exact_sets(rows),
    }


def _exact_sets(rows: Sequence[Row]) -> dict[str, Any]:
    """The share of rows that match clause by clause, over those whose schema is known, if there are any.

    A query that cannot be read for it counts as no match; `exact_set_unread` says how many rows have one.
    """
    known = [row for row in rows if row.get("exact_set_match") is not None]
    if not known:
        return {}
    matched = sum(row["exact_set_match"] for row in known)
    return {
        "exact_set_match": _share(matched, len(known)),
        "exact_set_match_interval": _interval(matched, len(known)),
        "exact_set_match_n": len(known),
        "exact_set_unread": sum(row["exact_set_unread"] for row in known),
    }


def _birds(rows: Sequence[Row]) -> dict[str, Any]:
    """BIRD's other scores, where they were measured: the mean soft F1, with 0 for what does not run, and R-VES as a share.

    Their intervals come from questions drawn anew.
    """
    shares = [row["soft_f1"] for row in rows if "soft_f1" in row]
    rewards = [row["ves_reward"] for row in rows if "ves_reward" in row]
    found: dict[str, Any] = {}
    if shares:
        found |= {
            "soft_f1": sum(shares) / len(shares),
            **_drawn("soft_f1", [(share, 1) for share in shares]),
        }
    if rewards:
        found |= {
            "r_ves": r_ves(rewards) / 100,
            **_drawn("r_ves", [(sqrt(reward), 1) for reward in rewards]),
        }
    return found


def _drawn(name: str, questions: Sequence[tuple[float, int]]) -> dict[str, list[float]]:
    """The interval of a mean or ratio, one (part, whole) a question, from questions drawn anew."""
    interval = clustered_interval(questions)
    return {f"{name}_interval": [interval.low, interval.high]} if interval else {}


def clustered(rows: Sequence[Row], values: Sequence[float]) -> dict[str, list[float]]:
    """`clustered_interval` of a row's values, resampling whole databases; nothing where there are no two that differ."""
    groups: dict[str, list[float]] = defaultdict(list)
    for row, value in zip(rows, values, strict=True):
        groups[row["db_id"]].append(value)
    found = clustered_interval([(sum(group), len(group)) for _, group in sorted(groups.items())])
    return {"clustered_interval": [found.low, found.high]} if found else {}


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


def _interval(part: int, whole: int) -> list[float]:
    interval = wilson_interval(part, whole)
    return [interval.low, interval.high]
