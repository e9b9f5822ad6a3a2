"""Greedy answers to many questions, each database's schema computed once.

Questions of one database whose prompts begin alike are a group. The prefix of a group is computed
once and kept once. The rest of each prompt is computed in one pass for many questions. Then all of
them go on together, whatever their database, by a token a pass. Where few are left, the next
tokens are guessed and several are checked in a pass (`draft`). A question that has its answer
leaves, and another takes its place.

The answers are those of one-by-one decoding, token for token (tested in float32). Only the rounding
of equal sums in another order differs. So it stays beside transformers' continuous batching
(`generate_batch`) and vLLM's prefix caching: it is exact in float32, also on a CPU.
"""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from operator import attrgetter
from statistics import median
from typing import TYPE_CHECKING, Any

import psutil
import torch
from transformers import DynamicCache

from ray_sql.generate.draft import Draft
from ray_sql.generate.hf_generate import inference
from ray_sql.models import decode_attention
from ray_sql.models.decode_attention import OwnTokens, Prefix, PrefixRuns
from ray_sql.rows import common_prefix

if TYPE_CHECKING:
    from transformers import PreTrainedModel

AUTO_NUM_SEQS = 64
"""Questions answered at a time where `evaluate.max_num_seqs` is `auto` and memory allows it."""
PROMPT_PASS = 4096
"""Tokens of a pass over the rest of prompts, padding included."""
STEP_TOKENS = {"cpu": 32, "cuda": 256}
"""Tokens of a pass, guesses included, that take about as long as one a question, by device."""
MAX_GUESSES = 8
"""Maximum tokens that are guessed of an answer at a time."""
TOLERANCE = 0.05
"""Relative difference of logits that arithmetic explains, in the middle of `PROBES` tries.

A question that misses its prefix is off by five times as much. A tuned model in bfloat16 was at
0.018, and at 0.5 without the prefix; a single try reached 0.07.
"""
PROBES = 5

Ended = Callable[[Sequence[int]], bool]
"""Tells whether an answer is complete, given its tokens so far."""
Finish = Callable[[int, list[int], float], None]
"""Receives a complete answer: its question's index, its tokens, its share of the seconds."""


@dataclass
class Group:
    """Questions whose prompts share their first `prefix` tokens.

    `members` are indices of questions. At least one token of each prompt is the question's own.
    """

    members: list[int]
    prefix: int


@dataclass
class Slot:
    """A question that is being answered.

    Its own tokens have the columns from `start` to before `end`; `tokens` are those of its answer.
    """

    question: int
    group: int
    draft: Draft
    start: int = 0
    end: int = 0
    tokens: list[int] = field(default_factory=list)
    seconds: float = 0.0


def group_prompts(prompts: Sequence[Sequence[int]], databases: Sequence[str]) -> list[Group]:
    """Return groups by database and common prefix, the largest first.

    A question joins if all members still share at least half of their prompts. A schema that was
    trimmed, or is shown in part, would cost the others their prefix.
    """
    groups: dict[str, list[Group]] = defaultdict(list)
    for index in sorted(range(len(prompts)), key=lambda index: -len(prompts[index])):
        prompt = prompts[index]
        for group in groups[databases[index]]:
            # the longest of the group: what it can give up, all can
            longest = prompts[group.members[0]]
            shared = common_prefix([list(longest[: group.prefix]), list(prompt[:-1])])
            if shared * 2 >= len(longest):
                group.members.append(index)
                group.prefix = shared
                break
        else:
            groups[databases[index]].append(Group([index], len(prompt) - 1))
    flat = [group for by_database in groups.values() for group in by_database]
    return sorted(flat, key=lambda group: -len(group.members))


def why_not_share(model: PreTrainedModel, longest: int) -> str | None:
    """Return why `model` cannot answer over a prefix that questions share; None if it can.

    Prompt and answer have up to `longest` tokens. Pairs of short prompts of random tokens are
    computed both ways. The attention itself finds sliding windows, softcaps and the like. The
    model's config is asked for effects that only long prompts have.
    """
    if reason := _why_length_matters(model.config.get_text_config(), longest):
        return reason
    try:
        with decode_attention.installed(model), inference(model):
            difference = median(_difference(model, longest, seed) for seed in range(PROBES))
    # each architecture fails in its own way; whole prompts are right for all
    except Exception as error:
        first_line = (str(error).splitlines() or [""])[0][:120]
        return f"it does not take a shared prefix ({type(error).__name__}: {first_line})"
    if not difference < TOLERANCE:
        return (
            "a shared prefix gives other logits than whole prompts "
            f"(relative difference {difference:.2g})"
        )
    return None


def _difference(model: PreTrainedModel, longest: int, seed: int) -> float:
    """Return the relative difference of the first logits of two answers, computed both ways."""
    vocabulary = model.config.get_text_config().vocab_size
    draw = torch.Generator().manual_seed(seed)
    prefix, *own = (
        torch.randint(vocabulary, (length,), generator=draw).tolist() for length in (8, 4, 2)
    )
    prompts = [prefix + tokens for tokens in own]
    decoder = Decoder(model, prompts, [Group([0, 1], len(prefix))], longest)
    shared = decoder.first_logits()
    alone = []
    for prompt in prompts:
        logits = model(torch.tensor([prompt], device=model.device)).logits
        alone.append(logits[0, -1].float())
    expected = torch.stack(alone)
    return float((shared - expected).norm() / expected.norm())


def _why_length_matters(config: Any, longest: int) -> str | None:
    """Return what sets in after some length, so that a probe of short prompts cannot see it."""
    chunk = getattr(config, "attention_chunk_size", None)
    if chunk and chunk < longest:
        return f"its attention is cut into chunks of {chunk} tokens, but sequences reach {longest}"
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") not in ("dynamic", "longrope"):
        return None
    short = (
        rope.get("original_max_position_embeddings")
        or getattr(config, "max_position_embeddings", None)
        or longest
    )
    if int(short) < longest:
        return (
            f"its positions change with a sequence's length after {short} tokens, "
            f"but sequences reach {longest}"
        )
    return None


def decode(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    groups: Sequence[Group],
    *,
    max_new_tokens: int,
    max_num_seqs: int | None,
    ended: Ended,
    finish: Finish,
) -> None:
    """Answer all prompts greedily, `max_num_seqs` at a time.

    None is as many as memory allows, up to `AUTO_NUM_SEQS`.
    """
    longest = max(map(len, prompts)) + max_new_tokens
    budget = None if max_num_seqs else free_memory(model) // bytes_per_token(model)
    with decode_attention.installed(model), inference(model):
        decoder = Decoder(
            model,
            prompts,
            groups,
            longest,
            max_num_seqs=max_num_seqs or AUTO_NUM_SEQS,
            budget=budget,
            max_new_tokens=max_new_tokens,
        )
        decoder.run(ended, finish)


def bytes_per_token(model: PreTrainedModel) -> int:
    """Return the bytes that the keys and values of one token take."""
    shape = model.config.get_text_config()
    heads = getattr(shape, "num_key_value_heads", None) or shape.num_attention_heads
    size = getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads
    return int(2 * shape.num_hidden_layers * heads * size * model.dtype.itemsize)


def free_memory(model: PreTrainedModel) -> int:
    """Return the bytes for keys and values: half of what a GPU has free, a quarter on a CPU."""
    if model.device.type == "cuda":
        return int(torch.cuda.mem_get_info(model.device)[0] // 2)
    return int(psutil.virtual_memory().available // 4)


class Decoder:
    """The questions that are being answered, a slot each.

    Slots are dense, and those of a group that came together stay together. `limit` is the length
    that no sequence passes; `budget` the tokens whose keys and values fit into memory, if known.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        prompts: Sequence[Sequence[int]],
        groups: Sequence[Group],
        limit: int,
        max_num_seqs: int = AUTO_NUM_SEQS,
        budget: int | None = None,
        max_new_tokens: int = 1,
    ) -> None:
        self._model, self._prompts, self._groups = model, prompts, groups
        self._limit, self._max_num_seqs, self._budget = limit, max_num_seqs, budget
        self._max_new_tokens = max_new_tokens
        self._waiting: deque[tuple[int, int]] = deque()
        self._left: dict[int, int] = {}
        for index, group in enumerate(groups):
            self._waiting += ((index, question) for question in group.members)
            self._left[index] = len(group.members)
        self._prefixes: dict[int, Prefix] = {}
        self._slots: list[Slot] = []
        self._own = OwnTokens()

    def run(self, ended: Ended, finish: Finish) -> None:
        """Answer everything."""
        while self._waiting or self._slots:
            # A quarter of the slots is filled at a time: a pass costs about as much for one
            # question as for several.
            if self._waiting and len(self._slots) <= self._max_num_seqs * 3 // 4:
                for chunk in self._prompt_passes(self._admit()):
                    first = len(self._slots)
                    self._slots += chunk
                    tokens = self._begin(chunk).argmax(-1)[:, None].tolist()
                    self._take(first, tokens, ended, finish)
            if self._slots:
                self._take(0, self._step(), ended, finish)
            else:
                self._own = OwnTokens()  # its memory is for whoever comes next

    def first_logits(self) -> torch.Tensor:
        """Return the logits of every answer's first token, `[questions, vocabulary]` in float32."""
        self._slots = self._admit()
        return self._begin(self._slots).float()

    def _admit(self) -> list[Slot]:
        """Return slots for the next questions that fit, with their prefixes computed."""
        new: list[Slot] = []
        while self._waiting and len(self._slots) + len(new) < self._max_num_seqs:
            index, question = self._waiting[0]
            if not self._fits(index, question, [*self._slots, *new]):
                break
            self._waiting.popleft()
            slot = Slot(question, index, Draft(self._prompts[question]))
            prefix = self._groups[index].prefix
            if prefix and index not in self._prefixes:
                started = time.monotonic()
                self._prefixes[index] = self.prefill(self._prompts[question][:prefix])
                slot.seconds = time.monotonic() - started
            new.append(slot)
        return new

    def _fits(self, group: int, question: int, slots: Sequence[Slot]) -> bool:
        """Tell whether a question fits beside `slots`, should all answers be as long as allowed."""
        if self._budget is None or not slots:
            return True
        pairs = [(slot.group, slot.question) for slot in slots] + [(group, question)]
        used = {index for index, _ in pairs} | set(self._prefixes)
        prefixes = sum(self._groups[index].prefix for index in used)
        own = max(
            len(self._prompts[member]) - self._groups[index].prefix for index, member in pairs
        )
        # the cache grows and never shrinks
        rows, columns = self._own.allocated
        columns = max(own + self._max_new_tokens + MAX_GUESSES, columns)
        return prefixes + columns * max(len(pairs), rows) <= self._budget

    def _prompt_passes(self, new: list[Slot]) -> Iterator[list[Slot]]:
        """Yield new slots by the length of their own prompt tokens, `PROMPT_PASS` tokens a pass."""
        new.sort(key=lambda slot: -len(self._own_prompt(slot)))
        while new:
            count = max(1, PROMPT_PASS // len(self._own_prompt(new[0])))
            yield sorted(new[:count], key=attrgetter("group"))
            del new[:count]

    def _own_prompt(self, slot: Slot) -> Sequence[int]:
        return self._prompts[slot.question][self._groups[slot.group].prefix :]

    def prefill(self, tokens: Sequence[int]) -> Prefix:
        """Compute the keys and values of a prefix."""
        cache = DynamicCache()
        ids = torch.tensor([list(tokens)], device=self._model.device)
        self._model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        keys = [layer.keys[0] for layer in cache.layers]
        values = [layer.values[0] for layer in cache.layers]
        return Prefix(keys, values, len(tokens))

    def _begin(self, slots: list[Slot]) -> torch.Tensor:
        """Return the logits of the first token of each answer.

        `slots` are the last ones. Their own prompt tokens are padded on the left.
        """
        prompts = [list(self._own_prompt(slot)) for slot in slots]
        width = max(map(len, prompts))
        for slot, prompt in zip(slots, prompts, strict=True):
            slot.start, slot.end = width - len(prompt), width
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
        columns = torch.arange(width).expand(len(slots), width)
        return self.forward(slots, len(self._slots) - len(slots), ids, columns)[:, -1]

    def _step(self) -> list[list[int]]:
        """Return the next tokens of every answer: one, and one for each guess that was right."""
        budget = STEP_TOKENS.get(self._model.device.type, 0) // len(self._slots) - 1
        inputs = []
        for slot in self._slots:
            most = min(MAX_GUESSES, budget, self._max_new_tokens - len(slot.tokens) - 1)
            inputs.append([slot.tokens[-1], *slot.draft.guess(max(0, most))])
        width = max(map(len, inputs))
        ids = torch.tensor([tokens + [0] * (width - len(tokens)) for tokens in inputs])
        columns = torch.tensor([[slot.end] for slot in self._slots]) + torch.arange(width)
        logits = self.forward(self._slots, 0, ids, columns, every_token=True)
        following = []
        for slot, tokens, chosen in zip(
            self._slots, inputs, logits.argmax(-1).tolist(), strict=True
        ):
            right = 0
            while right < len(tokens) - 1 and tokens[right + 1] == chosen[right]:
                right += 1
            following.append(chosen[: right + 1])
            # keys and values of wrong guesses are overwritten before they are seen
            slot.end += right + 1
        return following

    def forward(
        self,
        slots: Sequence[Slot],
        first: int,
        ids: torch.Tensor,
        columns: torch.Tensor,
        every_token: bool = False,
    ) -> torch.Tensor:
        """Return the logits after the last of `ids` `[slots, tokens]`, or after every token.

        Keys and values are written to `columns` of the rows from `first` on. Logits are
        `[slots, 1 or tokens, vocabulary]`.
        """
        started = time.monotonic()
        device, dtype = self._model.device, self._model.dtype
        width = int(columns.max()) + 1
        columns = columns.to(device)
        starts = torch.tensor([slot.start for slot in slots], device=device)[:, None]
        lengths = [self._groups[slot.group].prefix for slot in slots]
        prefixes = torch.tensor(lengths, device=device)[:, None]
        self._own.write_to(first, columns, width)
        own = torch.arange(width, device=device)
        visible = (own >= starts[:, :, None]) & (own <= columns[:, :, None])
        lowest = torch.finfo(dtype).min
        bias = torch.zeros(visible.shape, dtype=dtype, device=device).masked_fill_(~visible, lowest)
        runs = [
            (len(list(run)), self._prefixes.get(group))
            for group, run in groupby(slots, key=attrgetter("group"))
        ]
        tokens = ids.shape[1]
        logits: torch.Tensor = self._model(
            input_ids=ids.to(device),
            position_ids=(prefixes + columns - starts).clamp(0, self._limit - 1),  # of padding, too
            attention_mask=bias[:, None],
            past_key_values=self._own,
            use_cache=True,
            # Picked by index: the view that a slice makes would be multiplied with a copy of the
            # vocabulary's weights for every row.
            logits_to_keep=torch.arange(0 if every_token else tokens - 1, tokens, device=device),
            **{decode_attention.RUNS: PrefixRuns(runs, bias[:, None], self._limit)},
        ).logits
        share = (time.monotonic() - started) / len(slots)
        for slot in slots:
            slot.seconds += share
        return logits

    def _take(
        self, first: int, following: Sequence[Sequence[int]], ended: Ended, finish: Finish
    ) -> None:
        """Give the slots from `first` on their next tokens; free those whose answer is complete."""
        staying = list(range(first))
        for place, tokens in enumerate(following, start=first):
            slot = self._slots[place]
            if not self._extend(slot, tokens, ended):
                staying.append(place)
                continue
            self._left[slot.group] -= 1
            if not self._left[slot.group]:
                self._prefixes.pop(slot.group, None)
            finish(slot.question, slot.tokens, slot.seconds)
        if len(staying) < len(self._slots):
            self._slots = [self._slots[place] for place in staying]
            self._own.compact(staying, max((slot.end for slot in self._slots), default=0))

    def _extend(self, slot: Slot, tokens: Sequence[int], ended: Ended) -> bool:
        """Append tokens up to the end of an answer; tell whether it is complete."""
        for token in tokens:
            slot.tokens.append(token)
            slot.draft.add(token)
            if len(slot.tokens) >= self._max_new_tokens or ended(slot.tokens):
                return True
        return False
