"""Recognise columns that hold people's data, by their names and their cells."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator

from ray_sql.data.words import name_words
from ray_sql.database.cells import Cells, ColumnCells

LOOKED_AT = 200
"""Cells of a column that are looked at."""
SHARE = 0.5
"""A column is one of these if this share of its cells is."""

_IDENTIFIES = [
    {"email"},
    {"mail"},
    {"phone"},
    {"telephone"},
    {"mobile"},
    {"fax"},
    {"ssn"},
    {"passport"},
    {"iban"},
    {"card", "number"},
    {"credit", "card"},
    {"social", "security"},
    {"national", "id"},
    {"tax", "id"},
    {"identity", "number"},
    {"license", "number"},
]
"""Words of the name of a column that identifies a person, or leads to one."""
_TELLS = {"name", "firstname", "lastname", "surname", "forename", "nickname"} | {
    *("birthday", "birthdate", "birth", "dob", "address", "street")
}
"""Words of the name of a column that is about a person where such a column is beside it."""
_PATTERNS = [
    re.compile(r"[^@\s]+@[^@\s]+\.[a-z]{2,}", re.IGNORECASE),
    re.compile(r"(?=(?:\D*\d){8,15}\D*$)\+?[\d()][\d()./x -]*[-()./x ][\d()./x -]*"),
    re.compile(r"\+\d{8,15}"),
    re.compile(r"\d{3}-\d{2}-\d{4}"),
    re.compile(r"[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){3,7}(?: ?[A-Z0-9]{1,3})?"),
]
"""An e-mail address, phone numbers, an American identity number, a bank account."""
_DATE = re.compile(r"(\d{4}[-./]\d{1,2}[-./]\d{1,2}|\d{1,2}[-./]\d{1,2}[-./]\d{2,4})(\D.*)?")
_CARD = re.compile(r"\d{13,19}")


def people_columns(cells: Cells) -> list[str]:
    """Return, as `table.column`, the columns that hold people's data by all that shows.

    These are e-mail addresses, phone, identity and card numbers. In their tables they are names,
    addresses and birthdays, too.
    """
    tables: dict[str, list[ColumnCells]] = defaultdict(list)
    for column in cells.columns:
        tables[column.table].append(column)
    return [name for columns in tables.values() for name in _of_table(columns)]


def _of_table(columns: list[ColumnCells]) -> Iterator[str]:
    sure = {column.column for column in columns if _identifies(column)}
    for column in columns:
        tells = bool(sure) and not _TELLS.isdisjoint(name_words(column.column))
        if tells or column.column in sure:
            yield column.name


def _identifies(column: ColumnCells) -> bool:
    named = set(name_words(column.column))
    if any(words <= named for words in _IDENTIFIES):
        return True
    looked_at = [str(cell) for cell in column.cells[:LOOKED_AT]]
    return bool(looked_at) and sum(map(_is_contact, looked_at)) >= SHARE * len(looked_at)


def _is_contact(cell: str) -> bool:
    """Tell whether a cell is an address, or a number of a phone, a person, a card or an account."""
    if _DATE.fullmatch(cell):
        return False
    if any(pattern.fullmatch(cell) for pattern in _PATTERNS):
        return True
    digits = re.sub(r"[ -]", "", cell)
    return bool(_CARD.fullmatch(digits)) and _has_check_digit(digits)


def _has_check_digit(digits: str) -> bool:
    """Tell whether the last digit is Luhn's sum of the others, as on every card."""
    places = [int(digit) for digit in reversed(digits)]
    doubled = [sum(divmod(2 * digit, 10)) for digit in places[1::2]]
    return (sum(places[::2]) + sum(doubled)) % 10 == 0
