"""Read an answer: what stands behind the thoughts, in a code block, as SQL.

Where several code blocks hold a query, the last one is the answer: those before it look something
up, or are drafts. `generate` ends an answer by `is_complete`. So both know the same thoughts and
the same blocks.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

THOUGHTS = {
    "<think>": "</think>",
    "<thinking>": "</thinking>",
    "<thought>": "</thought>",
    "<reasoning>": "</reasoning>",
    "<seed:think>": "</seed:think>",
    "[THINK]": "[/THINK]",
    "◁think▷": "◁/think▷",
    "<|START_THINKING|>": "<|END_THINKING|>",
    "<|begin_of_thought|>": "<|end_of_thought|>",
    "<|channel>thought": "<channel|>",
    "<|channel|>analysis": "<|channel|>final<|message|>",
    "<|channel|>commentary": "<|channel|>final<|message|>",
    "to=self<|message|>": "to=user<|message|>",
}
"""The marks that begin and end a model's thoughts: Qwen's and DeepSeek's first, gpt-oss' last."""
_BEGIN = "|".join(map(re.escape, THOUGHTS))
_THOUGHTS_BEGIN = re.compile(rf"\s*(?:{_BEGIN})")
_PROMPT_END = re.compile(rf"({_BEGIN})\s*\Z")
_THOUGHTS_END = re.compile(
    # in quotes it is a word; the last one is what gpt-oss writes, without its special tokens
    rf"(?:{'|'.join(map(re.escape, set(THOUGHTS.values())))})(?!['\"%])"
    r"|\Aanalysis(?s:.*?)assistantfinal"
)

FENCE_SIGNS = "`~"
_FENCE = re.compile(r"`{4,5}(?!`)|```|^[ \t]*~{3,}", re.MULTILINE)
_SQL_NAME = re.compile(
    r"[ \t]*(?:(?:[a-z]+[-/]?)?sql(?:ite)?\d*|postgres|duckdb|bigquery|snowflake|oracle)\b",
    re.IGNORECASE,
)
"""A block's language, if it is SQL: sql, sqlite3, t-sql, pl/sql, postgresql, and the like."""
_ONE_WORD = re.compile(r"(?!(?:select|with|values)\b)[a-z][\w.+#/-]*\Z", re.IGNORECASE)
_STATEMENT = re.compile(
    r"[ \t]*(?:\(|--|/\*|(?:select|with|values|insert|update|delete|replace|merge|create|alter"
    r"|drop|pragma|explain)\b)",
    re.IGNORECASE,
)
_OTHER_LANGUAGES = {"bash", "csv", "json", "markdown", "output", "py", "python", "sh", "text"}

_PREFIX = re.compile(r"\s*(?:sql(?:ite)?|query|answer)[ \t]*:", re.IGNORECASE)
_QUERY_START = re.compile(
    r"(?:^\([\s(]{0,9}|`)?\b(?:SELECT\b|WITH\b|VALUES\b"
    r"|(?i:with\s+(?:recursive\s+)?\S+\s*(?:\([^()]*\)\s*)?as\s*(?:(?:not\s+)?materialized\s*)?\())",
    re.MULTILINE,
)
_LOWER_CASE_START = re.compile(r"\bselect\b", re.IGNORECASE)
_MAIN_VERB = re.compile(r"(?:\A|\))(?:select|values|insert|update|delete)\b", re.IGNORECASE)
_BLANK_LINE = re.compile(r"\n[ \t\r]*\n")
_WORD = re.compile(r"\w+|\S")
_EXPECT_MORE = set(
    ", ( AND AS ALL BY DISTINCT EXCEPT FROM HAVING IN INTERSECT JOIN NOT ON OR SELECT UNION WHERE "
    "WITH".split()
)
"""Words after which a query cannot end."""
_CLAUSES = set(
    ") , AND CROSS EXCEPT FETCH FROM FULL GROUP HAVING INNER INTERSECT JOIN LEFT LIMIT NATURAL "
    "OFFSET ON OR ORDER OUTER RIGHT UNION WHERE WINDOW".split()
)
"""Words that begin no query but go on with one."""


@dataclass(frozen=True)
class CodeBlock:
    """A fenced block. `text` is all between the fences, the language too."""

    text: str
    closed: bool

    @property
    def code(self) -> str:
        """The text without the words behind the opening fence: a language, a title, options."""
        line, newline, rest = self.text.partition("\n")
        if newline and _ONE_WORD.match(line.strip()):
            return rest
        named = _SQL_NAME.match(line)
        code = line[named.end() :] if named else line
        if newline and not _STATEMENT.match(code):
            return rest
        return code + newline + rest

    @property
    def is_query(self) -> bool:
        """Tell whether it holds a query, and is not in another language."""
        language = _WORD.match(self.text)
        if language and language[0].lower() in _OTHER_LANGUAGES:
            return False
        return one_line(self.code).lower().lstrip("( ").startswith(("select", "with", "values"))


def after_thoughts(text: str) -> str:
    """Return what a model says behind its thoughts: nothing if they have no end."""
    *_, answer = _THOUGHTS_END.split(text)
    return "" if _THOUGHTS_BEGIN.match(answer) else answer


def thoughts_begun(prompt: str) -> str:
    """Return the mark that a prompt ends with, so that an answer begins in its thoughts."""
    mark = _PROMPT_END.search(prompt)
    return mark[1] if mark else ""


def has_thoughts(text: str) -> bool:
    """Tell whether an answer has marks of thoughts."""
    return bool(_THOUGHTS_BEGIN.match(text) or _THOUGHTS_END.search(text))


def code_blocks(text: str) -> Iterator[CodeBlock]:
    """Yield the fenced blocks of a text; the last one may have no closing fence.

    A fence is three backticks or more, anywhere, or three tildes at the begin of a line. The
    closing one is at least as long as the opening one.
    """
    position = 0
    while opening := _FENCE.search(text, position):
        fence = opening[0].strip()
        line_start = "^[ \t]*" if fence.startswith("~") else ""
        closing = re.compile(f"{line_start}{fence}{fence[0]}*|\\Z", re.MULTILINE).search(
            text, opening.end()
        )
        assert closing
        position = closing.end()
        yield CodeBlock(text[opening.end() : closing.start()], closed=bool(closing[0]))


def is_complete(text: str) -> bool:
    """Tell whether a model's answer has its code block: one that is closed, behind the thoughts.

    A prompt asks for one block, so the first one ends the answer.
    """
    return any(block.closed for block in code_blocks(after_thoughts(text)))


def parse_sql(text: str) -> str | None:
    """Return the SQL in a model's answer, on one line; None where there is none.

    It stands behind the thoughts. Of several code blocks, the last closed one with a query counts.
    Without a block, it is the first query in the text.
    """
    text = after_thoughts(text)
    block = answer_block(text)
    if block is None:
        return _first_statement(one_line(_without_a_block(text))) or None
    return _first_statement(one_line(block.code)) or None


def answer_block(text: str) -> CodeBlock | None:
    """Return the last closed block with a query, or the next best; None without a block."""
    blocks = list(code_blocks(text))
    if not blocks:
        return None
    return max(enumerate(blocks), key=lambda at: (at[1].is_query, at[1].closed, at[0]))[1]


def unwrap_sql(text: str) -> str:
    """Return the SQL of a line that may be a whole answer; plain SQL stays to the byte.

    An answer has thoughts, a code block, or a prefix such as `SQL:`.
    """
    if has_thoughts(text) or _FENCE.search(text) or _PREFIX.match(text):
        return parse_sql(text) or ""
    return text


def _without_a_block(text: str) -> str:
    """Return the first query of a text without code blocks, up to where prose goes on.

    A blank line ends it, unless the query must go on, or does with the next word.
    """
    # SQL's words in capitals first: in lower case they are English too.
    start = _QUERY_START.search(text) or _LOWER_CASE_START.search(text)
    if not start:
        return text
    in_brackets = text[: start.start()].endswith("(")
    text = text[start.start() :]
    if text.startswith("`"):
        return text[1:].partition("`")[0]
    written = str.upper if start[0].isupper() else str.lower
    depth, position, has_verb, last = 0, 0, False, ""
    for piece in _PIECE.finditer(text):
        token = text[position : piece.start()]
        has_verb = has_verb or bool(depth <= 0 and _MAIN_VERB.search(token))
        depth += token.count("(") - token.count(")")
        last, position = token or last, piece.end()
        if depth < 0 and in_brackets:
            return text[: piece.start() - len(token) + token.rindex(")")]
        if piece[1]:
            last = piece[1]
        elif piece[2]:
            return text[: piece.start()]
        elif depth <= 0 and has_verb and _BLANK_LINE.search(piece[0]):
            following = _WORD.match(text, position)
            word = following[0] if following else ""
            # in capitals behind a query in small letters, it begins a sentence
            goes_on = word == written(word) and word.upper() in _CLAUSES
            if not goes_on and last.upper() not in _EXPECT_MORE and not last.endswith((",", "(")):
                return text[: piece.start()]
    return text


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
