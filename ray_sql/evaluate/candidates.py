"""A question's answers: propose them, choose among them, judge all, and score each way of choosing.

Choosing sees no gold: it is given `Options`, which hold none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from ray_sql.config.sections import AnswersSection, Way
from ray_sql.data import repair
from ray_sql.data.linking import sqlglot_dialect
from ray_sql.database import Executor, Schema
from ray_sql.evaluate import choosing
from ray_sql.evaluate.choosing import Choices, Proposal
from ray_sql.evaluate.shares import interval, resampled, share
from ray_sql.generate import Answer, Candidate
from ray_sql.metrics.judged import JudgedRow, is_right
from ray_sql.metrics.paired import paired_test
from ray_sql.tasks import Task

Parse = Callable[[str], str | None]
Judge = Callable[[Sequence[JudgedRow], Sequence[str | None]], list[JudgedRow]]
"""Adds verdicts to rows, each on its database."""


@dataclass(frozen=True)
class Options:
    """The answers to one question, parsed; its gold is left out.

    `proposals` are its samples or beams. `first` is the greedy answer with its names mended or
    constrained as those of samples are. It is a candidate too.
    """

    database: str | None
    schema: Schema | None
    greedy: str | None
    constrained: Proposal | None
    first: Proposal
    proposals: Sequence[Proposal]

    @property
    def candidates(self) -> list[Proposal]:
        """Return what is chosen from; nothing where the greedy answer is the only one."""
        return [self.first, *self.proposals] if self.proposals else []


def options(
    answer: Answer, database: str | None, schema: Schema | None, parse: Parse, mend: bool
) -> Options:
    """Return an answer's options; with `mend`, names of samples that do not exist are replaced."""

    def propose(candidate: Candidate) -> Proposal:
        predicted = parse(candidate.raw)
        if mend:
            predicted = mended(predicted, schema)
        return Proposal(predicted, candidate.logprob)

    constrained = None if answer.constrained is None else propose(answer.constrained)
    greedy = Candidate(answer.raw, answer.new_tokens, answer.logprob)
    proposals = [propose(candidate) for candidate in answer.candidates]
    return Options(
        database, schema, parse(answer.raw), constrained, constrained or propose(greedy), proposals
    )


def mended(predicted: str | None, schema: Schema | None) -> str | None:
    """Return SQL or links with names that exist, where that is clear."""
    if predicted is None or schema is None:
        return predicted
    if predicted.lstrip().startswith("{"):
        return repair.repair_links(predicted, schema)
    return repair.repair_sql(predicted, schema, sqlglot_dialect(schema.dialect))


def choose(
    questions: Sequence[Options], task: Task, settings: AnswersSection, executor: Executor
) -> list[Choices]:
    """Return the answer that each way chooses for each question."""
    if task.executes_sql:
        semantics, keep_distinct = settings.semantics, settings.keep_distinct
        asked = [(question.database, question.candidates) for question in questions]
        results = choosing.run_candidates(asked, executor, semantics, keep_distinct)
        choices = [
            choosing.choose_sql(question.greedy, question.candidates, result, semantics)
            for question, result in zip(questions, results, strict=True)
        ]
    else:
        choices = [
            choosing.choose_links(question.greedy, question.candidates) for question in questions
        ]
    sampled = any(question.proposals for question in questions)
    for question, choice in zip(questions, choices, strict=True):
        if not sampled:
            choice.chosen = {"greedy": question.greedy}
        if settings.ground == "repair":
            choice.chosen["repaired"] = mended(question.greedy, question.schema)
        if question.constrained:
            choice.chosen["constrained"] = question.constrained.predicted
    return choices


def add_verdicts(
    rows: Sequence[JudgedRow],
    questions: Sequence[Options],
    choices: Sequence[Choices],
    judge: Judge,
    way: Way,
    task: Task,
) -> list[JudgedRow]:
    """Return judged rows that hold the answer and the verdict of each way, and of each sample.

    An answer that several ways choose is judged once.
    """
    wanted: dict[tuple[int, str | None], JudgedRow] = {}
    for index, (row, question, choice) in enumerate(zip(rows, questions, choices, strict=True)):
        sampled = [proposal.predicted for proposal in question.proposals]
        for predicted in (*choice.chosen.values(), *sampled):
            wanted[index, predicted] = row | {"predicted": predicted}
    databases = [questions[index].database for index, _ in wanted]
    judged = dict(zip(wanted, judge(list(wanted.values()), databases), strict=True))
    form = "sql" if task.executes_sql else "links"
    complete = []
    for index, (question, choice) in enumerate(zip(questions, choices, strict=True)):
        ways = {}
        for name, predicted in choice.chosen.items():
            verdict = judged[index, predicted]
            ways[name] = {
                "predicted": predicted,
                "verdict": verdict["verdict"],
                "right": is_right(verdict),
            }
        row = judged[index, choice.chosen[way]] | {"chosen_by": way, "ways": ways}
        if question.proposals:
            row["candidates"] = [
                {
                    form: proposal.predicted,
                    "logprob": proposal.logprob,
                    "verdict": judged[index, proposal.predicted]["verdict"],
                    "right": is_right(judged[index, proposal.predicted]),
                    "result_key": key,
                }
                for proposal, key in zip(question.proposals, choice.result_keys[1:], strict=True)
            ]
        complete.append(row)
    return complete


def scores(rows: Sequence[JudgedRow], task: Task) -> dict[str, Any]:
    """Return the score of each way with its interval and paired test, and pass@k.

    `rows` are those that count. Empty where each question has one answer.
    """
    chosen = [row for row in rows if "ways" in row]
    if not chosen:
        return {}
    summary: dict[str, Any] = {"chosen_by": chosen[0]["chosen_by"]}
    for way in chosen[0]["ways"]:
        right = [row["ways"][way]["right"] for row in chosen]
        name = f"{task.metric}_{way}"
        summary[name] = share(sum(right), len(right))
        summary[f"{name}_interval"] = interval(sum(right), len(right))
        if way != "greedy":
            pairs = ((row["ways"]["greedy"]["right"], row["ways"][way]["right"]) for row in chosen)
            summary[f"{way}_vs_greedy"] = paired_test(pairs).named("greedy", way)
    return summary | _pass_at(chosen) | _cost(chosen)


def _cost(rows: Sequence[JudgedRow]) -> dict[str, float]:
    """Return mean tokens and seconds of a question; empty where its answers came from a file."""
    asked = [row for row in rows if "all_new_tokens" in row]
    names = {
        "new_tokens_greedy": "new_tokens",
        "new_tokens_all": "all_new_tokens",
        "seconds_all": "generation_seconds",
    }
    return {name: fmean(row[column] for row in asked) for name, column in names.items() if asked}


def _pass_at(rows: Sequence[JudgedRow]) -> dict[str, Any]:
    samples = min((len(row.get("candidates", ())) for row in rows), default=0)
    summary: dict[str, Any] = {}
    for k in choosing.sizes(samples):
        chances = [
            choosing.pass_at_k(sum(one["right"] for one in row["candidates"]), samples, k)
            for row in rows
        ]
        summary[f"pass@{k}"] = sum(chances) / len(chances)
        summary |= resampled(f"pass@{k}", [(chance, 1) for chance in chances])
    return summary
