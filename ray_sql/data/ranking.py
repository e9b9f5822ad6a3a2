"""Rank the tables of a schema by a question: by its words, the cells it names, and the keys."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache

from rapidfuzz import fuzz, process

from ray_sql.data.corpus import Example
from ray_sql.data.value_index import ALIKE, COMMON, SHORTEST
from ray_sql.data.words import name_words, words
from ray_sql.database import Schema, Table

IN_NAME, IN_COLUMN, IN_DESCRIPTION = 3.0, 1.0, 0.5
"""A word of the question counts so much in a table's name, in its columns, in what they mean."""
CELL = 6.0
"""A cell that the question names counts so much for its table."""
NEIGHBOUR = 0.3
"""A table gets this share of the best two tables that a foreign key joins it with."""

Weights = Mapping[str, Mapping[str, float]]
"""Word → table → how much the word counts for it."""


def rank_tables(example: Example, schema: Schema) -> list[str]:
    """Return the names of all tables, those that a question is likely to need first."""
    weights = _weights(schema)
    scores = dict.fromkeys(schema.table_names, 0.0)
    for word in dict.fromkeys(words(f"{example.question} {example.evidence}")):
        if word in COMMON:
            continue
        counted: dict[str, float] = {}
        for known, likeness in _spellings(word, weights):
            for table, weight in weights[known].items():
                counted[table] = max(counted.get(table, 0.0), weight * likeness)
        rarity = math.log(1 + len(scores) / max(1, len(counted)))
        for table, weight in counted.items():
            scores[table] += weight * rarity
    for value in example.values:
        scores[value.table] = scores.get(value.table, 0.0) + CELL
    joined = _neighbours(schema)
    places = {name: place for place, name in enumerate(schema.table_names)}

    def order(name: str) -> tuple[float, int]:
        best = sorted((scores[other] for other in joined[name]), reverse=True)[:2]
        return -scores[name] - NEIGHBOUR * sum(best), places[name]

    return sorted(places, key=order)


@lru_cache(maxsize=64)
def _weights(schema: Schema) -> Weights:
    weights: dict[str, dict[str, float]] = {}
    for table in schema.tables:
        for word, weight in _table_words(table).items():
            weights.setdefault(word, {})[table.name] = weight
    return weights


def _table_words(table: Table) -> dict[str, float]:
    """Return the words of a table, each with the most that it counts."""
    said = " ".join([table.description, *(column.description for column in table.columns)])
    found = dict.fromkeys(words(said), IN_DESCRIPTION)
    for column in table.columns:
        found |= dict.fromkeys(name_words(column.name), IN_COLUMN)
    return found | dict.fromkeys(name_words(table.name), IN_NAME)


def _spellings(word: str, known: Weights) -> list[tuple[str, float]]:
    """Return the words of the schema that a word may mean, with their likeness from 0 to 1."""
    found = {word: 1.0} if word in known else {}
    if len(word) >= SHORTEST and not word.isdigit():
        near = process.extract(word, list(known), scorer=fuzz.ratio, score_cutoff=ALIKE, limit=8)
        found |= {one: ratio / 100 for one, ratio, _ in near if one not in found}
        stem = word.removesuffix("s")
        # names that are written without a mark between their words: salesorderheader
        found |= {one: 0.5 for one in known if stem in one and one not in found}
    return list(found.items())


def _neighbours(schema: Schema) -> dict[str, set[str]]:
    """Return the tables that foreign keys join with each table."""
    joined: dict[str, set[str]] = {name: set() for name in schema.table_names}
    for table in schema.tables:
        for key in table.foreign_keys:
            if key.ref_table in joined and key.ref_table != table.name:
                joined[table.name].add(key.ref_table)
                joined[key.ref_table].add(table.name)
    return joined
