"""Compare two files of judged predictions, question by question.

    ray-sql compare A/predictions.jsonl B/predictions.jsonl

Nothing is executed: verdicts are taken as they stand in the files, paired by split and id. Both
files must have been scored against the same gold, and under the same semantics, which is known
where `metrics.json` still lies beside a file.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from ray_sql import data
from ray_sql.config import CompareConfig
from ray_sql.display import Display, percent
from ray_sql.errors import DamagedFile, DataError
from ray_sql.evaluate.shares import clustered, interval
from ray_sql.metrics import VerdictName, resolvable_difference
from ray_sql.metrics.judged import HARDNESS, JudgedRow, grouped, is_right
from ray_sql.metrics.paired import ALPHA, paired_test
from ray_sql.store import storage
from ray_sql.store.run_folder import COMPARISON, RunFolder
from ray_sql.store.shapes import Rules
from ray_sql.tasks import SCHEMA, SQL, Task

Key = tuple[str, str]
"""Split and id of a question."""

GROUPS = {"by_split": "split", "by_hardness": "hardness", "by_database": "db_id"}
"""Groups of a comparison, and the fields they are made by."""

QUESTIONS = "--- questions that only {side} gets right"
"""The line where the listing of single questions begins."""


@dataclass(frozen=True)
class PairedRows:
    """The questions that both files judge, in the first's order, and counts of those left out."""

    rows: list[tuple[JudgedRow, JudgedRow]]
    task: Task
    only_in_a: int
    only_in_b: int
    gold_errors: int


def run(config: CompareConfig) -> dict[str, Any]:
    """Compare the two files of `config.files`, and return what `compare.json` holds."""
    display, folder = Display(), RunFolder(config.run_dir)
    a, b = map(_answers, config.files)
    if config.dry_run:
        display.line(f"would compare {a} with {b} and write {config.run_dir}")
        return {}
    folder.require_ours(COMPARISON)
    result = compare_files(a, b)
    text = listing(result)
    storage.write_text(folder.comparison_text, text)
    storage.write_text(folder.comparison, json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    display.line(text.split(f"\n\n{QUESTIONS.format(side='A')}")[0])
    display.line(f"\nquestions on which they differ  {folder.comparison_text}")
    return result


def _answers(place: str) -> str:
    """Return the file of judged answers that a user means: the file, or that of a run's folder."""
    uri = storage.absolute_uri(place)
    inside = RunFolder(uri).predictions()
    if not uri.endswith(".jsonl") and storage.exists(inside):
        return inside
    return uri


def compare_files(a: str, b: str) -> dict[str, Any]:
    """Compare two files, at paths or URIs. Raises `DataError` where they cannot be compared."""
    paired = pair(read(a), read(b), a, b)
    rules = semantics(a), semantics(b)
    if all(rules) and rules[0] != rules[1]:
        raise DataError(
            f"--files: {a} was scored under semantics {rules[0]}, {b} under {rules[1]}; score one "
            "of them again: ray-sql evaluate --predictions_file … --evaluate.semantics "
            f"{rules[0]}"
        )
    return {"a": a, "b": b, **compare(paired)}


def read(file: str) -> dict[Key, JudgedRow]:
    """Return the judged rows of a file by split and id.

    Raises `DataError` with the first line that holds no judged row, or one that came before.
    """
    text = storage.read_text(file, f"--files {file}")
    if text is None:
        raise DataError(
            f"--files {file}: no such file; give the predictions.jsonl of a run or an evaluation"
        )
    rows: dict[Key, JudgedRow] = {}
    lines: dict[Key, int] = {}
    for line, row in data.parse_lines(file, text).items():
        key = _key(row, f"{file}, line {line}")
        if key in rows:
            raise DataError(
                f"{file}, line {line}: id {key[1]!r} of split {key[0]!r} was on line {lines[key]} "
                "before"
            )
        rows[key], lines[key] = row, line
    return rows


def _key(row: Any, where: str) -> Key:
    for field in ("id", "verdict"):
        if not isinstance(row, dict) or field not in row:
            raise DataError(
                f"{where}: no field {field!r}; --files takes judged predictions, as "
                "`ray-sql evaluate --predictions_file` writes them"
            )
    if row["verdict"] not in get_args(VerdictName):
        raise DataError(
            f"{where}: verdict {row['verdict']!r} is none of {', '.join(get_args(VerdictName))}"
        )
    return str(row.get("split", "")), str(row["id"])


def semantics(file: str) -> str | None:
    """Return the rule that a file was judged under, if the `metrics.json` beside it names one.

    A rule that keeps DISTINCT is another one; it is written as its flags.
    """
    try:
        metrics = RunFolder(file.rpartition("/")[0]).read_metrics(Rules) or {}
    except DamagedFile:
        return None
    for model in ("tuned", "base", "file"):
        for scores in metrics.get(model, {}).values():
            if "semantics" not in scores:
                return None
            distinct = " --evaluate.keep_distinct" if scores.get("keep_distinct") else ""
            return f"{scores['semantics']}{distinct}"
    return None


def pair(
    a: Mapping[Key, JudgedRow], b: Mapping[Key, JudgedRow], file_a: str, file_b: str
) -> PairedRows:
    """Pair the questions in both files.

    Raises `DataError` if there are none, or if the same id means another question or task.
    """
    common = [key for key in a if key in b]
    if not common:
        raise DataError(
            f"--files: {file_a} ({len(a)} questions{_example(a)}) and {file_b} ({len(b)} questions"
            f"{_example(b)}) have no split and id in common"
        )
    task_a, task_b = _task(a), _task(b)
    if task_a != task_b:
        raise DataError(
            f"--files: {file_a} holds answers of task {task_a.name}, {file_b} of task {task_b.name}"
        )
    for key in common:
        _check_same_question(key, a[key], b[key], file_a, file_b)
    judged = [
        (a[key], b[key])
        for key in common
        if "gold_error" not in (a[key]["verdict"], b[key]["verdict"])
    ]
    if not judged:
        raise DataError(
            f"--files: the gold of all {len(common)} questions in common fails, so nothing was "
            "judged"
        )
    left_out = len(a) - len(common), len(b) - len(common), len(common) - len(judged)
    return PairedRows(judged, task_a, *left_out)


def _check_same_question(key: Key, a: JudgedRow, b: JudgedRow, file_a: str, file_b: str) -> None:
    for field in ("db_id", "question", "gold"):
        in_a, in_b = a.get(field), b.get(field)
        if in_a and in_b and in_a != in_b:
            raise DataError(
                f"--files: split {key[0]!r}, id {key[1]!r} has {field} {str(in_a)[:80]!r} in "
                f"{file_a}, but {str(in_b)[:80]!r} in {file_b}; score both against the same data"
            )


def _example(rows: Mapping[Key, JudgedRow]) -> str:
    split, name = next(iter(rows), ("", ""))
    return f", e.g. split {split!r} id {name!r}" if rows else ""


def _task(rows: Mapping[Key, JudgedRow]) -> Task:
    return SCHEMA if any("linking" in row for row in rows.values()) else SQL


def compare(paired: PairedRows) -> dict[str, Any]:
    """Return accuracies, their difference, paired test and verdict, in all and by group.

    Both tasks are compared by exact answers, schema linking by strict recall too. `discordant`
    holds the questions that only one of the two gets right.
    """
    total = _test(paired.rows)
    result = {
        "metric": SQL.metric if paired.task.executes_sql else "exact_match",
        "verdict": verdict(total),
        **total,
    }
    if not paired.task.executes_sql:
        result[paired.task.metric] = _test(paired.rows, is_right)
    result |= {
        "only_in_a": paired.only_in_a,
        "only_in_b": paired.only_in_b,
        "gold_errors": paired.gold_errors,
    }
    for name, field in GROUPS.items():
        keyed = [{"key": a.get(field) or "unknown", "pair": (a, b)} for a, b in paired.rows]
        groups = grouped(keyed, "key", HARDNESS if field == "hardness" else ())
        result[name] = {
            group: _test([row["pair"] for row in rows]) for group, rows in groups.items()
        }
    differing = [(a, b) for a, b in paired.rows if _is_correct(a) != _is_correct(b)]
    differing.sort(key=lambda rows: _is_correct(rows[1]))
    return result | {"discordant": [_discordant(a, b) for a, b in differing]}


def _is_correct(row: JudgedRow) -> bool:
    return bool(row["verdict"] == "correct")


def _test(
    rows: Sequence[tuple[JudgedRow, JudgedRow]], counts: Callable[[JudgedRow], bool] = _is_correct
) -> dict[str, Any]:
    """Return the accuracies of both sides and the paired test; `counts` tells right answers."""
    n, marks = len(rows), [(counts(a), counts(b)) for a, b in rows]
    right_a, right_b = (sum(side) for side in zip(*marks, strict=True))
    test = paired_test(marks)
    by_database = clustered([a for a, _ in rows], [b - a for a, b in marks])
    return {
        "n": n,
        "accuracy_a": right_a / n,
        "interval_a": interval(right_a, n),
        "accuracy_b": right_b / n,
        "interval_b": interval(right_b, n),
        "difference": (right_b - right_a) / n,
        **{f"difference_{name}": bounds for name, bounds in by_database.items()},
        **test.named("a", "b"),
        "resolvable_difference": resolvable_difference(n, test.only_a + test.only_b),
    }


def verdict(test: Mapping[str, Any]) -> str:
    """Say in words what the numbers of a test allow one to say."""
    n, p = test["n"], test["mcnemar_p"]
    if p > ALPHA:
        points = 100 * test["resolvable_difference"]
        can = "are too few to resolve any difference"
        if points < 100:
            can = f"resolve about {points:.1f} points"
        return (
            f"no significant difference at this size: {n:,} questions {can} (McNemar p = {p:.2g})"
        )
    better = "B" if test["difference"] > 0 else "A"
    points = 100 * abs(test["difference"])
    text = f"{better} is significantly better, by {points:.1f} points (McNemar p = {p:.2g})"
    low, high = test.get("difference_clustered_interval", (1, 1))
    if low <= 0 <= high:
        text += (
            "; but not on every choice of databases: resampled, the difference B − A lies in "
            f"[{_points(low)}, {_points(high)}] points"
        )
    return text


def _discordant(a: JudgedRow, b: JudgedRow) -> dict[str, Any]:
    shared = {key: a.get(key) for key in ("id", "split", "db_id", "hardness", "question", "gold")}
    sides = {
        f"{key}_{side}": row.get(key)
        for side, row in (("a", a), ("b", b))
        for key in ("predicted", "verdict", "error")
    }
    return {**shared, "right": "a" if _is_correct(a) else "b", **sides}


def listing(result: Mapping[str, Any]) -> str:
    """Return the comparison as text: scores, groups, then questions that only one gets right."""
    lines = [
        f"A  {result['a']}",
        f"B  {result['b']}",
        "",
        f"{result['n']:,} questions in common, judged in both",
    ]
    left_out = {
        "only in A": result["only_in_a"],
        "only in B": result["only_in_b"],
        "whose gold fails": result["gold_errors"],
    }
    lines += [f"left out: {count:,} {reason}" for reason, count in left_out.items() if count]
    lines += ["", *_scores(result["metric"], result), "", result["verdict"]]
    if recall := result.get(SCHEMA.metric):
        lines += ["", *_scores(SCHEMA.metric, recall), "", verdict(recall)]
    for name in GROUPS:
        if len(result[name]) > 1 or name != "by_split":
            lines += ["", *_table(name.removeprefix("by_"), result[name])]
    for side in ("a", "b"):
        questions = [row for row in result["discordant"] if row["right"] == side]
        lines += ["", f"{QUESTIONS.format(side=side.upper())}: {len(questions)}"]
        for question in questions:
            lines += ["", *_question(question)]
    return "\n".join(lines) + "\n"


def _scores(metric: str, test: Mapping[str, Any]) -> list[str]:
    resampled = ""
    if bounds := test.get("difference_clustered_interval"):
        resampled = f" [{_points(bounds[0])}, {_points(bounds[1])}], resampling databases"
    return [
        f"{metric.replace('_', ' ')}, 95 % intervals",
        f"  A       {percent(test['accuracy_a'], test['interval_a'])}",
        f"  B       {percent(test['accuracy_b'], test['interval_b'])}",
        f"  B − A   {_points(test['difference'])} points{resampled}",
        f"  only A is right on {test['only_a']}, only B on {test['only_b']}",
    ]


def _points(difference: float) -> str:
    return f"{100 * difference:+.1f}"


def _table(title: str, groups: Mapping[str, Mapping[str, Any]]) -> list[str]:
    width = max(len(title), *(len(name) for name in groups))
    lines = [f"{title:<{width}}      n      A %      B %   B − A   only A   only B        p"]
    for name, test in groups.items():
        a, b = 100 * test["accuracy_a"], 100 * test["accuracy_b"]
        lines.append(
            f"{name:<{width}}  {test['n']:>5}  {a:>7.1f}  {b:>7.1f} "
            f"{_points(test['difference']):>7}  {test['only_a']:>7}  {test['only_b']:>7}  "
            f"{test['mcnemar_p']:>7.2g}"
        )
    if len(groups) > 5:
        lines.append(f"(of {len(groups)} p values, one in twenty is below 0.05 by chance)")
    return lines


def _question(row: Mapping[str, Any]) -> list[str]:
    place = ", ".join(str(row[key]) for key in ("split", "db_id", "hardness") if row[key])
    lines = [
        f"  {row['id']}  ({place})",
        f"    question  {_on_one_line(row['question'])}",
        f"    gold      {_on_one_line(row['gold'])}",
    ]
    for side in ("a", "b"):
        reason = row[f"error_{side}"] or row[f"verdict_{side}"]
        note = "" if row["right"] == side else f"    ◄ {_on_one_line(reason)}"
        lines.append(f"    {side.upper()}         {_on_one_line(row[f'predicted_{side}'])}{note}")
    return lines


def _on_one_line(text: Any) -> str:
    return " ".join(str(text).split()) if text else "(none)"
