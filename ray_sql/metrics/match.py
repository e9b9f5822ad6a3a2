"""When do two results answer the same question? Three published judgements, reproduced to the letter.

The same predictions score up to seven points apart under them, so a score without its semantics means nothing.
Values compare as Python compares them under all three: 1 equals 1.0, 0.1 + 0.2 does not equal 0.3, text is no number.
"""

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal, assert_never

from sqlparse.engine import FilterStack
from sqlparse.sql import Token
from sqlparse.tokens import Comment

from ray_sql.database import ResultRow, Rows

Semantics = Literal["spider", "bird", "strict"]


def execution_match(
    gold: Rows, predicted: Rows, *, semantics: Semantics, ordered: bool = False
) -> bool:
    """Whether two results are the same under the named semantics; only "spider" looks at `ordered`."""
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
    """Right if both have the same rows in the same order, columns in the same order."""
    return gold == predicted


def bird_match(gold: Rows, predicted: Rows) -> bool:
    """Right if both have the same set of rows: duplicates and row order are ignored, the order of columns is not.

    Source: the execution accuracy of BIRD (Li et al. 2023).
    """
    return set(gold) == set(predicted)


def spider_match(gold: Rows, predicted: Rows, *, ordered: bool) -> bool:
    """Right if one reordering of the predicted columns gives the same bag of rows, or the same list if `ordered`.

    Two empty results are the same whatever their columns. Source: test-suite accuracy (Zhong et al. 2020), the official
    evaluator of Spider, whose verdicts this repeats without trying every order of columns.
    """
    if not gold and not predicted:
        return True
    if len(gold) != len(predicted) or len(gold[0]) != len(predicted[0]):
        return False
    if not _same_sorted_rows(gold, predicted, ordered):
        return False
    if ordered:  # with the rows pinned down, columns can be matched one by one
        return Counter(zip(*gold, strict=True)) == Counter(zip(*predicted, strict=True))
    return _same_bag_in_some_column_order(gold, predicted)


def _same_sorted_rows(gold: Rows, predicted: Rows, ordered: bool) -> bool:
    """Whether the rows are alike once each row's cells are sorted by text and type.

    Meant as a quick rejection, but officially a verdict of its own: 1 and 1.0 sort differently beside 1.5, so the equal
    rows (1, 1.5) and (1.0, 1.5) are told apart.
    """
    gold_rows, predicted_rows = (
        [_sorted_row(row) for row in gold],
        [_sorted_row(row) for row in predicted],
    )
    return gold_rows == predicted_rows if ordered else set(gold_rows) == set(predicted_rows)


def _sorted_row(row: ResultRow) -> ResultRow:
    return row if len(row) == 1 else tuple(sorted(row, key=lambda cell: f"{cell}{type(cell)}"))


def _same_bag_in_some_column_order(gold: Rows, predicted: Rows) -> bool:
    """Whether some order of the predicted columns makes both the same bag of rows, which are as many and as wide.

    Columns are matched one after another. Each row carries a colour that stands for its cells matched so far; a
    predicted column can stand for the next gold one only if both then have equally many rows of every colour. With the
    most telling columns first, rows are soon all different and what is left is forced.
    """
    if Counter(gold) == Counter(predicted):
        return True
    gold_columns = sorted(zip(*gold, strict=True), key=lambda column: -len(set(column)))
    predicted_columns = list(zip(*predicted, strict=True))
    first_twin: dict[tuple[Any, ...], int] = {}
    twins = [first_twin.setdefault(column, place) for place, column in enumerate(predicted_columns)]
    colours: dict[
        tuple[Any, Any], int
    ] = {}  # shared by both sides, so that equal cells get equal colours

    def recolour(old: Sequence[int], column: Sequence[Any]) -> list[int]:
        return [colours.setdefault(pair, len(colours)) for pair in zip(old, column, strict=True)]

    blank = [-1] * len(gold)
    open_ways = [(blank, blank, frozenset(range(len(predicted_columns))))]
    while open_ways:
        gold_rows, predicted_rows, unused = open_ways.pop()
        if not unused:
            return True
        gold_next = recolour(gold_rows, gold_columns[len(gold_columns) - len(unused)])
        wanted = Counter(gold_next)
        # Equal columns are interchangeable: trying one of them is trying them all.
        for place in {twins[place]: place for place in unused}.values():
            predicted_next = recolour(predicted_rows, predicted_columns[place])
            if Counter(predicted_next) == wanted:
                open_ways.append((gold_next, predicted_next, unused - {place}))
    return False


def prepare_spider(sql: str, *, keep_distinct: bool = False, server: bool = False) -> str:
    """The text that the official evaluator of Spider runs in place of `sql`.

    `> =`, `< =` and `! =` are joined, inside literals too; `YEAR(CURDATE())` becomes 2020; and unless `keep_distinct`,
    every DISTINCT is dropped, from `IS NOT DISTINCT FROM` too. The official code also drops every statement but the
    first there. Here they stay, for the executor to refuse, unless they are empty. On a `server`, which the official code knows nothing
    of, the DISTINCT of `DISTINCT ON` and `IS DISTINCT FROM` stays: without it they are no SQL.
    """
    for apart in ("> =", "< =", "! ="):
        sql = sql.replace(apart, apart.replace(" ", ""))
    if not keep_distinct:
        statements = [list(statement.flatten()) for statement in FilterStack().run(sql)]  # type: ignore[no-untyped-call]
        told = [
            tokens for tokens in statements[1:] if not all(_says_nothing(token) for token in tokens)
        ]
        kept = [token for tokens in [*statements[:1], *told] for token in tokens]
        needed = _needed_distinct(kept) if server else set()
        sql = "".join(
            t.value for n, t in enumerate(kept) if t.value.lower() != "distinct" or n in needed
        )
    return re.sub(r"YEAR\s*\(\s*CURDATE\s*\(\s*\)\s*\)\s*", "2020", sql, flags=re.IGNORECASE)


def _needed_distinct(tokens: Sequence[Token]) -> set[int]:
    """Places of a DISTINCT that is followed by ON, or follows IS or NOT."""
    said = [number for number, token in enumerate(tokens) if not _says_nothing(token)]
    words = ["", *(tokens[number].value.lower() for number in said), ""]
    around = zip(said, words, words[2:], strict=False)
    return {
        number
        for number, before, after in around
        if after == "on" or before.split()[-1:] in (["is"], ["not"])
    }


def _says_nothing(token: Token) -> bool:
    return token.is_whitespace or token.ttype in Comment or token.value == ";"


def is_ordered(prepared_gold: str) -> bool:
    """Whether Spider's semantics compares in order: iff the prepared gold contains `order by`, wherever it stands."""
    return "order by" in prepared_gold.lower()
