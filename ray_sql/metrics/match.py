"""Compare two results under one of three published judgements, reproduced to the letter.

The same predictions score up to seven points apart under them, so a score without its semantics
means nothing. Under all three, values compare as in Python: 1 equals 1.0, 0.1 + 0.2 does not equal
0.3, and text is no number.
"""

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal, assert_never

from sqlparse.engine import FilterStack
from sqlparse.sql import Token
from sqlparse.tokens import Comment

from ray_sql.database import MOST_SQL, ResultRow, Rows

Semantics = Literal["spider", "bird", "strict"]
MOST_CELLS = 10_000_000
"""Cells that the search for an order of columns reads in vain, in seconds."""


def execution_match(
    gold: Rows, predicted: Rows, *, semantics: Semantics, ordered: bool = False
) -> bool:
    """Tell whether two results match under the semantics; only "spider" looks at `ordered`."""
    match semantics:
        case "spider":
            return spider_match(gold, predicted, ordered=ordered)
        case "bird":
            return bird_match(gold, predicted)
        case "strict":
            return strict_match(gold, predicted)
        case _:
            assert_never(semantics)


def strict_match(gold: Rows, predicted: Rows) -> bool:
    """Tell whether both have the same rows and columns in the same order."""
    return gold == predicted


def bird_match(gold: Rows, predicted: Rows) -> bool:
    """Tell whether both have the same set of rows; only the order of columns counts.

    Duplicates and the order of rows are ignored. Source: the execution accuracy of BIRD (Li et al.
    2023).
    """
    return set(gold) == set(predicted)


def spider_match(gold: Rows, predicted: Rows, *, ordered: bool) -> bool:
    """Tell whether one order of the predicted columns gives the same bag of rows.

    If `ordered`, it must give the same list of rows. Two empty results match with any columns.

    Source: test-suite accuracy (Zhong et al. 2020), the official evaluator of Spider. This repeats
    its verdicts without trying every order of columns.
    """
    if not gold and not predicted:
        return True
    if len(gold) != len(predicted) or len(gold[0]) != len(predicted[0]):
        return False
    if not _same_sorted_rows(gold, predicted, ordered):
        return False
    if ordered:  # With the rows fixed, columns can be matched one by one.
        return Counter(zip(*gold, strict=True)) == Counter(zip(*predicted, strict=True))
    return _same_bag_in_some_column_order(gold, predicted)


def _same_sorted_rows(gold: Rows, predicted: Rows, ordered: bool) -> bool:
    """Tell whether the rows are alike once each row's cells are sorted by text and type.

    It is meant as a quick rejection, but officially it is a verdict of its own. 1 and 1.0 sort
    differently beside 1.5, so the equal rows (1, 1.5) and (1.0, 1.5) do not match.
    """
    gold_rows = [_sorted_row(row) for row in gold]
    predicted_rows = [_sorted_row(row) for row in predicted]
    return gold_rows == predicted_rows if ordered else set(gold_rows) == set(predicted_rows)


def _sorted_row(row: ResultRow) -> ResultRow:
    return row if len(row) == 1 else tuple(sorted(row, key=lambda cell: f"{cell}{type(cell)}"))


def _same_bag_in_some_column_order(gold: Rows, predicted: Rows) -> bool:
    """Tell whether some order of the predicted columns gives the same bag of rows.

    Both results have the same numbers of rows and columns. Columns are matched one after another.
    Each row carries a colour that stands for its cells matched so far. A predicted column can stand
    for the next gold one only if both then have equally many rows of every colour. The columns with
    most distinct values come first, so rows are soon all different and the rest is forced.

    Raises:
        OverflowError: columns are so alike that the search would not end.
    """
    if Counter(gold) == Counter(predicted):
        return True
    gold_columns = sorted(zip(*gold, strict=True), key=lambda column: -len(set(column)))
    predicted_columns = list(zip(*predicted, strict=True))
    first_twin: dict[tuple[Any, ...], int] = {}
    twins = [first_twin.setdefault(column, place) for place, column in enumerate(predicted_columns)]
    # Shared by both sides, so that equal cells get equal colours.
    colours: dict[tuple[Any, Any], int] = {}

    def recolour(old: Sequence[int], column: Sequence[Any]) -> list[int]:
        return [colours.setdefault(pair, len(colours)) for pair in zip(old, column, strict=True)]

    blank = [-1] * len(gold)
    pending = [(blank, blank, frozenset(range(len(predicted_columns))))]
    bags, wanted_bags = _bags(predicted_columns), _bags(gold_columns)
    if Counter(bags) != Counter(wanted_bags):
        return False
    left = MOST_CELLS + 2 * len(gold) * len(gold_columns)
    while pending:
        gold_rows, predicted_rows, unused = pending.pop()
        if not unused:
            return True
        index = len(gold_columns) - len(unused)
        gold_next = recolour(gold_rows, gold_columns[index])
        wanted = Counter(gold_next)
        # Equal columns are interchangeable, so only one of them is tried.
        for place in {twins[place]: place for place in unused}.values():
            if bags[place] != wanted_bags[index]:
                continue
            left -= len(gold)
            if left < 0:
                raise OverflowError("too large: columns alike in too many orders to compare")
            predicted_next = recolour(predicted_rows, predicted_columns[place])
            if Counter(predicted_next) == wanted:
                pending.append((gold_next, predicted_next, unused - {place}))
    return False


def _bags(columns: Sequence[tuple[Any, ...]]) -> list[frozenset[tuple[Any, int]]]:
    """Return each column's values with their numbers, whatever the order of rows."""
    return [frozenset(Counter(column).items()) for column in columns]


def prepare_spider(
    sql: str, *, keep_distinct: bool = False, keep_needed: bool = False, most: int = MOST_SQL
) -> str:
    """Return the text that the official evaluator of Spider runs in place of `sql`.

    `> =`, `< =` and `! =` are joined, inside literals too. `YEAR(CURDATE())` becomes 2020. Unless
    `keep_distinct`, every DISTINCT is dropped, from `IS NOT DISTINCT FROM` too.

    With DISTINCT, the official code also drops every statement but the first. Here they stay, for
    the executor to refuse, unless they are empty; after an empty first one none is left.
    With `keep_needed`, `DISTINCT ON` and `IS DISTINCT FROM` keep their DISTINCT, because without it
    they are no SQL.
    """
    if len(sql) > most:
        return sql  # to be refused as it is
    for apart in ("> =", "< =", "! ="):
        sql = sql.replace(apart, apart.replace(" ", ""))
    # Without either word the pieces make the text again, and cutting it may take seconds.
    if not keep_distinct and ("distinct" in sql.lower() or ";" in sql):
        tokens: list[Token] = []
        statements = FilterStack().run(sql)  # type: ignore[no-untyped-call]
        for index, statement in enumerate(statements):
            words = list(statement.flatten())
            is_empty = all(map(_is_blank, words))
            if index == 0 or not is_empty:
                tokens += words
            if index == 0 and is_empty:
                break
        needed = _needed_distinct(tokens) if keep_needed else set()
        sql = "".join(
            token.value
            for index, token in enumerate(tokens)
            if token.value.lower() != "distinct" or index in needed
        )
    return re.sub(r"YEAR\s*\(\s*CURDATE\s*\(\s*\)\s*\)\s*", "2020", sql, flags=re.IGNORECASE)


def needs_distinct(sql: str) -> bool:
    """Tell whether a query has a DISTINCT without which it is no SQL, as `IS DISTINCT FROM`."""
    if "distinct" not in sql.lower() or len(sql) > MOST_SQL:
        return False
    statements = FilterStack().run(sql)  # type: ignore[no-untyped-call]
    return any(_needed_distinct(list(statement.flatten())) for statement in statements)


def _needed_distinct(tokens: Sequence[Token]) -> set[int]:
    """Return the places of a DISTINCT that is followed by ON, or follows IS or NOT."""
    places = [index for index, token in enumerate(tokens) if not _is_blank(token)]
    words = ["", *(tokens[index].value.lower() for index in places), ""]
    return {
        index
        for index, before, word, after in zip(places, words, words[1:], words[2:], strict=False)
        if word == "distinct" and (after == "on" or before.split()[-1:] in (["is"], ["not"]))
    }


def _is_blank(token: Token) -> bool:
    return token.is_whitespace or token.ttype in Comment or token.value == ";"


def is_ordered(prepared_gold: str) -> bool:
    """Tell whether Spider compares in order: the prepared gold contains `order by` anywhere."""
    return "order by" in prepared_gold.lower()
