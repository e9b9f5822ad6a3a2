"""Tokenised training examples, made once and read by every worker and trial, and their lengths.

A `TokenizedExample` is `prompt tokens + completion tokens`, with labels on the completion only. The
two parts are tokenised apart, because generation sees a prompt that ends before the answer's first
token. Examples lie in a Parquet file. Its name is a hash of everything they depend on, never of a
function's name, so an edited template can never meet stale rows.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from statistics import quantiles
from typing import TYPE_CHECKING, Any

from ray_sql.config.files import read_json
from ray_sql.config.sections import PromptSection, RowsSection
from ray_sql.data import Example, prompts
from ray_sql.data.chat import DATE, Chat, template_of
from ray_sql.data.contract import tokenizer_hash
from ray_sql.data.linking import LinkError
from ray_sql.database import SERIALIZER_VERSION, Schema, render
from ray_sql.errors import DamagedFile, DataError
from ray_sql.store import storage
from ray_sql.tasks import Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROWS_VERSION = 3
"""Raise when the code below makes other rows from the same input."""

IGNORED = -100
"""The label of a token that carries no loss."""

Progress = Callable[[int, int], None]
"""Receives (examples done, all examples)."""


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
class Audit:
    """Lengths in tokens, and counts of examples that do not fit or have no answer to learn."""

    examples: int
    rows: int
    tokens: int
    completion_tokens: int
    p50: int
    p90: int
    longest: int
    max_length: int
    too_long: int
    policy: str
    trimmed: int = 0
    dropped: int = 0
    unlinkable: list[str] = field(default_factory=list)

    def line(self) -> str:
        """Say the audit in one sentence for people."""
        share = 100 * self.completion_tokens / max(1, self.tokens)
        text = (
            f"{self.rows} rows, {self.tokens:,} tokens ({share:.0f} % carry the loss); "
            f"length: half up to {self.p50}, 90 % up to {self.p90}, longest {self.longest}, "
            f"limit {self.max_length}"
        )
        if self.too_long:
            text += (
                f"; {self.too_long} were longer "
                f"({self.trimmed} had unused tables left out, {self.dropped} dropped)"
            )
        if self.unlinkable:
            count = len(self.unlinkable)
            text += f"; {count} left out because their SQL cannot be linked to the schema"
        return text


@dataclass(frozen=True)
class Encoder:
    """Tokenises examples of one task, with one way of writing schemas."""

    tokenizer: PreTrainedTokenizerBase
    task: Task
    prompt: PromptSection
    schemas: Mapping[str, Schema]

    def encode(self, example: Example, schema: str | None = None) -> TokenizedExample:
        """Return an example's tokens, with `schema` in place of its own schema text if given.

        Raises `LinkError` if the SQL cannot be linked and the answer needs links.
        """
        turns = self._turns(example, schema)
        answer = prompts.answer(self.task, example, self.schemas)
        completion = self.chat.completion(turns, answer)
        prompt_ids = encode_prompt(self.tokenizer, self.chat.prompt(turns))
        completion_ids = self.tokenizer(completion, add_special_tokens=False)["input_ids"]
        input_ids = prompt_ids + completion_ids
        return TokenizedExample(example.id, example.db_id, input_ids, len(prompt_ids))

    def encode_question(self, example: Example, shown: Schema | None = None) -> list[int]:
        """Return the tokens of an example's prompt, for generation."""
        return encode_prompt(self.tokenizer, self.chat.prompt(self.question_turns(example, shown)))

    def answer_length(self, example: Example) -> int:
        """Return the tokens of an example's gold answer; 0 where its SQL cannot be linked."""
        try:
            answer = prompts.answer(self.task, example, self.schemas)
        except LinkError:
            return 0
        return len(self.tokenizer(answer, add_special_tokens=False)["input_ids"])

    def question_turns(self, example: Example, shown: Schema | None = None) -> list[dict[str, str]]:
        """Return the turns of an example's prompt, for generation.

        `shown` is its schema in the prompt, by default as an example is trained on. The full one is
        shown where the gold SQL does not fit a reduced form of it.
        """
        if shown is not None and not example.schema_text:
            return self._turns(example, render(shown, self.prompt.serializer))
        try:
            return self._turns(example)
        except LinkError:
            full = self.prompt.model_copy(update={"schema_form": "full"})
            return replace(self, prompt=full)._turns(example)

    @cached_property
    def chat(self) -> Chat:
        """Write turns in the tokenizer's chat template."""
        return Chat(self.tokenizer, self.prompt.thinking)

    def _turns(self, example: Example, schema: str | None = None) -> list[dict[str, str]]:
        if schema is None:
            schema = prompts.schema_text(example, self.schemas, self.prompt)
        return prompts.messages(self.task, schema, example.question, example.evidence)

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
        needed = {name.lower() for name in prompts.gold_links(example, self.schemas)}
        unused = [table for table in schema.tables if table.name.lower() not in needed]
        tables = list(schema.tables)
        # the widest first, so that as many tables as possible stay
        for table in sorted(unused, key=lambda table: len(table.columns))[::-1]:
            tables.remove(table)
            shown = _without_dangling_keys(Schema(schema.db_id, tuple(tables)))
            shorter = self.encode(example, render(shown, self.prompt.serializer))
            if len(shorter.input_ids) <= limits.max_length:
                return shorter
        raise DataError(
            f"example {example.id} ({example.db_id}): even with only the tables its SQL uses it is "
            f"over --rows.max_length {limits.max_length}; raise it, or use --rows.too_long drop"
        )


def prepare(
    examples: Sequence[Example],
    encoder: Encoder,
    limits: RowsSection,
    cache: Path,
    progress: Progress | None = None,
) -> tuple[Path, Audit]:
    """Return the Parquet file of the tokenised examples, and their audit.

    They are made only if the cache has none of the same content. Raises `DataError` for an example
    over `rows.max_length` under the policy `error`, and where no example can be used.
    """
    key = cache_key(examples, encoder, limits)
    file, audit_file = cache / "rows" / f"{key}.parquet", cache / "rows" / f"{key}.json"
    with suppress(DamagedFile):  # there is none, or it must be made again
        audit = read_json(Audit, audit_file, "")
        if _holds(file, audit.rows):
            return file, audit
    rows, audit = build(examples, encoder, limits, progress)
    _require_usable(audit)
    write(rows, file)
    storage.write_local_text(audit_file, json.dumps(asdict(audit)))
    return file, audit


def build(
    examples: Sequence[Example],
    encoder: Encoder,
    limits: RowsSection,
    progress: Progress | None = None,
) -> tuple[list[TokenizedExample], Audit]:
    """Return tokenised examples in the examples' order, and their audit.

    Those that do not fit or have no answer to learn are left out, and counted in the audit.
    """
    rows: list[TokenizedExample] = []
    lengths: list[int] = []
    counts = {"trimmed": 0, "dropped": 0}
    unlinkable = []
    for index, example in enumerate(examples):
        if progress and index % 100 == 0:
            progress(index, len(examples))
        try:
            full = encoder.encode(example)
            fits = len(full.input_ids) <= limits.max_length
            row = full if fits else encoder.shorten(example, limits)
        except LinkError:
            unlinkable.append(example.id)
            continue
        lengths.append(len(full.input_ids))
        if row is None:
            counts["dropped"] += 1
            continue
        rows.append(row)
        if not fits:
            counts["trimmed"] += 1
    return rows, _audit(rows, lengths, limits, counts, unlinkable)


def _require_usable(audit: Audit) -> None:
    if audit.dropped and audit.policy == "error":
        raise DataError(
            f"{audit.dropped} of {audit.examples} training examples are over --rows.max_length "
            f"{audit.max_length}, the longest has {audit.longest} tokens; raise it, or choose "
            "--rows.too_long trim_schema or drop"
        )
    if not audit.rows:
        raise DataError(
            f"no training rows: none of {audit.examples} examples could be used "
            f"({len(audit.unlinkable)} cannot be linked)"
        )


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


def write(rows: Sequence[TokenizedExample], file: Path) -> None:
    """Write tokenised examples as Parquet, complete or not at all."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.Table.from_pylist([asdict(row) for row in rows])
    # trials of a sweep may write the same file at once
    with storage.write_to_cache(file) as part:
        pq.write_table(table, part)


def _holds(file: Path, rows: int) -> bool:
    """Tell whether a Parquet file is there, whole to its end, with this many rows."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return file.is_file() and int(pq.read_metadata(file).num_rows) == rows
    except (OSError, pa.ArrowInvalid):
        return False


def read(file: str | Path) -> list[TokenizedExample]:
    """Return the tokenised examples of a file."""
    return [TokenizedExample(**values) for values in _table(file).to_pylist()]


def largest_token(file: str | Path) -> int:
    """Return the largest token of the examples in a file."""
    import pyarrow.compute as pc

    column = _table(file, ["input_ids"])["input_ids"]
    return int(pc.max(pc.list_flatten(column)).as_py())


def _table(file: str | Path, columns: list[str] | None = None) -> Any:
    """Return a file of tokenised examples as a table, perhaps of some columns only."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.read_table(file, columns=columns)
    except (OSError, pa.ArrowInvalid) as error:
        raise DamagedFile(
            f"{file}: cannot be read ({type(error).__name__}); remove it if it is there, and run "
            "the command again, which makes it anew"
        ) from None


def cache_key(examples: Sequence[Example], encoder: Encoder, limits: RowsSection) -> str:
    """Return 24 hex digits over all that rows depend on.

    These are data, schemas, template texts, serialiser, tokenizer and lengths.
    """
    used = sorted({example.db_id for example in examples} & set(encoder.schemas))
    parts: list[Any] = [
        [ROWS_VERSION, SERIALIZER_VERSION, encoder.task.name],
        [
            encoder.task.system,
            prompts.USER,
            prompts.EVIDENCE,
            DATE.isoformat(),
            template_of(encoder.tokenizer),
        ],
        [
            tokenizer_hash(encoder.tokenizer),
            encoder.prompt.of_training(),
            limits.max_length,
            limits.too_long,
        ],
        [example.content() for example in examples],
        [encoder.schemas[db_id].to_dict() for db_id in used],
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]


def _without_dangling_keys(schema: Schema) -> Schema:
    """Return the schema without foreign keys to tables that it does not have."""
    tables = []
    for table in schema.tables:
        keys = tuple(key for key in table.foreign_keys if schema.table(key.ref_table))
        tables.append(replace(table, foreign_keys=keys))
    return Schema(schema.db_id, tuple(tables))


def _audit(
    rows: Sequence[TokenizedExample],
    lengths: Sequence[int],
    limits: RowsSection,
    counts: Mapping[str, int],
    unlinkable: list[str],
) -> Audit:
    longest = max(lengths, default=0)
    tenths = [float(longest)] * 9
    if len(lengths) > 1:
        tenths = quantiles(lengths, n=10, method="inclusive")
    return Audit(
        examples=len(lengths) + len(unlinkable),
        rows=len(rows),
        tokens=sum(len(row.input_ids) for row in rows),
        completion_tokens=sum(len(row.input_ids) - row.prompt_length for row in rows),
        p50=round(tenths[4]),
        p90=round(tenths[8]),
        longest=longest,
        max_length=limits.max_length,
        too_long=sum(counts.values()),
        policy=limits.too_long,
        unlinkable=unlinkable,
        **counts,
    )
