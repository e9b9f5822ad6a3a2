"""Find the cell values of a database that a question names.

Case, accents and the order of words do not matter, and words may be inflected or misspelt. Numbers
and dates are found in other forms.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date

from rapidfuzz import fuzz, process

from ray_sql.data.corpus import CellValue
from ray_sql.data.words import Word, dates, name_words, numbers, placed_words, quoted_spans, words
from ray_sql.database.cells import Cell, Cells, ColumnCells, printable

VALUES_VERSION = 1
"""Raise when the code below finds other values for the same question."""

ALIKE = 80.0
"""Two words are one, inflected or misspelt, from this ratio up (of 100)."""
SHORTEST = 4
"""Letters of the shortest word that may be inflected or misspelt."""
COVERED = 0.8
"""A value is found if a question has this share of its words, weighted by how rare they are."""
SURE = 0.95
"""From this score on, a value's words mean no shorter value besides."""
MOST_POSTINGS = 10_000
"""Values that are looked at for a question, those with its rarest words first."""
DIGITS = 3
"""A number with fewer digits is too frequent to mean a cell, unless it has a decimal point."""
CODES = 3
"""Cells of a column that are shown because the column is spoken of: no more, for they are codes."""
CODE_LENGTH = 8
"""Characters of the longest code."""
COLUMNS_PER_VALUE = 2
"""Columns that are shown with the same value."""
COMMON = frozenset(
    """a about after all also an and any are as at average be been before between both but by can
    count different do does each ever every find first for from give had has have her highest him
    his how i id if in is it its last least less list lowest many maximum me minimum more most name
    names no not number of off on one only or order other our out over per please same show so some
    tell than that the their them there these they this those to total two type under up us use
    used using value was we were what when where which who whose will with without year years you
    your""".split()
)
"""Words that mean no cell by themselves, unless they are in quotes."""
_SEXES = {
    "f": frozenset("female females woman women girl girls lady ladies".split()),
    "m": frozenset("male males man men boy boys gentleman gentlemen".split()),
}
"""The words that a letter stands for in columns of `_SEX_NAMES`."""
_SEX_NAMES = frozenset(["sex", "gender"])
ABBREVIATED = 3
"""Letters of the shortest begin of a word that may stand for it: `Sci.`"""


@dataclass(frozen=True)
class _Place:
    """A cell's column, by its index, and the cell."""

    column: int
    cell: Cell


@dataclass(frozen=True)
class _Found:
    """The values that a part of a question names, and how surely from 0 to 1."""

    score: float
    words: frozenset[int]
    """The places of the question's words that name it."""
    places: tuple[_Place, ...]


class ValueIndex:
    """The values of one database, to be found by the words of questions."""

    def __init__(self, cells: Cells) -> None:
        self._columns = cells.columns
        self._names = [
            (name_words(column.table), name_words(column.column)) for column in cells.columns
        ]
        self._schema_words = {word for table, column in self._names for word in [*table, *column]}
        self._coded = [index for index, column in enumerate(cells.columns) if _has_codes(column)]
        self._texts: list[str] = []
        self._places: list[list[_Place]] = []
        self._by_text: dict[str, int] = {}
        self._by_sorted: dict[str, list[int]] = defaultdict(list)
        self._by_initials: dict[str, list[int]] = defaultdict(list)
        self._with_word: dict[str, list[int]] = defaultdict(list)
        self._by_begin: dict[str, list[str]] = defaultdict(list)
        self._by_number: dict[float, list[_Place]] = defaultdict(list)
        self._by_date: dict[date, list[_Place]] = defaultdict(list)
        for index, column in enumerate(cells.columns):
            for cell in printable(column.cells):
                self._add(_Place(index, cell))
        for word in self._with_word:
            if len(word) >= SHORTEST and not word.isdigit():
                self._by_begin[word[0]].append(word)
        self._totals = [sum(map(self._weight, dict.fromkeys(text.split()))) for text in self._texts]
        self._longest = max((text.count(" ") + 1 for text in self._texts), default=0)

    def find(self, question: str, top: int) -> tuple[CellValue, ...]:
        """Return at most `top` values that a question names, the surest first."""
        asked = placed_words(question)
        known = {word.text for word in asked}
        found = [*self._exact(question, asked), *self._alike(question, asked)]
        found += [*self._initials(question, asked), *self._letters(asked)]
        found += [_Found(0.95, frozenset(), tuple(places)) for places in self._figures(question)]
        found += [_Found(0.5, frozenset(), (place,)) for place in self._codes(known)]
        chosen: dict[CellValue, None] = {}
        for one in _without_parts(found):
            for place in self._best_columns(one.places, known):
                column = self._columns[place.column]
                chosen[CellValue(column.table, column.column, _literal(place.cell))] = None
        return tuple(chosen)[:top]

    def _add(self, place: _Place) -> None:
        """Enter a cell by its words, its number and its date."""
        if not isinstance(place.cell, str):
            self._by_number[float(place.cell)].append(place)
            return
        parts = words(place.cell)
        if not parts:
            return
        if place.cell[0].isdigit() or place.cell[0] in "-+":
            for number in _whole_number(place.cell):
                self._by_number[number].append(place)
            for day in dates(place.cell):
                self._by_date[day].append(place)
        text = " ".join(parts)
        number = self._by_text.setdefault(text, len(self._texts))
        if number == len(self._texts):
            self._texts.append(text)
            self._places.append([])
            if len(parts) > 1:
                self._by_initials["".join(part[0] for part in parts)].append(number)
                self._by_sorted[" ".join(sorted(parts))].append(number)
            for part in dict.fromkeys(parts):  # a set has another order in each process
                self._with_word[part].append(number)
        self._places[number].append(place)

    def _exact(self, question: str, asked: Sequence[Word]) -> Iterator[_Found]:
        """Yield the values of which all words stand together in a question, in any order."""
        quoted = quoted_spans(question)
        for begin in range(len(asked)):
            for end in range(begin + 1, min(len(asked), begin + self._longest) + 1):
                span = asked[begin:end]
                text = " ".join(word.text for word in span)
                matches = [self._by_text[text]] if text in self._by_text else []
                score = 1.0
                if not matches and len(span) > 1:
                    matches = self._by_sorted.get(" ".join(sorted(text.split())), [])
                    score = 0.97
                if matches and self._means_a_cell(question, span, quoted):
                    places = [place for number in matches for place in self._places[number]]
                    yield _Found(score, frozenset(range(begin, end)), tuple(places))

    def _means_a_cell(
        self, question: str, span: Sequence[Word], quoted: Iterable[tuple[int, int]]
    ) -> bool:
        """Tell whether words that are a cell's are meant as one: not `name`, `first` or `3`."""
        if any(begin <= span[0].start and span[-1].end <= end for begin, end in quoted):
            return True
        texts = [word.text for word in span]
        if len(texts) == 1 and texts[0].isdigit():
            return len(texts[0]) >= DIGITS
        is_capital = span[0].start > 0 and question[span[0].start].isupper()
        if len(texts) == 1 and len(texts[0]) == 1:
            return is_capital
        if all(text in COMMON for text in texts):
            return False
        plain = all(text in COMMON or self._is_schema_word(text) for text in texts)
        return is_capital or not plain

    def _is_schema_word(self, text: str) -> bool:
        return text in self._schema_words or text.removesuffix("s") in self._schema_words

    def _initials(self, question: str, asked: Sequence[Word]) -> Iterator[_Found]:
        """Yield the values that are initials of a question's words, or have its words as theirs."""
        capital = [question[word.start].isupper() for word in asked]
        for begin in range(len(asked)):
            text = asked[begin].text
            is_code = question[asked[begin].start : asked[begin].end].isupper()
            if is_code and len(text) > 1 and text not in COMMON:
                for number in self._by_initials.get(text, []):
                    yield _Found(0.9, frozenset([begin]), tuple(self._places[number]))
            for end in range(begin + 2, min(len(asked), begin + 4) + 1):
                initials = "".join(word.text[0] for word in asked[begin:end])
                if all(capital[begin:end]) and initials in self._by_text:
                    number = self._by_text[initials]
                    yield _Found(0.9, frozenset(range(begin, end)), tuple(self._places[number]))

    def _letters(self, asked: Sequence[Word]) -> Iterator[_Found]:
        """Yield the letters that stand for a sex which a question names."""
        for index, word in enumerate(asked):
            for letter, meant in _SEXES.items():
                if word.text in meant and letter in self._by_text:
                    places = self._places[self._by_text[letter]]
                    fitting = [
                        place
                        for place in places
                        if not _SEX_NAMES.isdisjoint(self._names[place.column][1])
                    ]
                    yield _Found(0.9, frozenset([index]), tuple(fitting))

    def _alike(self, question: str, asked: Sequence[Word]) -> Iterator[_Found]:
        """Yield the values of which a question has most words, maybe inflected or misspelt."""
        spelt: dict[str, tuple[float, set[int]]] = {}
        for index, word in enumerate(asked):
            is_code = question[word.start : word.end].isupper()
            for known, ratio in self._spellings(word.text, is_code):
                before = spelt.get(known, (0.0, set[int]()))
                spelt[known] = max(before[0], ratio), before[1] | {index}
        scores: dict[int, float] = defaultdict(float)
        left = MOST_POSTINGS
        for known in sorted(spelt, key=lambda one: len(self._with_word[one])):
            matches = self._with_word[known]
            left -= len(matches)
            if left < 0:
                break
            for number in matches:
                scores[number] += self._weight(known) * spelt[known][0]
        for number, score in scores.items():
            share = score / self._totals[number]
            if share >= COVERED:
                parts = set(self._texts[number].split())
                places = [spelt[part][1] for part in parts if part in spelt]
                used = frozenset(index for part in places for index in part)
                if self._is_told(question, [asked[index] for index in used]):
                    yield _Found(0.95 * share, used, tuple(self._places[number]))

    def _is_told(self, question: str, used: Sequence[Word]) -> bool:
        """Tell whether words of a question say more than what tables and columns are called."""
        for word in used:
            is_code = len(word.text) > 1 and question[word.start : word.end].isupper()
            plain = word.text in COMMON or self._is_schema_word(word.text)
            tells = (len(word.text) >= DIGITS or len(used) > 1) and not word.text.isdigit()
            if is_code or (tells and not plain):
                return True
        return False

    def _spellings(self, word: str, is_code: bool) -> Iterator[tuple[str, float]]:
        """Yield the words of cells that a question's word may mean, with their likeness to 1."""
        if word in self._with_word:
            yield word, 1.0
            return
        if word in COMMON and not is_code:
            return
        others = [word.removesuffix("s"), f"{word}s"]
        if is_code:
            others.append(f"{word}a")  # US and USA
        yield from ((other, 0.97) for other in others if other in self._with_word)
        if len(word) < SHORTEST or word.isdigit():
            return
        near = process.extract(
            word, self._by_begin[word[0]], scorer=fuzz.ratio, score_cutoff=ALIKE, limit=5
        )
        yield from ((known, ratio / 100) for known, ratio, _ in near)
        begins = (word[:length] for length in range(ABBREVIATED, len(word) - 1))
        yield from ((begin, 0.88) for begin in begins if begin in self._with_word)

    def _weight(self, word: str) -> float:
        return math.log(1 + len(self._texts) / len(self._with_word[word]))

    def _figures(self, question: str) -> Iterator[list[_Place]]:
        """Yield the cells that are a number or a date of a question."""
        days = dates(question)
        for day in sorted(days):
            yield self._by_date.get(day, [])
        for number in sorted(numbers(question)):
            told = f"{number:g}".strip("-")
            if len(told.replace(".", "")) >= DIGITS or "." in told:
                yield self._by_number.get(number, [])

    def _codes(self, known: set[str]) -> Iterator[_Place]:
        """Yield all cells of columns that have a few, as `Yes` and `No`, and that are spoken of."""
        for index in self._coded:
            telling = [word for word in self._names[index][1] if word not in COMMON]
            if telling and _share(telling, known) == 1:
                yield from (_Place(index, cell) for cell in self._columns[index].cells)

    def _best_columns(self, places: Sequence[_Place], known: set[str]) -> list[_Place]:
        """Return the places of a value in the columns that a question's words fit best."""

        def unnamed(place: _Place) -> tuple[float, float]:
            table, column = self._names[place.column]
            return -_share(column, known), -_share(table, known)

        return sorted(places, key=unnamed)[:COLUMNS_PER_VALUE]


def _without_parts(found: Iterable[_Found]) -> Iterator[_Found]:
    """Yield what was found, the surest and longest first, without parts of what is sure."""
    taken: list[frozenset[int]] = []
    for one in sorted(found, key=lambda one: (-one.score, -len(one.words))):
        if one.places and not any(one.words and one.words < other for other in taken):
            yield one
            if one.score >= SURE:
                taken.append(one.words)


def _has_codes(column: ColumnCells) -> bool:
    """Tell whether a column has a few short texts only, and no other cells."""
    return 1 < len(column.cells) <= CODES and all(
        isinstance(cell, str) and cell.isprintable() and len(cell) <= CODE_LENGTH
        for cell in column.cells
    )


def _share(names: Sequence[str], known: set[str]) -> float:
    """Return the share of a name's words that a question has, in the singular or the plural."""
    said = sum(not known.isdisjoint({name, f"{name}s", name.removesuffix("s")}) for name in names)
    return said / max(1, len(names))


def _whole_number(cell: str) -> Iterator[float]:
    """Yield the number that a text is."""
    try:
        number = float(cell)
    except ValueError:
        return
    if math.isfinite(number):
        yield number


def _literal(cell: Cell) -> str:
    if isinstance(cell, str):
        return "'" + cell.replace("'", "''") + "'"
    return str(cell)
