"""Run gold and prediction on their database: one verdict per question, one kind per error."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from ray_sql.database import Executor, Limits, Place, QueryResult, suite
from ray_sql.database.pool import Progress
from ray_sql.metrics.bird import soft_f1, ves_reward
from ray_sql.metrics.match import (
    Semantics,
    execution_match,
    is_ordered,
    needs_distinct,
    prepare_spider,
)

VerdictName = Literal["correct", "wrong", "error", "timeout", "gold_error"]
ErrorKind = Literal[
    "none",
    "no such column",
    "no such table",
    "syntax",
    "timeout",
    "crash",
    "refused",
    "too large",
    "empty",
    "wrong rows",
    "gold error",
    "gold over a limit",
    "cut off",
    "other",
]
PREFIXES: tuple[ErrorKind, ...] = (
    "refused",
    "too large",
    "crash",
    "no such column",
    "no such table",
)
"""Kinds that open the message of their errors."""

LIMITS = ("too large", "timeout", "crash")
"""Openings of errors by which a query went over a limit; another limit may let it run."""

EMPTY = "empty result"
SYNTAX = (
    "syntax error",
    "incomplete input",
    "unrecognized token",
    "unterminated",
    "parser stack overflow",
)


@dataclass(frozen=True)
class Pair:
    """A gold and a predicted query for one question on one database."""

    database: Place
    gold: str
    predicted: str
    other_golds: tuple[str, ...] = ()
    """Further queries that are right as well."""


@dataclass(frozen=True)
class Verdict:
    """The judgement of a prediction: `error` is the reason where it is not correct.

    `seconds` are the prediction's own. `soft_f1` is measured under semantics "bird" only, and is 0
    for a query that does not run.
    """

    verdict: VerdictName
    error: str | None
    seconds: float
    soft_f1: float | None = None


def judge(
    executor: Executor,
    pair: Pair,
    *,
    semantics: Semantics,
    keep_distinct: bool = False,
    limits: Limits | None = None,
) -> Verdict:
    """Judge one prediction; it is right if it equals any of several golds.

    Where it equals none, the verdict is that by the first gold that runs. Under "spider" DISTINCT
    is dropped from both queries unless `keep_distinct`. Where the database's folder is a test suite
    (`shop/shop.sqlite` beside `shop/*.sqlite` of its schema), the results must agree on every file
    of it.

    Raises:
        DataError: the database is missing.
    """
    first: Verdict | None = None
    for gold in (pair.gold, *pair.other_golds):
        alone = replace(pair, gold=gold, other_golds=())
        verdict = _judge_by_one(executor, alone, semantics, keep_distinct, limits)
        if verdict.verdict == "correct":
            return verdict
        if first is None or first.verdict == "gold_error":
            first = verdict
    assert first is not None
    return first


def _judge_by_one(
    executor: Executor, pair: Pair, semantics: Semantics, keep_distinct: bool, limits: Limits | None
) -> Verdict:
    """Judge one prediction by its one gold query."""
    gold, predicted = pair.gold, pair.predicted
    databases: tuple[Place, ...] = (pair.database,)
    if semantics == "spider":
        most = (limits or executor.limits).sql_length
        # Where the official code breaks gold, there is no verdict to agree with.
        needed = "://" in str(pair.database) or needs_distinct(gold)
        gold = prepare_spider(gold, keep_distinct=keep_distinct, keep_needed=needed, most=most)
        predicted = prepare_spider(
            predicted, keep_distinct=keep_distinct, keep_needed=needed, most=most
        )
        databases = suite.find(executor, pair.database).databases
    seconds = 0.0
    share = 0.0 if semantics == "bird" else None
    for database in databases:
        expected = executor.run(database, gold, limits)
        if expected.status != "ok":
            return Verdict("gold_error", expected.error, seconds)
        actual = executor.run(database, predicted, limits)
        seconds += actual.seconds
        if actual.status != "ok":
            failure: VerdictName = "timeout" if actual.status == "timeout" else "error"
            return Verdict(failure, actual.error, seconds, share)
        if semantics == "bird":
            share = soft_f1(expected.rows, actual.rows)
        ordered = is_ordered(gold)
        try:
            matches = execution_match(
                expected.rows, actual.rows, semantics=semantics, ordered=ordered
            )
        except OverflowError as error:
            return Verdict("error", str(error), seconds, share)
        if not matches:
            return Verdict("wrong", _difference(expected, actual), seconds, share)
    return Verdict("correct", None, seconds, share)


def time_pair(executor: Executor, pair: Pair, iterations: int) -> float:
    """Return BIRD's R-VES reward of a *right* prediction, after `iterations` runs of both in turn.

    A failure now, by running into its limit, earns the reward of a wrong prediction, 0. Officially
    the limit is on all runs of a pair together, here on each query. Run nothing else beside it.
    """
    gold_seconds: list[float] = []
    predicted_seconds: list[float] = []
    for _ in range(iterations):
        for seconds, sql in ((predicted_seconds, pair.predicted), (gold_seconds, pair.gold)):
            result = executor.run(pair.database, sql, again=True)
            if result.status != "ok":
                return 0.0
            seconds.append(result.seconds)
    return ves_reward(gold_seconds, predicted_seconds)


def judge_many(
    executor: Executor,
    pairs: Sequence[Pair],
    *,
    semantics: Semantics,
    keep_distinct: bool = False,
    limits: Limits | None = None,
    progress: Progress | None = None,
) -> list[Verdict]:
    """Judge many predictions over all workers; return verdicts in the order of the pairs."""

    def judge_pair(pair: Pair) -> Verdict:
        return judge(
            executor, pair, semantics=semantics, keep_distinct=keep_distinct, limits=limits
        )

    return executor.map(judge_pair, pairs, progress)


def classify_error(verdict: Verdict) -> ErrorKind:
    """Return the kind of failure, for counting; "none" for a correct prediction."""
    message = (verdict.error or "").lower()
    match verdict.verdict:
        case "correct":
            return "none"
        case "gold_error":
            return "gold over a limit" if message.startswith(LIMITS) else "gold error"
        case "timeout":
            return "timeout"
        case "wrong":
            return "empty" if message.startswith(EMPTY) else "wrong rows"
    for kind in PREFIXES:
        if message.startswith(kind):
            return kind
    return "syntax" if any(sign in message for sign in SYNTAX) else "other"


def _difference(gold: QueryResult, predicted: QueryResult) -> str:
    """Say why two results do not match, as far as their sizes tell."""
    if gold.rows and not predicted.rows:
        return f"{EMPTY}, gold has {len(gold.rows)} rows"
    if len(predicted.rows) != len(gold.rows):
        return f"{len(predicted.rows)} rows, gold has {len(gold.rows)}"
    if len(predicted.columns) != len(gold.columns):
        return f"{len(predicted.columns)} columns, gold has {len(gold.columns)}"
    return "other values or another order than gold"
