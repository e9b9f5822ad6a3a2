"""The parts of a query that Spider's judgements compare, as plain values."""

from dataclasses import dataclass
from typing import NamedTuple


class Unit(NamedTuple):
    """A column as "table.column" or "*", maybe under an aggregate."""

    aggregate: str
    column: str
    distinct: bool


class Term(NamedTuple):
    """A unit, or an arithmetic operation on two."""

    operation: str
    left: Unit
    right: Unit | None


class Condition(NamedTuple):
    """A comparison; of its values, only nested queries are kept."""

    negated: bool
    comparison: str
    term: Term
    values: "tuple[SpiderQuery | None, ...]"


class Conditions(NamedTuple):
    """A flat list of conditions and the words between them."""

    items: tuple[Condition, ...] = ()
    connectors: tuple[str, ...] = ()


@dataclass(frozen=True)
class SpiderQuery:
    """One SELECT with its clauses, and the query that a set operation adds to it."""

    distinct: bool
    select: tuple[tuple[str, Term], ...]
    tables: "tuple[str | SpiderQuery, ...]"
    on: Conditions
    where: Conditions
    group: tuple[Unit, ...]
    having: Conditions
    direction: str
    order: tuple[Term, ...]
    limited: bool
    combined: "tuple[str, SpiderQuery] | None" = None
