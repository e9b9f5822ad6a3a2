"""Two files of judged predictions, question by question: is one model better, and on which questions do they differ?

    ray-sql compare A/predictions.jsonl B/predictions.jsonl

Nothing is executed again: verdicts are taken as they stand in the files, paired by split and id. Both must have been scored against
the same gold, and under the same semantics, which is known where `metrics.json` still lies beside a file.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from ray_sql import data
from ray_sql.config import CompareConfig
from ray_sql.display import Display, percent
from ray_sql.errors import DataError
from ray_sql.evaluate.scoring import Row, clustered
from ray_sql.metrics import VerdictName, mcnemar, resolvable_difference, wilson_interval
from ray_sql.metrics.judged import HARDNESS, grouped, is_right
from ray_sql.store import storage
from ray_sql.store.run_folder import RunFolder

Key = tuple[str, str]
"""Split and id of a question."""

ALPHA = 0.05
"""p above which a difference is called not significant."""

QUESTIONS = "--- questions that only A gets right"
"""Where the listing goes on with single questions."""


@dataclass(frozen=True)
class Paired:
    """The questions that both files judge, in the order of the first, and how many had to be left out."""

    rows: list[tuple[Row, Row]]
    only_in_a: int
    only_in_b: int
    gold_errors: int


def run(config: CompareConfig) -> dict[str, Any]:
    """Compare the two files of `config.files`, write `compare.json` and `compare.txt`; returns what the former holds."""
    display = Display()
    files = [storage.absolute_uri(file) for file in config.files]
    if config.dry_run:
        display.line(f"would compare {files[0]} with {files[1]} and write {config.run_dir}")
        return {}
    paired = pair(read(files[0]), read(files[1]), files)
    rules = [semantics(file) for file in files]
    if all(rules) and rules[0] != rules[1]:
        raise DataError(
            f"--files: {files[0]} was scored under semantics {rules[0]}, {files[1]} under {rules[1]}; score one of them again: "
            f"ray-sql evaluate --predictions_file … --evaluate.semantics {rules[0]}"
        )
    result = {"a": files[0], "b": files[1], **compare(paired)}
    text = listing(result)
    storage.write_text(f"{config.run_dir}/compare.txt", text)
    storage.write_text(
        f"{config.run_dir}/compare.json", json.dumps(result, indent=2, ensure_ascii=False) + "\n"
    )
    display.line(text.split(f"\n\n{QUESTIONS}")[0])
    display.line(f"\nquestions on which they differ  {config.run_dir}/compare.txt")
    return result


def read(file: str) -> dict[Key, Row]:
    """The judged rows of a file by split and id; raises `DataError` with the line of the first that is none."""
    try:
        text = storage.read_text(file)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"--files {file}: cannot be read as UTF-8 text ({' '.join(str(error).split())})"
        ) from None
    if text is None:
        raise DataError(
            f"--files {file}: no such file; give the predictions.jsonl of a run or an evaluation"
        )
    rows: dict[Key, Row] = {}
    lines: dict[Key, int] = {}
    for line, row in data.parse_lines(file, text).items():
        key = _key(row, f"{file}, line {line}")
        if key in rows:
            raise DataError(
                f"{file}, line {line}: id {key[1]!r} of split {key[0]!r} was on line {lines[key]} before"
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
    """Under which rule the rows of a file were judged, if the `metrics.json` beside it says so."""
    try:
        metrics = RunFolder(file.rpartition("/")[0]).read_metrics() or {}
    except ValueError:
        return None
    scores = [one for name in ("tuned", "base", "file") for one in metrics.get(name, {}).values()]
    if not scores or "semantics" not in scores[0]:
        return None
    # with DISTINCT kept it is another rule, and said as one asks for it
    return str(scores[0]["semantics"]) + (
        " --evaluate.keep_distinct" if scores[0].get("keep_distinct") else ""
    )


def pair(a: Mapping[Key, Row], b: Mapping[Key, Row], files: Sequence[str]) -> Paired:
    """The questions in both; raises `DataError` where there are none, or where the same id means another question."""
    common = [key for key in a if key in b]
    if not common:
        raise DataError(
            f"--files: {files[0]} ({len(a)} questions{_example(a)}) and {files[1]} ({len(b)} questions{_example(b)}) have no "
            "split and id in common"
        )
    if len({_task(rows) for rows in (a, b)}) == 2:
        raise DataError(
            f"--files: {files[0]} holds answers of task {_task(a)}, {files[1]} of task {_task(b)}"
        )
    for key in common:
        for field in ("db_id", "question", "gold"):
            one, other = a[key].get(field), b[key].get(field)
            if one and other and one != other:
                raise DataError(
                    f"--files: split {key[0]!r}, id {key[1]!r} has {field} {str(one)[:80]!r} in {files[0]}, but "
                    f"{str(other)[:80]!r} in {files[1]}; score both against the same data"
                )
    judged = [
        (a[key], b[key])
        for key in common
        if "gold_error" not in (a[key]["verdict"], b[key]["verdict"])
    ]
    if not judged:
        raise DataError(
            f"--files: the gold of all {len(common)} questions in common fails, so nothing was judged"
        )
    return Paired(judged, len(a) - len(common), len(b) - len(common), len(common) - len(judged))


def _example(rows: Mapping[Key, Row]) -> str:
    split, name = next(iter(rows), ("", ""))
    return f", e.g. split {split!r} id {name!r}" if rows else ""


def _task(rows: Mapping[Key, Row]) -> str:
    return "schema" if any("linking" in row for row in rows.values()) else "sql"


def compare(paired: Paired) -> dict[str, Any]:
    """Accuracies, difference, paired test and verdict, in all and by split, hardness and database; and what differs."""
    schema = any("linking" in row for row, _ in paired.rows)
    total = _test(paired.rows)
    recalled = {"strict_recall": _test(paired.rows, is_right)} if schema else {}
    pairs = [(a, b) for a, b in paired.rows if _exact(a) != _exact(b)]
    groups = {}
    for name, field in (
        ("by_split", "split"),
        ("by_hardness", "hardness"),
        ("by_database", "db_id"),
    ):
        keyed = [{"key": a.get(field) or "unknown", "pair": (a, b)} for a, b in paired.rows]
        parts = grouped(keyed, "key", HARDNESS if field == "hardness" else ())
        groups[name] = {part: _test([one["pair"] for one in rows]) for part, rows in parts.items()}
    return {
        "metric": "exact_match" if schema else "execution_accuracy",
        "verdict": verdict(total),
        **total,
        **recalled,
        "only_in_a": paired.only_in_a,
        "only_in_b": paired.only_in_b,
        "gold_errors": paired.gold_errors,
        **groups,
        "discordant": [_discordant(a, b) for a, b in sorted(pairs, key=lambda one: _exact(one[1]))],
    }


def _exact(row: Row) -> bool:
    return bool(row["verdict"] == "correct")


def _test(
    rows: Sequence[tuple[Row, Row]], counts: Callable[[Row], bool] = _exact
) -> dict[str, Any]:
    """The accuracies of both sides, where `counts` says which answers count, and the paired test of their difference."""
    n, marks = len(rows), [(counts(a), counts(b)) for a, b in rows]
    in_a, in_b = (sum(side) for side in zip(*marks, strict=True))
    only_a, only_b = sum(a and not b for a, b in marks), sum(b and not a for a, b in marks)
    intervals = [wilson_interval(count, n) for count in (in_a, in_b)]
    by_database = clustered([a for a, _ in rows], [b - a for a, b in marks])
    return {
        "n": n,
        "accuracy_a": in_a / n,
        "interval_a": [intervals[0].low, intervals[0].high],
        "accuracy_b": in_b / n,
        "interval_b": [intervals[1].low, intervals[1].high],
        "difference": (in_b - in_a) / n,
        **{f"difference_{name}": value for name, value in by_database.items()},
        "only_a": only_a,
        "only_b": only_b,
        "mcnemar_p": mcnemar(only_a, only_b),
        "resolvable_difference": resolvable_difference(n, only_a + only_b),
    }


def verdict(test: Mapping[str, Any]) -> str:
    """What the numbers allow one to say, in words."""
    n, p = test["n"], test["mcnemar_p"]
    if p > ALPHA:
        found = test["resolvable_difference"]
        can = (
            f"resolve about {100 * found:.1f} points"
            if found < 1
            else "are too few to resolve any difference"
        )
        return (
            f"no significant difference at this size: {n:,} questions {can} (McNemar p = {p:.2g})"
        )
    better = "B" if test["difference"] > 0 else "A"
    text = f"{better} is significantly better, by {100 * abs(test['difference']):.1f} points (McNemar p = {p:.2g})"
    low, high = test.get("difference_clustered_interval", (1, 1))
    if low <= 0 <= high:
        text += (
            f"; but not on every choice of databases: resampled, the difference B − A lies in [{_points(low)}, "
            f"{_points(high)}] points"
        )
    return text


def _discordant(a: Row, b: Row) -> dict[str, Any]:
    shared = {key: a.get(key) for key in ("id", "split", "db_id", "hardness", "question", "gold")}
    sides = {
        f"{key}_{side}": row.get(key)
        for side, row in (("a", a), ("b", b))
        for key in ("predicted", "verdict", "error")
    }
    return {**shared, "right": "a" if _exact(a) else "b", **sides}


def listing(result: Mapping[str, Any]) -> str:
    """The whole comparison as text to read: scores, groups, then every question that only one of the two got right."""
    metric = result["metric"].replace("_", " ")
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
    lines += [f"left out: {count:,} {why}" for why, count in left_out.items() if count]
    lines += ["", *_scores(metric, result), "", result["verdict"]]
    if "strict_recall" in result:
        lines += [
            "",
            *_scores("strict recall", result["strict_recall"]),
            "",
            verdict(result["strict_recall"]),
        ]
    for name in ("by_split", "by_hardness", "by_database"):
        if len(result[name]) > 1 or name != "by_split":
            lines += ["", *_table(name.removeprefix("by_"), result[name])]
    for side in ("a", "b"):
        found = [one for one in result["discordant"] if one["right"] == side]
        lines += ["", f"{QUESTIONS.replace(' A ', f' {side.upper()} ')}: {len(found)}"]
        for one in found:
            lines += ["", *_question(one)]
    return "\n".join(lines) + "\n"


def _scores(metric: str, test: Mapping[str, Any]) -> list[str]:
    return [
        f"{metric}, 95 % intervals",
        f"  A       {percent(test['accuracy_a'], test['interval_a'])}",
        f"  B       {percent(test['accuracy_b'], test['interval_b'])}",
        f"  B − A   {_points(test['difference'])} points{_resampled(test)}",
        f"  only A is right on {test['only_a']}, only B on {test['only_b']}",
    ]


def _points(difference: float) -> str:
    return f"{100 * difference:+.1f}"


def _resampled(test: Mapping[str, Any]) -> str:
    if "difference_clustered_interval" not in test:
        return ""
    low, high = test["difference_clustered_interval"]
    return f" [{_points(low)}, {_points(high)}], resampling databases"


def _table(title: str, groups: Mapping[str, Mapping[str, Any]]) -> list[str]:
    width = max(len(title), *(len(name) for name in groups))
    lines = [f"{title:<{width}}      n      A %      B %   B − A   only A   only B        p"]
    for name, test in groups.items():
        a, b, difference = (
            100 * test["accuracy_a"],
            100 * test["accuracy_b"],
            _points(test["difference"]),
        )
        lines.append(
            f"{name:<{width}}  {test['n']:>5}  {a:>7.1f}  {b:>7.1f} {difference:>7}  {test['only_a']:>7}  {test['only_b']:>7}  "
            f"{test['mcnemar_p']:>7.2g}"
        )
    if len(groups) > 5:
        lines.append(f"(of {len(groups)} p values, one in twenty is below 0.05 by chance)")
    return lines


def _question(one: Mapping[str, Any]) -> list[str]:
    place = ", ".join(str(part) for part in (one["split"], one["db_id"], one["hardness"]) if part)
    lines = [
        f"  {one['id']}  ({place})",
        f"    question  {_flat(one['question'])}",
        f"    gold      {_flat(one['gold'])}",
    ]
    for side in ("a", "b"):
        reason = one[f"error_{side}"] or one[f"verdict_{side}"]
        note = "" if one["right"] == side else f"    ◄ {_flat(reason)}"
        lines.append(f"    {side.upper()}         {_flat(one[f'predicted_{side}'])}{note}")
    return lines


def _flat(text: Any) -> str:
    return " ".join(str(text).split()) if text else "(none)"
