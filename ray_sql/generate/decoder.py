"""Greedy answers to many questions, each database's schema computed once.

Questions of one database whose prompts begin alike are a group. The prefix of a group is computed once and kept once; what is
left of each prompt is computed in one pass for many questions, and then all of them go on together, whatever their database: by a token
a pass, or by several where few are left and the next ones can be guessed (`draft`). A question that has its answer leaves, and another
takes its place. The answers are those of one-by-one decoding, token for token but for the rounding of equal sums in another order
(tested in float32).
"""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from operator import attrgetter
from statistics import median
from typing import TYPE_CHECKING, Any

from ray_sql.generate.draft import Draft
from ray_sql.rows import common_prefix

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from ray_sql.models.decode_attention import Prefix

AUTO = 64
"""Questions answered together where `evaluate.max_num_seqs` is `auto` and memory allows it."""
PASS = 4096
"""Tokens of a pass over the rest of prompts, padding included."""
STEP = {"cpu": 32, "cuda": 256}
"""Tokens of a pass, guesses included, that take about as long as one a question, by the kind of device."""
GUESS = 8
"""Most tokens that are guessed of an answer at a time."""
TOLERANCE = 0.05
"""Relative difference of logits that arithmetic explains, in the middle of `DRAWS` tries: a question that misses its prefix is off by
five times as much (a tuned model in bfloat16 was at 0.018, and at 0.5 without the prefix; a single try reached 0.07)."""
DRAWS = 5

Ended = Callable[[int, Sequence[int]], bool]
"""Whether the answer to a question, given its number and the tokens so far, is complete."""
Finished = Callable[[int, list[int], float], None]
"""What to do with a complete answer: its question's number, its tokens, its share of the seconds."""


@dataclass
class Group:
    """Questions whose prompts share their first `prefix` tokens; at least one token of each prompt is its own."""

    questions: list[int]
    prefix: int


@dataclass
class _Row:
    """A question that is being answered: `start` is the first column of its own tokens, `end` the column after the last."""

    question: int
    group: int
    draft: Draft
    start: int = 0
    end: int = 0
    said: list[int] = field(default_factory=list)
    seconds: float = 0.0


def group(prompts: Sequence[Sequence[int]], databases: Sequence[str]) -> list[Group]:
    """Questions by database and common prefix, the largest groups first.

    A question joins if all members still share at least half of their prompts: a schema that was trimmed, or is shown in part, would
    cost the others their prefix.
    """
    made: dict[str, list[Group]] = defaultdict(list)
    for number in sorted(range(len(prompts)), key=lambda n: -len(prompts[n])):
        prompt = prompts[number]
        for one in made[databases[number]]:
            first = prompts[
                one.questions[0]
            ]  # the longest of the group: what it can give up, all can
            shared = common_prefix([list(first[: one.prefix]), list(prompt[:-1])])
            if shared * 2 >= len(first):
                one.questions.append(number)
                one.prefix = shared
                break
        else:
            made[databases[number]].append(Group([number], len(prompt) - 1))
    groups = [one for each in made.values() for one in each]
    return sorted(groups, key=lambda one: -len(one.questions))


def why_not(model: PreTrainedModel, longest: int) -> str | None:
    """Why `model` cannot answer over a prefix that questions share, where prompt and answer have up to `longest` tokens; None: it can.

    Pairs of short prompts of random tokens are computed both ways. Sliding windows, softcaps and the like are found by the
    attention itself; what only long prompts show, in the model's config.
    """
    if reason := _unlike_short(model.config.get_text_config(), longest):
        return reason

    from ray_sql.models import decode_attention

    try:
        with decode_attention.installed(model), _inference(model):
            difference = median(_difference(model, longest, seed) for seed in range(DRAWS))
    except (
        Exception
    ) as error:  # each architecture fails in its own way; whole prompts are right for all
        return f"it does not take a shared prefix ({type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]})"
    if not difference < TOLERANCE:
        return f"a shared prefix gives other logits than whole prompts (relative difference {difference:.2g})"
    return None


def _difference(model: PreTrainedModel, longest: int, seed: int) -> float:
    """Relative difference of the first logits of two answers over a shared prefix from those over whole prompts."""
    import torch

    vocabulary = model.config.get_text_config().vocab_size
    draw = torch.Generator().manual_seed(seed)
    prefix, *own = (
        torch.randint(vocabulary, (length,), generator=draw).tolist() for length in (8, 4, 2)
    )
    prompts = [prefix + each for each in own]
    together = _Decoder(model, prompts, [Group([0, 1], len(prefix))], longest, AUTO).first_logits()
    alone = [
        model(torch.tensor([prompt], device=model.device)).logits[0, -1].float()
        for prompt in prompts
    ]
    return float((together - torch.stack(alone)).norm() / torch.stack(alone).norm())


def _unlike_short(config: Any, longest: int) -> str | None:
    """What sets in after some length, so that a probe of short prompts cannot see it."""
    chunk = getattr(config, "attention_chunk_size", None)
    if chunk and chunk < longest:
        return f"its attention is cut into chunks of {chunk} tokens, but sequences reach {longest}"
    rope = getattr(config, "rope_parameters", None) or {}
    short = (
        rope.get("original_max_position_embeddings")
        or getattr(config, "max_position_embeddings", None)
        or longest
    )
    if rope.get("rope_type") in ("dynamic", "longrope") and int(short) < longest:
        return f"its positions change with a sequence's length after {short} tokens, but sequences reach {longest}"
    return None


def decode(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    groups: Sequence[Group],
    *,
    max_new_tokens: int,
    together: int | None,
    ended: Ended,
    finished: Finished,
) -> None:
    """Answer all prompts greedily; `together` questions at once, or as many as memory allows, up to `AUTO`."""
    from ray_sql.models import decode_attention

    longest = max(map(len, prompts)) + max_new_tokens
    room = None if together else memory(model) // token_bytes(model)
    with decode_attention.installed(model), _inference(model):
        decoder = _Decoder(model, prompts, groups, longest, together or AUTO, room, max_new_tokens)
        decoder.run(ended, finished)


def token_bytes(model: PreTrainedModel) -> int:
    """Bytes that the keys and values of one token take."""
    shape = model.config.get_text_config()
    heads = getattr(shape, "num_key_value_heads", None) or shape.num_attention_heads
    size = getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads
    return int(2 * shape.num_hidden_layers * heads * size * model.dtype.itemsize)


def memory(model: PreTrainedModel) -> int:
    """Bytes that may be filled with keys and values: half of what is free on the GPU, a quarter of what is on the CPU."""
    import psutil
    import torch

    if model.device.type == "cuda":
        return int(torch.cuda.mem_get_info(model.device)[0] // 2)
    return int(psutil.virtual_memory().available // 4)


def _inference(model: PreTrainedModel) -> Any:
    """No gradients, and autocast as in training: LoRA weights are float32 there, and the same tensors must meet the same arithmetic."""
    import contextlib

    import torch

    stack = contextlib.ExitStack()
    stack.enter_context(torch.inference_mode())
    stack.enter_context(
        torch.autocast(model.device.type, torch.bfloat16, enabled=model.dtype == torch.bfloat16)
    )
    return stack


class _Decoder:
    """The questions that are being answered, one row each: rows are dense, and those of a group that came together stay together."""

    def __init__(
        self,
        model: PreTrainedModel,
        prompts: Sequence[Sequence[int]],
        groups: Sequence[Group],
        limit: int,
        together: int,
        room: int | None = None,
        max_new_tokens: int = 1,
    ) -> None:
        from ray_sql.models.decode_attention import OwnTokens

        self._model, self._prompts, self._groups = model, prompts, groups
        self._limit, self._together, self._room, self._new = limit, together, room, max_new_tokens
        self._waiting = deque(
            (number, question) for number, one in enumerate(groups) for question in one.questions
        )
        self._left = {number: len(one.questions) for number, one in enumerate(groups)}
        self._prefixes: dict[int, Prefix] = {}
        self._rows: list[_Row] = []
        self._own = OwnTokens()

    def run(self, ended: Ended, finished: Finished) -> None:
        """Answer everything."""
        from ray_sql.models.decode_attention import OwnTokens

        while self._waiting or self._rows:
            # places are filled a quarter of them at a time: a pass costs about as much for one question as for several
            if self._waiting and len(self._rows) <= self._together * 3 // 4:
                new = self._admit()
                for chunk in self._passes(new):
                    self._rows += chunk
                    first = self._begin(chunk).argmax(-1)[:, None].tolist()
                    self._take(len(self._rows) - len(chunk), first, ended, finished)
            if self._rows:
                self._take(0, self._step(), ended, finished)
            else:
                self._own = OwnTokens()  # its memory is for whoever comes next

    def first_logits(self) -> torch.Tensor:
        """Logits of the first token of every answer, `[questions, vocabulary]` in float32."""
        self._rows = self._admit()
        return self._begin(self._rows).float()

    def _admit(self) -> list[_Row]:
        """The next questions that there is a place for, their prefixes computed."""
        new: list[_Row] = []
        while self._waiting and len(self._rows) + len(new) < self._together:
            number, question = self._waiting[0]
            if (self._rows or new) and not self._fits(number, question, [*self._rows, *new]):
                break
            self._waiting.popleft()
            row = _Row(question, number, Draft(self._prompts[question]))
            if number not in self._prefixes and self._groups[number].prefix:
                started = time.monotonic()
                self._prefixes[number] = self._prefill(
                    self._prompts[question][: self._groups[number].prefix]
                )
                row.seconds = time.monotonic() - started
            new.append(row)
        return new

    def _fits(self, number: int, question: int, rows: Sequence[_Row]) -> bool:
        """Whether a question's keys and values find room beside those of `rows`, should all answers be as long as they may."""
        if self._room is None:
            return True
        asked = [(row.group, row.question) for row in rows] + [(number, question)]
        prefixes = sum(
            self._groups[one].prefix for one in {one for one, _ in asked} | set(self._prefixes)
        )
        widest = (
            max(len(self._prompts[q]) - self._groups[one].prefix for one, q in asked)
            + self._new
            + GUESS
        )
        rows_there, columns_there = self._own.room  # it grows and never shrinks
        return prefixes + max(widest, columns_there) * max(len(asked), rows_there) <= self._room

    def _passes(self, new: list[_Row]) -> Iterable[list[_Row]]:
        """New rows by the length of their own prompt tokens, as many in a pass as `PASS` allows."""
        new.sort(key=lambda row: -len(self._own_prompt(row)))
        while new:
            count = max(1, PASS // len(self._own_prompt(new[0])))
            yield sorted(new[:count], key=attrgetter("group"))
            del new[:count]

    def _own_prompt(self, row: _Row) -> Sequence[int]:
        return self._prompts[row.question][self._groups[row.group].prefix :]

    def _prefill(self, tokens: Sequence[int]) -> Prefix:
        import torch
        from transformers import DynamicCache

        from ray_sql.models.decode_attention import Prefix

        cache = DynamicCache()
        ids = torch.tensor([list(tokens)], device=self._model.device)
        self._model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return Prefix(
            [layer.keys[0] for layer in cache.layers],
            [layer.values[0] for layer in cache.layers],
            len(tokens),
        )

    def _begin(self, rows: list[_Row]) -> torch.Tensor:
        """Logits of the first token of each answer; the last of `self._rows` are `rows`, whose own tokens are padded on the left."""
        import torch

        prompts = [list(self._own_prompt(row)) for row in rows]
        width = max(map(len, prompts))
        for row, prompt in zip(rows, prompts, strict=True):
            row.start, row.end = width - len(prompt), width
        ids = torch.tensor(
            [[0] * row.start + prompt for row, prompt in zip(rows, prompts, strict=True)]
        )
        return self._forward(
            rows, len(self._rows) - len(rows), ids, torch.arange(width).expand(len(rows), width)
        )

    def _step(self) -> list[list[int]]:
        """The next tokens of every answer: the one that follows, and what follows the guesses that turn out right."""
        import torch

        most = min(GUESS, STEP.get(self._model.device.type, 0) // len(self._rows) - 1)
        inputs = [
            [row.said[-1], *row.draft.guess(max(0, min(most, self._new - len(row.said) - 1)))]
            for row in self._rows
        ]
        width = max(map(len, inputs))
        ids = torch.tensor([tokens + [0] * (width - len(tokens)) for tokens in inputs])
        columns = torch.tensor([[row.end] for row in self._rows]) + torch.arange(width)
        chosen = self._forward(self._rows, 0, ids, columns, whole=True).argmax(-1).tolist()
        following = []
        for row, tokens, found in zip(self._rows, inputs, chosen, strict=True):
            right = next(
                (n for n, guess in enumerate(tokens[1:]) if guess != found[n]), len(tokens) - 1
            )
            following.append(found[: right + 1])
            row.end += (
                right + 1
            )  # what was written of wrong guesses is overwritten before it is seen
        return following

    def _forward(
        self,
        rows: Sequence[_Row],
        first: int,
        ids: torch.Tensor,
        columns: torch.Tensor,
        whole: bool = False,
    ) -> torch.Tensor:
        """Logits after the last of `ids` `[rows, tokens]`, or after each where they are wanted `whole`; keys and values are written to
        `columns` of the rows from `first` on."""
        import torch

        from ray_sql.models.decode_attention import SEEN, Seen

        started = time.monotonic()
        device, dtype = self._model.device, self._model.dtype
        width = int(columns.max()) + 1
        columns = columns.to(device)
        starts = torch.tensor([row.start for row in rows], device=device)[:, None]
        prefixes = torch.tensor([self._groups[row.group].prefix for row in rows], device=device)[
            :, None
        ]
        self._own.at(first, columns, width)
        own = torch.arange(width, device=device)
        visible = (own >= starts[:, :, None]) & (own <= columns[:, :, None])
        bias = torch.zeros(visible.shape, dtype=dtype, device=device).masked_fill_(
            ~visible, torch.finfo(dtype).min
        )
        runs = [
            (len(list(run)), self._prefixes.get(number))
            for number, run in groupby(rows, key=attrgetter("group"))
        ]
        logits = self._model(
            input_ids=ids.to(device),
            position_ids=(prefixes + columns - starts).clamp(0, self._limit - 1),  # of padding, too
            attention_mask=bias[:, None],
            past_key_values=self._own,
            use_cache=True,
            # picked by number: the view that a slice makes would be multiplied with a copy of the vocabulary's weights for every row
            logits_to_keep=torch.arange(
                0 if whole else ids.shape[1] - 1, ids.shape[1], device=device
            ),
            **{SEEN: Seen(runs, bias[:, None], self._limit)},
        ).logits
        share = (time.monotonic() - started) / len(rows)
        for row in rows:
            row.seconds += share
        return logits if whole else logits[:, -1]

    def _take(
        self, first: int, following: Sequence[Sequence[int]], ended: Ended, finished: Finished
    ) -> None:
        """Give the rows from `first` on their next tokens; those whose answer is complete leave, the others move up."""
        staying = list(range(first))
        for place, tokens in enumerate(following, start=first):
            row = self._rows[place]
            if not self._say(row, tokens, ended):
                staying.append(place)
                continue
            self._left[row.group] -= 1
            if not self._left[row.group]:
                self._prefixes.pop(row.group, None)
            finished(row.question, row.said, row.seconds)
        if len(staying) < len(self._rows):
            self._rows = [self._rows[place] for place in staying]
            self._own.keep(staying, max((row.end for row in self._rows), default=0))

    def _say(self, row: _Row, tokens: Sequence[int], ended: Ended) -> bool:
        """Go on with an answer; whether it is complete, and what would come after its end is left out."""
        for token in tokens:
            row.said.append(token)
            row.draft.add(token)
            if len(row.said) >= self._new or ended(row.question, row.said):
                return True
        return False
