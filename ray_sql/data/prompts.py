"""Write the content of prompts, and the answers that are expected.

A prompt puts the schema first and the question last, so that questions on one database share a
prefix. `chat` writes the turns as a model reads them. `contract` records the words that are used.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ray_sql.config.sections import PromptSection
from ray_sql.data import Example, linking
from ray_sql.data.answers import one_line
from ray_sql.data.corpus import CellValue
from ray_sql.data.noise import noisy_schema
from ray_sql.database import Links, Names, Schema, render, restrict
from ray_sql.errors import DataError
from ray_sql.tasks import Task

USER = "Schema:\n{schema}\n\n{evidence}Question: {question}"
EVIDENCE = "Hint: {evidence}\n"
VALUES = "Values: {values}\n"


def schema_text(example: Example, schemas: Mapping[str, Schema], prompt: PromptSection) -> str:
    """Return the schema as the prompt shows it: the dataset's own text, or else our rendering."""
    if example.schema_text:
        return example.schema_text
    return render(shown_schema(example, schemas, prompt), prompt.serializer)


def shown_schema(example: Example, schemas: Mapping[str, Schema], prompt: PromptSection) -> Schema:
    """Return the part of the example's schema that a prompt shows in training.

    Raises:
        LinkError: it needs the links of the gold SQL, which cannot be found.
    """
    schema = schemas[example.db_id]
    match prompt.schema_form:
        case "full":
            return schema
        case "noisy":
            return noisy_schema(example, schema, prompt)
        case form:
            return restrict(schema, linking.gold_links(example.gold, schema), form)


def values_text(values: Iterable[CellValue], shown: Schema) -> str:
    """Return cells as a prompt writes them, without those of columns that are not shown.

    `singer.country = 'France', concert.year = 2014`.
    """
    names, parts = Names(shown), list[str]()
    for value in values:
        table = shown.table(value.table)
        column = table.column(value.column) if table else None
        if table and column:
            parts.append(f"{names.table(table.name)}.{names.one(column.name)} = {value.literal}")
    return ", ".join(parts)


def messages(
    task: Task, schema: str, question: str, evidence: str = "", values: str = ""
) -> list[dict[str, str]]:
    """Return the system and the user turn of one question."""
    hint = EVIDENCE.format(evidence=evidence) if evidence else ""
    hint += VALUES.format(values=values) if values else ""
    content = USER.format(schema=schema, evidence=hint, question=question)
    return [{"role": "system", "content": task.system}, {"role": "user", "content": content}]


def answer(task: Task, example: Example, schemas: Mapping[str, Schema]) -> str:
    """Return the expected answer: the gold SQL, or its links, in a fenced block.

    Raises:
        LinkError: the task needs links, and those of the gold SQL cannot be found.
    """
    body = one_line(example.gold)
    if not task.executes_sql:
        body = linking.format_links(gold_links(example, schemas))
    return f"```{task.fence}\n{body}\n```"


def gold_links(example: Example, schemas: Mapping[str, Schema]) -> Links:
    """Return the dataset's own links, or else those of the gold SQL.

    Raises:
        DataError: the dataset's links cannot be read.
        LinkError: the gold SQL cannot be linked, or there is no schema to link it to.
    """
    text = example.links_text
    if text is None:
        if example.db_id not in schemas:
            raise linking.LinkError(
                f"example {example.id}: no schema of {example.db_id} to find links in, and no "
                "CREATE TABLE in its row; name the databases with --data.databases, or give each "
                "row `links`"
            )
        return linking.gold_links(example.gold, schemas[example.db_id])
    links = linking.parse_links(text) or linking.parse_python_literal(text)
    if links is None:
        raise DataError(
            f"example {example.id}: links are neither JSON nor a Python literal: {text[:80]!r}"
        )
    return links
