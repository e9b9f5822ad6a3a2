"""Answers to many questions, each database's schema computed once.

Questions of one database whose prompts begin alike are a group. The prefix of a group is computed
once and kept once. The rest of each prompt is computed in one pass for many questions. Then all of
them go on together, whatever their database, by a token a pass. Where few are left, the next
tokens are guessed and several are checked in a pass (`draft`). A question that has its answer
leaves, and another takes its place: one that waits, or one that comes only now (`more`). So does
a question whose answer nobody needs any more (`needed`).

Answers to a question are one slot until they differ (`slots`). So a sample costs the tokens that no
other answer to its question has begun with.

The answers are those of one-by-one decoding, token for token (tested in float32). Only the rounding
of equal sums in another order differs. So it stays beside transformers' continuous batching
(`generate_batch`) and vLLM's prefix caching: it is exact in float32, also on a CPU.
"""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

import torch
from transformers import DynamicCache

from ray_sql.generate.decoded import Decoded
from ray_sql.generate.draft import Draft
from ray_sql.generate.groups import Group
from ray_sql.generate.hf_generate import inference
from ray_sql.generate.kept_prefixes import KeptPrefixes
from ray_sql.generate.memory import bytes_per_token, free_memory
from ray_sql.generate.slots import Ended, Pick, Slot
from ray_sql.generate.wanted import Wanted
from ray_sql.models import decode_attention, recurrent
from ray_sql.models.decode_attention import OwnTokens, Prefix, PrefixRuns
from ray_sql.models.decode_states import StatesPass
from ray_sql.models.recurrent import State

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


GREEDY = Wanted()
"""One greedy answer a question."""
Finish = Callable[[int, list[Decoded], float], None]
"""Receives a question's index, its answers in the order of `Wanted`, and its share of seconds."""
More = Callable[[], Sequence[tuple[Sequence[int], int]]]
"""Returns prompts that came meanwhile, each with the number of its first tokens that others share.

Their indices follow those of the prompts before them.
"""


Needed = Callable[[int], bool]
"""Tells whether somebody still needs the answer to a question, by its index."""


def no_more() -> Sequence[tuple[Sequence[int], int]]:
    """Return no further prompts."""
    return ()


def always(question: int) -> bool:
    """Need the answer to every question."""
    return True


def decode(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    groups: Sequence[Group],
    *,
    max_new_tokens: int,
    max_num_seqs: int | None,
    ended: Ended,
    finish: Finish,
    wanted: Wanted = GREEDY,
    kept: KeptPrefixes | None = None,
    more: More = no_more,
    needed: Needed = always,
    longest: int = 0,
) -> None:
    """Give all prompts the answers that are wanted, `max_num_seqs` prompts at a time.

    None is as many as memory allows, up to `AUTO_NUM_SEQS`. Prefixes are taken from `kept`, and
    left there. `more` and `needed` are asked before every pass. The prompts and answers of `more`
    have at most `longest` tokens.
    """
    longest = max(longest, max(map(len, prompts)) + max_new_tokens)
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
            wanted=wanted,
            kept=kept,
        )
        decoder.run(ended, finish, more, needed)


class Decoder:
    """The questions that are being answered, in slots.

    Slots are dense. `limit` is the length that no sequence passes; `budget` the tokens whose keys
    and values fit into memory, if known.
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
        wanted: Wanted = GREEDY,
        kept: KeptPrefixes | None = None,
    ) -> None:
        self._model, self._prompts, self._groups = model, list(prompts), list(groups)
        self._kept = kept or KeptPrefixes()
        self._carries = recurrent.has_layers(model)
        self._limit, self._max_num_seqs, self._budget = limit, max_num_seqs, budget
        self._max_new_tokens, self._wanted = max_new_tokens, wanted
        self._waiting: deque[tuple[int, int]] = deque()
        self._left: dict[int, int] = {}
        for index, group in enumerate(groups):
            self._waiting += ((index, question) for question in group.members)
            self._left[index] = len(group.members)
        begins = (tuple(prompts[group.members[0]][: group.prefix]) for group in groups)
        self._group_of = {begin: index for index, begin in enumerate(begins)}
        self._prefixes: dict[int, Prefix] = {}
        self._slots: list[Slot] = []
        self._own = OwnTokens()
        self._numbers: dict[int, torch.Tensor] = {}
        self._seconds: dict[int, float] = defaultdict(float)
        self._done: dict[int, dict[int, Decoded]] = defaultdict(dict)

    def run(
        self, ended: Ended, finish: Finish, more: More = no_more, needed: Needed = always
    ) -> None:
        """Answer everything that is needed, and what comes meanwhile."""
        while True:
            self._leave(needed)
            for prompt, prefix in more():
                self._join(prompt, prefix)
            if not self._waiting and not self._slots:
                return
            # A quarter of the slots is filled at a time: a pass costs about as much for one
            # question as for several.
            if self._waiting and len(self._slots) <= self._max_num_seqs * 3 // 4:
                for chunk in self._prompt_passes(self._admit()):
                    first = len(self._slots)
                    self._slots += chunk
                    logits = self._begin(chunk)
                    self._advance(first, [[]] * len(chunk), logits, ended, finish)
            if self._slots:
                guesses = self._guesses()
                self._advance(0, guesses, self._step(guesses), ended, finish)
            else:
                self._own = OwnTokens()  # its memory is for whoever comes next

    def _join(self, prompt: Sequence[int], prefix: int) -> None:
        """Let a prompt wait for a slot, in the group whose prefix it begins with."""
        index = self._group_of.setdefault(tuple(prompt[:prefix]), len(self._groups))
        if index == len(self._groups):
            self._groups.append(Group([], prefix))
            self._left[index] = 0
        question = len(self._prompts)
        self._prompts.append(prompt)
        self._groups[index].members.append(question)
        self._waiting.append((index, question))
        self._left[index] += 1

    def _leave(self, needed: Needed) -> None:
        """Free the places of questions whose answers nobody needs any more."""
        left = {question: group for group, question in self._waiting if not needed(question)}
        left |= {slot.question: slot.group for slot in self._slots if not needed(slot.question)}
        if not left:
            return
        self._waiting = deque(one for one in self._waiting if one[1] not in left)
        staying = [place for place, slot in enumerate(self._slots) if slot.question not in left]
        if len(staying) < len(self._slots):
            self._slots = [self._slots[place] for place in staying]
            self._own.compact(staying, max((slot.end for slot in self._slots), default=0))
        for question, group in left.items():
            self._forget(question, group)

    def first_logits(self) -> torch.Tensor:
        """Return the logits of every answer's first token, `[questions, vocabulary]` in float32."""
        self._slots = self._admit()
        return self._begin(self._slots)[:, -1].float()

    def _admit(self) -> list[Slot]:
        """Return slots for the next questions that fit, with their prefixes computed."""
        new: list[Slot] = []
        while self._waiting and len(self._slots) + len(new) < self._max_num_seqs:
            index, question = self._waiting[0]
            if not self._fits(index, question, [*self._slots, *new]):
                break
            self._waiting.popleft()
            prompt = self._prompts[question]
            prefix = self._groups[index].prefix
            if prefix and index not in self._prefixes:
                started = time.monotonic()
                self._prefixes[index] = self._kept.get(prompt[:prefix], self.prefill)
                self._seconds[question] += time.monotonic() - started
            most = self._max_new_tokens + MAX_GUESSES
            self._numbers[question] = self._wanted.numbers(prompt, most)
            new.append(Slot(question, index, list(range(self._wanted.answers)), Draft(prompt)))
        return new

    def _fits(self, group: int, question: int, slots: Sequence[Slot]) -> bool:
        """Tell whether a question fits beside `slots`, should all answers be as long as allowed.

        Every answer may come to need a slot of its own.
        """
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
        states = max((prefix.state_bytes for prefix in self._prefixes.values()), default=0)
        columns += states // bytes_per_token(self._model)
        needed = sum(len(slot.answers) for slot in slots) + self._wanted.answers
        return prefixes + columns * max(needed, rows) <= self._budget

    def _prompt_passes(self, new: list[Slot]) -> Iterator[list[Slot]]:
        """Yield new slots by the length of their own prompt tokens, `PROMPT_PASS` tokens a pass."""
        new.sort(key=lambda slot: -len(self._own_prompt(slot)))
        while new:
            count = max(1, PROMPT_PASS // len(self._own_prompt(new[0])))
            yield new[:count]
            del new[:count]

    def _own_prompt(self, slot: Slot) -> Sequence[int]:
        return self._prompts[slot.question][self._groups[slot.group].prefix :]

    def prefill(self, tokens: Sequence[int]) -> Prefix:
        """Compute the keys, values and states of a prefix."""
        # given the config, a cache holds states, but of windows no more than they see
        cache = DynamicCache(config=self._model.config) if self._carries else DynamicCache()
        ids = torch.tensor([list(tokens)], device=self._model.device)
        self._model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return decode_attention.read_cache(cache, len(tokens))

    def _begin(self, slots: list[Slot]) -> torch.Tensor:
        """Return the logits of the first token of each answer, `[slots, 1, vocabulary]`.

        `slots` are the last ones. Their own prompt tokens are padded on the left.
        """
        prompts = [list(self._own_prompt(slot)) for slot in slots]
        width = max(map(len, prompts))
        for slot, prompt in zip(slots, prompts, strict=True):
            slot.start, slot.end = width - len(prompt), width - 1
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
        columns = torch.arange(width).expand(len(slots), width)
        return self.forward(slots, len(self._slots) - len(slots), ids, columns)

    def _guesses(self) -> list[list[int]]:
        """Return guesses at the next tokens of every slot, where few slots leave room for them.

        A state that has met a wrong guess cannot go back, so that there layers may carry none.
        """
        if self._carries:
            return [[] for _ in self._slots]
        budget = STEP_TOKENS.get(self._model.device.type, 0) // len(self._slots) - 1
        guesses = []
        for slot in self._slots:
            most = min(MAX_GUESSES, budget, self._max_new_tokens - len(slot.tokens) - 1)
            guesses.append(slot.draft.guess(max(0, most)))
        return guesses

    def _step(self, guesses: Sequence[Sequence[int]]) -> torch.Tensor:
        """Return the logits after the last token of every slot, and after each guess.

        Keys and values of wrong guesses are overwritten before they are seen.
        """
        width = 1 + max(map(len, guesses))
        ids = [
            [slot.tokens[-1], *guess, *[0] * (width - 1 - len(guess))]
            for slot, guess in zip(self._slots, guesses, strict=True)
        ]
        columns = torch.tensor([[slot.end] for slot in self._slots]) + torch.arange(width)
        return self.forward(self._slots, 0, torch.tensor(ids), columns, every_token=True)

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
        groups = [slot.group for slot in slots]
        order = sorted(range(len(slots)), key=groups.__getitem__)
        runs = [
            (len(list(run)), self._prefixes.get(group))
            for group, run in groupby(groups[place] for place in order)
        ]
        rows = torch.tensor(order, device=device)
        tokens = ids.shape[1]
        positions = (prefixes + columns - starts).clamp(0, self._limit - 1)  # of padding, too
        shared = PrefixRuns(runs, rows, bias[:, None], columns, positions, self._own, self._limit)
        logits: torch.Tensor = self._model(
            input_ids=ids.to(device),
            position_ids=positions,
            attention_mask=bias[:, None],
            past_key_values=self._own,
            use_cache=True,
            # Picked by index: the view that a slice makes would be multiplied with a copy of the
            # vocabulary's weights for every row.
            logits_to_keep=torch.arange(0 if every_token else tokens - 1, tokens, device=device),
            **{decode_attention.RUNS: shared},
            **self._states(slots, first, tokens),
        ).logits
        share = (time.monotonic() - started) / len(slots)
        for slot in slots:
            self._seconds[slot.question] += share
        return logits

    def _states(self, slots: Sequence[Slot], first: int, tokens: int) -> dict[str, StatesPass]:
        """Return what layers that carry a state are told of a pass over so many tokens a slot."""
        if not self._carries:
            return {}
        begins: list[Mapping[int, State] | None] | None = None
        lengths = [tokens] * len(slots)
        if not slots[0].tokens:
            prefixes = [self._prefixes.get(slot.group) for slot in slots]
            begins = [None if prefix is None else prefix.states for prefix in prefixes]
            lengths = [tokens - slot.start for slot in slots]
        return {recurrent.CARRIED: StatesPass(self._own.states, first, lengths, begins)}

    def _advance(
        self,
        first: int,
        guesses: Sequence[Sequence[int]],
        logits: torch.Tensor,
        ended: Ended,
        finish: Finish,
    ) -> None:
        """Let the slots from `first` on go on by their next tokens; free those that are complete.

        Answers that are no longer alike get slots of their own, with copies of their keys.
        """
        picks = self._picks(self._slots[first:], logits)
        staying, places = self._slots[:first], list(range(first))
        new: list[Slot] = []
        sources: list[int] = []
        for row, slot in enumerate(self._slots[first:]):
            branches = slot.branches(guesses[row], picks[row])
            slots = [slot.copy() for _ in branches[1:]] + [slot]
            going = []
            for one, branch in zip(slots, branches, strict=True):
                if one.follow(branch, self._max_new_tokens, ended):
                    self._keep(one, finish)
                else:
                    going.append(one)
            staying += going[:1]
            places += [first + row] * len(going[:1])
            new += going[1:]
            sources += [first + row] * len(going[1:])
        width = max((slot.end for slot in (*staying, *new)), default=0)
        if new:
            places += range(len(self._slots), len(self._slots) + len(new))
            self._own.append(sources, len(self._slots), width)
        if len(staying) < len(self._slots):
            self._own.compact(places, width)
        self._slots = staying + new

    def _picks(self, slots: Sequence[Slot], logits: torch.Tensor) -> list[Pick]:
        """Return for each slot how its answers go on, given the logits behind each place."""
        rows, places, vocabulary = logits.shape
        numbers = [
            self._numbers[slot.question][len(slot.tokens) : len(slot.tokens) + places]
            for slot in slots
        ]
        chosen = self._wanted.choose(logits.view(-1, vocabulary), torch.cat(numbers))
        tokens, logprobs = (values.view(rows, places, -1).tolist() for values in chosen)
        return [
            self._pick(slot.question, logits[row], tokens[row], logprobs[row])
            for row, slot in enumerate(slots)
        ]

    def _pick(
        self,
        question: int,
        logits: torch.Tensor,
        tokens: Sequence[Sequence[int]],
        logprobs: Sequence[Sequence[float]],
    ) -> Pick:
        def pick(place: int, answer: int, begun: list[int]) -> tuple[int, float]:
            token = tokens[place][answer]
            allowed = self._wanted.allowed(
                question, answer, begun, token, logits[place], self._prompts[question]
            )
            if allowed == token:
                return token, logprobs[place][answer]
            return allowed, float(logits[place].float().log_softmax(-1)[allowed])

        return pick

    def _keep(self, slot: Slot, finish: Finish) -> None:
        """Keep complete answers; hand over all of the question once the last one is complete."""
        done = self._done[slot.question]
        answer = Decoded(slot.tokens, slot.logprob if self._wanted.scores else None)
        done |= dict.fromkeys(slot.answers, answer)
        if len(done) < self._wanted.answers:
            return
        self._forget(slot.question, slot.group)
        finish(slot.question, [done[place] for place in sorted(done)], self._seconds[slot.question])

    def _forget(self, question: int, group: int) -> None:
        """Free what is held for a question, and the prefix that it was the last to use."""
        self._done.pop(question, None)
        self._numbers.pop(question, None)
        self._left[group] -= 1
        if not self._left[group]:
            self._prefixes.pop(group, None)
