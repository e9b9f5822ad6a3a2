"""Everything before the first worker starts: data, base model, rows, audit, contract, and the inputs that workers read.

`prepare` is what a training run, a dry run and the pre-flight check have in common; it needs no cluster and no GPU.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray_sql import cluster, data, generate, models, rows
from ray_sql.config import AUTO_EXAMPLES_PER_ROW, Config, differences, strip_password
from ray_sql.data import Corpus, prompts
from ray_sql.errors import ConfigError, DataError, StoreError
from ray_sql.evaluate import scoring
from ray_sql.generate import Question
from ray_sql.rows import Audit
from ray_sql.store import storage
from ray_sql.store.run_folder import CONFIG, RunFolder
from ray_sql.tasks import TASKS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Progress = Callable[[int, int], None]

SCORING = (
    "split",
    "evaluate.semantics",
    "evaluate.keep_distinct",
    "evaluate.limit",
    "evaluate.max_new_tokens",
    "evaluate.baseline",
    "evaluate.num_beams",
    "evaluate.first_executable",
    "evaluate.ves_iterations",
)
"""Settings that decide what the scores of a run mean."""
TRAINED_ON = ("train", "validation")
"""The splits that shape an adapter; which others are scored may change."""


@dataclass(frozen=True)
class Prepared:
    """What a run starts from. `gold_errors` are gold queries that do not run, over all splits, as rows with id and error."""

    corpus: Corpus
    model_folder: str
    tokenizer: PreTrainedTokenizerBase
    rows_file: Path
    audit: Audit
    contract: dict[str, Any]
    gold_errors: list[dict[str, Any]]

    def questions(self, config: Config) -> list[Question]:
        """The questions that will be scored, at most `evaluate.limit` of each split."""
        asked = [
            question
            for split in config.split
            for question in self._asked(split, config, config.evaluate.limit)
        ]
        generate.check_window(self.model_folder, asked, config.evaluate.max_new_tokens)
        return asked

    def validation(self, config: Config) -> list[Question]:
        """The validation questions that choose the best checkpoint; only those whose gold runs."""
        if not config.evaluate.select_examples:
            return []
        failing = {(row["split"], row["id"]) for row in self.gold_errors}
        asked = self._asked("validation", config, None)
        usable = [
            q for q in asked if q.gold and (not TASKS[config.task_type].executes_sql or q.database)
        ]
        return list(
            data.sample(
                [q for q in usable if (q.split, q.id) not in failing],
                config.evaluate.select_examples,
                config.seed,
            )
        )

    def validation_rows(self, config: Config) -> list[rows.TokenizedExample]:
        """The examples of `validation` with their gold answers, for their loss; without those that could not be trained on either."""
        examples = {example.id: example for example in self.corpus.splits["validation"]}
        asked = [examples[question.id] for question in self.validation(config)]
        return rows.build(asked, self.corpus.schemas, self.tokenizer, config)[0]

    def _asked(self, split: str, config: Config, limit: int | None) -> list[Question]:
        examples = data.sample(self.corpus.splits[split], limit, config.seed)
        return generate.make_questions(examples, split, self.corpus, self.tokenizer, config)


def prepare(config: Config, progress: Progress | None = None) -> Prepared:
    """Load and check all that `config` names. Raises a `RaySqlError` for whatever the user can fix, before anything is written
    outside the cache."""
    corpus = data.load(config)
    check_databases(corpus, config)
    begun = None if config.overwrite else RunFolder(config.run_dir).read_contract()
    folder, revision = models.resolve(
        config.model_name,
        config.cache,
        config.read_token,
        models.revision_of(begun, config.model_name),
    )
    tokenizer = models.load_tokenizer(folder)
    file, audit = rows.prepare(corpus.splits["train"], corpus.schemas, tokenizer, config, progress)
    longest = min(audit.longest, config.rows.max_length)
    models.check_window(
        folder,
        longest,
        "an example has {tokens}: lower --rows.max_length and choose --rows.too_long",
    )
    contract = prompts.contract(config, tokenizer, revision)
    failing = gold_errors(corpus, config, progress)
    check_gold(corpus, failing, config)
    return Prepared(corpus, folder, tokenizer, file, audit, contract, failing)


def check_databases(corpus: Corpus, config: Config) -> None:
    """Raise `DataError` if a question that is to be scored by execution is on a database that is missing among others.

    A corpus without any database is no error: it can be trained on, and its scores say that nothing was executed.
    """
    if not TASKS[config.task_type].executes_sql or not corpus.databases:
        return
    if config.evaluate.select_examples and any(
        strip_password(place) != place for place in corpus.databases.values()
    ):
        raise ConfigError(
            "--data.databases: the workers execute validation SQL, but a password is written into no file they read: leave it out of "
            "the URL and give it as PGPASSWORD in the environment, or in ~/.pgpass"
        )
    for split in config.split:
        for example in corpus.splits[split]:
            if example.db_id not in corpus.databases:
                raise DataError(
                    f"--split {split}, example {example.id}: the database of db_id {example.db_id!r} is missing; expected "
                    f"{example.db_id}/{example.db_id}.sqlite beside the others"
                )


def gold_errors(
    corpus: Corpus, config: Config, progress: Progress | None = None
) -> list[dict[str, Any]]:
    """Gold queries that do not run; examples without a database are not among them.

    Found once per content of the data. Asked again every time: what timed out or crashed, which may have been the machine's fault,
    and queries on a server, whose content may change unseen.
    """
    golds = [
        (f"{split}\0{example.id}", database, example.gold)
        for split, examples in corpus.splits.items()
        for example in examples
        if (database := corpus.executable(example.db_id))
    ]
    file = (
        config.cache
        / "gold_queries"
        / f"{_gold_key(corpus, golds)}-{config.evaluate.timeout:g}.json"
    )
    known = json.loads(file.read_text()) if file.is_file() else None
    found = scoring.failing_gold(
        [gold for gold in golds if known is None or gold[0] in known["again"] or "://" in gold[1]],
        config,
        progress,
    )
    on_files = [row for row in found if "://" not in row["database"]]
    settled = [row for row in on_files if not row["error"].startswith(("timeout", "crash"))]
    lasting = (known["failing"] if known else []) + settled
    again = [row["id"] for row in on_files if row not in settled]
    storage.write_local_text(file, json.dumps({"failing": lasting, "again": again}))
    failing = {row["id"]: row for row in [*lasting, *found]}
    ids = [(name, *name.partition("\0")[::2]) for name, _, _ in golds if name in failing]
    return [failing[name] | {"split": split, "id": plain} for name, split, plain in ids]


def check_gold(corpus: Corpus, failing: Sequence[dict[str, Any]], config: Config) -> None:
    """Raise `DataError` if there is gold to execute for the scores, and none of it runs: that is known before training, not after."""
    if not TASKS[config.task_type].executes_sql:
        return
    golds = [
        e for split in config.split for e in corpus.splits[split] if corpus.executable(e.db_id)
    ]
    wrong = [row for row in failing if row["split"] in config.split]
    if golds and len(wrong) == len(golds):
        raise DataError(
            f"--split {','.join(config.split)}: nothing could be scored, for none of its {len(golds)} gold queries runs; that of "
            f"{wrong[0]['id']} fails with: {wrong[0]['error']}; check the databases and the gold SQL"
        )


def _gold_key(corpus: Corpus, golds: Sequence[tuple[str, str, str]]) -> str:
    """Changes with the questions, the schemas, and the state of every SQLite file."""
    files = sorted({Path(database) for _, database, _ in golds if "://" not in database})
    states = [
        (file.name, (state := file.stat()).st_size, state.st_mtime_ns)
        for file in files
        if file.is_file()
    ]
    return hashlib.sha256(json.dumps([corpus.fingerprint(), states]).encode()).hexdigest()[:24]


def write_inputs(prepared: Prepared, config: Config) -> None:
    """Lay out the run's folder: settings, contract, rows, validation questions, and the gold queries that do not run.

    Under `overwrite` an earlier run is removed here, and not before everything that can be checked has been.
    """
    folder = RunFolder(config.run_dir)
    if config.overwrite:
        folder.remove()
    folder.write_settings(config.public())
    folder.write_contract(prepared.contract)
    folder.write_data_fingerprint(prepared.corpus.fingerprint(TRAINED_ON))
    storage.put(prepared.rows_file, folder.rows)
    asked = prepared.validation(config)
    if (
        config.scaling.storage_path or cluster.address()
    ):  # else workers are on this machine, where the databases are
        asked = generate.stage_databases(asked, folder)
    storage.write_text(folder.validation_questions, generate.dump(asked))
    if held_out := prepared.validation_rows(config):
        with tempfile.TemporaryDirectory(prefix="ray_sql-") as scratch:
            rows.write(held_out, Path(scratch) / "rows.parquet")
            storage.put(Path(scratch) / "rows.parquet", folder.validation_rows)
    if prepared.gold_errors:
        folder.write_gold_errors(prepared.gold_errors)


def earlier_run(config: Config) -> dict[str, Any] | None:
    """The metrics of an earlier run of the same settings under this name; None if there is none, it did not end, or it is to be
    overwritten.

    Raises `ConfigError` if the name holds a run of other settings, `StoreError` if it holds something else.
    """
    folder = RunFolder(config.run_dir)
    folder.finish_removal()
    if not folder.has_settings():
        if folder.exists():
            raise StoreError(
                f"{folder}: exists, but is no run of ray_sql (no config.json); choose another --output_name"
            )
        return None
    trained = folder.holds_training_run()
    if config.overwrite and trained:
        return None
    try:
        earlier = type(config)(**folder.read_settings())
    except ValueError:  # cut off, or of another version
        way_out = ", or replace the run with --overwrite" if trained else ""
        raise ConfigError(
            f"{folder.place(CONFIG)} is of no run of this version of ray_sql; choose another "
            f"--output_name{way_out}"
        ) from None
    if config.overwrite:
        return None
    if earlier.identity() != config.identity():
        differing = differences(earlier.public(), config.public()) or "other data"
        raise ConfigError(
            f"{folder} holds a run of other settings ({differing}); choose another --output_name, or replace "
            "it with --overwrite"
        )
    if not folder.is_finished():
        return None
    check_scored_alike(earlier, config)
    return folder.read_metrics()


def check_scored_alike(earlier: Config, config: Config) -> None:
    """Raise `ConfigError` if a finished run was scored otherwise than `config` says: its table would answer another question."""
    changed = [
        f"{name} {before!r} there, {now!r} here"
        for name in SCORING
        if (before := earlier.setting(name)) != (now := config.setting(name))
    ]
    if config.prev_checkpoint and config.prev_checkpoint != earlier.prev_checkpoint:
        changed.append(
            f"prev_checkpoint {earlier.prev_checkpoint!r} there, {config.prev_checkpoint!r} here"
        )
    if changed:
        folder = RunFolder(config.run_dir)
        raise ConfigError(
            f"{folder} holds a finished run, scored otherwise ({'; '.join(changed[:3])}); score its "
            f"adapter anew with ray-sql evaluate --adapter {folder.adapter}, or train again with "
            "another --output_name or --overwrite"
        )


def check_same_data(corpus: Corpus, config: Config) -> None:
    """Raise `ConfigError` if the run's folder holds a run of the same settings on other data."""
    before = RunFolder(config.run_dir).read_data_fingerprint()
    now = corpus.fingerprint(TRAINED_ON)
    if before and before != now and not config.overwrite:
        raise ConfigError(
            f"{config.run_dir} holds a run on other data (fingerprint {before} there, {now} of {config.dataset_id} now); choose "
            "another --output_name, or replace it with --overwrite"
        )


def plan(prepared: Prepared, config: Config) -> Iterator[str]:
    """What a run would do, in lines for people."""
    corpus, audit = prepared.corpus, prepared.audit
    steps = config.batching.steps(audit.rows)
    yield f"data      {config.dataset_id}, fingerprint {corpus.fingerprint()}, {len(corpus.schemas)} databases"
    for line in data.leakage(corpus):
        yield f"          {line}"
    by_split = {
        split: sum(row["split"] == split for row in prepared.gold_errors) for split in corpus.splits
    }
    failing = ", ".join(f"{count} in {split}" for split, count in by_split.items() if count)
    yield f"gold      {f'queries that do not run: {failing}; kept out of the scores' if failing else 'every query runs'}"
    yield f"rows      {audit.line()}"
    batching = config.batching
    shared = batching.examples_per_row
    if shared > 1:
        computed, alone = rows.count_tokens(rows.read(prepared.rows_file), batching)
        yield (
            f"sharing   up to {shared} questions in a row with their schema: {computed:,} tokens to compute an epoch, "
            f"{alone / computed:.1f} times fewer"
        )
        most = min(AUTO_EXAMPLES_PER_ROW, batching.global_batch_size)
        if config.rows.examples_per_row == "auto" and shared < most:
            yield (
                f"          so that a step mixes databases: larger steps share more, and so does --rows.examples_per_row {most}, "
                "faster an epoch and less accurate after as many"
            )
    made_of = f"{config.train_batch_size} x {config.accumulation_steps} x {config.scaling.max_workers} workers"
    if config.scaling.elastic:
        made_of = f"with {config.scaling.min_workers} to {config.scaling.max_workers} workers alike"
    yield f"training  {steps} steps of {batching.global_batch_size} examples ({made_of}), a checkpoint every {config.save_steps}"
    if config.evaluate.select_examples:
        every = config.evaluate.eval_steps or config.save_steps
        yield f"          measured on validation questions every {every} steps and at the end, to keep the best"
    scored = {
        split: min(len(corpus.splits[split]), config.evaluate.limit or len(corpus.splits[split]))
        for split in config.split
    }
    models = "base and tuned model" if config.evaluate.baseline else "tuned model"
    yield f"scoring   {models} on {', '.join(f'{n} of {split}' for split, n in scored.items())}, semantics {config.evaluate.semantics}"
    for split in config.split:
        if TASKS[config.task_type].executes_sql and not any(
            corpus.executable(e.db_id) for e in corpus.splits[split]
        ):
            yield f"          nothing can be executed on {split}, so it gets no score: {data.why_not_executable(corpus)}"
    yield f"run       {config.run_dir}"
    yield from _passing(config)


def _passing(config: Config) -> Iterator[str]:
    """What a submitted job would lose: Ray runs it in a folder of its own and removes that later."""
    if not os.environ.get("RAY_JOB_SUBMISSION_ID"):
        return
    if Path(config.run_dir).is_relative_to(Path.cwd()):
        yield "          lies in this job's working folder, which Ray removes: give --output_dir a place that stays"
    if config.tracking.enabled and config.tracking.uri is None:
        yield "          MLflow's records, too: give --tracking.uri (or MLFLOW_TRACKING_URI) a server or a file that stays"
