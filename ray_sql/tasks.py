"""The tasks: words of the prompt, form of the answer, scores and their labels.

A third task is one more record here, and its judge in `evaluate/scoring.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

TaskName = Literal["sql", "schema"]


@dataclass(frozen=True)
class Task:
    """One task. Scores are named by their keys in `metrics.json`; labels are for people."""

    name: TaskName
    system: str
    """The system turn of its prompts."""
    fence: str
    """The language of the fenced block that holds an answer."""
    executes_sql: bool
    """Answers are SQL, judged by executing them; else they are links, judged by comparing names."""
    metric: str
    """The main score, by which models are chosen and compared."""
    label: str
    tie_break: str
    """The score that decides between models with equal main scores."""
    secondary: Mapping[str, str]
    """Scores shown beside the main one, with their labels, where they were measured."""
    hub_tag: str
    hub_label: str
    purpose: str
    """The sentence of the model card on what the model does, after its subject."""
    metric_meaning: str
    """The sentence of the model card on the main score, without its rule and full stop."""
    caveat: str
    """The warning of the model card: how an answer may be wrong."""

    def objective(self, scores: Mapping[str, Any]) -> tuple[float, float]:
        """Return (main score, tie-break) of a summary; higher is better."""
        return scores[self.metric], scores[self.tie_break]

    def rule(self, scores: Mapping[str, Any]) -> str:
        """Name the rule that results were compared by, as ` (spider)`; empty for links."""
        return f" ({scores['semantics']})" if self.executes_sql else ""


SQL = Task(
    name="sql",
    system=(
        "You write SQL. Given a database schema and a question, answer with one SQL query in a "
        "sql code block."
    ),
    fence="sql",
    executes_sql=True,
    metric="execution_accuracy",
    label="execution accuracy",
    tie_break="valid_sql",
    secondary={
        "valid_sql": "valid SQL",
        "exact_set_match": "exact set match",
        "soft_f1": "soft F1",
        "r_ves": "R-VES (if the machine was idle)",
    },
    hub_tag="text-to-sql",
    hub_label="text to SQL",
    purpose="answers a question about a database, given its schema, with one SQL query.",
    metric_meaning=(
        "Execution accuracy: the share of questions whose SQL, executed, gives the result of the "
        "reference query"
    ),
    caveat="SQL may run and still answer another question",
)

SCHEMA = Task(
    name="schema",
    system=(
        "You find what a query needs. Given a database schema and a question, answer with the "
        "tables and columns needed, as JSON in a json code block."
    ),
    fence="json",
    executes_sql=False,
    metric="strict_recall",
    label="strict recall",
    tie_break="column_f1",
    secondary={
        "completed_strict_recall": "strict recall, links completed",
        "exact_match": "exact match",
        "table_f1": "table F1",
        "column_f1": "column F1",
        "unparsable": "unparsable",
    },
    hub_tag="schema-linking",
    hub_label="schema linking",
    purpose=(
        "names the tables and columns of a database that a question needs, given its schema, as "
        "JSON (schema linking)."
    ),
    metric_meaning=(
        "Strict recall: the share of questions of which every table and column that is needed was "
        "named"
    ),
    caveat="An answer may leave out what is needed",
)

TASKS: Mapping[TaskName, Task] = {task.name: task for task in (SQL, SCHEMA)}
