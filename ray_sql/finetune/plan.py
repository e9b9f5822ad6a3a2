"""Tell people, before anything starts, what a run is about to do."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ray_sql import cluster, data, models, rows
from ray_sql.config import AUTO_EXAMPLES_PER_ROW
from ray_sql.finetune.prepare import Prepared
from ray_sql.metrics import how_little_is_known, mcnemar
from ray_sql.metrics.paired import ALPHA
from ray_sql.store import checkpoints
from ray_sql.store.run_folder import RunFolder
from ray_sql.tasks import TASKS

FEW_STEPS = 30
"""Fewer optimizer steps than this change a model little."""


def lines(prepared: Prepared) -> Iterator[str]:
    """Yield the plan of a training run, a line each."""
    config = prepared.config
    yield from _data(prepared)
    yield from _training(prepared)
    yield from _scoring(prepared)
    yield f"run       {config.run_dir}"
    yield from _resumed(prepared)
    yield from _lost_with_the_job(prepared)


def _data(prepared: Prepared) -> Iterator[str]:
    config = prepared.config
    corpus = prepared.corpus
    fingerprint, databases = corpus.fingerprint(), data.counted(len(corpus.schemas), "database")
    yield f"data      {config.dataset_id}, fingerprint {fingerprint}, {databases}"
    for line in [*data.remarks(corpus.notes, prepared.left_out), *data.leakage(corpus)]:
        yield f"          {line}"
    yield from _gold(prepared)


def _gold(prepared: Prepared) -> Iterator[str]:
    """Yield how many gold queries were executed, and which do not run."""
    corpus, failing = prepared.corpus, prepared.gold_errors
    examples = [example for split in corpus.splits.values() for example in split]
    tried = sum(corpus.trial(example.db_id) is not None for example in examples)
    if not tried:
        yield f"gold      no query was executed: {data.why_not_executable(corpus)}"
    elif failing:
        splits = [row["split"] for row in failing]
        counts = [f"{splits.count(split)} in {split}" for split in corpus.splits if split in splits]
        where = "the scores"
        if {row.id for row in prepared.left_out} & {row["id"] for row in failing}:
            where = "training and of the scores"
        yield f"gold      queries that do not run: {', '.join(counts)}; kept out of {where}"
        for row in failing[:3]:
            yield f"          {row['where']}: {row['error']}"
    elif tried == len(examples):
        yield "gold      every query runs"
    else:
        yield f"gold      {tried} of {len(examples)} queries were executed, and all of them run"


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
    yield from _compute_type(prepared)
    saved = f"every {config.save_steps}" if prepared.steps > config.save_steps else "at the end"
    yield (
        f"training  {prepared.steps} steps of {config.batching.global_batch_size} examples "
        f"({made_of}), a checkpoint {saved}"
    )
    if prepared.steps < FEW_STEPS:
        yield (
            "          so few steps change a model little: raise --num_epochs, or lower "
            "--grad_accum_steps"
        )
    if config.evaluate.select_examples:
        yield (
            f"          measured on validation questions every {config.eval_every} steps and at "
            "the end, to keep the best"
        )


def _compute_type(prepared: Prepared) -> Iterator[str]:
    """Yield the type that this machine's CPU will compute in, and by how much it is the faster.

    Workers on GPUs and on other machines choose when they start.
    """
    config = prepared.config
    given = config.train.bf16
    if given is None and not config.overwrite:
        given = RunFolder(config.run_dir).read_bf16()
    if given is None and not (cluster.address() or cluster.on_gpu(config.scaling)):
        yield f"compute   {models.cpu_speed(prepared.model_folder, config.cache).line()}"
    elif given is not None:
        why = "as this run began"
        if config.train.bf16 is not None:
            why = f"as --train.bf16 {str(given).lower()} says"
        yield f"compute   {('float32', 'bfloat16')[given]}, {why}"


def _sharing(prepared: Prepared) -> Iterator[str]:
    config = prepared.config
    examples = rows.read(prepared.rows_file)
    databases = {example.db_id for example in examples}
    batching = config.batching_of(databases)
    shared = batching.examples_per_row
    if shared == 1:
        return
    computed, alone = rows.count_tokens(examples, batching)
    yield (
        f"sharing   up to {shared} questions in a row with their schema: {computed:,} tokens to "
        f"compute an epoch, {alone / computed:.1f} times fewer"
    )
    most = min(AUTO_EXAMPLES_PER_ROW, batching.global_batch_size)
    if config.rows.examples_per_row == "auto" and shared < most and len(databases) > 1:
        yield (
            "          so that a step mixes databases: larger steps share more, and so does "
            f"--rows.examples_per_row {most}, faster an epoch and less accurate after as many"
        )


def _scoring(prepared: Prepared) -> Iterator[str]:
    config = prepared.config
    splits = {split: prepared.corpus.splits[split] for split in config.split}
    limit = config.evaluate.limit
    sizes = {
        split: min(len(examples), limit or len(examples)) for split, examples in splits.items()
    }
    counts = [f"{size} of {split}" for split, size in sizes.items()]
    models = "base and tuned model" if config.evaluate.baseline else "tuned model"
    task = TASKS[config.task_type]
    rule = f"semantics {config.evaluate.semantics}" if task.executes_sql else f"by {task.label}"
    yield f"scoring   {models} on {', '.join(counts)}, {rule}"
    match config.prompt.links_kind:
        case "gold":
            yield "          over schemas made smaller by gold links: an oracle, not a result"
        case "predicted":
            yield f"          over schemas made smaller by the links of {config.prompt.links}"
    yield from _precision(sum(sizes.values()))
    yield from _cut_answers(prepared)
    if not task.executes_sql:
        return
    corpus = prepared.corpus
    for split, examples in splits.items():
        if not examples:
            yield (
                f"          nothing is held out as {split}: {len(corpus.splits['train'])} training "
                f"examples are too few for --data.test_fraction {config.data.test_fraction:g}; "
                f"raise it, or give a file of {split}"
            )
        elif not any(corpus.executable(example.db_id) for example in examples):
            why = data.why_not_executable(corpus)
            yield f"          nothing can be executed on {split}, so it gets no score: {why}"


def _precision(questions: int) -> Iterator[str]:
    """Say how little a few questions tell, and which gain they show."""
    little = how_little_is_known(questions)
    if not little:
        return
    yield (
        f"          {little}; give more, or raise --data.test_fraction (of `ray-sql prepare`, for "
        "what it made)"
    )
    alone = _least_alone()
    gain = 100 * alone / questions
    told = f"shows from {gain:.0f} points on at the earliest" if gain <= 100 else "cannot be shown"
    yield (
        f"          a gain over the base model {told}: it takes {alone} questions that the "
        f"tuned model alone gets right (p <= {ALPHA})"
    )


def _least_alone() -> int:
    """Return the fewest questions by which one model is shown to be better than another."""
    return next(count for count in range(1, 99) if mcnemar(0, count) <= ALPHA)


def _cut_answers(prepared: Prepared) -> Iterator[str]:
    """Warn of gold answers that are longer than an answer may be."""
    config, encoder = prepared.config, prepared.encoder
    most = config.evaluate.max_new_tokens
    for split in dict.fromkeys(("train", *config.split)):
        lengths = [encoder.answer_length(example) for example in prepared.corpus.splits[split]]
        over = sum(length > most for length in lengths)
        if over:
            yield (
                f"          {over} of {len(lengths)} gold answers of {split} are longer than "
                f"--evaluate.max_new_tokens {most} (the longest has {max(lengths)} tokens), and "
                "would be cut off: raise it"
            )


def _resumed(prepared: Prepared) -> Iterator[str]:
    """Say where a run goes on that was begun before."""
    config = prepared.config
    saved = [] if config.overwrite else checkpoints.complete(RunFolder(config.run_dir))
    if saved and not config.prev_checkpoint:
        yield f"          goes on after step {saved[-1].step} of {prepared.steps}"


def _lost_with_the_job(prepared: Prepared) -> Iterator[str]:
    """Warn of what Ray removes with a submitted job's working folder."""
    config = prepared.config
    if not cluster.submission():
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
