"""Ask a model questions, in this process or on all ranks of a process group."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from ray_sql.cluster.ranks import gather_all, rank, world_size
from ray_sql.config.sections import AnswersSection
from ray_sql.generate import decoder, hf_generate
from ray_sql.generate.ends import Ends
from ray_sql.generate.questions import Answer, Question
from ray_sql.models import cpu_linear

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

OnAnswer = Callable[[int, Answer], None]
"""Receives each answer as it comes, with the index of its question."""
OnFallback = Callable[[str], None]
"""Receives the reason why prompts that share a schema are computed whole."""


@dataclass(frozen=True)
class Decoding:
    """Limits and sizes for generating answers."""

    max_new_tokens: int
    batch_size: int = 1
    """Prompts that transformers' `generate` computes at a time."""
    max_num_seqs: int | None = None
    """Questions answered at a time over the prefixes they share; None: as many as memory allows."""
    num_beams: int = 1

    @classmethod
    def from_settings(cls, evaluate: AnswersSection, batch_size: int, num_beams: int = 1) -> Self:
        """Return what the settings say; `num_beams` apart, for checkpoints are chosen greedily."""
        max_num_seqs = None if evaluate.max_num_seqs == "auto" else evaluate.max_num_seqs
        return cls(evaluate.max_new_tokens, batch_size, max_num_seqs, num_beams)


def answer_questions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    decoding: Decoding,
    *,
    on_answer: OnAnswer | None = None,
    on_fallback: OnFallback | None = None,
) -> list[Answer]:
    """Return the answers in the order of the questions, greedily over the prefixes they share.

    Beams, and models that cannot share a prefix, go through transformers' `generate` in batches of
    prompts of similar length. The answers are the same in float32. The model is left as it was.
    """
    if not questions:
        return []
    answers: dict[int, Answer] = {}

    def keep(index: int, answer: Answer) -> None:
        answers[index] = answer
        if on_answer:
            on_answer(index, answer)

    training, use_cache = model.training, model.config.use_cache
    model.eval()
    model.config.use_cache = True
    try:
        with cpu_linear.merged(model):
            if decoding.num_beams > 1:
                _answer_in_batches(model, tokenizer, questions, decoding, keep)
            elif reason := _why_not_share(model, questions, decoding):
                if on_fallback:
                    on_fallback(reason)
                _answer_in_batches(model, tokenizer, questions, decoding, keep)
            else:
                _answer_over_prefixes(model, tokenizer, questions, decoding, keep)
    finally:
        model.train(training)
        model.config.use_cache = use_cache
    return [answers[index] for index in range(len(questions))]


def _why_not_share(
    model: PreTrainedModel, questions: Sequence[Question], decoding: Decoding
) -> str | None:
    longest = max(len(question.input_ids) for question in questions)
    return decoder.why_not_share(model, longest + decoding.max_new_tokens)


def _answer_over_prefixes(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    decoding: Decoding,
    keep: OnAnswer,
) -> None:
    prompts = [question.input_ids for question in questions]
    ends = Ends(model, tokenizer, prompts[0])

    def finish(index: int, tokens: list[int], seconds: float) -> None:
        tokens = ends.cut(tokens)
        keep(index, Answer(ends.text(tokens), len(prompts[index]), len(tokens), seconds))

    groups = decoder.group_prompts(prompts, [question.db_id for question in questions])
    decoder.decode(
        model,
        prompts,
        groups,
        max_new_tokens=decoding.max_new_tokens,
        max_num_seqs=decoding.max_num_seqs,
        ended=ends,
        finish=finish,
    )


def _answer_in_batches(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    decoding: Decoding,
    keep: OnAnswer,
) -> None:
    order = sorted(range(len(questions)), key=lambda index: -len(questions[index].input_ids))
    for start in range(0, len(order), decoding.batch_size):
        batch = order[start : start + decoding.batch_size]
        prompts = [questions[index].input_ids for index in batch]
        answers = hf_generate.answer_batch(
            model, tokenizer, prompts, decoding.max_new_tokens, decoding.num_beams
        )
        for index, answer in zip(batch, answers, strict=True):
            keep(index, answer)


def answer_on_all_ranks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    decoding: Decoding,
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
    groups = decoder.group_prompts(prompts, [question.db_id for question in questions])

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
