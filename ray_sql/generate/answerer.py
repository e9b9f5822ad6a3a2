"""A model that stays ready for questions, as a service or a terminal asks them.

It is merged once. The begin of a database's prompts, its schema, is computed once and
kept while there is room.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import TYPE_CHECKING, Self

from ray_sql.generate import probe
from ray_sql.generate.answers import Decoding, Fits, Joining, OnAnswer, answer_ready, ready
from ray_sql.generate.decoder import Needed, always
from ray_sql.generate.groups import Group, group_known, known_prefix
from ray_sql.generate.kept_prefixes import KeptPrefixes
from ray_sql.generate.name_guard import NameGuard
from ray_sql.generate.questions import Answer, Question

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PROBED_TOKENS = 1024
"""Lengths are rounded up to a multiple of this before a model is asked whether it can share."""


class Answerer:
    """Answers questions one call after the other; a context manager, for one thread at a time."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, most_bytes: int
    ) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._kept = KeptPrefixes(most_bytes)
        self._ready = ExitStack()

    def __enter__(self) -> Self:
        self._ready.enter_context(ready(self._model))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ready.close()

    def answer(
        self,
        questions: Sequence[Question],
        decoding: Decoding,
        begins: Mapping[str, Sequence[int]],
        guards: Mapping[str, NameGuard] | None = None,
        *,
        on_answer: OnAnswer | None = None,
        more: Callable[[Fits], Sequence[Question]] | None = None,
        needed: Needed = always,
    ) -> list[Answer]:
        """Return the answers in the order of the questions, computed together.

        `begins` has the tokens with which the prompts of each database begin. `more` is asked
        again and again for questions that came meanwhile: they are answered too, behind the
        others in order. Then a question that is not `needed` any more is left out.
        """
        longest = self._longest(questions, decoding)
        groups = self._groups(questions, decoding, begins, longest)
        if groups is None and more:
            questions = [*questions, *more(lambda question: True)]

        def fits(question: Question) -> bool:
            return len(question.input_ids) + decoding.max_new_tokens <= longest

        def joined() -> list[tuple[Question, int]]:
            assert more is not None
            return [
                (one, known_prefix(one.input_ids, begins.get(one.db_id, ()))) for one in more(fits)
            ]

        return answer_ready(
            self._model,
            self._tokenizer,
            questions,
            decoding,
            guards,
            groups=groups,
            kept=self._kept,
            on_answer=on_answer,
            joining=Joining(joined, longest, needed) if more else None,
        )

    def _longest(self, questions: Sequence[Question], decoding: Decoding) -> int:
        """Return the tokens that prompt and answer may have, rounded up: few lengths are tried."""
        longest = max(len(question.input_ids) for question in questions) + decoding.max_new_tokens
        return -(-longest // PROBED_TOKENS) * PROBED_TOKENS

    def _groups(
        self,
        questions: Sequence[Question],
        decoding: Decoding,
        begins: Mapping[str, Sequence[int]],
        longest: int,
    ) -> list[Group] | None:
        if decoding.num_beams > 1 or probe.why_not_share(self._model, longest):
            return None
        prompts = [question.input_ids for question in questions]
        return group_known(prompts, [question.db_id for question in questions], begins)
