"""How well predicted schema links (table -> columns) cover the tables and columns that the gold SQL reads.

For the SQL that follows, a missing name is fatal and a spare one costs a few tokens: look at strict recall (all gold
names kept) first, and at precision after it.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

Links = Mapping[str, Iterable[str]]
"""Columns by table; names are compared lower-cased."""
Name = tuple[str, str]


@dataclass(frozen=True)
class PRF:
    """Precision, recall and F1, as shares between 0 and 1."""

    precision: float
    recall: float
    f1: float


@dataclass(frozen=True)
class Counts:
    """How many names are in gold, in the prediction, and in both."""

    gold: int
    predicted: int
    shared: int

    @property
    def scores(self) -> PRF:
        """Precision, recall, F1; a share of no names at all is 1, for nothing was wrong or missed."""
        precision = self.shared / self.predicted if self.predicted else 1.0
        recall = self.shared / self.gold if self.gold else 1.0
        total = self.gold + self.predicted
        return PRF(precision, recall, 2 * self.shared / total if total else 1.0)

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(
            self.gold + other.gold, self.predicted + other.predicted, self.shared + other.shared
        )


@dataclass(frozen=True)
class LinkingScore:
    """One question's links against gold."""

    tables: Counts
    columns: Counts
    hallucinated: int
    """Predicted tables and columns that the schema does not have; a column of an unknown table counts too."""
    parsed: bool
    """False where the answer held no links at all that could be read; it then scores as an empty one."""

    @property
    def exact(self) -> bool:
        """Whether the prediction has all of gold's tables and columns and nothing else."""
        return self.parsed and all(
            kind.gold == kind.shared == kind.predicted for kind in (self.tables, self.columns)
        )

    @property
    def table_exact(self) -> bool:
        """Whether the prediction has all of gold's tables and no other."""
        return self.parsed and self.tables.gold == self.tables.shared == self.tables.predicted

    @property
    def table_strict_recall(self) -> bool:
        """Whether every gold table is kept."""
        return self.parsed and self.tables.shared == self.tables.gold

    @property
    def strict_recall(self) -> bool:
        """Whether every gold table and column is kept, so that the right SQL can still be written."""
        return self.table_strict_recall and self.columns.shared == self.columns.gold


@dataclass(frozen=True)
class LinkingSummary:
    """The links of many questions: micro counts every name once, macro every question once; the rest are shares."""

    questions: int
    table_micro: PRF
    table_macro: PRF
    column_micro: PRF
    column_macro: PRF
    table_exact: float
    exact: float
    table_strict_recall: float
    strict_recall: float
    hallucinated: int
    """Names, over all questions."""
    questions_hallucinating: int
    unparsable: int
    """Answers."""


def score_links(gold: Links, predicted: Links | None, schema: Links | None = None) -> LinkingScore:
    """Score one prediction; None is an answer that could not be parsed. Without `schema` nothing is a hallucination."""
    gold_tables, gold_columns = _names(gold)
    tables, columns = _names(predicted or {})
    unknown = 0
    if schema is not None:
        known_tables, known_columns = _names(schema)
        unknown = len(tables - known_tables) + len(columns - known_columns)
    return LinkingScore(
        tables=Counts(len(gold_tables), len(tables), len(gold_tables & tables)),
        columns=Counts(len(gold_columns), len(columns), len(gold_columns & columns)),
        hallucinated=unknown,
        parsed=predicted is not None,
    )


def summarise_links(scores: Sequence[LinkingScore]) -> LinkingSummary:
    """Aggregate the scores of at least one question."""
    if not scores:
        raise ValueError("no linking score to summarise")
    none = Counts(0, 0, 0)
    return LinkingSummary(
        questions=len(scores),
        table_micro=sum((score.tables for score in scores), none).scores,
        table_macro=_mean([score.tables.scores for score in scores]),
        column_micro=sum((score.columns for score in scores), none).scores,
        column_macro=_mean([score.columns.scores for score in scores]),
        table_exact=fmean(score.table_exact for score in scores),
        exact=fmean(score.exact for score in scores),
        table_strict_recall=fmean(score.table_strict_recall for score in scores),
        strict_recall=fmean(score.strict_recall for score in scores),
        hallucinated=sum(score.hallucinated for score in scores),
        questions_hallucinating=sum(score.hallucinated > 0 for score in scores),
        unparsable=sum(not score.parsed for score in scores),
    )


def _names(links: Links) -> tuple[set[str], set[Name]]:
    tables = {table.lower() for table in links}
    return tables, {
        (table.lower(), column.lower()) for table, columns in links.items() for column in columns
    }


def _mean(scores: Sequence[PRF]) -> PRF:
    return PRF(
        fmean(score.precision for score in scores),
        fmean(score.recall for score in scores),
        fmean(score.f1 for score in scores),
    )
