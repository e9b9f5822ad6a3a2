"""Names of functions in the text of a query, of a view or of another function."""

import re
from collections.abc import Iterable

PLAIN = re.compile(r"[^\W\d][\w$]*")
"""A name that is one word. Operators are not, and names in quotes need not be."""


def outside(functions: list[tuple[str, bool, str]], refused: set[str]) -> set[str]:
    """Return the names of what the database's owner made that acts outside, alone or by another.

    `functions` are (name, whether it has rights of its own or hides its text, text).
    """
    found = {name for name, has_rights, _ in functions if has_rights}
    texts = [(name, text) for name, has_rights, text in functions if not has_rights]
    while more := {name for name, text in texts if used(refused | found, text) - {name}} - found:
        found |= more
    return found


def used(names: Iterable[str], sql: str) -> set[str]:
    """Return the names that stand in a text: as words, or anywhere if they are no words."""
    found, text = words(sql), sql.lower().replace('""', '"')
    return {name for name in names if name in (found if PLAIN.fullmatch(name) else text)}


def is_called(name: str, sql: str) -> bool:
    """Tell whether a name may be that of a call: a parenthesis or a comment comes next."""
    return re.search(rf"\b{name}\b[`\"]?\s*(?:\(|/\*|--|#)", sql, re.IGNORECASE) is not None


def words(sql: str) -> set[str]:
    """Return every word in lower case, inside comments and quotes too."""
    return {word.lower() for word in PLAIN.findall(sql)}
