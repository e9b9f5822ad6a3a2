"""Ask a model questions, in this process or on all ranks of a process group."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Self

from ray_sql.cluster.ranks import gather_all, rank, world_size
from ray_sql.config.sections import AnswersSection
from ray_sql.generate import decoder, hf_generate, probe
from ray_sql.generate.decoded import Decoded, make_answer
from ray_sql.generate.decoder import Needed, always
from ray_sql.generate.ends import Ends
from ray_sql.generate.groups import Group, group_prompts
from ray_sql.generate.kept_prefixes import KeptPrefixes
from ray_sql.generate.name_guard import NameGuard
from ray_sql.generate.questions import Answer, Question
from ray_sql.generate.sampling import Sampling
from ray_sql.generate.wanted import Allows, Wanted
from ray_sql.models import cpu_linear

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

OnAnswer = Callable[[int, Answer], None]
"""Receives each answer as it comes, with the index of its question."""
Fits = Callable[[Question], bool]
"""Tells whether a question can join those that are being answered."""
OnFallback = Callable[[str], None]
"""Receives the reason why prompts that share a schema are computed whole."""


@dataclass(frozen=True)
class Joining:
    """Questions that join others while these are answered.

    `more` returns those that came since it was called last, each with the number of its first
    tokens that others share. Prompt and answer have at most `longest` tokens. A question that is
    not `needed` any more gets no answer.
    """

    more: Callable[[], Sequence[tuple[Question, int]]]
    longest: int
    needed: Needed = always


@dataclass(frozen=True)
class Decoding:
    """Limits and sizes for generating answers."""

    max_new_tokens: int
    batch_size: int = 1
    """Prompts that transformers' `generate` computes at a time."""
    max_num_seqs: int | None = None
    """Questions answered at a time over the prefixes they share; None: as many as memory allows."""
    num_beams: int = 1
    sampling: Sampling | None = None
    """Samples to draw beside each greedy answer."""

    @classmethod
    def from_settings(cls, evaluate: AnswersSection, batch_size: int, seed: int) -> Self:
        """Return what the settings of an evaluation say."""
        max_num_seqs = None if evaluate.max_num_seqs == "auto" else evaluate.max_num_seqs
        sampling = None
        if evaluate.samples > 1:
            sampling = Sampling(evaluate.samples, evaluate.temperature, evaluate.top_p, seed)
        return cls(evaluate.max_new_tokens, batch_size, max_num_seqs, evaluate.num_beams, sampling)


def answer_questions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    decoding: Decoding,
    guards: Mapping[str, NameGuard] | None = None,
    *,
    on_answer: OnAnswer | None = None,
    on_fallback: OnFallback | None = None,
) -> list[Answer]:
    """Return the answers in the order of the questions, computed over the prefixes they share.

    Each is greedy, and has samples where `decoding.sampling` asks for them. With `guards`, by
    database, it has a greedy answer of names that exist too, and samples have no other names.
    Beams, and models that cannot share a prefix, go through transformers' `generate` in batches of
    prompts of similar length. The answers are the same in float32. The model is left as it was.
    """
    if not questions:
        return []
    with ready(model):
        groups = _groups(model, questions, decoding, on_fallback)
        return answer_ready(
            model, tokenizer, questions, decoding, guards, groups=groups, on_answer=on_answer
        )


@contextmanager
def ready(model: PreTrainedModel) -> Iterator[None]:
    """Hold a model as answering needs it, its adapter merged, and leave it as it was."""
    training, use_cache = model.training, model.config.use_cache
    model.eval()
    model.config.use_cache = True
    try:
        with cpu_linear.merged(model):
            yield
    finally:
        model.train(training)
        model.config.use_cache = use_cache


def answer_ready(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    decoding: Decoding,
    guards: Mapping[str, NameGuard] | None = None,
    *,
    groups: Sequence[Group] | None,
    kept: KeptPrefixes | None = None,
    on_answer: OnAnswer | None = None,
    joining: Joining | None = None,
) -> list[Answer]:
    """Answer as `answer_questions` does, by a model that is `ready`.

    Questions of a group share a prefix, which `kept` may hold. Without groups, each prompt is
    computed whole, and none can join. Questions that `joining` needs no more are left out.
    """
    answers: dict[int, Answer] = {}
    questions = list(questions)

    def keep(index: int, answer: Answer) -> None:
        answers[index] = answer
        if on_answer:
            on_answer(index, answer)

    ends = Ends(model, tokenizer, questions[0].input_ids)
    allows = None if guards is None else _allows(questions, guards, ends)
    wanted = Wanted(decoding.sampling, allows, () if guards is None else _letters(tokenizer))
    if groups is None:
        needed = joining.needed if joining else always
        _answer_in_batches(model, tokenizer, questions, decoding, wanted, keep, needed)
    else:
        _answer_over_prefixes(model, ends, questions, groups, decoding, wanted, keep, kept, joining)
    return [answers[index] for index in sorted(answers)]


def _groups(
    model: PreTrainedModel,
    questions: Sequence[Question],
    decoding: Decoding,
    on_fallback: OnFallback | None,
) -> list[Group] | None:
    """Return the questions by the prefixes they share; None if the model or beams share none."""
    if decoding.num_beams > 1:
        return None
    prompts = [question.input_ids for question in questions]
    reason = probe.why_not_share(model, max(map(len, prompts)) + decoding.max_new_tokens)
    if reason is None:
        return group_prompts(prompts, [question.db_id for question in questions])
    if on_fallback:
        on_fallback(reason)
    return None


@lru_cache(maxsize=4)
def _letters(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Return the tokens of one character."""
    return tuple(token for piece, token in tokenizer.get_vocab().items() if len(piece) == 1)


def _allows(questions: Sequence[Question], guards: Mapping[str, NameGuard], ends: Ends) -> Allows:
    """Return a function that tells whether an answer's tokens have only names that exist."""

    @lru_cache(maxsize=100_000)
    def allows_text(db_id: str, text: str, complete: bool) -> bool:
        guard = guards.get(db_id)
        return guard is None or guard.allows_answer(text, complete)

    def allows(question: int, tokens: Sequence[int]) -> bool:
        complete = tokens[-1] in ends.stops
        return allows_text(questions[question].db_id, ends.text(tokens), complete)

    return allows


def _answer_over_prefixes(
    model: PreTrainedModel,
    ends: Ends,
    questions: list[Question],
    groups: Sequence[Group],
    decoding: Decoding,
    wanted: Wanted,
    keep: OnAnswer,
    kept: KeptPrefixes | None,
    joining: Joining | None,
) -> None:
    """Answer questions, and append those that join to `questions`."""

    def finish(index: int, decoded: list[Decoded], seconds: float) -> None:
        tokens = len(questions[index].input_ids)
        constrained = wanted.allows is not None
        keep(index, make_answer(ends, tokens, decoded, seconds, constrained))

    def more() -> list[tuple[Sequence[int], int]]:
        joined = joining.more() if joining else ()
        questions.extend(question for question, _ in joined)
        return [(question.input_ids, prefix) for question, prefix in joined]

    decoder.decode(
        model,
        [question.input_ids for question in questions],
        groups,
        max_new_tokens=decoding.max_new_tokens,
        max_num_seqs=decoding.max_num_seqs,
        ended=ends,
        finish=finish,
        wanted=wanted,
        kept=kept,
        more=more,
        needed=joining.needed if joining else always,
        longest=joining.longest if joining else 0,
    )


def _answer_in_batches(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    decoding: Decoding,
    wanted: Wanted,
    keep: OnAnswer,
    needed: Needed,
) -> None:
    order = sorted(range(len(questions)), key=lambda index: -len(questions[index].input_ids))
    for start in range(0, len(order), decoding.batch_size):
        batch = [one for one in order[start : start + decoding.batch_size] if needed(one)]
        if not batch:
            continue
        prompts = [questions[index].input_ids for index in batch]
        answers = hf_generate.answer_batch(
            model, tokenizer, prompts, decoding.max_new_tokens, decoding.num_beams, wanted, batch
        )
        for index, answer in zip(batch, answers, strict=True):
            keep(index, answer)


def answer_on_all_ranks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    decoding: Decoding,
    guards: Mapping[str, NameGuard] | None = None,
    *,
    on_answer: OnAnswer | None = None,
    on_fallback: OnFallback | None = None,
) -> list[Answer] | None:
    """Answer a share of the databases on every rank; rank 0 returns all answers, others None.

    `on_answer` and `on_fallback` are told of this rank's share.
    """
    shares = spread(questions, world_size(), decoding.max_new_tokens)
    own = shares[rank()]

    def tell(place: int, answer: Answer) -> None:
        if on_answer:
            on_answer(own[place], answer)

    own_answers = answer_questions(
        model,
        tokenizer,
        [questions[index] for index in own],
        decoding,
        guards,
        on_answer=tell,
        on_fallback=on_fallback,
    )
    by_rank = gather_all(own_answers)
    if rank() > 0:
        return None
    answers: dict[int, Answer] = {}
    for share, shared_answers in zip(shares, by_rank, strict=True):
        answers |= zip(share, shared_answers, strict=True)
    return [answers[index] for index in range(len(answers))]


def spread(questions: Sequence[Question], world: int, max_new_tokens: int) -> list[list[int]]:
    """Return the indices of each rank's questions: whole databases, about equal in tokens.

    A database that is more than a rank's fair share is cut into parts. Each part computes its
    schema again.
    """
    prompts = [question.input_ids for question in questions]
    groups = group_prompts(prompts, [question.db_id for question in questions])

    def tokens(members: Sequence[int], prefix: int) -> int:
        own = (len(prompts[index]) - prefix + max_new_tokens for index in members)
        return prefix + sum(own)

    total = sum(tokens(group.members, group.prefix) for group in groups)
    fair = max(1.0, total / world)
    parts: list[tuple[int, list[int]]] = []
    for group in groups:
        count = max(1, round(tokens(group.members, group.prefix) / fair))
        count = min(len(group.members), count)
        for start in range(count):
            part = group.members[start::count]
            parts.append((tokens(part, group.prefix), part))
    shares: list[list[int]] = [[] for _ in range(world)]
    load = [0] * world
    for cost, part in sorted(parts, key=lambda part: -part[0]):
        lightest = load.index(min(load))
        load[lightest] += cost
        shares[lightest] += part
    return shares
