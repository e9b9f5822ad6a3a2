"""A tuned model as MLflow loads it: `mlflow.pyfunc.load_model("models:/ray-sql-sql@champion")`.

Questions come as rows with `question`, and `database` or `schema`. A database is a file, a URL, or
the name of one of the run's own; a schema is CREATE TABLE statements. A run with one database needs
neither. No SQL of an answer is executed. The script in the model's folder, which
`tracking/models.py` writes, makes the instance.
"""

from __future__ import annotations

import atexit
import threading
from collections.abc import Mapping
from typing import Any

from mlflow.pyfunc import PythonModel
from pandas import DataFrame

from ray_sql.config import AskConfig, load
from ray_sql.config.sections import AnswersSection
from ray_sql.data.schema_texts import read_schema
from ray_sql.errors import DataError
from ray_sql.serve import databases, recipe
from ray_sql.serve.databases import Database
from ray_sql.serve.engine import Reply
from ray_sql.serve.opening import open_engine
from ray_sql.serve.prompter import Prompter


class TunedModel(PythonModel):  # type: ignore[misc]  # mlflow is not followed by mypy
    """An adapter over its base model, which is loaded from where the run had it.

    MLflow's `model_config` takes settings of `ray-sql ask`, such as `cache_dir`.
    """

    def load_context(self, context: Any) -> None:
        """Load the adapter of a downloaded model. Raises `RaySqlError` where it cannot be used."""
        settings = load(
            AskConfig, [], adapter=context.artifacts["adapter"], **(context.model_config or {})
        )
        self._recipe = recipe.find(settings)
        self._known: dict[str, Database] = {}
        self._engine = open_engine(Prompter(self._recipe, {}))
        self._lock = threading.Lock()
        atexit.register(self._engine.close)

    def predict(self, context: Any, model_input: DataFrame, params: Any = None) -> DataFrame:
        """Return a row for every row of questions, with `sql` or `links`.

        Raises `DataError` for a row without a question, or with a database that is not found.
        """
        rows = [_texts(row) for row in model_input.to_dict("records")]
        with self._lock:
            places = [self._database(row) for row in rows]
            prompter = self._prompter(dict.fromkeys(places))
            settings = _executing_nothing(prompter)
            asked = [
                prompter.ask(row["question"], place, row["evidence"], settings)
                for row, place in zip(rows, places, strict=True)
            ]
            replies = self._engine.answer(asked)
        return DataFrame([self._answer(reply) for reply in replies], columns=["sql", "links"])

    def _database(self, row: Mapping[str, str]) -> str:
        """Return the name under which a row's database is known, after reading it."""
        if not row["question"]:
            raise DataError("a row has no question; give it in the column question")
        name = row["schema"] or row["database"]
        if name in self._known:
            return name
        if row["schema"]:
            schema = read_schema(row["schema"], "schema")
            if schema is None:
                raise DataError(
                    f"the schema {row['schema'][:60]!r} creates no table that can be read; give "
                    "CREATE TABLE statements, or a database"
                )
            self._known[name] = Database(name, schema, None)
        else:
            self._known[name] = databases.find(name or None, self._recipe.config)
        return name

    def _prompter(self, needed: Mapping[str, None]) -> Prompter:
        """Return prompts on the databases that are needed; those of earlier calls are dropped."""
        prompter = self._engine.prompter
        if not needed.keys() <= prompter.databases.keys():
            self._known = {name: self._known[name] for name in needed}
            prompter.take(dict(self._known))
        return prompter

    def _answer(self, reply: Reply) -> dict[str, str | None]:
        column = "sql" if self._engine.prompter.task.executes_sql else "links"
        return {"sql": None, "links": None, column: reply.predicted}


def _executing_nothing(prompter: Prompter) -> AnswersSection:
    """Return the run's settings for answers, greedy where a choice would execute SQL."""
    settings = prompter.config.evaluate
    several = settings.samples > 1 or settings.num_beams > 1
    return settings.greedy() if several and prompter.task.executes_sql else settings


def _texts(row: Mapping[str, Any]) -> dict[str, str]:
    """Return a row's texts; what is missing, None or not a text counts as empty."""
    columns = ("question", "database", "schema", "evidence")
    given = {name: row.get(name) for name in columns}
    return {name: text if isinstance(text, str) else "" for name, text in given.items()}
