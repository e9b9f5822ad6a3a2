"""Words, numbers and dates of a text, written so that two spellings of one meet."""

from __future__ import annotations

import re
import unicodedata
from datetime import date
from typing import NamedTuple

_SYLLABLE = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"
_WORD = re.compile(rf"[{_SYLLABLE}]|(?:(?![{_SYLLABLE}])[^\W_])+")
_NUMBER = re.compile(r"(?<![\w.])-?\d{1,3}(?:,\d{3})+(?:\.\d+)?(?![\w])|(?<![\w.])-?\d+(?:\.\d+)?")
_QUOTED = re.compile(r"\"([^\"]+)\"|“([^”]+)”|«([^»]+)»|`([^`]+)`|(?<!\w)['‘]([^'’]+)['’](?!\w)")
_CAMEL = re.compile(r"(?<=[a-z])(?=[A-Z])")

_MONTHS = "jan feb mar apr may jun jul aug sep oct nov dec".split()
_MONTH = rf"(?P<month>{'|'.join(_MONTHS)})[a-z]*\.?"
_DAY = r"(?P<d>\d{1,2})(?:st|nd|rd|th)?"
_DATES = [
    re.compile(r"(?<!\d)(?P<y>\d{4})[-/.](?P<m>\d{1,2})[-/.](?P<d>\d{1,2})(?!\d)"),
    re.compile(r"(?<!\d)(?P<m>\d{1,2})[-/.](?P<d>\d{1,2})[-/.](?P<y>\d{4})(?!\d)"),
    re.compile(r"(?<!\d)(?P<d>\d{1,2})[-/.](?P<m>\d{1,2})[-/.](?P<y>\d{4})(?!\d)"),
    re.compile(rf"\b{_MONTH}\s+{_DAY},?\s+(?P<y>\d{{4}})\b", re.IGNORECASE),
    re.compile(rf"\b{_DAY}\s+(?:of\s+)?{_MONTH},?\s+(?P<y>\d{{4}})\b", re.IGNORECASE),
]


class Word(NamedTuple):
    """A word in folded spelling, and where it stands in its text."""

    text: str
    start: int
    end: int


def fold(text: str) -> str:
    """Return a text without case and accents."""
    parts = unicodedata.normalize("NFKD", text)
    bare = "".join(char for char in parts if not unicodedata.combining(char))
    return unicodedata.normalize("NFC", bare).casefold()


def words(text: str) -> list[str]:
    """Return the folded words of a text. A Chinese, Japanese or Korean sign is a word."""
    return _WORD.findall(fold(text))


def placed_words(text: str) -> list[Word]:
    """Return the folded words of a text with their places in it."""
    found = []
    for match in _WORD.finditer(text):
        found += [Word(one, match.start(), match.end()) for one in words(match[0])]
    return found


def name_words(name: str) -> list[str]:
    """Return the folded words of the name of a table or column: `firstName` has two."""
    return words(_CAMEL.sub(" ", name))


def quoted_spans(text: str) -> list[tuple[int, int]]:
    """Return where texts in quotes begin and end."""
    return [match.span() for match in _QUOTED.finditer(text)]


def numbers(text: str) -> set[float]:
    """Return the numbers of a text; `1,200` is one."""
    return {float(match[0].replace(",", "")) for match in _NUMBER.finditer(text)}


def dates(text: str) -> set[date]:
    """Return the dates of a text. `3/4/2024` is two: March and April."""
    found = set()
    for pattern in _DATES:
        for match in pattern.finditer(text):
            parts = match.groupdict()
            name = parts.get("month")
            month = _MONTHS.index(name[:3].lower()) + 1 if name else int(parts["m"])
            try:
                found.add(date(int(parts["y"]), month, int(parts["d"])))
            except ValueError:
                continue
    return found
