"""Divide pairs into those to train on and those to score, near ones kept on one side."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence

from ray_sql.config.sections import QuestionsSection
from ray_sql.data.corpus import Example
from ray_sql.data.splits import set_aside

Divided = tuple[list[Example], list[Example]]


def divide(
    examples: Sequence[Example], groups: Sequence[int], section: QuestionsSection, seed: int
) -> tuple[Divided, str]:
    """Return (train, dev) and how they were divided, in words.

    Whole databases where there are several of a fitting size, else questions.
    """
    fraction = section.test_fraction
    databases = {example.db_id for example in examples}
    if section.split_by == "database" or (section.split_by is None and len(databases) > 1):
        train, dev = set_aside(tuple(examples), fraction, section.split_by, f"{seed}-held-out")
        apart = {one.db_id for one in train}.isdisjoint(one.db_id for one in dev)
        if apart and dev:
            return (list(train), list(dev)), "by database"
    return _by_group(examples, groups, round(fraction * len(examples)), seed), (
        "by question, near duplicates on one side"
    )


def _by_group(
    examples: Sequence[Example], groups: Sequence[int], wanted: int, seed: int
) -> Divided:
    """Draw groups until `wanted` examples are in `dev`; one that would take more is passed over.

    Where all groups are larger, the smallest is drawn.
    """
    members: dict[int, list[int]] = defaultdict(list)
    for place, group in enumerate(groups):
        members[group].append(place)
    order = sorted(members.values())
    random.Random(f"{seed}-held-out").shuffle(order)
    drawn: set[int] = set()
    for places in order:
        if len(drawn) + len(places) <= wanted:
            drawn.update(places)
    if wanted and not drawn and len(order) > 1:
        smallest = min(order, key=len)
        drawn.update(smallest)
    train = [one for place, one in enumerate(examples) if place not in drawn]
    return train, [examples[place] for place in sorted(drawn)]


def across(splits: Sequence[Sequence[int]]) -> set[int]:
    """Return the groups that are in more than one split; each split has the groups of its pairs."""
    found: set[int] = set()
    seen: set[int] = set()
    for groups in splits:
        found |= seen & set(groups)
        seen |= set(groups)
    return found
