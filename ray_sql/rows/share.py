"""Schema-shared rows: many questions on one database, for the price of one schema.

In this task a prompt is mostly schema, and many questions share it. A shared row is

    [shared prefix][rest of prompt 1 + answer 1][rest of prompt 2 + answer 2] …

where every question sees the prefix and itself, and its positions go on from the prefix's end. Each token then meets exactly
what it would meet in a row of its own, so loss and gradients are those of the separate examples, and the prefix is computed once.
The prefix is the longest common one of the *tokens*, so nothing is assumed about a template. The idea is known where one prompt
has many sampled answers (PrefixGrouper, arXiv 2506.05433; tree packing for GRPO, TRL PR 7328); here the questions differ.

`plan` says which examples meet in an optimizer step, always `Config.global_batch` of them; `passes` lays one rank's part of a step out.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import chain
from typing import TYPE_CHECKING, Any

from ray_sql.config import Config
from ray_sql.rows.tokenise import IGNORED, Row

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

PADDING = -1
"""The segment of a token that only fills a batch."""
PADDED = 1.25
"""How many times the tokens of its rows a pass may compute, padding included: on Spider, rows of 2 and 8 examples a pass make half the
passes so for an eighth more tokens; with 1.5 they would save another quarter of the passes for a fifth more."""
AUTO = 8
"""Most questions that share a row where `rows.examples_per_row` is `auto`."""


@dataclass(frozen=True)
class Shared:
    """Examples in one row, the first `prefix` tokens common to all; a plain row is one example and no prefix."""

    examples: tuple[Row, ...]
    prefix: int

    @property
    def tokens(self) -> int:
        """How many tokens the row computes."""
        return self.prefix + sum(len(row.input_ids) - self.prefix for row in self.examples)


@dataclass(frozen=True)
class Pass:
    """One forward pass: rows, shared or plain, padded to one length. All four tensors are `[rows, length]`, int64.

    `segments` is 0 for a prefix or a plain row, 1, 2, … for the questions after a prefix, and `PADDING`; `labels` are `IGNORED` but
    on answers.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    segments: torch.Tensor
    labels: torch.Tensor

    def to(self, device: torch.device) -> Pass:
        """The same tensors on `device`."""
        return Pass(
            *(getattr(self, field.name).to(device, non_blocking=True) for field in fields(self))
        )


@dataclass(frozen=True)
class Step:
    """One rank's part of an optimizer step; `labels` counts those of all ranks."""

    passes: tuple[Pass, ...]
    labels: int


class Steps:
    """A rank's part of every optimizer step of a run, laid out when it is asked for."""

    def __init__(
        self,
        rows: Sequence[Row],
        config: Config,
        together: int,
        rank: int,
        world: int,
        pad: int,
        halvings: int = 0,
    ) -> None:
        self._rows, self._config, self._together, self._halvings = rows, config, together, halvings
        self._rank, self._world, self._pad = rank, world, pad
        self._plan = plan(rows, config, together)

    def __len__(self) -> int:
        return len(self._plan)

    def __getitem__(self, number: int) -> Step:
        examples = [self._rows[index] for index in self._plan[number]]
        mine = passes(
            examples, self._config, self._together, self._rank, self._world, self._halvings
        )
        made = tuple(collate(rows, self._pad) for rows in mine) or (self._idle(examples[0]),)
        return Step(made, sum(len(row.input_ids) - row.prompt_length for row in examples))

    def _idle(self, row: Row) -> Pass:
        """What a rank computes when there are fewer examples than ranks: it takes part in the exchange of gradients, with none."""
        made = collate([Shared((row,), 0)], self._pad)
        return replace(made, labels=made.labels.new_full(made.labels.shape, IGNORED))


def plan(
    rows: Sequence[Row], config: Config, together: int, limit: int | None = None
) -> list[list[int]]:
    """The examples of the run's optimizer steps (the first `limit` of them), as indices into `rows`; the same for any number of workers.

    An epoch visits every example once, groups of `together` on one database after each other (`epoch_order`); which ones, and in
    which order the groups come, is drawn anew for every epoch. The step that ends an epoch may be smaller.
    """
    databases = [row.db_id for row in rows]
    size = config.global_batch
    total = min(config.steps(len(rows)), limit or config.steps(len(rows)))
    steps: list[list[int]] = []
    epoch = 0
    while len(steps) < total:
        order = epoch_order(databases, min(together, size), random.Random(f"{config.seed} {epoch}"))
        steps += [order[start : start + size] for start in range(0, len(order), size)]
        epoch += 1
    return steps[:total]


def together(config: Config) -> int:
    """How many questions share a row as the settings say, no more than a step has; a model may still not allow it.

    `auto` is no more than a step then has rows: after as many examples, rows of 2 in steps of 8 and of 4 in steps of 32 answered as
    many new questions as plain rows, rows of 8 fewer (`benchmarks.quality`). It divides the step where some number above 1 does, so
    that the step's end cuts no group of one database in two.
    """
    size, wanted = config.global_batch, config.rows.examples_per_row
    if wanted != "auto":
        return min(wanted, size)
    mixing = [each for each in range(1, AUTO + 1) if each * each <= size]
    return max([each for each in mixing if each > 1 and size % each == 0] or mixing)


def tokens(rows: Sequence[Row], config: Config) -> tuple[int, int]:
    """How many tokens, without padding, the run's first epoch computes on one worker, and how many with one example a row."""
    made = [row for step in _first_epoch(rows, config) for one in step for row in one]
    return sum(row.tokens for row in made), sum(
        len(one.input_ids) for row in made for one in row.examples
    )


def heaviest_pass(rows: Sequence[Row], config: Config, halvings: int = 0) -> tuple[int, int]:
    """The largest forward pass of the run's first epoch on one worker: its rows, and the tokens that each of them is padded to."""
    heaviest = max(
        (one for step in _first_epoch(rows, config, halvings) for one in step), key=padded
    )
    return len(heaviest), max(row.tokens for row in heaviest)


def longest_row(rows: Sequence[Row], config: Config, halvings: int = 0) -> int:
    """Tokens of the longest row, shared or not, of the run's first epoch on one worker."""
    return max(
        row.tokens for step in _first_epoch(rows, config, halvings) for one in step for row in one
    )


def padded(rows: Sequence[Shared]) -> int:
    """How many tokens a pass over these rows computes."""
    return len(rows) * max(row.tokens for row in rows)


def _first_epoch(
    rows: Sequence[Row], config: Config, halvings: int = 0
) -> list[list[list[Shared]]]:
    """Forward passes by step."""
    steps = plan(rows, config, together(config), config.steps_per_epoch(len(rows)))
    return [
        passes([rows[index] for index in step], config, together(config), 0, 1, halvings)
        for step in steps
    ]


def epoch_order(databases: Sequence[str], together: int, draw: random.Random) -> list[int]:
    """Every index into `databases` once, in a random order of groups of `together`; where that is 1, in any order.

    A group is of one database, or of what is left of several. All but the last are full, so that steps of a multiple of `together`
    never cut one in two, which would compute its schema twice. A database's n groups are spread over the epoch, one at a
    random place in each n-th of it, so that steps that follow each other are mostly of different databases.
    """
    shuffled = draw.sample(range(len(databases)), len(databases))
    if together == 1:
        return shuffled
    members: dict[str, list[int]] = defaultdict(list)
    for index in shuffled:
        members[databases[index]].append(index)
    rest = [
        indices[len(indices) - len(indices) % together :] for _, indices in sorted(members.items())
    ]
    draw.shuffle(rest)
    left = list(chain.from_iterable(rest))
    placed: list[tuple[float, list[int]]] = []
    for indices in (*(members[name] for name in sorted(members)), left):
        count = len(indices) // together
        groups = [
            indices[start : start + together] for start in range(0, count * together, together)
        ]
        placed += [((number + draw.random()) / count, group) for number, group in enumerate(groups)]
    last = left[len(left) - len(left) % together :]
    return [*chain.from_iterable(group for _, group in sorted(placed)), *last]


def share(
    examples: Sequence[Row], together: int, row_length: int, at_least: int = 1
) -> list[Shared]:
    """The examples in as few rows as `together` and `row_length` (tokens) allow, but `at_least` so many where there are as many
    examples; rows of one example where nothing may be shared."""
    members: dict[str, list[Row]] = defaultdict(list)
    for row in examples:
        members[row.db_id].append(row)
    fair = max(1, -(-len(examples) // at_least))
    made = [
        shared
        for group in members.values()
        for shared in _fill(group, min(together, fair), row_length)
    ]
    while (
        len(made) < at_least
        and (largest := max(made, key=lambda one: len(one.examples))).examples[1:]
    ):
        made.remove(largest)
        half = len(largest.examples) // 2
        made += [_joined(largest.examples[:half]), _joined(largest.examples[half:])]
    return made


def common_prefix(sequences: Sequence[list[int]]) -> int:
    """Length of the longest common prefix of token sequences."""
    first, last = (
        min(sequences),
        max(sequences),
    )  # in lexical order, what these two share is shared by all between
    return next(
        (i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b),
        min(len(first), len(last)),
    )


def per_pass(config: Config, together: int, halvings: int = 0) -> int:
    """Most examples in a forward pass where up to `together` share a row, after so many halvings."""
    return max(1, max(together, config.train_batch_size) >> halvings)


def passes(
    examples: Sequence[Row], config: Config, together: int, rank: int, world: int, halvings: int = 0
) -> list[list[Shared]]:
    """The forward passes of one rank in a step over `examples`, longest first, the ranks' shares about equal in tokens.

    A pass holds rows of up to `train_batch_size` examples together, not of very different lengths, or one row with more; half as
    many, and so on, after `halvings`: first fewer rows, which costs nothing, then fewer questions in a row. A rank is left without
    a pass only if there are fewer examples than ranks.
    """
    batch = max(1, config.train_batch_size >> halvings)
    together = min(together, per_pass(config, together, halvings))
    rows = sorted(
        share(examples, together, config.rows.row_length, world), key=lambda one: -one.tokens
    )
    mine: list[Shared] = []
    load = [0] * world
    for row in rows:
        to = load.index(min(load))
        load[to] += row.tokens
        if to == rank:
            mine.append(row)
    made: list[list[Shared]] = []
    for row in mine:
        if made and _fits([*made[-1], row], batch):
            made[-1].append(row)
        else:
            made.append([row])
    return made


def _fits(rows: Sequence[Shared], batch: int) -> bool:
    return sum(len(row.examples) for row in rows) <= batch and padded(rows) <= PADDED * sum(
        row.tokens for row in rows
    )


def collate(rows: Sequence[Shared], pad: int) -> Pass:
    """Rows as the tensors of one forward pass, padded on the right."""
    import torch

    lines = [_line(row) for row in rows]
    width = max(len(line[0]) for line in lines)
    fill = (pad, 0, PADDING, IGNORED)
    columns = (
        torch.tensor(
            [line[column] + [fill[column]] * (width - len(line[column])) for line in lines]
        )
        for column in range(4)
    )
    return Pass(*columns)


def model_inputs(made: Pass, model: PreTrainedModel) -> dict[str, Any]:
    """What `model` is called with, on its device, to compute the rows of a pass."""
    import torch

    from ray_sql.models import packed_attention

    # asked before the pass is moved: a GPU's answer would have to be waited for
    shared, whole = bool((made.segments > 0).any()), bool((made.segments == 0).all())
    made = made.to(model.device)
    if not shared:  # plain rows: causal order and, where there is any, the padding say everything
        inputs = {"input_ids": made.input_ids}
        return inputs if whole else inputs | {"attention_mask": (made.segments == 0).long()}
    inputs = {"input_ids": made.input_ids, "position_ids": made.position_ids}
    implementation = model.config._attn_implementation
    if implementation == packed_attention.NAME and made.segments.is_cuda:
        return inputs | {"attention_mask": packed_attention.block_mask(made.segments)}
    seen = visible(made.segments)
    mask = seen[:, None]
    if implementation == "eager":  # it adds the mask to the scores
        mask = torch.zeros_like(mask, dtype=model.dtype).masked_fill(
            ~mask, torch.finfo(model.dtype).min
        )
    if implementation == packed_attention.NAME:
        inputs[packed_attention.SPANS] = [
            packed_attention.spans(*each, model.dtype)
            for each in zip(made.segments, seen, strict=True)
        ]
    return inputs | {"attention_mask": mask}


def visible(segments: torch.Tensor) -> torch.Tensor:
    """Who sees whom, bool `[rows, length, length]` (query, key), for `segments` `[rows, length]`."""
    query, key = segments[:, :, None], segments[:, None, :]
    return ((key == 0) | (key == query)).tril()


def _fill(group: Sequence[Row], together: int, row_length: int) -> list[Shared]:
    """One database's examples as rows: each joins the first row where it fits, saves tokens, and shares at least half its prompt.

    A schema that was trimmed, or shown in part, shares less, and would cost those that share more their prefix.
    """
    made: list[Shared] = []
    for row in group:
        for place, one in enumerate(made):
            joined = _joined((*one.examples, row)) if len(one.examples) < together else one
            saves = one.tokens < joined.tokens < one.tokens + len(row.input_ids)
            if saves and joined.prefix * 2 >= row.prompt_length and joined.tokens <= row_length:
                made[place] = joined
                break
        else:
            made.append(_joined((row,)))
    return made


def _joined(examples: tuple[Row, ...]) -> Shared:
    if len(examples) == 1:
        return Shared(examples, 0)
    # one prompt token at least stays with each question: the answers' first tokens are predicted from the token before them, and
    # that of a prefix could only be asked for one of them
    prompts = [row.input_ids[: row.prompt_length - 1] for row in examples]
    return Shared(examples, common_prefix(prompts))


def _line(row: Shared) -> tuple[list[int], list[int], list[int], list[int]]:
    """Token, position, segment and label of every place in a row."""
    ids = list(row.examples[0].input_ids[: row.prefix])
    positions, segments, labels = list(range(row.prefix)), [0] * row.prefix, [IGNORED] * row.prefix
    for number, example in enumerate(row.examples, start=1 if row.prefix else 0):
        own = example.input_ids[row.prefix :]
        unlearned = example.prompt_length - row.prefix
        ids += own
        positions += range(row.prefix, row.prefix + len(own))
        segments += [number] * len(own)
        labels += [IGNORED] * unlearned + own[unlearned:]
    return ids, positions, segments, labels
