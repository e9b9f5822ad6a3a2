"""Write questions as the prompts that an adapter was trained for; its contract is checked first."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from ray_sql import generate, models
from ray_sql.config.sections import AnswersSection
from ray_sql.data import Example, values
from ray_sql.data.contract import check_described
from ray_sql.data.corpus import CellValue
from ray_sql.data.shown import ShownSchema
from ray_sql.data.value_index import ValueIndex
from ray_sql.database import Executor, Links, Schema, render
from ray_sql.errors import DataError
from ray_sql.evaluate.models import check_adapter
from ray_sql.generate import Question
from ray_sql.rows import common_prefix, encode_prompt
from ray_sql.serve.databases import Database
from ray_sql.serve.recipe import Recipe
from ray_sql.tasks import TASKS

UNLIKE = (("How many?", ""), ("1", ""), ("How many?", "1 is one"))
"""Questions with hints, which begin differently: what their prompts share is the schema."""


@dataclass(frozen=True)
class Asked:
    """A question as a prompt, and the settings by which it is answered.

    `example` is None for a conversation. `links` are what a linker left of its schema, or
    `why_whole` says why it left all.
    """

    question: Question
    settings: AnswersSection
    turns: list[dict[str, str]]
    example: Example | None = None
    links: Links | None = None
    why_whole: str | None = None


class Prompter:
    """The prompts of an adapter, on the databases that it is asked about.

    Raises `ContractError` for an adapter that was trained for other prompts.
    """

    def __init__(self, recipe: Recipe, databases: Mapping[str, Database]) -> None:
        config = recipe.config
        self.config, self.adapter = config, recipe.adapter
        self.task, self.name = TASKS[config.task_type], recipe.name
        pinned = models.revision_of(self.adapter.read_contract(), config.model_name)
        self.model_folder, revision = models.resolve(
            config.model_name, config.cache, config.read_token, pinned
        )
        self.tokenizer = models.load_tokenizer(self.model_folder)
        check_adapter(self.adapter.uri, config, self.tokenizer, revision)
        self._most_tokens, self._largest_token = 0, -1
        """The longest prompt with its answer, and the largest token, that the model reads."""
        self.take(databases)

    def take(self, databases: Mapping[str, Database]) -> None:
        """Ask about these databases from now on; where that fails, about those before."""
        schemas = {name: database.schema for name, database in databases.items()}
        config = self.config
        check_described(self.adapter.read_contract() or {}, schemas, self.adapter.uri)
        encoder = generate.question_encoder(self.tokenizer, config, schemas)
        indexes: dict[str, ValueIndex] = {}
        with Executor(1) as executor:
            for name, database in databases.items():
                place = database.place
                if found := values.search(database.schema, place, config.prompt, executor):
                    indexes[name] = found.index
        self.databases, self._encoder, self._values = databases, encoder, indexes
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

        Raises `DataError` for an unknown database and an empty question, and `ModelError` for a
        prompt that is longer than the model's window.
        """
        self.database(database)
        if not question.strip():
            raise DataError("the question is empty; write what you want to know")
        example = self._example(question, database, evidence)
        return self._asked(example, settings or self.config.evaluate)

    def shown(self, asked: Asked, shown: ShownSchema) -> Asked:
        """Return a question with a prompt that shows a part of its schema."""
        if asked.example is None or shown.links is None:
            return replace(asked, why_whole=shown.why_whole)
        narrowed = self._asked(asked.example, asked.settings, shown.schema)
        return replace(narrowed, links=shown.links)

    def ask_turns(self, turns: list[dict[str, str]], settings: AnswersSection) -> Asked:
        """Return a conversation as a prompt, whatever it is about.

        It shares the schema of a database whose prompts begin so. Raises `ModelError` for one that
        the model's template cannot write, or that is longer than its window.
        """
        tokens = encode_prompt(self.tokenizer, self._encoder.chat.prompt(turns))
        database = next(
            (name for name, begin in self.begins.items() if tokens[: len(begin)] == begin), ""
        )
        question = Question("", "", database, "", "", None, None, tokens)
        self._check_window(question, settings)
        return Asked(question, settings, turns)

    def database(self, name: str) -> Database:
        """Return a database that is asked about. Raises `DataError` for an unknown name."""
        if name not in self.databases:
            known = ", ".join(sorted(self.databases))
            raise DataError(f"database {name!r} is not registered; there are {known}")
        return self.databases[name]

    def schema_text(self, database: str) -> str:
        """Return a database's schema as prompts show it."""
        schema = self.databases[database].schema
        return render(schema, self.config.prompt.serializer)

    def _asked(
        self, example: Example, settings: AnswersSection, shown: Schema | None = None
    ) -> Asked:
        turns = self._encoder.question_turns(example, shown)
        tokens = encode_prompt(self.tokenizer, self._encoder.chat.prompt(turns))
        name, place = example.db_id, self.databases[example.db_id].place
        question = Question("", "", name, example.question, "", None, place, tokens)
        self._check_window(question, settings)
        return Asked(question, settings, turns, example)

    def _check_window(self, question: Question, settings: AnswersSection) -> None:
        """Check a prompt, which reads the model's files, unless a larger one was checked before."""
        tokens = len(question.input_ids) + settings.max_new_tokens
        largest = max(question.input_ids, default=0)
        if tokens > self._most_tokens or largest > self._largest_token:
            generate.check_window(self.model_folder, [question], settings.max_new_tokens)
            self._most_tokens = max(tokens, self._most_tokens)
            self._largest_token = max(largest, self._largest_token)

    def _example(self, question: str, database: str, evidence: str = "") -> Example:
        """Return a question with the cells that it names."""
        found: tuple[CellValue, ...] = ()
        if database in self._values:
            found = self._values[database].find(question, self.config.prompt.values_top)
        return Example("", database, question, "", evidence, values=found)

    def _begin(self, database: str) -> list[int]:
        """Return what all prompts begin with: those with a hint, with cells, and with neither."""
        examples = [self._example(question, database, evidence) for question, evidence in UNLIKE]
        if database in self._values:
            cells = [
                CellValue(table.name, table.columns[0].name, "1")
                for table in self.databases[database].schema.tables[:1]
            ]
            examples.append(replace(examples[0], values=tuple(cells)))
        prompts = [self._encoder.encode_question(example) for example in examples]
        return prompts[0][: common_prefix(prompts)]
