"""Show a dataset in its `report.html`: schemas, coverage, lengths, and the audit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, get_args

from ray_sql.curate.flags import MEANING
from ray_sql.curate.pairs import Judged, Pair
from ray_sql.data.linking import LinkError, gold_links
from ray_sql.database import Links, Schema, render
from ray_sql.database.serialize import Serializer
from ray_sql.metrics import hardness
from ray_sql.metrics.judged import HARDNESS
from ray_sql.report.html import render as render_page

CHARACTERS_PER_TOKEN = 3.3
"""Characters of a schema for each token of a usual tokenizer, about."""
MOST_LISTED = 300
"""Rejected or flagged pairs that the page lists."""


def page(
    title: str,
    record: Mapping[str, Any],
    schemas: Mapping[str, Schema],
    splits: Mapping[str, Sequence[Pair]],
    judged: Judged,
) -> str:
    """Return the page as HTML."""
    pairs = [pair for rows in splits.values() for pair in rows]
    used = {pair.example.db_id for pair in pairs}
    shown = {db_id: schema for db_id, schema in schemas.items() if db_id in used}
    links = {db_id: _used(db_id, schema, pairs) for db_id, schema in shown.items()}
    counts = Counter(flag.kind for pair in pairs for flag in pair.flags)
    return render_page(
        "dataset.jinja",
        title,
        _facts(record),
        {},
        splits=_by_level(splits),
        levels=list(HARDNESS),
        lengths=[_lengths(schema) for schema in shown.values()],
        serializers=list(get_args(Serializer)),
        schemas=[_tables(schema, links[db_id]) for db_id, schema in shown.items()],
        kinds=[(kind, count, MEANING[kind]) for kind, count in counts.most_common()],
        flagged=[
            (pair.example, "; ".join(f"{flag.kind}: {flag.detail}" for flag in pair.flags))
            for pair in pairs
            if pair.flags
        ][:MOST_LISTED],
        rejected=[row.row() for row in judged.rejected][:MOST_LISTED],
        unexamined=judged.unexamined,
    )


def _facts(record: Mapping[str, Any]) -> dict[str, str]:
    counts, sources = record["counts"], record["sources"]
    facts = {name: str(source) for name, source in sources.items() if source}
    facts |= {name: f"{count:,}" for name, count in counts.items()}
    return facts | {"divided": record["divided"], "fingerprint": record["fingerprint"]}


def _by_level(splits: Mapping[str, Sequence[Pair]]) -> list[tuple[str, list[int]]]:
    """Return the pairs of each split by hardness."""
    rows = []
    for split, pairs in splits.items():
        levels = Counter(pair.example.hardness or hardness(pair.example.gold) for pair in pairs)
        rows.append((split, [levels[level] for level in HARDNESS]))
    return rows


def _lengths(schema: Schema) -> tuple[str, list[int]]:
    """Return about how many tokens a schema takes in each form."""
    texts = [render(schema, serializer) for serializer in get_args(Serializer)]
    return schema.db_id, [round(len(text) / CHARACTERS_PER_TOKEN) for text in texts]


def _used(db_id: str, schema: Schema, pairs: Sequence[Pair]) -> list[Links]:
    """Return the tables and columns that each query reads; a query without links has none."""
    found = []
    for pair in pairs:
        if pair.example.db_id == db_id:
            try:
                found.append(gold_links(pair.example.gold, schema))
            except LinkError:
                continue
    return found


def _tables(schema: Schema, links: Sequence[Links]) -> tuple[str, list[dict[str, Any]]]:
    """Return a schema's tables, each column with the number of queries that read it."""
    tables = Counter(name for one in links for name in one)
    columns = Counter[tuple[str, str]]()
    for one in links:
        for name, used in one.items():
            columns.update((name, column) for column in used)
    return schema.db_id, [
        {
            "name": table.name,
            "queries": tables[table.name],
            "columns": [
                (
                    column.name,
                    column.type,
                    column.name in table.primary_key,
                    columns[table.name, column.name],
                )
                for column in table.columns
            ],
            "keys": [
                f"{', '.join(key.columns)} → {key.ref_table}({', '.join(key.ref_columns)})"
                for key in table.foreign_keys
            ],
        }
        for table in schema.tables
    ]
