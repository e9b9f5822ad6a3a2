"""Check a query's words as Spider's parser splits them, which decides some verdicts by itself."""

import re
from collections.abc import Sequence
from itertools import takewhile

from sqlglot import Token, TokenType

_NAMES_OR_VALUES = (TokenType.STRING, TokenType.IDENTIFIER)
_UNKNOWN = {"<>", "==", "true", "false"}
_UNKNOWN_PAIRS = {("distinct", "on"), ("nulls", "first"), ("nulls", "last")}
_NUMBERS_IN_CODE = (TokenType.HEX_STRING, TokenType.BIT_STRING, TokenType.BYTE_STRING)
_BEFORE_CONDITION = {"where", "and", "or", "on", "having", "not", "is", "("}


class UnreadableError(Exception):
    """Spider's parser would reject this."""


def first_statement(tokens: Sequence[Token]) -> list[Token]:
    """Return the tokens before the first semicolon: Spider's parser never reads on."""
    return list(takewhile(lambda token: token.token_type is not TokenType.SEMICOLON, tokens))


def aliases(tokens: Sequence[Token]) -> dict[str, str]:
    """Return the word after an AS → the word before it, over the whole text."""
    return {
        tokens[place + 1].text.lower(): tokens[place - 1].text.lower()
        for place, token in enumerate(tokens[:-1])
        if token.token_type is TokenType.ALIAS
    }


def check_spelling(sql: str, tokens: Sequence[Token]) -> None:
    """Reject good SQL that does not split into words which Spider's parser knows.

    A comment is words to it too. It accepts one that comes after everything it reads (an ORDER BY);
    here a comment is always rejected.

    Raises:
        UnreadableError: names the word.
    """
    if not tokens or tokens[0].token_type not in (TokenType.SELECT, TokenType.L_PAREN):
        raise UnreadableError("no query")
    previous = ""
    for token in tokens:
        word = token.text.lower()
        if token.comments or word in _UNKNOWN or (word == "not" and previous in _BEFORE_CONDITION):
            raise UnreadableError(word)
        if token.token_type in _NUMBERS_IN_CODE or (previous, word) in _UNKNOWN_PAIRS:
            raise UnreadableError(word)
        if token.token_type in _NAMES_OR_VALUES and (
            sql[token.start] in "[`" or re.search("[\"']", word)
        ):
            raise UnreadableError(word)
        touches_left = _is_wordy(sql[token.start - 1 : token.start])
        touches_right = _is_wordy(sql[token.end + 1 : token.end + 2])
        if word in ("=", "+", "-", "*", "/") and touches_left:
            raise UnreadableError(word)
        if word in ("=", "!=", ">=", "<=", "+", "*", "/") and touches_right:
            raise UnreadableError(word)
        previous = word


def _is_wordy(character: str) -> bool:
    return character.isalnum() or (character != "" and character in "_\"'.-")
