"""Tell people, before anything starts, what a run is about to do."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from ray_sql import data, rows
from ray_sql.config import AUTO_EXAMPLES_PER_ROW
from ray_sql.finetune.prepare import Prepared
from ray_sql.tasks import TASKS


def lines(prepared: Prepared) -> Iterator[str]:
    """Yield the plan of a training run, a line each."""
    config = prepared.config
    yield from _data(prepared)
    yield from _training(prepared)
    yield from _scoring(prepared)
    yield f"run       {config.run_dir}"
    yield from _lost_with_the_job(prepared)


def _data(prepared: Prepared) -> Iterator[str]:
    config = prepared.config
    corpus = prepared.corpus
    fingerprint, databases = corpus.fingerprint(), len(corpus.schemas)
    yield f"data      {config.dataset_id}, fingerprint {fingerprint}, {databases} databases"
    for line in data.leakage(corpus):
        yield f"          {line}"
    failing = [row["split"] for row in prepared.gold_errors]
    counts = [f"{failing.count(split)} in {split}" for split in corpus.splits if split in failing]
    if counts:
        yield f"gold      queries that do not run: {', '.join(counts)}; kept out of the scores"
    else:
        yield "gold      every query runs"


def _training(prepared: Prepared) -> Iterator[str]:
    config = prepared.config
    yield f"rows      {prepared.audit.line()}"
    yield from _sharing(prepared)
    scaling = config.scaling
    made_of = (
        f"{config.train_batch_size} x {config.accumulation_steps} x {scaling.max_workers} workers"
    )
    if scaling.elastic:
        made_of = f"with {scaling.min_workers} to {scaling.max_workers} workers alike"
    yield (
        f"training  {prepared.steps} steps of {config.batching.global_batch_size} examples "
        f"({made_of}), a checkpoint every {config.save_steps}"
    )
    if config.evaluate.select_examples:
        yield (
            f"          measured on validation questions every {config.eval_every} steps and at "
            "the end, to keep the best"
        )


def _sharing(prepared: Prepared) -> Iterator[str]:
    config = prepared.config
    batching = config.batching
    shared = batching.examples_per_row
    if shared == 1:
        return
    examples = rows.read(prepared.rows_file)
    computed, alone = rows.count_tokens(examples, batching)
    yield (
        f"sharing   up to {shared} questions in a row with their schema: {computed:,} tokens to "
        f"compute an epoch, {alone / computed:.1f} times fewer"
    )
    most = min(AUTO_EXAMPLES_PER_ROW, batching.global_batch_size)
    if config.rows.examples_per_row == "auto" and shared < most:
        yield (
            "          so that a step mixes databases: larger steps share more, and so does "
            f"--rows.examples_per_row {most}, faster an epoch and less accurate after as many"
        )


def _scoring(prepared: Prepared) -> Iterator[str]:
    config = prepared.config
    splits = {split: prepared.corpus.splits[split] for split in config.split}
    limit = config.evaluate.limit
    counts = [f"{min(len(s), limit or len(s))} of {split}" for split, s in splits.items()]
    models = "base and tuned model" if config.evaluate.baseline else "tuned model"
    yield f"scoring   {models} on {', '.join(counts)}, semantics {config.evaluate.semantics}"
    if not TASKS[config.task_type].executes_sql:
        return
    corpus = prepared.corpus
    for split, examples in splits.items():
        if not any(corpus.executable(example.db_id) for example in examples):
            why = data.why_not_executable(corpus)
            yield f"          nothing can be executed on {split}, so it gets no score: {why}"


def _lost_with_the_job(prepared: Prepared) -> Iterator[str]:
    """Warn of what Ray removes with a submitted job's working folder."""
    config = prepared.config
    if not os.environ.get("RAY_JOB_SUBMISSION_ID"):
        return
    if Path(config.run_dir).is_relative_to(Path.cwd()):
        yield (
            "          lies in this job's working folder, which Ray removes: give --output_dir a "
            "place that stays"
        )
    if config.tracking.enabled and config.tracking.uri is None:
        yield (
            "          MLflow's records, too: give --tracking.uri (or MLFLOW_TRACKING_URI) a "
            "server or a file that stays"
        )
