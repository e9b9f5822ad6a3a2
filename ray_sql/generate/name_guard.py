"""Decide, while SQL is being written, whether its names can still be names that exist."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from ray_sql.data.answers import after_thoughts, code_blocks
from ray_sql.data.linking import sqlglot_dialect
from ray_sql.database.places import dialect_of
from ray_sql.generate.begun_query import BegunQuery
from ray_sql.generate.questions import Question
from ray_sql.generate.sql_words import LEXER, SIGNS

ANY_LETTER = "\N{LATIN SMALL LETTER E WITH ACUTE}"
"""Stands for a letter of which some bytes are still to come."""
REMEMBERED = 10_000
"""Beginnings of queries that are remembered for a database."""


@dataclass(frozen=True)
class NameGuard:
    """Tells for one database which beginnings of a query have only names that exist."""

    tables: Mapping[str, Collection[str]]
    """Table → its columns, in lower case."""
    dialect: str = "sqlite"
    _begun: dict[str, BegunQuery] = field(default_factory=dict, repr=False, compare=False)
    """Beginning of a query → the meaning before its last token: most calls add a token to one."""

    def allows_answer(self, text: str, complete: bool = False) -> bool:
        """Tell whether an answer may begin like this: it is free but for the SQL in its block."""
        block = next(code_blocks(after_thoughts(text)), None)
        if block is None or "\n" not in block.text:
            return True
        if block.closed or complete:
            return self.allows(block.code + "\n", complete=True)
        if block.code.endswith("\N{REPLACEMENT CHARACTER}") and not self._is_ascii:
            return True  # a letter of which some bytes are still to come
        code = re.sub("\N{REPLACEMENT CHARACTER}+$", ANY_LETTER, block.code)
        return self.allows(re.sub("\n`{1,2}$", "\n", code))

    def allows(self, sql: str, complete: bool = False) -> bool:
        """Tell whether a query may begin like this, or be like this if it is `complete`."""
        tokens = [match for match in LEXER.finditer(sql) if match.lastgroup != "space"]
        query, known = self._known_beginning(sql, tokens)
        for index, token in enumerate(tokens[known:], known):
            if index == len(tokens) - 2:  # what follows may change the meaning of the last one
                self._remember(sql[: token.end()], query)
            following = tokens[index + 1].group() if index + 1 < len(tokens) else ""
            unfinished = token.end() == len(sql)
            if not query.fits(token, following, unfinished):
                return False
            query.read(token, following)
        return not complete or query.may_end()

    def _known_beginning(self, sql: str, tokens: Sequence[re.Match[str]]) -> tuple[BegunQuery, int]:
        """Return the meaning behind the longest beginning that was read, and its tokens' number."""
        for index in range(len(tokens) - 1, 0, -1):
            query = self._begun.get(sql[: tokens[index].end()])
            if query:
                return query.copy(), index
        return self._start.copy(), 0

    @cached_property
    def _is_ascii(self) -> bool:
        """Tell whether no name has letters of several bytes."""
        return all(
            name.isascii() for table, columns in self.tables.items() for name in (table, *columns)
        )

    @cached_property
    def _start(self) -> BegunQuery:
        return BegunQuery(self.tables, self.dialect)

    def _remember(self, beginning: str, query: BegunQuery) -> None:
        if len(self._begun) >= REMEMBERED:
            self._begun.clear()
        self._begun[beginning] = query.copy()


def guards(
    names: Mapping[str, Mapping[str, Collection[str]]], questions: Iterable[Question]
) -> dict[str, NameGuard]:
    """Return a guard for the database of each question, in the dialect of its place.

    The SQL of DuckDB and MySQL is not read here: their answers are free.
    """
    dialects = {
        question.db_id: sqlglot_dialect(dialect_of(question.database) or "sqlite")
        for question in questions
    }
    return {
        db_id: NameGuard(names[db_id], dialect)
        for db_id, dialect in dialects.items()
        if dialect in SIGNS
    }
