"""The kinds of things that an audit finds, and a finding as a plain value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Kind = Literal[
    "does_not_run",
    "empty",
    "constant",
    "limit_tie",
    "row_order",
    "tie_order",
    "float_sum",
    "nulls_first",
    "text_numbers",
    "clock",
    "duplicate_columns",
    "near_duplicate",
    "public",
]
KINDS: tuple[Kind, ...] = get_args(Kind)

MEANING: dict[Kind, str] = {
    "does_not_run": "fails, or goes over a limit",
    "empty": "gives no row, or nothing but NULL: almost any wrong query agrees",
    "constant": "gives the same on tables without rows: it does not look at the data",
    "limit_tie": "LIMIT cuts rows that are equal by ORDER BY: which ones are left is open",
    "row_order": "gives other rows where the tables' rows lie in another order",
    "tie_order": "sorts by what is equal in several rows: their order is open",
    "float_sum": "adds fractions: the last digits depend on the order of rows",
    "nulls_first": "sorts, and NULL comes first: another database puts it last",
    "text_numbers": "compares numbers that are stored as text: 10 comes before 9",
    "clock": "reads the clock or draws at random: its result changes",
    "duplicate_columns": "gives the same column twice",
    "near_duplicate": "is asked almost alike in another split",
    "public": "is in a public test set",
}
"""Kind → its meaning, in words for a table."""

UNDETERMINED: tuple[Kind, ...] = ("limit_tie", "row_order", "tie_order", "float_sum", "clock")
"""Kinds by which a right answer may differ from gold."""


@dataclass(frozen=True)
class Flag:
    """One finding about a query, with what was seen, in words."""

    kind: Kind
    detail: str = ""
