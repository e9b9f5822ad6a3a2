"""One training run from end to end: prepare, record, train, evaluate, report.

The stages meet in the run's folder. A run that was cut off anywhere goes on when the same command
is given again, and a finished one is shown, not repeated.
"""

from __future__ import annotations

import time
from contextlib import suppress
from typing import Any

from ray_sql import data, publish, rows, tracking, train
from ray_sql.config import Config
from ray_sql.display import Display
from ray_sql.errors import DataError
from ray_sql.evaluate.models import evaluate_models
from ray_sql.finetune import plan
from ray_sql.finetune.earlier import finished_metrics, require_same_data
from ray_sql.finetune.prepare import Prepared, prepare
from ray_sql.finetune.results import conclude
from ray_sql.finetune.session import Session, require_start, spool
from ray_sql.report import terminal
from ray_sql.report.progress import Progress, StartupClock, validation_scores
from ray_sql.store.run_folder import RunFolder


def run(config: Config) -> dict[str, Any]:
    """Train and evaluate as `config` says. Returns the content of `metrics.json`.

    Raises `RaySqlError` for what the user can fix.
    """
    clock = StartupClock()
    clock.mark("imports")
    with Display() as display:
        if config.publishes:  # what could not be published is known before training
            display.line(f"Hub       {publish.require_publishable(config)}")
        earlier = finished_metrics(config)
        if earlier is not None:
            _show_finished(config, earlier, display)
            return earlier
        with Session(config, display, clock) as session:
            metrics = _train_and_evaluate(session)
        terminal.show(session.folder, config.output_name, metrics, display)
        if config.publish:  # the run is over by now: whatever happens here, it is kept
            session.record.tag({"hub_url": publish.publish(config, display)})
    return metrics


def dry_run(config: Config) -> None:
    """Show an example, the audit and the plan. Starts nothing, and writes nothing but caches."""
    with Display() as display:
        finished_metrics(config)  # raises where the name holds another run
        prepared = preview(config, display)
        require_start(prepared)


def preview(config: Config, display: Display) -> Prepared:
    """Show the first example that is trained on, the audit and the plan."""
    display.starting("data and tokenizer")
    prepared = prepare(config, display.counter("reading data"))
    display.end("reading data")
    display.starting("")
    encoded = rows.read(prepared.rows_file)[0]
    prompt = encoded.input_ids[: encoded.prompt_length]
    answer = encoded.input_ids[encoded.prompt_length :]
    display.line("--- prompt ---")
    display.line(str(prepared.tokenizer.decode(prompt)))
    display.line("--- answer (carries the loss) ---")
    display.line(str(prepared.tokenizer.decode(answer)))
    display.line("--- plan ---")
    for line in plan.lines(prepared):
        display.line(line)
    return prepared


def _show_finished(config: Config, metrics: dict[str, Any], display: Display) -> None:
    """Show a finished run, send MLflow what still waits, and publish if asked for."""
    with suppress(DataError):  # a finished run can be shown where its data are out of reach
        require_same_data(data.load(config), config)
    display.line(
        f"{config.run_dir} holds a finished run of these settings; --overwrite trains it again."
    )
    left = tracking.replay(config.tracking, spool(config))
    if left:
        display.line(f"{left} records still wait in {spool(config)} for MLflow to take them")
    terminal.show(RunFolder(config.run_dir), config.output_name, metrics, display)
    if config.publish:
        publish.publish(config, display)


def _train_and_evaluate(session: Session) -> dict[str, Any]:
    started = time.monotonic()
    config, prepared, display = session.config, session.prepared, session.display
    progress = Progress(session.folder, session.record, display, session.clock)
    display.starting("workers and model")
    with publish.beside_training(config) as progress.on_checkpoint:
        fitted = train.fit(config, prepared.model_folder, progress)
    best = fitted.best
    why = "the last one: no validation questions to choose by"
    if best.objective is not None:
        scores = validation_scores(best.metrics).removeprefix(", validation")
        why = f"the best on validation:{scores}"
    display.line(f"best      checkpoint-{best.step} of {fitted.steps} steps, {why}")
    evaluation = evaluate_models(
        config,
        session.questions,
        prepared.judged_schemas,
        prepared.model_folder,
        session.folder.adapter.uri,
        display,
        progress,
    )
    progress.close()
    facts = {
        "best_step": best.step,
        "objective": best.objective,
        "steps": fitted.steps,
        "training_seconds": round(fitted.seconds, 1),
        "startup_seconds": session.clock.stages(),
        "seconds": round(time.monotonic() - started, 1),
    }
    return conclude(config, prepared, evaluation, session.record, facts)
