"""A schema as a linker would leave it: what the gold SQL needs, beside names like its mistakes."""

from __future__ import annotations

import random

from ray_sql.config.sections import PromptSection
from ray_sql.data.corpus import Example
from ray_sql.data.linking import gold_links
from ray_sql.database import Links, Schema, complete, restrict


def noisy_schema(example: Example, schema: Schema, prompt: PromptSection) -> Schema:
    """Return a part of the schema with all that the example's gold SQL needs, drawn by its content.

    Unneeded tables, and unneeded columns of tables that are shown, stay by the chances of `prompt`.
    Links are completed as a linker's are. A share of the examples shows the full schema.

    Raises:
        LinkError: the links of the gold SQL cannot be found.
    """
    chance = random.Random("\n".join([example.db_id, example.question, example.gold]))
    needed = {table: set(names) for table, names in gold_links(example.gold, schema).items()}
    if chance.random() < prompt.full_share:
        return schema
    links: Links = {}
    for table in schema.tables:
        if table.name in needed or chance.random() < prompt.spare_tables:
            kept = needed.get(table.name, set())
            links[table.name] = [
                name
                for name in table.column_names
                if name in kept or chance.random() < prompt.spare_columns
            ]
    return restrict(schema, complete(links, schema), "reduced")
