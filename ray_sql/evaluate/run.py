"""Score a predictions file, or a base model and its adapter: the door of `ray-sql evaluate`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ray_sql import data, generate, models, tracking
from ray_sql.config import Config, EvaluateConfig, absolute
from ray_sql.config.sections import NO_LINKS
from ray_sql.data.contract import check_described
from ray_sql.data.shown import AskedLinks
from ray_sql.display import Display
from ray_sql.errors import ConfigError
from ray_sql.evaluate import audit, predictions_file, results
from ray_sql.evaluate.linker import asked_links, is_adapter
from ray_sql.evaluate.models import (
    check_adapter,
    evaluate_endpoint,
    evaluate_models,
    scored_conversations,
    scored_questions,
)
from ray_sql.evaluate.scored import load_scored
from ray_sql.metrics.judged import Evaluation
from ray_sql.report import figures, html, terminal
from ray_sql.report.progress import Progress
from ray_sql.store import storage
from ray_sql.store.run_folder import AdapterFolder, RunFolder
from ray_sql.tasks import TASKS


def run(config: EvaluateConfig) -> dict[str, Any]:
    """Score what `config` names on its splits, write the results, and return `metrics.json`."""
    folder = RunFolder(config.run_dir)
    folder.finish_removal()
    if folder.holds_training_run():
        raise ConfigError(
            f"{config.run_dir} holds a training run; give the evaluation an --output_name of its "
            "own"
        )
    with Display() as display:
        if config.dry_run:
            display.starting("data and model")
            display.lines(_plan(config, display))
            return {}
        folder.require_ours()
        facts: dict[str, Any] = {}
        if config.predictions_file:
            path = absolute(config.predictions_file)
            evaluation = predictions_file.evaluate_file(path, config, display)
        else:
            display.starting("data and model")
            evaluation, facts = _evaluate_models(config, config.adapter, display)
        if config.audit:
            evaluation = audit.with_flags(evaluation, config.audit)
        metrics = {
            "task_type": config.task_type,
            "dataset_id": config.dataset_id,
            "links": NO_LINKS if config.predictions_file else config.prompt.links_kind,
            **facts,
            **results.summarise(evaluation, TASKS[config.task_type], config.evaluate),
        }
        folder.write_settings(config.public())
        results.write(folder, evaluation, metrics)
        drawn = figures.figures(metrics, evaluation)
        html.write(folder, config.output_name, metrics, evaluation, drawn)
        terminal.show(folder, config.output_name, metrics, display)
    return metrics


def _plan(config: EvaluateConfig, display: Display) -> Iterator[str]:
    """Yield lines on what would be scored, after reading it; with a model, one of its prompts."""
    corpus = load_scored(config, config.adapter)
    if config.predictions_file:
        rows, notes = predictions_file.read_rows(absolute(config.predictions_file), corpus, config)
        yield from notes
        source = f"{len(rows)} predictions of {config.predictions_file}"
    else:
        base, _ = models.resolve(config.model_name, config.cache, config.read_token)
        tokenizer = models.load_tokenizer(base)
        links = AskedLinks()
        if is_adapter(config.prompt.asked_links):
            yield f"links     the linker {config.prompt.links} would be asked first"
        else:
            links = asked_links(config, corpus, display)
        for first in scored_questions(corpus, tokenizer, config, links)[:1]:
            yield f"--- prompt ---\n{tokenizer.decode(first.input_ids)}\n--- plan ---"
        source = config.model_name + (f" and --adapter {config.adapter}" if config.adapter else "")
    yield from data.remarks(corpus.notes, corpus.left_out)
    counts = ", ".join(f"{len(corpus.splits[split])} of {split}" for split in config.split)
    yield (
        f"would score {source} on {counts}, semantics {config.evaluate.semantics}, and write "
        f"{config.run_dir}"
    )


def _evaluate_models(
    config: Config, adapter: str | None, display: Display
) -> tuple[Evaluation, dict[str, Any]]:
    """Return the judged answers, and the mean tokens of a prompt."""
    corpus = load_scored(config, adapter)
    predictions_file.require_executable(corpus, TASKS[config.task_type])
    predictions_file.show_remarks(corpus, RunFolder(config.run_dir), display)
    contract = None
    if adapter:
        adapter = storage.absolute_uri(adapter)
        contract = AdapterFolder(adapter).read_contract()
    pinned = models.revision_of(contract, config.model_name)
    folder, revision = models.resolve(config.model_name, config.cache, config.read_token, pinned)
    tokenizer = models.load_tokenizer(folder)
    if adapter:
        check_adapter(adapter, config, tokenizer, revision)
        check_described(contract or {}, corpus.schemas, adapter)
    links = asked_links(config, corpus, display)
    questions = scored_questions(corpus, tokenizer, config, links)
    generate.check_window(folder, questions, config.evaluate.max_new_tokens)
    schemas = corpus.judged_schemas(TASKS[config.task_type])
    if config.evaluate.backend == "openai":
        conversations = scored_conversations(corpus, tokenizer, config, links)
        task = TASKS[config.task_type]
        rows = evaluate_endpoint(config.evaluate, questions, conversations, schemas, task, display)
        evaluation = {"tuned" if adapter else "base": rows}
    else:
        progress = Progress(RunFolder(config.run_dir), tracking.null_run(), display)
        evaluation = evaluate_models(config, questions, schemas, folder, adapter, display, progress)
    return evaluation, {"prompts": generate.token_counts(questions)}
