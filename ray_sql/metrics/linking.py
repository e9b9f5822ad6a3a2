"""Score predicted schema links (table -> columns) against the names that the gold SQL reads.

For the SQL that follows, a missing name is fatal and a spare one costs a few tokens. So look at
strict recall (all gold names kept) first, and at precision after it.
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
    """Counts of the names in gold, in the prediction, and in both."""

    gold: int
    predicted: int
    shared: int

    @property
    def scores(self) -> PRF:
        """Return precision, recall and F1.

        Where gold has no names, none was missed: recall is 1. An answer without names has a
        precision of 1 only where gold has none either, else 0.
        """
        return PRF(
            _share(self.shared, self.predicted or self.gold),
            _share(self.shared, self.gold),
            _share(2 * self.shared, self.gold + self.predicted),
        )

    @property
    def exact(self) -> bool:
        """Tell whether the prediction has all of gold's names and no other."""
        return self.gold == self.shared == self.predicted

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
    """Predicted tables and columns outside the schema; a column of an unknown table counts too."""
    parsed: bool
    """False where no links could be read from the answer; it then scores as an empty one."""

    @property
    def exact(self) -> bool:
        """Tell whether the prediction has all of gold's tables and columns and no other."""
        return self.table_exact and self.columns.exact

    @property
    def table_exact(self) -> bool:
        """Tell whether the prediction has all of gold's tables and no other."""
        return self.parsed and self.tables.exact

    @property
    def table_strict_recall(self) -> bool:
        """Tell whether every gold table is kept."""
        return self.parsed and self.tables.shared == self.tables.gold

    @property
    def strict_recall(self) -> bool:
        """Tell whether every gold name is kept, so the right SQL can still be written."""
        return self.table_strict_recall and self.columns.shared == self.columns.gold


@dataclass(frozen=True)
class LinkingSummary:
    """The links of many questions; values without a comment are shares.

    Micro counts every name once, macro every question once.
    """

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
    """Score one prediction; None is an unparsable answer.

    Without `schema` no name counts as hallucinated.
    """
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


@dataclass(frozen=True)
class SpareNames:
    """The unneeded names in a prediction, and `of_` how many there could be.

    Columns are those of the tables that it names.
    """

    tables: int
    of_tables: int
    columns: int
    of_columns: int


def spare_names(gold: Links, predicted: Links, schema: Links) -> SpareNames:
    """Count the names of the schema that a prediction has and gold does not need."""
    (gold_tables, gold_columns), (tables, columns) = _names(gold), _names(predicted)
    all_tables, all_columns = _names(schema)
    unneeded = {name for name in all_columns - gold_columns if name[0] in tables}
    return SpareNames(
        len((tables & all_tables) - gold_tables),
        len(all_tables - gold_tables),
        len(columns & unneeded),
        len(unneeded),
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
    """Return the tables, and the (table, column) pairs, in lower case."""
    tables: set[str] = set()
    columns: set[Name] = set()
    for table, names in links.items():
        tables.add(table.lower())
        columns |= {(table.lower(), name.lower()) for name in names}
    return tables, columns


def _share(part: int, total: int) -> float:
    return part / total if total else 1.0


def _mean(scores: Sequence[PRF]) -> PRF:
    return PRF(
        fmean(score.precision for score in scores),
        fmean(score.recall for score in scores),
        fmean(score.f1 for score in scores),
    )
