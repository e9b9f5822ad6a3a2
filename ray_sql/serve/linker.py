"""Two stages: a linker names what a question needs, and the prompt shows what that leaves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ray_sql.data import Example
from ray_sql.data.linking import parse_links
from ray_sql.data.shown import AskedLinks
from ray_sql.serve.prompter import Asked, Prompter

if TYPE_CHECKING:
    from ray_sql.serve.engine import Engine, Reply

SPLIT = ""
"""Questions that people ask are of no split."""


class Linker:
    """Shows a generator's prompts what a linker leaves of their schemas."""

    def __init__(self, engine: Engine, generator: Prompter) -> None:
        self._engine, self._generator = engine, generator
        config = generator.config
        self._form = config.linking.form_of(config.prompt.schema_form)
        self._complete = config.linking.complete

    def narrow(self, asked: Sequence[Asked]) -> list[Asked]:
        """Return questions with prompts that show what the linker leaves; others as they are."""
        examples = [one.example for one in asked if one.example is not None]
        prompter, greedy = self._engine.prompter, self._engine.config.evaluate.greedy()
        questions = [
            prompter.ask(one.question, one.db_id, one.evidence, greedy) for one in examples
        ]
        answers = iter(self._engine.answer(questions))
        return [
            one if one.example is None else self._narrowed(one, one.example, next(answers))
            for one in asked
        ]

    def _narrowed(self, asked: Asked, example: Example, answer: Reply) -> Asked:
        found = {(SPLIT, example.id): parse_links(answer.predicted or "")}
        links = AskedLinks("linker", self._form, self._complete, found)
        schemas = {example.db_id: self._generator.database(example.db_id).schema}
        return self._generator.shown(asked, links.show(SPLIT, example, schemas))

    def close(self) -> None:
        """Leave the linker."""
        self._engine.close()
