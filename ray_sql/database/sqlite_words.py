"""Parse SQLite's SQL as SQLite does: most of its keywords may also be names, without quotes.

sqlglot shares its keywords among dialects, so a column called `any`, `outer` or `window` is lost or
refused. SQLite takes a keyword for a name wherever it cannot be the keyword. That rule is applied
to the words of a query before sqlglot parses them.
"""

from collections.abc import Sequence

from sqlglot import Token, TokenType, exp
from sqlglot.dialects import SQLite

from ray_sql.database.query import MOST_NODES

RESERVED = frozenset(
    """
    add all alter and as autoincrement between case check collate commit constraint create default
    deferrable delete distinct drop else escape exists foreign from group having in index insert
    intersect into is isnull join limit not nothing notnull null on or order primary references
    returning select set table then to transaction union unique update using values when where
    except with
    """.split()
)
"""Keywords that are never names without quotes."""

_JOIN_WORDS = {"cross", "full", "inner", "left", "natural", "outer", "right"}
_FRAME_WORDS = {"rows", "range", "groups"}
_FRAME_ENDS = {"preceding", "following", "row"}
_QUOTED = (TokenType.IDENTIFIER, TokenType.STRING)
_CONSTANTS = (
    TokenType.NUMBER,
    TokenType.HEX_STRING,
    TokenType.NULL,
    TokenType.TRUE,
    TokenType.FALSE,
    TokenType.PARAMETER,
    TokenType.PLACEHOLDER,
    TokenType.CURRENT_DATE,
    TokenType.CURRENT_TIME,
    TokenType.CURRENT_TIMESTAMP,
)
_NO_NAME_AFTER = {
    *_QUOTED,
    *_CONSTANTS,
    TokenType.VAR,
    TokenType.R_PAREN,
    TokenType.END,
    TokenType.ISNULL,
    TokenType.NOTNULL,
    TokenType.ASC,
    TokenType.DESC,
    TokenType.ALIAS,
    TokenType.COLON,
}
"""Words after which no column may come; AS is followed by an alias or a type."""

_ODD_WORDS = {"any", "connect_by_root", "if", "prior"}
"""No keywords, and yet sqlglot reads them as operators."""


def tokenize(sql: str) -> list[Token]:
    """Return the tokens of a query; a keyword that stands for a name is an identifier."""
    tokens: list[Token] = SQLite().tokenize(sql)
    for place, token in enumerate(tokens):
        if _may_be_name(token) and _is_name(tokens, place):
            token.token_type = TokenType.IDENTIFIER
    return tokens


def _may_be_name(token: Token) -> bool:
    word = token.text.lower()
    if token.token_type is TokenType.VAR:
        return word in _ODD_WORDS
    known = token.token_type in _QUOTED or token.token_type in _CONSTANTS
    return not known and word.isidentifier() and word not in RESERVED


def parse(sql: str, tokens: Sequence[Token]) -> list[exp.Expr | None]:
    """Return the statements that tokens of `tokenize` make."""
    statements: list[exp.Expr | None] = (
        SQLite().parser(max_nodes=MOST_NODES).parse(list(tokens), sql)
    )
    for statement in filter(None, statements):
        for name in statement.find_all(exp.Identifier):
            start = name.meta.get("start")
            if start is not None and (sql[start].isalnum() or sql[start] == "_"):
                name.set("quoted", False)
    return statements


def _is_name(tokens: Sequence[Token], place: int) -> bool:
    """Tell whether a keyword is a name here, because it could not be the keyword."""
    before, following = tokens[max(0, place - 2) : place], tokens[place + 1 : place + 2]
    if not before:
        return False
    if before[-1].token_type is TokenType.DOT:
        return True
    word, last = tokens[place].text.lower(), _word(before[-1:])
    next_word = _word(following)
    if next_word == "(" or before[-1].token_type in _NO_NAME_AFTER:
        return False
    if word in _JOIN_WORDS and last in _JOIN_WORDS:
        return False
    if last == "not" and before[0].token_type in _NO_NAME_AFTER:
        return False
    if (last, word) in (("with", "recursive"), ("exclude", "no"), ("exclude", "ties")):
        return False
    if word in _FRAME_WORDS and last == "(" and _word(before[:1]) in ("over", "as"):
        return False
    return next_word not in _FRAME_ENDS


def _word(tokens: Sequence[Token]) -> str:
    return tokens[0].text.lower() if tokens else ""
