"""Tokenised training examples, made once and read by every worker and trial, and their lengths.

A `TokenizedExample` is `prompt tokens + completion tokens`, with labels on the completion only. The two
parts are tokenised apart, because generation sees a prompt that ends before the answer's first
token. Examples lie in a Parquet file. Its name is a hash of everything they depend on, never of a
function's name, so an edited template can never meet stale rows.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import quantiles
from typing import TYPE_CHECKING, Any

from ray_sql.config import Config
from ray_sql.data import Example, prompts
from ray_sql.data.linking import LinkError
from ray_sql.database import SERIALIZER_VERSION, Schema, render
from ray_sql.errors import DataError
from ray_sql.store import storage
from ray_sql.tasks import TASKS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROWS_VERSION = 2
"""Raise when the code below makes other rows from the same input."""

IGNORED = -100
"""The label of a token that carries no loss."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class TokenizedExample:
    """One training example: `input_ids` are prompt then completion, the first `prompt_length` carry no loss."""

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
    """How long the rows are, in tokens, and what became of those that do not fit or have no answer to learn."""

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
        """The audit as one sentence for people."""
        share = 100 * self.completion_tokens / max(1, self.tokens)
        text = (
            f"{self.rows} rows, {self.tokens:,} tokens ({share:.0f} % carry the loss); length: half up to {self.p50}, "
            f"90 % up to {self.p90}, longest {self.longest}, limit {self.max_length}"
        )
        if self.too_long:
            text += f"; {self.too_long} were longer ({self.trimmed} had unused tables left out, {self.dropped} dropped)"
        if self.unlinkable:
            text += f"; {len(self.unlinkable)} left out because their SQL cannot be linked to the schema"
        return text


def prepare(
    examples: Sequence[Example],
    schemas: Mapping[str, Schema],
    tokenizer: PreTrainedTokenizerBase,
    config: Config,
    progress: Progress | None = None,
) -> tuple[Path, Audit]:
    """The Parquet file of the rows of `examples`, and their audit; made only if the cache has none of the same content.

    Raises `DataError` for an example over `rows.max_length` under the policy `error`, and where no example can be used.
    """
    key = cache_key(examples, schemas, tokenizer, config)
    file, audit_file = (
        config.cache / "rows" / f"{key}.parquet",
        config.cache / "rows" / f"{key}.json",
    )
    if file.is_file() and audit_file.is_file():
        return file, Audit(**json.loads(audit_file.read_text()))
    rows, audit = build(examples, schemas, tokenizer, config, progress)
    _check(audit)
    write(rows, file)
    with storage.write_atomically(audit_file) as part:
        part.write_text(json.dumps(asdict(audit)))
    return file, audit


def build(
    examples: Sequence[Example],
    schemas: Mapping[str, Schema],
    tokenizer: PreTrainedTokenizerBase,
    config: Config,
    progress: Progress | None = None,
) -> tuple[list[TokenizedExample], Audit]:
    """Rows in the examples' order, without those that do not fit or have no answer to learn; the audit says how many."""
    rows: list[TokenizedExample] = []
    lengths: list[int] = []
    counts = {"trimmed": 0, "dropped": 0}
    unlinkable = []
    for number, example in enumerate(examples):
        if progress and number % 100 == 0:
            progress(number, len(examples))
        try:
            row = encode(example, schemas, tokenizer, config)
            fits = len(row.input_ids) <= config.rows.max_length
            kept = row if fits else _shorten(example, schemas, tokenizer, config)
        except LinkError:
            unlinkable.append(example.id)
            continue
        lengths.append(len(row.input_ids))
        if not fits:
            counts["trimmed" if kept else "dropped"] += 1
        if kept:
            rows.append(kept)
    return rows, _audit(rows, lengths, config, counts, unlinkable)


def _check(audit: Audit) -> None:
    if audit.dropped and audit.policy == "error":
        raise DataError(
            f"{audit.dropped} of {audit.examples} training examples are over --rows.max_length {audit.max_length}, the longest has "
            f"{audit.longest} tokens; raise it, or choose --rows.too_long trim_schema or drop"
        )
    if not audit.rows:
        raise DataError(
            f"no training rows: none of {audit.examples} examples could be used ({len(audit.unlinkable)} cannot be linked)"
        )


def encode(
    example: Example,
    schemas: Mapping[str, Schema],
    tokenizer: PreTrainedTokenizerBase,
    config: Config,
    schema: str | None = None,
) -> TokenizedExample:
    """One example as a row, with `schema` in place of its own schema text where given."""
    schema = prompts.schema_text(example, schemas, config.prompt) if schema is None else schema
    turns = prompts.messages(TASKS[config.task_type], schema, example.question, example.evidence)
    completion = prompts.render_completion(
        tokenizer, turns, prompts.answer(TASKS[config.task_type], example, schemas)
    )
    prompt_ids = encode_prompt(tokenizer, prompts.render_prompt(tokenizer, turns))
    completion_ids = tokenizer(completion, add_special_tokens=False)["input_ids"]
    return TokenizedExample(example.id, example.db_id, prompt_ids + completion_ids, len(prompt_ids))


def encode_prompt(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Prompt tokens as training and generation both see them; a chat template writes its own special tokens."""
    return list(tokenizer(text, add_special_tokens=tokenizer.chat_template is None)["input_ids"])


def write(rows: Sequence[TokenizedExample], file: Path) -> None:
    """Rows as Parquet, complete or absent."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.Table.from_pylist([asdict(row) for row in rows])
    with storage.write_atomically(
        file
    ) as part:  # trials of a sweep may write the same file at once
        pq.write_table(table, part)


def read(file: str | Path) -> list[TokenizedExample]:
    """The rows of a file that `write` made."""
    import pyarrow.parquet as pq

    return [TokenizedExample(**values) for values in pq.read_table(file).to_pylist()]


def cache_key(
    examples: Sequence[Example],
    schemas: Mapping[str, Schema],
    tokenizer: PreTrainedTokenizerBase,
    config: Config,
) -> str:
    """24 hex digits over all that rows depend on: data, schemas, template texts, serialiser, tokenizer, lengths."""
    used = sorted({example.db_id for example in examples} & set(schemas))
    parts: list[Any] = [
        [ROWS_VERSION, SERIALIZER_VERSION, config.task_type],
        [
            TASKS[config.task_type].system,
            prompts.USER,
            prompts.EVIDENCE,
            prompts.DATE.isoformat(),
            prompts.template_of(tokenizer),
        ],
        [
            prompts.tokenizer_hash(tokenizer),
            config.prompt.model_dump(),
            config.rows.max_length,
            config.rows.too_long,
        ],
        [asdict(example) for example in examples],
        [schemas[db_id].to_dict() for db_id in used],
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]


def _shorten(
    example: Example,
    schemas: Mapping[str, Schema],
    tokenizer: PreTrainedTokenizerBase,
    config: Config,
) -> TokenizedExample | None:
    """What `rows.too_long` makes of a row that does not fit; None drops it."""
    limit, policy = config.rows.max_length, config.rows.too_long
    if policy != "trim_schema":
        return None
    if example.schema_text or example.db_id not in schemas:
        raise DataError(
            f"example {example.id}: its schema is a text of the dataset, so --rows.too_long trim_schema cannot leave tables out; "
            "use drop, or raise --rows.max_length"
        )
    schema = prompts.shown_schema(example, schemas, config.prompt.schema_form)
    needed = {name.lower() for name in prompts.gold_links(example, schemas)}
    unused = sorted(
        (t for t in schema.tables if t.name.lower() not in needed), key=lambda t: len(t.columns)
    )
    tables = list(schema.tables)
    while unused:
        tables.remove(unused.pop())  # the widest first, so that as many tables as possible stay
        text = render(_closed(Schema(schema.db_id, tuple(tables))), config.prompt.serializer)
        shorter = encode(example, schemas, tokenizer, config, text)
        if len(shorter.input_ids) <= limit:
            return shorter
    raise DataError(
        f"example {example.id} ({example.db_id}): even with only the tables its SQL uses it is over --rows.max_length {limit}; "
        "raise it, or use --rows.too_long drop"
    )


def _closed(schema: Schema) -> Schema:
    """The schema without foreign keys to tables that it does not have."""
    tables = (
        replace(
            table,
            foreign_keys=tuple(key for key in table.foreign_keys if schema.table(key.ref_table)),
        )
        for table in schema.tables
    )
    return Schema(schema.db_id, tuple(tables))


def _audit(
    rows: Sequence[TokenizedExample],
    lengths: Sequence[int],
    config: Config,
    counts: Mapping[str, int],
    unlinkable: list[str],
) -> Audit:
    longest = max(lengths, default=0)
    tenths = (
        quantiles(lengths, n=10, method="inclusive") if len(lengths) > 1 else [float(longest)] * 9
    )
    return Audit(
        examples=len(lengths) + len(unlinkable),
        rows=len(rows),
        tokens=sum(len(row.input_ids) for row in rows),
        completion_tokens=sum(len(row.input_ids) - row.prompt_length for row in rows),
        p50=round(tenths[4]),
        p90=round(tenths[8]),
        longest=longest,
        max_length=config.rows.max_length,
        too_long=sum(counts.values()),
        policy=config.rows.too_long,
        unlinkable=unlinkable,
        **counts,
    )
