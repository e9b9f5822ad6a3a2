"""Choose one of a question's candidates, without looking at its gold.

The candidates are the greedy answer and the samples. Ways of choosing, for SQL:

- `greedy`: the greedy answer.
- `first_executable`: the likeliest candidate that runs.
- `vote`: candidates with the same result are a group, and the heaviest group wins. A candidate
  weighs 1, or `EMPTY_WEIGHT` where its result is empty. One that does not run has no vote.
- `weighted_vote`: the same, where each different answer weighs its probability instead.

Ties go to the group with the larger probability. The likeliest answer of the winning group is
chosen. Two results are the same if each would be right were the other gold. Where no candidate
runs, the greedy answer stays.

For links, `vote` keeps the tables and columns that at least half of the candidates name, and
`weighted_vote` those with half of the probability.

Source: self-consistency (Wang et al., arXiv 2203.11171) over executed results (Shi et al., arXiv
2204.11454).
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from math import comb, exp
from typing import Any

from ray_sql.config.sections import Way
from ray_sql.database import Executor, Links, QueryResult
from ray_sql.metrics import Semantics, execution_match, is_ordered, prepare_spider

WAYS: tuple[Way, ...] = ("greedy", "first_executable", "vote", "weighted_vote")
"""Ways to choose among samples, and the greedy answer beside them."""
EMPTY_WEIGHT = 0.5
"""Votes of a candidate whose result is empty: a wrong condition often leaves no row."""
KEPT_SHARE = 0.5
"""Share of the candidates that must name a table or column of the voted links."""


@dataclass(frozen=True)
class Proposal:
    """A candidate of a question: its SQL or links, and its log-probability where it is known."""

    predicted: str | None
    logprob: float | None = None

    @property
    def probability(self) -> float:
        """Return the probability of the answer, 1 where it is not known."""
        return 1.0 if self.logprob is None else exp(self.logprob)


@dataclass
class Choices:
    """The answer that each way chooses, and the group of results of each candidate."""

    chosen: dict[Way, str | None]
    result_keys: list[int | None]
    """Equal for candidates with the same result; None for those that do not run."""


def choose_sql(
    greedy: str | None,
    proposals: Sequence[Proposal],
    results: Sequence[QueryResult | None],
    same: Semantics,
) -> Choices:
    """Choose among SQL by executed `results`, None where there was nothing to run."""
    keys = _result_keys(proposals, results, same)
    ran = [index for index, key in enumerate(keys) if key is not None]
    likeliest = sorted(ran, key=lambda index: -proposals[index].probability)
    chosen: dict[Way, str | None] = dict.fromkeys(WAYS, greedy)
    if not ran:
        return Choices(chosen, keys)
    chosen["first_executable"] = proposals[likeliest[0]].predicted
    counts: dict[int, float] = defaultdict(float)
    masses: dict[int, float] = defaultdict(float)
    counted = set()
    for index in likeliest:
        key, proposal, result = keys[index], proposals[index], results[index]
        assert key is not None and result is not None
        weight = 1.0 if result.rows else EMPTY_WEIGHT
        counts[key] += weight
        if proposal not in counted:  # draws of the same answer are one event
            counted.add(proposal)
            masses[key] += weight * proposal.probability
    by_way: dict[Way, dict[int, tuple[float, float]]] = {
        "vote": {key: (counts[key], masses[key]) for key in counts},
        "weighted_vote": {key: (masses[key], counts[key]) for key in counts},
    }
    for way, weights in by_way.items():
        winner = max(weights, key=weights.__getitem__)
        chosen[way] = next(
            proposals[index].predicted for index in likeliest if keys[index] == winner
        )
    return Choices(chosen, keys)


def _result_keys(
    proposals: Sequence[Proposal], results: Sequence[QueryResult | None], same: Semantics
) -> list[int | None]:
    """Return the number of the first candidate with the same result, None without a result."""
    firsts: list[int] = []
    keys: list[int | None] = []
    ordered = [is_ordered(proposal.predicted or "") for proposal in proposals]
    for index, result in enumerate(results):
        if result is None or result.status != "ok":
            keys.append(None)
            continue
        for first in firsts:
            other = results[first]
            assert other is not None
            in_order = ordered[first] or ordered[index]
            if execution_match(other.rows, result.rows, semantics=same, ordered=in_order):
                keys.append(first)
                break
        else:
            firsts.append(index)
            keys.append(index)
    return keys


def run_candidates(
    questions: Sequence[tuple[str | None, Sequence[Proposal]]],
    executor: Executor,
    semantics: Semantics,
    keep_distinct: bool,
) -> list[list[QueryResult | None]]:
    """Execute the candidates of each (database, proposals), as they will be judged."""
    tries: list[tuple[str, str]] = []
    places: list[tuple[int, int]] = []
    results: list[list[QueryResult | None]] = []
    for index, (database, proposals) in enumerate(questions):
        results.append([None] * len(proposals))
        for place, proposal in enumerate(proposals):
            if database is not None and proposal.predicted:
                sql = proposal.predicted
                if semantics == "spider":
                    sql = prepare_spider(sql, keep_distinct=keep_distinct, keep_needed=True)
                tries.append((database, sql))
                places.append((index, place))
    for (index, place), result in zip(places, executor.run_many(tries), strict=True):
        results[index][place] = result
    return results


def choose_links(greedy: str | None, proposals: Sequence[Proposal]) -> Choices:
    """Choose links, JSON objects as text, by votes for each table and column."""
    keys: dict[str, int] = {}
    result_keys: list[int | None] = []
    links: list[Links | None] = []
    for index, proposal in enumerate(proposals):
        if proposal.predicted is None:
            result_keys.append(None)
            links.append(None)
            continue
        links.append(json.loads(proposal.predicted))
        result_keys.append(keys.setdefault(_canonical(links[-1]), index))
    chosen: dict[Way, str | None] = dict.fromkeys(WAYS, greedy)
    parsed = [index for index, answer in enumerate(links) if answer is not None]
    if not parsed:
        return Choices(chosen, result_keys)
    best = max(parsed, key=lambda index: proposals[index].probability)
    chosen["first_executable"] = proposals[best].predicted
    equal = [1.0 if index in parsed else 0.0 for index in range(len(links))]
    by_probability = [0.0] * len(links)
    for index in {result_keys[index]: index for index in reversed(parsed)}.values():
        by_probability[index] = proposals[index].probability
    chosen["vote"] = json.dumps(voted_links(links, equal))
    chosen["weighted_vote"] = json.dumps(voted_links(links, by_probability))
    return Choices(chosen, result_keys)


def _canonical(links: Any) -> str:
    return json.dumps({table: sorted(columns) for table, columns in sorted(links.items())})


def voted_links(
    links: Sequence[Links | None], weights: Sequence[float], keep: float = KEPT_SHARE
) -> Links:
    """Return the tables and columns with this share of the weight, in the order of first mention.

    A column with enough of it keeps its table.
    """
    votes: dict[tuple[str, str | None], float] = defaultdict(float)
    for answer, weight in zip(links, weights, strict=True):
        for table, columns in (answer or {}).items():
            votes[table, None] += weight
            for column in dict.fromkeys(columns):
                votes[table, column] += weight
    enough = keep * sum(weights) * (1 - 1e-9)  # 0.3 * 10 is a little more than 3
    kept: Links = {}
    for (table, name), votes_for in votes.items():
        if votes_for < enough:
            continue
        columns = kept.setdefault(table, [])
        if name is not None:
            columns.append(name)
    return kept


def pass_at_k(correct: int, samples: int, k: int) -> float:
    """Return the chance that one of `k` candidates is right, if `correct` of `samples` are.

    Unbiased for k up to `samples`. Source: Chen et al. 2021, arXiv 2107.03374.
    """
    return 1 - comb(samples - correct, k) / comb(samples, k)


def sizes(samples: int) -> list[int]:
    """Return 1, 2, 4, … up to `samples`, and `samples` itself: the k of pass@k."""
    powers = [2**power for power in range(samples.bit_length()) if 2**power <= samples]
    return sorted({*powers, samples})
