"""Schema-shared rows: many questions on one database, for the price of one schema.

In this task a prompt is mostly schema, and many questions share it. A shared row is

    [shared prefix][rest of prompt 1 + answer 1][rest of prompt 2 + answer 2] …

Every question sees the prefix and itself, and its positions go on from the prefix's end. Each token
then meets exactly what it would meet in a row of its own. So loss and gradients are those of the
separate examples, and the prefix is computed once. The prefix is the longest common one of the
*tokens*, so nothing is assumed about a template. The idea is known where one prompt has many
sampled answers (PrefixGrouper, arXiv 2506.05433; tree packing for GRPO, TRL PR 7328). Here the
questions differ.

`step_order` says which examples meet in an optimizer step. `passes` lays out one rank's part of a
step. Both work on token ids alone; `batch` makes tensors of what they return.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

from ray_sql.config import Batching
from ray_sql.rows.encoder import TokenizedExample

MAX_PADDING = 1.25
"""A pass computes at most this many times the tokens of its rows, padding included.

On Spider, rows of 2 and 8 examples a pass make half the passes so, for an eighth more tokens. With
1.5 they would save another quarter of the passes for a fifth more.
"""


@dataclass(frozen=True)
class SharedRow:
    """Examples in one row; the first `prefix` tokens are common to all.

    A plain row is one example and no prefix.
    """

    examples: tuple[TokenizedExample, ...]
    prefix: int

    @property
    def tokens(self) -> int:
        """Tokens that the row computes."""
        own = (len(example.input_ids) - self.prefix for example in self.examples)
        return self.prefix + sum(own)


def step_order(
    examples: Sequence[TokenizedExample], batching: Batching, limit: int | None = None
) -> list[list[int]]:
    """Return the examples of each optimizer step, as indices; of the first `limit` steps if given.

    The order does not depend on the number of workers. An epoch visits every example once
    (`epoch_order`) and is drawn anew. The step that ends an epoch may be smaller.
    """
    databases = [example.db_id for example in examples]
    size = batching.global_batch_size
    total = batching.steps(len(examples))
    if limit:
        total = min(total, limit)
    steps: list[list[int]] = []
    epoch = 0
    while len(steps) < total:
        draw = random.Random(f"{batching.seed} {epoch}")
        order = epoch_order(databases, min(batching.examples_per_row, size), draw)
        steps += [order[start : start + size] for start in range(0, len(order), size)]
        epoch += 1
    return steps[:total]


def count_tokens(examples: Sequence[TokenizedExample], batching: Batching) -> tuple[int, int]:
    """Return the tokens of the first epoch on one worker, and those of one example a row.

    Padding does not count.
    """
    rows = list(chain.from_iterable(_first_epoch(examples, batching)))
    alone = sum(len(example.input_ids) for row in rows for example in row.examples)
    return sum(row.tokens for row in rows), alone


def heaviest_pass(examples: Sequence[TokenizedExample], batching: Batching) -> tuple[int, int]:
    """Return the largest forward pass of the first epoch on one worker: (rows, padded length)."""
    heaviest = max(_first_epoch(examples, batching), key=padded_tokens)
    return len(heaviest), max(row.tokens for row in heaviest)


def longest_row(examples: Sequence[TokenizedExample], batching: Batching) -> int:
    """Return the tokens of the longest row of the first epoch on one worker."""
    return max(row.tokens for row in chain.from_iterable(_first_epoch(examples, batching)))


def padded_tokens(rows: Sequence[SharedRow]) -> int:
    """Return the tokens that a pass over these rows computes, padding included."""
    return len(rows) * max(row.tokens for row in rows)


def _first_epoch(examples: Sequence[TokenizedExample], batching: Batching) -> list[list[SharedRow]]:
    """Return the forward passes of the first epoch on one worker."""
    steps = step_order(examples, batching, batching.steps_per_epoch(len(examples)))
    by_step = (passes([examples[index] for index in step], batching, 0, 1) for step in steps)
    return list(chain.from_iterable(by_step))


def epoch_order(databases: Sequence[str], examples_per_row: int, draw: random.Random) -> list[int]:
    """Return every index into `databases` once, in a random order of groups of `examples_per_row`.

    A group is of one database, or of what is left of several. All but the last are full. So a step
    of a multiple of `examples_per_row` never cuts a group in two, which would compute its schema
    twice. A database's n groups are spread over the epoch, one at a random place in each n-th of
    it. So steps that follow each other are mostly of different databases.
    """
    shuffled = draw.sample(range(len(databases)), len(databases))
    if examples_per_row == 1:
        return shuffled
    members: dict[str, list[int]] = defaultdict(list)
    for index in shuffled:
        members[databases[index]].append(index)
    rest = []
    for _, indices in sorted(members.items()):
        rest.append(indices[len(indices) - len(indices) % examples_per_row :])
    draw.shuffle(rest)
    left = list(chain.from_iterable(rest))
    placed: list[tuple[float, list[int]]] = []
    for indices in (*(members[name] for name in sorted(members)), left):
        count = len(indices) // examples_per_row
        for part in range(count):
            start = part * examples_per_row
            group = indices[start : start + examples_per_row]
            placed.append(((part + draw.random()) / count, group))
    last = left[len(left) - len(left) % examples_per_row :]
    return [*chain.from_iterable(group for _, group in sorted(placed)), *last]


def share(
    examples: Sequence[TokenizedExample], examples_per_row: int, row_length: int, min_rows: int = 1
) -> list[SharedRow]:
    """Return the examples in as few rows as `examples_per_row` and `row_length` (tokens) allow.

    There are at least `min_rows` rows where there are that many examples. A row has one example
    where nothing may be shared.
    """
    members: dict[str, list[TokenizedExample]] = defaultdict(list)
    for example in examples:
        members[example.db_id].append(example)
    fair = max(1, -(-len(examples) // min_rows))
    rows: list[SharedRow] = []
    for group in members.values():
        rows += _fill(group, min(examples_per_row, fair), row_length)
    while len(rows) < min(min_rows, len(examples)):
        largest = max(rows, key=lambda row: len(row.examples))
        rows.remove(largest)
        half = len(largest.examples) // 2
        rows += [_join(largest.examples[:half]), _join(largest.examples[half:])]
    return rows


def common_prefix(sequences: Sequence[list[int]]) -> int:
    """Return the length of the longest common prefix of token sequences."""
    # in lexical order: what the first and the last share, all between them share
    first, last = min(sequences), max(sequences)
    for index, (a, b) in enumerate(zip(first, last, strict=False)):
        if a != b:
            return index
    return min(len(first), len(last))


def passes(
    examples: Sequence[TokenizedExample], batching: Batching, rank: int, world: int
) -> list[list[SharedRow]]:
    """Return the forward passes of one rank in a step over `examples`, the longest first.

    The ranks' shares are about equal in tokens. A pass holds several rows of not very different
    lengths with up to `train_batch_size` examples, or one row with more. Each halving first takes
    rows from a pass, which costs nothing, then questions from a row. A rank is left without a pass
    only if there are fewer examples than ranks.
    """
    batch_size = max(1, batching.train_batch_size >> batching.microbatch_halvings)
    most = min(batching.examples_per_row, batching.examples_per_pass)
    rows = share(examples, most, batching.row_length, world)
    own: list[SharedRow] = []
    load = [0] * world
    for row in sorted(rows, key=lambda row: -row.tokens):
        lightest = load.index(min(load))
        load[lightest] += row.tokens
        if lightest == rank:
            own.append(row)
    result: list[list[SharedRow]] = []
    for row in own:
        if result and _fits([*result[-1], row], batch_size):
            result[-1].append(row)
        else:
            result.append([row])
    return result


def _fits(rows: Sequence[SharedRow], batch_size: int) -> bool:
    examples = sum(len(row.examples) for row in rows)
    tokens = sum(row.tokens for row in rows)
    return examples <= batch_size and padded_tokens(rows) <= MAX_PADDING * tokens


def _fill(
    group: Sequence[TokenizedExample], examples_per_row: int, row_length: int
) -> list[SharedRow]:
    """Return one database's examples as rows.

    An example joins the first row where it fits, saves tokens, and shares at least half its prompt.
    A schema that was trimmed, or shown in part, shares less. It would cost the others their prefix.
    """
    rows: list[SharedRow] = []
    for example in group:
        for index, row in enumerate(rows):
            if len(row.examples) == examples_per_row:
                continue
            joined = _join((*row.examples, example))
            saves = joined.tokens < row.tokens + len(example.input_ids)
            shares = joined.prefix * 2 >= example.prompt_length
            if saves and shares and joined.tokens <= row_length:
                rows[index] = joined
                break
        else:
            rows.append(_join((example,)))
    return rows


def _join(examples: tuple[TokenizedExample, ...]) -> SharedRow:
    if len(examples) == 1:
        return SharedRow(examples, 0)
    # Each question keeps at least one token of its prompt: an answer's first token is predicted
    # from the token before it, and that of a prefix could only be asked for one of them.
    prompts = [example.input_ids[: example.prompt_length - 1] for example in examples]
    return SharedRow(examples, common_prefix(prompts))
