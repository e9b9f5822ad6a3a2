"""The cells that questions name, found alike for training and for answers (`prompt.values`)."""

from __future__ import annotations

import shlex
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from ray_sql.config.sections import NO_VALUES, PromptSection
from ray_sql.data.corpus import CellValue, Corpus, Example, counted, join_some
from ray_sql.data.people import people_columns
from ray_sql.data.value_index import ValueIndex
from ray_sql.database import Executor, Schema
from ray_sql.database.bounded import BoundedReader
from ray_sql.database.cells import Cells, is_named, read_cells


@dataclass(frozen=True)
class Searched:
    """The cells of one database, and their index."""

    cells: Cells
    index: ValueIndex


def with_values(corpus: Corpus, prompt: PromptSection) -> Corpus:
    """Return the corpus, each example with the cells that its question names.

    Under `none` they have none. The notes say whose cells are searched, and which are people's.
    """
    questions: dict[str, list[str]] = defaultdict(list)
    for example in _examples(corpus):
        questions[example.db_id].append(example.question)
    found: dict[tuple[str, str], tuple[CellValue, ...]] = {}
    searched: dict[str, Cells] = {}
    with Executor(1) as executor:
        for db_id, asked in questions.items():
            place = corpus.executable(db_id)
            database = search(corpus.schemas.get(db_id), place, prompt, executor)
            if database is None:
                continue
            searched[db_id] = database.cells
            for question in asked:
                found[db_id, question] = database.index.find(question, prompt.values_top)
    splits = {
        split: tuple(
            replace(example, values=found.get((example.db_id, example.question), ()))
            for example in examples
        )
        for split, examples in corpus.splits.items()
    }
    corpus = replace(corpus, splits=splits)
    if prompt.values == NO_VALUES:
        return corpus
    return replace(corpus, notes=(*corpus.notes, *_notes(corpus, searched, prompt)))


def search(
    schema: Schema | None, place: str | None, prompt: PromptSection, executor: Executor
) -> Searched | None:
    """Return the cells of a database; None where none are wanted or nothing is executed."""
    if prompt.values == NO_VALUES or schema is None or place is None:
        return None
    cells = read_cells(schema, BoundedReader(executor, place), prompt.values_without)
    return Searched(cells, ValueIndex(cells))


def _examples(corpus: Corpus) -> Iterator[Example]:
    for examples in corpus.splits.values():
        yield from examples


def _notes(corpus: Corpus, searched: Mapping[str, Cells], prompt: PromptSection) -> Iterator[str]:
    """Say how many questions name cells, what was not searched, and which cells are people's."""
    examples = list(_examples(corpus))
    naming = sum(bool(example.values) for example in examples)
    yield (
        f"values: {naming:,} of {counted(len(examples), 'question')} name cells, up to "
        f"{prompt.values_top} of which stand in the prompt"
    )
    others = {example.db_id for example in examples} - searched.keys()
    if others:
        yield (
            f"values: none of {counted(len(others), 'database')}, on which nothing is executed "
            f"({join_some(others)})"
        )
    sampled = _with_database({db_id: cells.sampled for db_id, cells in searched.items()})
    if sampled:
        yield (
            f"values: of {counted(len(sampled), 'column')} with too many cells only a part is "
            f"searched ({join_some(sampled)})"
        )
    unread = _with_database({db_id: cells.unread for db_id, cells in searched.items()})
    if unread:
        yield f"values: {counted(len(unread), 'column')} cannot be read ({join_some(unread)})"
    people = _with_database({db_id: people_columns(cells) for db_id, cells in searched.items()})
    if people:  # all are named: whoever is not told of one cannot leave it out
        columns = ",".join(dict.fromkeys(name.partition(": ")[2] for name in people))
        yield (
            f"values: {counted(len(people), 'column')} may hold people's data; keep columns out of "
            f"prompts with --prompt.values_without {shlex.quote(columns)}"
        )
    unknown = [name for name in prompt.values_without if not _is_known(name, corpus)]
    if unknown:
        yield f"values: --prompt.values_without names no column of the data: {join_some(unknown)}"


def _with_database(columns: Mapping[str, Sequence[str]]) -> list[str]:
    return [f"{db_id}: {name}" for db_id, names in columns.items() for name in names]


def _is_known(name: str, corpus: Corpus) -> bool:
    columns = (
        (table.name, table.column_names)
        for schema in corpus.schemas.values()
        for table in schema.tables
    )
    return any(is_named(table, column, [name]) for table, names in columns for column in names)
