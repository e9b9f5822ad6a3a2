"""Tokenise examples as they are trained on, and questions as they are asked."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, TypeVar

from ray_sql.config.sections import PromptSection, RowsSection
from ray_sql.data import Example, prompts
from ray_sql.data.chat import Chat
from ray_sql.data.linking import LinkError
from ray_sql.data.ranking import rank_tables
from ray_sql.database import Schema, Table, render, restrict
from ray_sql.errors import DataError
from ray_sql.tasks import Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""The label of a token that carries no loss."""


@dataclass(frozen=True)
class TokenizedExample:
    """One training example: prompt, then completion; the first `prompt_length` carry no loss."""

    id: str
    db_id: str
    input_ids: list[int]
    prompt_length: int

    @property
    def labels(self) -> list[int]:
        """The token to learn at every place, `IGNORED` on the prompt."""
        return [IGNORED] * self.prompt_length + self.input_ids[self.prompt_length :]


@dataclass(frozen=True)
class Asked:
    """A prompt for generation. `shown` is the part of its schema that had room, None for all."""

    turns: list[dict[str, str]]
    input_ids: list[int]
    shown: Schema | None = None


Prompt = TypeVar("Prompt", bound=TokenizedExample | Asked)


@dataclass(frozen=True)
class Encoder:
    """Tokenises examples of one task, with one way of writing schemas."""

    tokenizer: PreTrainedTokenizerBase
    task: Task
    prompt: PromptSection
    schemas: Mapping[str, Schema]
    room: int | None = None
    """Tokens that a prompt may have where it is answered. None leaves no table out."""
    sizes: dict[Table, int] = field(default_factory=dict, compare=False, repr=False)
    """The tokens of tables, as they were counted."""

    def encode(self, example: Example, shown: Schema | None = None) -> TokenizedExample:
        """Return an example's tokens, with `shown` in place of its own schema if given.

        Raises `LinkError` if the SQL cannot be linked and the answer needs links.
        """
        turns = self._turns(example, shown)
        answer = prompts.answer(self.task, example, self.schemas)
        completion = self.chat.completion(turns, answer)
        prompt_ids = encode_prompt(self.tokenizer, self.chat.prompt(turns))
        completion_ids = self.tokenizer(completion, add_special_tokens=False)["input_ids"]
        input_ids = prompt_ids + completion_ids
        return TokenizedExample(example.id, example.db_id, input_ids, len(prompt_ids))

    def encode_question(self, example: Example, shown: Schema | None = None) -> list[int]:
        """Return the tokens of an example's prompt, for generation."""
        return self.ask(example, shown).input_ids

    def answer_length(self, example: Example) -> int:
        """Return the tokens of an example's gold answer; 0 where its SQL cannot be linked."""
        try:
            answer = prompts.answer(self.task, example, self.schemas)
        except LinkError:
            return 0
        return len(self.tokenizer(answer, add_special_tokens=False)["input_ids"])

    def question_turns(self, example: Example, shown: Schema | None = None) -> list[dict[str, str]]:
        """Return the turns of an example's prompt, for generation."""
        return self.ask(example, shown).turns

    def ask(self, example: Example, shown: Schema | None = None) -> Asked:
        """Return an example's prompt for generation, of at most `room` tokens where it can be.

        `shown` is its schema in the prompt, by default as an example is trained on. The full one is
        shown where the gold SQL does not fit a reduced form of it. Where that is too long, it has
        the tables that the question is likely to need.
        """
        whole = self._prompt(self._question_turns(example, shown))
        if self.room is None or len(whole.input_ids) <= self.room or example.schema_text:
            return whole
        schema = shown or self._schema_of(example)

        def asked(part: Schema) -> Asked:
            return replace(self._prompt(self._turns(example, part)), shown=part)

        return self._fitted(example, schema, frozenset(), self.room, asked) or whole

    def _prompt(self, turns: list[dict[str, str]]) -> Asked:
        return Asked(turns, encode_prompt(self.tokenizer, self.chat.prompt(turns)))

    def _schema_of(self, example: Example) -> Schema:
        """Return the schema that an example is asked with, where it names none itself."""
        try:
            return prompts.shown_schema(example, self.schemas, self.prompt)
        except LinkError:
            return self.schemas[example.db_id]

    def _question_turns(self, example: Example, shown: Schema | None) -> list[dict[str, str]]:
        try:
            return self._turns(example, shown)
        except LinkError:
            full = self.prompt.model_copy(update={"schema_form": "full"})
            return replace(self, prompt=full)._turns(example)

    @cached_property
    def chat(self) -> Chat:
        """Write turns in the tokenizer's chat template."""
        return Chat(self.tokenizer, self.prompt.thinking)

    def _turns(self, example: Example, shown: Schema | None = None) -> list[dict[str, str]]:
        """Return the turns of a prompt; a text of the dataset is shown as it is."""
        if shown is None and not example.schema_text:
            shown = prompts.shown_schema(example, self.schemas, self.prompt)
        schema = shown or self.schemas.get(example.db_id)
        text = example.schema_text or ""
        if shown is not None and not text:
            text = render(shown, self.prompt.serializer)
        values = prompts.values_text(example.values, schema) if schema else ""
        return prompts.messages(self.task, text, example.question, example.evidence, values)

    def shorten(self, example: Example, limits: RowsSection) -> TokenizedExample | None:
        """Return an example that is too long without unused tables; None drops it.

        Raises `DataError` if that does not help.
        """
        if limits.too_long != "trim_schema":
            return None
        if example.schema_text or example.db_id not in self.schemas:
            raise DataError(
                f"example {example.id}: its schema is a text of the dataset, so --rows.too_long "
                "trim_schema cannot leave tables out; use drop, or raise --rows.max_length"
            )
        schema = prompts.shown_schema(example, self.schemas, self.prompt)
        needed = frozenset(prompts.gold_links(example, self.schemas))

        def encoded(part: Schema) -> TokenizedExample:
            return self.encode(example, part)

        shorter = self._fitted(example, schema, needed, limits.max_length, encoded)
        if shorter is not None:
            return shorter
        raise DataError(
            f"example {example.id} ({example.db_id}): even with only the tables its SQL uses it is "
            f"over --rows.max_length {limits.max_length}; raise it, or use --rows.too_long drop"
        )

    def _fitted(
        self,
        example: Example,
        schema: Schema,
        needed: Collection[str],
        room: int,
        write: Callable[[Schema], Prompt],
    ) -> Prompt | None:
        """Return what `write` makes of as many tables as fit in `room` tokens, the likeliest ones.

        Tables of `needed` stay. None if even those are too long.
        """
        ranked = rank_tables(example, schema)
        chosen = set(needed)
        written = write(_part(schema, chosen))
        if len(written.input_ids) > room:
            return None
        while more := self._fitting(schema, ranked, chosen, room - len(written.input_ids)):
            fuller = write(_part(schema, {*chosen, *more}))
            while more and len(fuller.input_ids) > room:
                more.pop()  # sizes of tables alone are not to the token those of tables together
                fuller = write(_part(schema, {*chosen, *more}))
            if not more:
                break
            chosen |= {*more}
            written = fuller
        return written

    def _fitting(
        self, schema: Schema, ranked: Sequence[str], chosen: Collection[str], left: int
    ) -> list[str]:
        """Return further tables in their order, as many as `left` tokens have room for."""
        more = []
        for name in ranked:
            size = self._size(schema, name)
            if name not in chosen and size <= left:
                more.append(name)
                left -= size
        return more

    def _size(self, schema: Schema, name: str) -> int:
        """Return the tokens of a table, with its keys."""
        table = next(one for one in schema.tables if one.name == name)
        if table not in self.sizes:
            text = render(replace(schema, tables=(table,), unshown=0), self.prompt.serializer)
            self.sizes[table] = len(self.tokenizer(f"{text}\n\n")["input_ids"])
        return self.sizes[table]


def encode_prompt(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return prompt tokens as training and generation both see them.

    A chat template writes its own special tokens. Without one the tokenizer adds those that begin a
    text; an end of text that it adds too would stand before the answer.
    """
    ids = list(tokenizer(text, add_special_tokens=tokenizer.chat_template is None)["input_ids"])
    end = tokenizer.eos_token
    if ids and ids[-1] == tokenizer.eos_token_id and not text.endswith(str(end)):
        ids.pop()
    return ids


def _part(schema: Schema, tables: Collection[str]) -> Schema:
    """Return the schema with these tables only, which says how many it lacks."""
    part = restrict(schema, {name: [] for name in tables}, "tables")
    return replace(part, unshown=schema.unshown + len(schema.tables) - len(part.tables))
