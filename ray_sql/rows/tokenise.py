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
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import quantiles
from typing import Any

from ray_sql.config.files import read_json
from ray_sql.config.sections import NO_VALUES, RowsSection
from ray_sql.data import Example, prompts
from ray_sql.data.chat import DATE, template_of
from ray_sql.data.contract import tokenizer_hash
from ray_sql.data.linking import LinkError
from ray_sql.database import SERIALIZER_VERSION
from ray_sql.errors import DamagedFile, DataError
from ray_sql.rows.encoder import Encoder, TokenizedExample
from ray_sql.store import storage

ROWS_VERSION = 4
"""Raise when the code below makes other rows from the same input."""

Progress = Callable[[int, int], None]
"""Receives (examples done, all examples)."""


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
    words = [encoder.task.system, prompts.USER, prompts.EVIDENCE]
    if encoder.prompt.values != NO_VALUES:
        words.append(prompts.VALUES)
    parts: list[Any] = [
        [ROWS_VERSION, SERIALIZER_VERSION, encoder.task.name],
        [*words, DATE.isoformat(), template_of(encoder.tokenizer)],
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
