"""The schema that the prompt of a scored question shows: all of it, or what links leave of it.

Gold links are an oracle: nobody has them for a question without an answer. A split whose prompts
show them has another name, so that every score, file, plot and card made of it says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ray_sql.config.sections import GOLD, NO_LINKS, LinkedForm
from ray_sql.data.corpus import Example
from ray_sql.data.linking import LinkError, gold_links
from ray_sql.database import Links, Schema, complete, restrict

ORACLE = "-oracle"
"""The end of a split's name where its prompts show gold links."""


@dataclass(frozen=True)
class ShownSchema:
    """A question's schema as its prompt shows it; None where the dataset has only a text of it.

    `links` are what is left of it. They are None for a whole schema, and `why_whole` says why links
    could not make it smaller.
    """

    schema: Schema | None
    links: Links | None = None
    why_whole: str | None = None


@dataclass(frozen=True)
class AskedLinks:
    """The links that make the schemas of scored questions smaller: `source` is as in the settings.

    `found` are a linker's by split and id, None for an answer that holds none.
    """

    source: str = NO_LINKS
    form: LinkedForm = "tables"
    complete: bool = True
    found: Mapping[tuple[str, str], Links | None] = field(default_factory=dict)

    def split_name(self, split: str) -> str:
        """Return the name of a split's scores, which says where they are an oracle's."""
        return split + ORACLE if self.source == GOLD else split

    def show(self, split: str, example: Example, schemas: Mapping[str, Schema]) -> ShownSchema:
        """Return what the prompt of an example shows."""
        schema = schemas.get(example.db_id)
        if self.source == NO_LINKS or schema is None or example.schema_text:
            return ShownSchema(schema)
        try:
            links = self._links(split, example, schema)
        except LinkError as error:
            return ShownSchema(schema, why_whole=str(error))
        return ShownSchema(restrict(schema, links, self.form), links)

    def _links(self, split: str, example: Example, schema: Schema) -> Links:
        """Return an example's links. Raises `LinkError` where there are none to be used."""
        if self.source == GOLD:
            try:
                return gold_links(example.gold, schema)
            except LinkError:
                raise LinkError("its gold SQL cannot be linked") from None
        key = split, example.id
        if key not in self.found:
            raise LinkError("the linker has no answer to it")
        links = self.found[key]
        if links is None:
            raise LinkError("the linker's answer cannot be read")
        known = complete(links, schema)
        if not known:
            raise LinkError("the linker's answer names no table of the database")
        return known if self.complete else links
