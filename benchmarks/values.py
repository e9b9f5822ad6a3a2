"""Find the cells that questions name: how many of those in the gold SQL, how fast, how long.

    RAY_SQL_SHARED=… python -m benchmarks.values [--quick] [--serializer ddl] [--top 5]

The questions are the demo's, and Spider's dev where RAY_SQL_SHARED names a folder with Spider in
data/spider. A text literal counts where gold compares a column with it, and a cell of the database
is that text. It is found if it is among the values of the prompt. Literals that are no cell, and
patterns of LIKE, are counted apart. Training tokens are those of an epoch over shared rows of the
demo. The last line is one JSON object. With --quick, 150 questions of each.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from sqlglot import exp, parse_one
from sqlglot.errors import SqlglotError

from benchmarks import make_encoder
from ray_sql import data, models, rows
from ray_sql.config import Config, load
from ray_sql.config.sections import PromptSection
from ray_sql.data import Corpus, Example, values
from ray_sql.database import Executor, Schema

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

COMPARES = (exp.EQ, exp.NEQ, exp.In, exp.GT, exp.GTE, exp.LT, exp.LTE, exp.Between)
QUICK = 150


def main(argv: list[str] | None = None) -> None:
    """Measure each dataset, and print the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help=f"{QUICK} questions of each")
    parser.add_argument("--serializer", default="ddl", choices=["ddl", "compact", "m_schema"])
    parser.add_argument("--top", type=int, default=5)
    arguments = parser.parse_args(argv)
    datasets = {"demo": ("demo", "seen,unseen")}
    if shared := os.environ.get("RAY_SQL_SHARED"):
        datasets["spider_dev"] = f"{shared}/data/spider", "dev"
    config = load(Config, [], model_name="demo", output_name="values", task_type="sql")
    folder, _ = models.resolve(config.model_name, config.cache, None)
    tokenizer = models.load_tokenizer(folder)
    figures = {}
    for name, (dataset_id, split) in datasets.items():
        chosen = config.changed(
            {
                "dataset_id": dataset_id,
                "split": tuple(split.split(",")),
                "prompt.serializer": arguments.serializer,
                "prompt.values_top": arguments.top,
            }
        )
        figures[name] = measure(chosen, tokenizer, QUICK if arguments.quick else None)
        print(name, json.dumps(figures[name], indent=1))
    figures["demo"]["epoch_tokens_percent"] = _epoch(config, tokenizer)
    print(json.dumps(figures))


def measure(
    config: Config, tokenizer: PreTrainedTokenizerBase, limit: int | None
) -> dict[str, float]:
    """Return the figures of the scored questions of a dataset."""
    corpus = data.load_split(config, config.split)
    chosen = {
        split: data.sample(corpus.splits[split], limit, config.seed) for split in config.split
    }
    corpus = replace(corpus, splits=chosen)
    examples = [example for split in chosen.values() for example in split]
    named = data.with_values(corpus, _matched(config.prompt))
    asked = [example for split in named.splits.values() for example in split]
    encoder = make_encoder(tokenizer, config, corpus.schemas)
    before, after = (
        sum(len(encoder.encode_question(example)) for example in some) for some in (examples, asked)
    )
    return recall(corpus, examples, config.prompt) | {
        "prompt_tokens": round(before / len(examples), 1),
        "prompt_tokens_percent": round(100 * (after - before) / before, 2),
    }


def recall(corpus: Corpus, examples: Sequence[Example], prompt: PromptSection) -> dict[str, float]:
    """Return how many text literals of gold are found, and the time of that."""
    by_database: dict[str, list[Example]] = defaultdict(list)
    for example in examples:
        by_database[example.db_id].append(example)
    counts: Counter[str] = Counter()
    indexing, finding = list[float](), list[float]()
    with Executor(1) as executor:
        for db_id, own in by_database.items():
            started, schema = time.perf_counter(), corpus.schemas[db_id]
            place = corpus.executable(db_id)
            found = values.search(schema, place, _matched(prompt), executor)
            indexing.append(time.perf_counter() - started)
            assert found is not None
            known = {str(cell).lower() for one in found.cells.columns for cell in one.cells}
            for example in own:
                started = time.perf_counter()
                cells = found.index.find(example.question, prompt.values_top)
                finding.append(time.perf_counter() - started)
                shown = [cell.literal.strip("'").replace("''", "'").lower() for cell in cells]
                counts += _count(example.gold, schema, known, shown)
                counts["values"] += len(cells)
    finding.sort()
    return {
        "questions": len(examples),
        "literals_in_cells": counts["cells"],
        "recall": _percent(counts["cells_found"], counts["cells"]),
        "literals_elsewhere": counts["elsewhere"],
        "patterns": counts["patterns"],
        "patterns_recall": _percent(counts["patterns_found"], counts["patterns"]),
        "values_per_question": round(counts["values"] / len(examples), 2),
        "ms_per_question": round(1000 * sum(finding) / len(finding), 2),
        "ms_p99": round(1000 * finding[int(0.99 * len(finding))], 2),
        "databases": len(indexing),
        "index_seconds": round(sum(indexing), 2),
        "index_seconds_most": round(max(indexing), 2),
    }


def _matched(prompt: PromptSection) -> PromptSection:
    return prompt.model_copy(update={"values": "matched"})


def _count(gold: str, schema: Schema, known: set[str], shown: Sequence[str]) -> Counter[str]:
    """Count the text literals of a gold query, and those that are among the shown values."""
    counts: Counter[str] = Counter()
    for text, is_pattern in text_literals(gold, schema):
        if is_pattern:
            counts["patterns"] += 1
            counts["patterns_found"] += any(text.strip("%") in one for one in shown)
        elif text in known:
            counts["cells"] += 1
            counts["cells_found"] += text in shown
        else:
            counts["elsewhere"] += 1
    return counts


def text_literals(gold: str, schema: Schema) -> Iterator[tuple[str, bool]]:
    """Yield the texts that gold compares with, in lower case, and whether they are patterns."""
    columns = {name.lower() for table in schema.tables for name in table.column_names}
    try:
        tree = parse_one(gold, read="sqlite")
    except SqlglotError:
        return
    for node in tree.find_all(exp.Like, *COMPARES):
        for part in node.iter_expressions():
            is_text = isinstance(part, exp.Literal) and part.is_string
            # SQLite takes a name in double quotes that is no column for a text
            is_quoted = isinstance(part, exp.Column) and not part.table
            if is_text or (is_quoted and part.name.lower() not in columns):
                yield part.name.lower(), isinstance(node, exp.Like)


def _epoch(config: Config, tokenizer: PreTrainedTokenizerBase) -> float:
    """Return by how many percent values make the tokens of an epoch of the demo more."""
    computed = []
    for kind in ("none", "matched"):
        chosen = config.changed({"dataset_id": "demo", "split": ("seen",), "prompt.values": kind})
        corpus = data.load(chosen)
        encoder = make_encoder(tokenizer, chosen, corpus.schemas)
        examples, _ = rows.build(corpus.splits["train"], encoder, chosen.rows)
        batching = chosen.batching_of({example.db_id for example in examples})
        computed.append(rows.count_tokens(examples, batching)[0])
    return round(100 * (computed[1] / computed[0] - 1), 2)


def _percent(part: int, whole: int) -> float:
    return round(100 * part / max(1, whole), 1)


if __name__ == "__main__":
    main()
