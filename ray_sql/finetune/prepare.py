"""Everything before the first worker starts: data, base model, rows, audit, contract, inputs.

`prepare` is what a training run, a dry run and the pre-flight check have in common. It needs no
cluster and no GPU.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray_sql import cluster, data, generate, models, rows
from ray_sql.config import Config, strip_password
from ray_sql.data import Corpus, Example, LeftOut
from ray_sql.data.contract import described, make_contract
from ray_sql.database import Schema
from ray_sql.display import Display
from ray_sql.errors import ConfigError, DataError
from ray_sql.evaluate.linker import asked_links
from ray_sql.evaluate.models import scored_questions
from ray_sql.finetune import gold
from ray_sql.generate import Question
from ray_sql.rows import Audit
from ray_sql.store import storage
from ray_sql.store.run_folder import RunFolder
from ray_sql.tasks import TASKS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Progress = Callable[[int, int], None]

TRAINED_ON = ("train", "validation")
"""The splits that shape an adapter; others may be scored without training again."""


@dataclass(frozen=True)
class Found:
    """The data, the base model and its tokenizer, before they are read through."""

    corpus: Corpus
    model_folder: str
    revision: str | None
    """The revision of a model of the Hub."""
    tokenizer: PreTrainedTokenizerBase


@dataclass(frozen=True)
class Prepared:
    """A run before it starts.

    `gold_errors` are the gold queries of all splits that do not run, and `left_out` the rows that
    are not used.
    """

    config: Config
    corpus: Corpus
    model_folder: str
    tokenizer: PreTrainedTokenizerBase
    rows_file: Path
    audit: Audit
    contract: dict[str, Any]
    gold_errors: list[dict[str, Any]]
    left_out: list[LeftOut] = field(default_factory=list)

    @property
    def steps(self) -> int:
        """The optimizer steps of the run."""
        return self.config.batching.steps(self.audit.rows)

    def questions(self, display: Display | None = None) -> list[Question]:
        """Return the questions to score, at most `evaluate.limit` of each split.

        Raises `ModelError` for a prompt that is longer than the model's window.
        """
        links = asked_links(self.config, self.corpus, display or Display())
        questions = scored_questions(self.corpus, self.tokenizer, self.config, links)
        generate.check_window(self.model_folder, questions, self.config.evaluate.max_new_tokens)
        return questions

    def validation(self) -> list[Question]:
        """Return the validation questions that choose the best checkpoint; their gold runs."""
        count = self.config.evaluate.select_examples
        if not count:
            return []
        executes = TASKS[self.config.task_type].executes_sql
        failing = {row["id"] for row in self.gold_errors if row["split"] == "validation"}
        usable = [
            question
            for question in generate.make_questions(
                self.corpus.splits["validation"], "validation", self.corpus, self.encoder
            )
            if question.gold and question.id not in failing and (question.database or not executes)
        ]
        return list(data.sample(usable, count, self.config.seed))

    def validation_rows(self) -> list[rows.TokenizedExample]:
        """Return the examples of `validation` with their gold answers, for their loss.

        Examples that could not be trained on either are left out.
        """
        by_id = {example.id: example for example in self.corpus.splits["validation"]}
        examples = [by_id[question.id] for question in self.validation()]
        return rows.build(examples, self.encoder, self.config.rows)[0]

    @property
    def judged_schemas(self) -> dict[str, Schema]:
        """The schemas that answers are judged by."""
        return self.corpus.judged_schemas(TASKS[self.config.task_type])

    @property
    def encoder(self) -> rows.Encoder:
        """The encoder of this run's examples."""
        return generate.question_encoder(self.tokenizer, self.config, self.corpus.schemas)


def find(config: Config) -> Found:
    """Load the data and the tokenizer, and fetch the model, that `config` names.

    Raises a `RaySqlError` where one is missing, which is known after a second or two.
    """
    corpus = data.load(config)
    if TASKS[config.task_type].executes_sql and corpus.databases:
        _require_databases(corpus, config.split, config.evaluate.select_examples)
    begun = None if config.overwrite else RunFolder(config.run_dir).read_contract()
    folder, revision = models.resolve(
        config.model_name,
        config.cache,
        config.read_token,
        models.revision_of(begun, config.model_name),
    )
    return Found(corpus, folder, revision, models.load_tokenizer(folder))


def prepare(
    config: Config, progress: Progress | None = None, found: Found | None = None
) -> Prepared:
    """Load and check all that `config` names, from what was `found` if it was looked for before.

    Raises a `RaySqlError` for whatever the user can fix, before anything is written outside of the
    cache.
    """
    found = found or find(config)
    corpus, folder, tokenizer = found.corpus, found.model_folder, found.tokenizer
    executes = TASKS[config.task_type].executes_sql
    encoder = rows.Encoder(tokenizer, TASKS[config.task_type], config.prompt, corpus.schemas)
    failing = gold.failing(corpus, config.evaluate, config.cache, progress)
    if executes:
        gold.require_scorable(corpus, config.split, failing)
    left_out = gold.not_trained(corpus, failing, config.data.bad_rows)
    unused = {row.id for row in left_out}
    train = [example for example in corpus.splits["train"] if example.id not in unused]
    file, audit = rows.prepare(train, encoder, config.rows, config.cache, progress)
    models.check_window(
        folder,
        min(audit.longest, config.rows.max_length),
        "an example has {tokens}: lower --rows.max_length and choose --rows.too_long",
    )
    models.check_vocabulary(folder, rows.largest_token(file))
    contract = make_contract(config, tokenizer, found.revision)
    if config.prompt.description_chars:
        contract["described"] = described(corpus.schemas)
    left_out = [*corpus.left_out, *left_out, *_unlinkable(train, audit)]
    return Prepared(config, corpus, folder, tokenizer, file, audit, contract, failing, left_out)


def _unlinkable(train: Sequence[Example], audit: Audit) -> list[LeftOut]:
    """Return the training examples without an answer, because their SQL has no links."""
    by_id = {example.id: example for example in train}
    reason = "its SQL cannot be linked to the schema"
    return [LeftOut("train", name, by_id[name].place, reason) for name in audit.unlinkable]


def write_inputs(prepared: Prepared) -> None:
    """Lay out the run's folder: settings, contract, rows, validation, and failing gold queries."""
    config = prepared.config
    folder = RunFolder(config.run_dir)
    folder.write_settings(config.public())
    folder.write_contract(prepared.contract)
    folder.write_data_fingerprint(prepared.corpus.fingerprint(TRAINED_ON))
    storage.put(prepared.rows_file, folder.rows)
    questions = prepared.validation()
    if config.scaling.storage_path or cluster.address():
        # workers may be on machines that do not see the databases
        questions = generate.stage_databases(questions, folder)
    storage.write_text(folder.validation_questions, generate.dump(questions))
    if config.tune.objective == "chosen" and config.evaluate.ground != "none":
        schemas = {one.db_id: prepared.corpus.schemas[one.db_id].to_dict() for one in questions}
        storage.write_text(folder.validation_schemas, json.dumps(schemas))
    validation_rows = prepared.validation_rows()
    if validation_rows:
        with tempfile.TemporaryDirectory(prefix="ray_sql-") as scratch:
            local = Path(scratch) / "rows.parquet"
            rows.write(validation_rows, local)
            storage.put(local, folder.validation_rows)
    if prepared.gold_errors:
        folder.write_gold_errors(prepared.gold_errors)
    if prepared.left_out:
        folder.write_left_out(map(asdict, prepared.left_out))


def _require_databases(corpus: Corpus, splits: Sequence[str], validated: int) -> None:
    """Raise for scored questions whose database is missing among others, or hidden by a password.

    `validated` is the number of validation questions, which the workers ask.
    A corpus without any database is no error: it can be trained on, and its scores say that nothing
    was executed.
    """
    places = corpus.databases.values()
    if validated and any(strip_password(place) != place for place in places):
        raise ConfigError(
            "--data.databases: the workers execute validation SQL, but a password is written into "
            "no file they read: leave it out of the URL and give it as PGPASSWORD or MYSQL_PWD in "
            "the environment, or in ~/.pgpass"
        )
    for split in splits:
        for example in corpus.splits[split]:
            if example.db_id not in corpus.databases and not example.schema_text:
                raise DataError(
                    f"--split {split}, example {example.id}: the database of db_id "
                    f"{example.db_id!r} is missing; expected "
                    f"{example.db_id}/{example.db_id}.sqlite beside the others"
                )
