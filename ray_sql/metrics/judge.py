"""Run gold and prediction on their database and say what came of it: one verdict a question, one kind an error."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from ray_sql.database import Executor, Limits, Place, QueryResult
from ray_sql.database.pool import Progress
from ray_sql.metrics.bird import soft_f1, ves_reward
from ray_sql.metrics.match import Semantics, execution_match, is_ordered, prepare_spider

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
    "other",
]
ERROR_KINDS: tuple[ErrorKind, ...] = get_args(ErrorKind)

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
    """A gold query and a predicted one for the same question on one SQLite file or PostgreSQL database."""

    database: Place
    gold: str
    predicted: str


@dataclass(frozen=True)
class Verdict:
    """What came of a prediction: the reason where it is not correct, and the seconds its own query took.

    `soft_f1`, under semantics "bird" only, says how nearly right it is; 0 where it does not run.
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
    """Judge one prediction; only a missing database raises (DataError).

    Under "spider" DISTINCT is dropped from both queries unless `keep_distinct`, and where the database's folder is a
    test suite (`shop/shop.sqlite` beside `shop/*.sqlite`) the results must agree on every file of it.
    """
    gold, predicted = pair.gold, pair.predicted
    databases: tuple[Place, ...] = (pair.database,)
    if semantics == "spider":
        server = "://" in str(pair.database)
        gold = prepare_spider(gold, keep_distinct=keep_distinct, server=server)
        predicted = prepare_spider(predicted, keep_distinct=keep_distinct, server=server)
        databases = _test_suite(pair.database)
    seconds = 0.0
    share = 0.0 if semantics == "bird" else None
    for database in databases:
        expected = executor.run(database, gold, limits)
        if expected.status != "ok":
            return Verdict("gold_error", expected.error, seconds)
        found = executor.run(database, predicted, limits)
        seconds += found.seconds
        if found.status != "ok":
            return Verdict(
                "timeout" if found.status == "timeout" else "error", found.error, seconds, share
            )
        if semantics == "bird":
            share = soft_f1(expected.rows, found.rows)
        if not execution_match(
            expected.rows, found.rows, semantics=semantics, ordered=is_ordered(gold)
        ):
            return Verdict("wrong", _difference(expected, found), seconds, share)
    return Verdict("correct", None, seconds, share)


def time_pair(executor: Executor, pair: Pair, iterations: int) -> float:
    """The reward that BIRD's R-VES gives a *right* prediction for its speed: both queries run `iterations` times in turn.

    Where either fails this time, by running into its limit, it earns what a wrong one does; officially the limit is on all runs of
    a pair together, here on each query. Nothing else may run beside it.
    """
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(iterations):
        for kept, sql in zip(seconds, (pair.predicted, pair.gold), strict=True):
            result = executor.run(pair.database, sql, again=True)
            if result.status != "ok":
                return 0.0
            kept.append(result.seconds)
    predicted, gold = seconds
    return ves_reward(gold, predicted)


def judge_many(
    executor: Executor,
    pairs: Sequence[Pair],
    *,
    semantics: Semantics,
    keep_distinct: bool = False,
    limits: Limits | None = None,
    progress: Progress | None = None,
) -> list[Verdict]:
    """Judge many predictions over all workers; verdicts in the order of the pairs."""

    def one(pair: Pair) -> Verdict:
        return judge(
            executor, pair, semantics=semantics, keep_distinct=keep_distinct, limits=limits
        )

    return executor.map(one, pairs, progress)


def classify_error(verdict: Verdict) -> ErrorKind:
    """The kind of failure, for counting; "none" for a correct prediction."""
    message = (verdict.error or "").lower()
    match verdict.verdict:
        case "correct":
            return "none"
        case "gold_error":
            return "gold error"
        case "timeout":
            return "timeout"
        case "wrong":
            return "empty" if message.startswith(EMPTY) else "wrong rows"
    prefixes: tuple[ErrorKind, ...] = (
        "refused",
        "too large",
        "crash",
        "no such column",
        "no such table",
    )
    for kind in prefixes:
        if message.startswith(kind):
            return kind
    return "syntax" if any(sign in message for sign in SYNTAX) else "other"


def _difference(gold: QueryResult, found: QueryResult) -> str:
    """Why two results do not match, as far as their sizes tell."""
    if gold.rows and not found.rows:
        return f"{EMPTY}, gold has {len(gold.rows)} rows"
    if len(found.rows) != len(gold.rows):
        return f"{len(found.rows)} rows, gold has {len(gold.rows)}"
    if len(found.columns) != len(gold.columns):
        return f"{len(found.columns)} columns, gold has {len(gold.columns)}"
    return "other values or another order than gold"


def _test_suite(database: Place) -> tuple[Place, ...]:
    """Every database that a query on this one must hold on, this one first.

    Only a folder named after the database is a test suite: a folder of unrelated databases must not become one.
    """
    if isinstance(database, str) and "://" in database:
        return (database,)
    database = Path(database)
    if database.parent.name != database.stem:
        return (database,)
    return (
        database,
        *(path for path in sorted(database.parent.glob("*.sqlite")) if path != database),
    )
