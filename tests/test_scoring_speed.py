"""The benchmark of scoring judges what it says it judges; its figures are not tested."""

import random
from collections import Counter

import pytest

from benchmarks.scoring_speed import (
    RUNAWAYS,
    demo_pairs,
    measure,
    mutated,
    not_stopped,
    summary,
    with_runaways,
)
from ray_sql.database import Limits
from ray_sql.metrics import Pair
from tests.waiting import HANGS

LIMITS = Limits(seconds=0.3)


@pytest.fixture(scope="module")
def gold(tmp_path_factory: pytest.TempPathFactory) -> list[Pair]:
    pairs = demo_pairs(str(tmp_path_factory.mktemp("cache")))
    assert len(pairs) > 800 and len({pair.database for pair in pairs}) == 10
    return random.Random(14).sample(pairs, 200)


def test_every_mutation_changes_the_text_and_most_change_the_verdict(gold: list[Pair]) -> None:
    changed = mutated(gold, random.Random(1))
    assert changed == mutated(gold, random.Random(1))
    assert all(
        old.predicted != new.predicted and old.gold == new.gold
        for old, new in zip(gold, changed, strict=True)
    )
    assert {verdict.verdict for verdict in measure(gold, 2, LIMITS).verdicts} == {"correct"}
    found = Counter(verdict.verdict for verdict in measure(changed, 2, LIMITS).verdicts)
    assert min(found["correct"], found["wrong"], found["error"]) >= 20 and found["gold_error"] == 0


def test_every_runaway_is_stopped(gold: list[Pair]) -> None:
    pairs = [Pair(gold[0].database, gold[0].gold, runaway) for runaway in RUNAWAYS] + gold[:5]
    measurement = measure(pairs, 2, LIMITS)
    assert not_stopped(pairs, measurement, HANGS) == []
    assert not_stopped(pairs, measurement, 0.1)[0].startswith("a pair took")
    assert summary(pairs, {1: [measurement], 2: [measurement]})["runaways"] == len(RUNAWAYS)
    share = with_runaways(gold, random.Random(1))
    assert sum(old != new for old, new in zip(gold, share, strict=True)) == 2
