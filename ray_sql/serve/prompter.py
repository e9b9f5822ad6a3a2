"""Write questions as the prompts that an adapter was trained for; its contract is checked first."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ray_sql import generate, models
from ray_sql.config.sections import AnswersSection
from ray_sql.data import Example
from ray_sql.database import render
from ray_sql.errors import DataError
from ray_sql.evaluate.models import check_adapter
from ray_sql.generate import Question
from ray_sql.rows import Encoder, common_prefix, encode_prompt
from ray_sql.serve.databases import Database
from ray_sql.serve.recipe import Recipe
from ray_sql.tasks import TASKS

UNLIKE = ("How many?", "1")
"""Two questions that begin differently: what their prompts share is the schema."""


@dataclass(frozen=True)
class Asked:
    """A question as a prompt, and the settings by which it is answered."""

    question: Question
    settings: AnswersSection


class Prompter:
    """The prompts of an adapter, on the databases that it is asked about.

    Raises `ContractError` for an adapter that was trained for other prompts.
    """

    def __init__(self, recipe: Recipe, databases: Mapping[str, Database]) -> None:
        config = recipe.config
        self.config, self.adapter, self.databases = config, recipe.adapter, databases
        self.task, self.name = TASKS[config.task_type], recipe.name
        pinned = models.revision_of(self.adapter.read_contract(), config.model_name)
        self.model_folder, revision = models.resolve(
            config.model_name, config.cache, config.read_token, pinned
        )
        check_adapter(self.adapter.uri, config, self.model_folder, revision)
        self.tokenizer = models.load_tokenizer(self.model_folder)
        schemas = {name: database.schema for name, database in databases.items()}
        self._encoder = Encoder(self.tokenizer, self.task, config.prompt, schemas)
        self.begins = {name: self._begin(name) for name in databases}
        """The tokens that the prompts of all questions on a database begin with."""

    def ask(
        self,
        question: str,
        database: str,
        evidence: str = "",
        settings: AnswersSection | None = None,
    ) -> Asked:
        """Return a question with its prompt.

        Raises `DataError` for an unknown database, and `ModelError` for a prompt that is longer
        than the model's window.
        """
        if database not in self.databases:
            known = ", ".join(sorted(self.databases))
            raise DataError(f"database {database!r} is not registered; there are {known}")
        settings = settings or self.config.evaluate
        place = self.databases[database].place
        tokens = self._tokens(question, database, evidence)
        return self._asked(Question("", "", database, question, "", None, place, tokens), settings)

    def ask_turns(self, turns: list[dict[str, str]], settings: AnswersSection) -> Asked:
        """Return a conversation as a prompt, whatever it is about.

        It shares the schema of a database whose prompts begin so. Raises `ModelError` for one that
        the model's template cannot write, or that is longer than its window.
        """
        tokens = encode_prompt(self.tokenizer, self._encoder.chat.prompt(turns))
        database = next(
            (name for name, begin in self.begins.items() if tokens[: len(begin)] == begin), ""
        )
        return self._asked(Question("", "", database, "", "", None, None, tokens), settings)

    def schema_text(self, database: str) -> str:
        """Return a database's schema as prompts show it."""
        schema = self.databases[database].schema
        return render(schema, self.config.prompt.serializer)

    def _asked(self, question: Question, settings: AnswersSection) -> Asked:
        generate.check_window(self.model_folder, [question], settings.max_new_tokens)
        return Asked(question, settings)

    def _tokens(self, question: str, database: str, evidence: str = "") -> list[int]:
        return self._encoder.encode_question(Example("", database, question, "", evidence))

    def _begin(self, database: str) -> list[int]:
        prompts = [self._tokens(question, database) for question in UNLIKE]
        return prompts[0][: common_prefix(prompts)]
