"""The table of scores, as values that the terminal, `report.html` and the model card lay out."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ray_sql.data import corpus
from ray_sql.data.shown import ORACLE
from ray_sql.display import percent, printable
from ray_sql.metrics.paired import PairedTest
from ray_sql.tasks import Task

Scores = Mapping[str, Mapping[str, Any]]
"""The summary of each split, as `metrics.json` holds it for one model."""


@dataclass(frozen=True)
class ScoreLine:
    """One score of a split: a cell per model, in the order of the table's models."""

    kind: Literal["main", "level", "secondary"]
    """`level` is the main score on one level of hardness."""
    split: str
    label: str
    n: int
    cells: list[str]
    left_out: int = 0
    """Questions of the split that do not count, because their gold fails."""

    @property
    def count(self) -> str:
        """Return n as people read it."""
        return counted(self.n, self.left_out)


def score_lines(models: Mapping[str, Scores], task: Task) -> Iterator[ScoreLine]:
    """Yield the scores of each split: the main one, the same by hardness, then the secondary ones.

    Counts are those of the last model. A secondary score that no model has is left out.
    """
    last = list(models.values())[-1]
    for split, scores in last.items():
        by_model = [summary[split] for summary in models.values()]
        cells = [percent(each[task.metric], each["interval"], each["n"]) for each in by_model]
        yield ScoreLine(
            "main", split, task.label, scores["n"], cells, left_out=scores["gold_errors"]
        )
        for level, group in scores.get("by_hardness", {}).items():
            groups = [each["by_hardness"].get(level, group) for each in by_model]
            cells = [percent(each[task.metric], each["interval"]) for each in groups]
            yield ScoreLine("level", split, level, group["n"], cells)
        for key in secondary_scores(by_model, task):
            cells = [share_text(each, key) for each in by_model]
            n = scores.get(f"{key}_n", scores["n"])
            yield ScoreLine("secondary", split, task.secondary[key], n, cells)
        yield from way_lines(split, by_model, task)


WAYS = {
    "greedy": "greedy",
    "first_executable": "first that runs",
    "vote": "vote",
    "weighted_vote": "weighted vote",
    "repaired": "names repaired",
    "constrained": "names constrained",
}
"""Ways to choose an answer, with their labels."""


def way_lines(
    split: str, summaries: Sequence[Mapping[str, Any]], task: Task
) -> Iterator[ScoreLine]:
    """Yield the score of each way to choose an answer, and pass@k, where there are several."""
    last = summaries[-1]
    for way, label in WAYS.items():
        key = f"{task.metric}_{way}"
        if key in last:
            cells = [share_text(each, key) + _against_greedy(each, way) for each in summaries]
            yield ScoreLine("secondary", split, label, last["n"], cells)
    for key in (key for key in last if re.fullmatch(r"pass@\d+", key)):
        cells = [share_text(each, key) for each in summaries]
        yield ScoreLine("secondary", split, key, last["n"], cells)


def _against_greedy(scores: Mapping[str, Any], way: str) -> str:
    """Return the p of a way against the greedy answers, as ` p = 0.03`; empty for these."""
    test = scores.get(f"{way}_vs_greedy")
    return f" p = {test['mcnemar_p']:.2g}" if test else ""


def markdown(models: Mapping[str, Scores], task: Task) -> str:
    """Return the main and secondary scores as a Markdown table."""
    lines = [line for line in score_lines(models, task) if line.kind != "level"]
    if not lines:
        return "Nothing was scored."
    head = ["split", "score", "n", *models]
    cells = [[prose(line.split), line.label, line.count, *line.cells] for line in lines]
    table = [head, ["---"] * len(head), *cells]
    return "\n".join(f"| {' | '.join(row)} |" for row in table)


def prose(text: str) -> str:
    """Return a text as Markdown shows it: one line, in which no sign is Markdown's or HTML's."""
    return re.sub(r"([\\`*\[\]<>|#~$&]|(?<!\w)_|_(?!\w))", r"\\\1", one_line(text))


def one_line(text: str) -> str:
    """Return a text in one line, without what a terminal or a page would obey."""
    return printable(" ".join(text.split()))


def secondary_scores(summaries: Sequence[Mapping[str, Any]], task: Task) -> list[str]:
    """Return the keys of the secondary scores that at least one summary has."""
    return [key for key in task.secondary if any(key in summary for summary in summaries)]


def share_text(scores: Mapping[str, Any], key: str) -> str:
    """Write a secondary score with its interval; a dash where it was not measured."""
    if key not in scores:
        return "–"
    n = scores.get(f"{key}_n", scores["n"])
    return percent(scores[key], scores.get(f"{key}_interval"), n)


def counted(n: int, left_out: int) -> str:
    """Write n beside the questions that do not count: `1 of 2`."""
    return f"{n:,} of {n + left_out:,}" if left_out else f"{n:,}"


def notes(metrics: Mapping[str, Any], model: str) -> list[str]:
    """Return what must stand beside the scores of a model: what they leave out, and why."""
    splits = metrics[model].items()
    oracles = [
        f"{split}: prompts show the gold links, which nobody has for a new question: a bound"
        for split, _ in splits
        if split.endswith(ORACLE)
    ]
    return [*oracles, *(f"{split}: {note}" for split, scores in splits for note in _notes(scores))]


def _notes(scores: Mapping[str, Any]) -> Iterator[str]:
    n, failing, over = scores["n"], scores["gold_errors"], scores.get("gold_over_limits", 0)
    named = "; ".join(f"{row['id']}: {row['error']}" for row in scores.get("gold_left_out", [])[:3])
    if failing:
        more = ", …" if failing > 3 else ""
        of_all = f"{failing} of {n + failing} questions are not counted"
        yield f"{of_all}, for their gold fails ({named}{more})"
    if over:
        yield (
            f"{over} of these golds went over a limit: --evaluate.timeout, --evaluate.max_rows, "
            "--evaluate.max_bytes and --evaluate.max_sql_length raise it"
        )
    if unread := scores.get("exact_set_gold_unread", 0):
        read = scores.get("exact_set_match_n", 0)
        yield (
            f"exact set match counts {read} of {read + unread} questions: Spider's parser cannot "
            "read the gold of the others"
        )
    if unknown := scores.get("by_hardness", {}).get("unknown", {}).get("n", 0):
        yield f"hardness is unknown for {unknown} of {n} questions: Spider grades no such gold"
    if flagged := scores.get("flagged"):
        without = f"{corpus.counted(flagged, 'question')} whose gold the audit flags"
        yield f"without the {without}: {_accuracy(scores['unflagged'])}"
    elif "unflagged" in scores:
        yield "the audit flags the gold of none of these questions"
    if undetermined := scores.get("undetermined"):
        without = f"{undetermined} of them whose gold has several right results"
        yield f"without the {without}: {_accuracy(scores['determined'])}"
    for reason, count in scores.get("full_schema", {}).items():
        yield f"{count} of {n + failing} prompts show the full schema: {reason}"
    if "new_tokens_all" in scores:
        yield (
            f"all answers to a question took {scores['seconds_all']:.2f} s and "
            f"{scores['new_tokens_all']:.0f} new tokens; its greedy answer has "
            f"{scores['new_tokens_greedy']:.0f} of them"
        )
    if room := scores.get("no_room"):
        recall = room["gold_table_recall"]
        kept = "" if recall is None else f", and show {100 * recall:.1f} % of those that gold needs"
        yield f"{room['prompts']} of {n + failing} prompts have no room for all tables{kept}"
    if cut := scores.get("errors", {}).get("cut off", 0):
        yield (
            f"{cut} of {n} answers are not right and were cut off at --evaluate.max_new_tokens; "
            "a higher one lets them end"
        )


def _accuracy(scores: Mapping[str, Any]) -> str:
    """Write the accuracy over a part of the questions."""
    accuracy = percent(scores["execution_accuracy"], scores["interval"], scores["n"])
    return f"{accuracy} of n = {scores['n']:,}"


def paired_lines(metrics: Mapping[str, Any]) -> list[str]:
    """Return a sentence for each paired test of the tuned model in `metrics.json`."""
    lines = []
    for key, other in (("compared", "base"), ("compared_default", "default")):
        name = "the default settings" if other == "default" else other
        for split, test in metrics.get(key, {}).items():
            lines.append(
                f"{split}: tuned alone is right on {test['only_tuned']}, {name} alone on "
                f"{test[f'only_{other}']} (McNemar p = {test['mcnemar_p']:.2g})"
            )
    return lines


def verdict(metrics: Mapping[str, Any], split: str) -> str:
    """Say how the tuned model compares with its base on a split; empty where none was measured."""
    test = metrics.get("compared", {}).get(split)
    if test is None:
        return ""
    pair = PairedTest(test["only_base"], test["only_tuned"])
    words = "not shown to beat its base"
    if pair.b_is_better:
        words = "better than its base"
    elif pair.a_is_better:
        words = "worse than its base"
    return f"{words} (p = {pair.p:.2g})"
