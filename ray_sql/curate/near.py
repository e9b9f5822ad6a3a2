"""Find pairs that are almost the same, in a dataset or in public test sets.

Two are near where they ask one database the same question, but for a few words that say little. Or
where their SQL is the same but for its literals.
"""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rapidfuzz import fuzz, process
from sqlglot import Dialect, TokenType
from sqlglot.errors import SqlglotError

from ray_sql.config.files import read_text
from ray_sql.data.corpus import Example
from ray_sql.data.linking import sqlglot_dialect
from ray_sql.database import Schema
from ray_sql.errors import DataError

ALIKE = 94
"""Similarity of two questions' words, of 100, from which they count as one."""
MOST_COMPARED = 5_000
"""Questions of a database that are compared word by word, one with all; more take minutes."""
LONG_SQL = 12
"""Tokens from which equal SQL is no accident."""
_LITERALS = (TokenType.STRING, TokenType.NUMBER)
_SMALL = frozenset(
    """
    a all an and are be by can could did display do does each every find for from get give had has
    have i in is it list many me much name of on or please return s show tell that the their them
    there these they this those to us want was we were what which who whose with would you
    """.split()
)
"""Words without which a question is the same."""


@dataclass(frozen=True)
class Reading:
    """The dialect of a database's queries, and its names in lower case; None where unknown."""

    dialect: str = "sqlite"
    names: frozenset[str] | None = None

    @classmethod
    def of(cls, schema: Schema) -> Reading:
        """Return how queries on a database are read."""
        own = schema.lower_names().items()
        names = frozenset(name for table, columns in own for name in (table, *columns))
        return cls(sqlglot_dialect(schema.dialect), names)

    def is_literal(self, kind: TokenType, text: str) -> bool:
        """Tell whether a word is a literal: in SQLite `"x"` is one where nothing is called x."""
        if kind is TokenType.IDENTIFIER and self.dialect == "sqlite" and self.names is not None:
            return text not in self.names
        return kind in _LITERALS


def tokens(sql: str, reading: Reading, literals: bool = False) -> list[str]:
    """Return a query's words in lower case; each literal is `?`, unless they are asked for."""
    try:
        found = Dialect.get_or_raise(reading.dialect).tokenize(sql.rstrip("; \n"))
    except SqlglotError:
        return sql.lower().split()
    written = ((token.token_type, token.text.lower()) for token in found)
    return [
        "?" if not literals and reading.is_literal(kind, text) else text for kind, text in written
    ]


def words(question: str) -> list[str]:
    """Return the words that say something, in lower case; "how many" stays apart from "which"."""
    counted = re.sub(r"\bhow (many|much)\b|\bnumber of\b|\bcount\b", "howmany", question.lower())
    return [word for word in re.findall(r"\w+", counted) if word not in _SMALL]


def groups(examples: Sequence[Example], schemas: Mapping[str, Schema]) -> list[int]:
    """Return a number for each example; those that are near to each other share it."""
    parents = list(range(len(examples)))
    for one, other in _pairs(examples, schemas):
        parents[_root(parents, other)] = _root(parents, one)
    return [_root(parents, place) for place in range(len(examples))]


def _root(parents: list[int], place: int) -> int:
    while parents[place] != place:
        parents[place] = parents[parents[place]]
        place = parents[place]
    return place


def _pairs(examples: Sequence[Example], schemas: Mapping[str, Schema]) -> Iterator[tuple[int, int]]:
    """Yield places of examples that are near."""
    readings = {db_id: Reading.of(schema) for db_id, schema in schemas.items()}
    first: dict[tuple[str, ...], int] = {}
    said: dict[str, list[tuple[int, str]]] = defaultdict(list)
    for place, example in enumerate(examples):
        asked = " ".join(words(example.question)) or example.question.lower()
        shape = " ".join(tokens(example.gold, readings.get(example.db_id, Reading())))
        for key in ((example.db_id, "sql", shape), (example.db_id, "question", asked)):
            yield first.setdefault(key, place), place
        said[example.db_id].append((place, asked))
    for asked_here in said.values():
        yield from _alike(asked_here[:MOST_COMPARED])


def _alike(asked: Sequence[tuple[int, str]]) -> Iterator[tuple[int, int]]:
    texts = [text for _, text in asked]
    for row, (place, text) in enumerate(asked):
        near = process.extract(
            text, texts[:row], scorer=fuzz.token_sort_ratio, score_cutoff=ALIKE, limit=3
        )
        for _, _, other in near:
            yield asked[other][0], place


# Public test sets, known by hashes


def hashes(example: Example) -> Iterator[str]:
    """Yield the hashes by which a pair is known again: of its question, and of long SQL."""
    yield _hash("question", re.findall(r"\w+", example.question.lower()))
    written = tokens(example.gold, Reading(), literals=True)
    if len(written) >= LONG_SQL:
        yield _hash("sql", written)


def _hash(kind: str, parts: Iterable[str]) -> str:
    return f"{kind} {hashlib.sha256(' '.join(parts).encode()).hexdigest()[:32]}"


def read_hashes(file: Path) -> frozenset[str]:
    """Return the hashes of a file that `write_hashes` wrote. Raises `DataError` for another."""
    way_out = "make it with ray-sql audit --write_hashes"
    lines = read_text(file, way_out, f"--hashes {file}").split("\n")
    found = frozenset(line for line in lines if line)
    strange = next(
        (one for one in found if not re.fullmatch(r"(question|sql) [0-9a-f]{32}", one)), ""
    )
    if strange or not found:
        raise DataError(f"--hashes {file}: holds {strange[:40] or 'nothing'!r}; {way_out}")
    return found


def hash_lines(examples: Iterable[Example]) -> str:
    """Return the hashes of examples as text, a line each, in an order that tells nothing."""
    found = {one for example in examples for one in hashes(example)}
    return "".join(f"{one}\n" for one in sorted(found))
