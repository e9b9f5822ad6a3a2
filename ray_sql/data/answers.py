"""Read the SQL in an answer."""

from __future__ import annotations

import re


def parse_sql(text: str) -> str | None:
    """Return the SQL in a model's answer: its fenced block, or else its first statement.

    None means that there is none.
    """
    block = re.search(
        r"```(?:(?!(?:select|with|values)\b)[a-z]*[ \t]*\n|sql(?:ite)?\b)?(.*?)(?:```|\Z)",
        text,
        re.DOTALL | re.IGNORECASE,
    )
    if block:
        return _first_statement(one_line(block[1])) or None
    # SQL's words in capitals first: in lower case they are English too.
    for pattern in (r"\b(?:SELECT|WITH|VALUES)\b", r"(?i)\bselect\b"):
        start = re.search(pattern, text)
        if start:
            text = text[start.start() :].split("\n\n")[0]
            break
    return _first_statement(one_line(text)) or None


_PIECE = re.compile(
    r"""('[^']*'?|"[^"]*"?|`[^`]*`?|(?<![\w\])])\[[^\]\n]{0,200}\])"""
    r"""|(?:--[^\n]*|/\*.*?(?:\*/|\Z)|\s)+|(;)""",
    re.DOTALL,
)
"""A piece of SQL: quoted text (group 1), a run of comments and white space, or a semicolon (2).

A name in brackets is quoted text too; a bracket right after a word opens an array or its index.
"""


def one_line(sql: str) -> str:
    """Return SQL without line breaks and comments outside quotes.

    On one line, a comment would hide the rest.
    """
    return _PIECE.sub(lambda piece: piece[1] or piece[2] or " ", sql).strip()


def _first_statement(sql: str) -> str:
    """Return the text before the first semicolon outside quotes."""
    for piece in _PIECE.finditer(sql):
        if piece[2]:
            return sql[: piece.start()].strip()
    return sql.strip()
