"""One training run from end to end: prepare, record, train, measure, report.

The stages are functions that meet in the run's folder, so a run that was cut off anywhere goes on when the same command is given
again, and a finished one is shown, not repeated.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.table import Table

from ray_sql import cluster, data, progress, publish, tracking, train
from ray_sql.config import Config, EvaluateConfig, absolute, mask_password
from ray_sql.display import Display, percent
from ray_sql.errors import ConfigError, DataError, TakenOver
from ray_sql.evaluate import measure
from ray_sql.evaluate.measure import Measured
from ray_sql.finetune import prepare
from ray_sql.finetune.prepare import Prepared
from ray_sql.generate import Question
from ray_sql.progress import StartupClock
from ray_sql.report import figures, html
from ray_sql.store import storage
from ray_sql.store.run_folder import AdapterFolder, RunFolder
from ray_sql.train import FitResult


def run(config: Config) -> dict[str, Any]:
    """Train and measure as `config` says; returns what `metrics.json` holds. Raises `RaySqlError` for what the user can fix."""
    timeline = StartupClock()
    timeline.mark("imports")
    with Display() as display:
        if config.publishes:  # what could not be published should be known before training
            display.line(f"Hub       {publish.check(config)}")
        earlier = prepare.earlier_run(config)
        if earlier is not None:
            with suppress(DataError):  # a finished run can be shown where its data are out of reach
                prepare.check_same_data(data.load(config), config)
            display.line(
                f"{config.run_dir} holds a finished run of these settings; --overwrite trains it again."
            )
            if left := tracking.replay(config.tracking, spool(config)):
                display.line(
                    f"{left} records still wait in {spool(config)} for MLflow to take them"
                )
            show(earlier, config, display)
            if config.publish:
                publish.publish(config, display)
            return earlier
        if config.tracking.enabled:
            tracking.require_store(config.tracking)
            timeline.mark("MLflow")
        prepared = prepare.prepare(config, display.counter("reading data"))
        prepare.check_same_data(prepared.corpus, config)
        train.starting_point(
            config.prev_checkpoint,
            RunFolder(config.run_dir),
            prepared.contract,
            config.lora,
            config.batching.steps(prepared.audit.rows),
        )
        asked = prepared.questions(
            config
        )  # now: what cannot be asked should be known before training
        if config.scaling.num_workers:
            cluster.start_ray_in_background()
        for line in prepare.plan(prepared, config):
            display.line(line)
        timeline.mark("data")
        if config.overwrite:
            _close_earlier(config)
        prepare.write_inputs(prepared, config)
        record = begin(config, prepared)
        timeline.mark("run folder and MLflow run")
        status: tracking.Status | None = "FAILED"
        try:
            metrics = _train_and_measure(config, prepared, asked, record, display, timeline)
            status = "FINISHED"
        except (KeyboardInterrupt, SystemExit):
            status = "KILLED"
            raise
        except TakenOver:
            status = None  # the run in MLflow is the other driver's now
            raise
        finally:
            if status:
                record.end(status)
        show(metrics, config, display)
        if config.publish:  # the run is over by now: whatever happens here, it is kept
            record.tag({"hub_url": publish.publish(config, display)})
    return metrics


def dry_run(config: Config) -> None:
    """Resolve everything, show one rendered example, the audit and the plan; starts and writes nothing but caches."""
    with Display() as display:
        prepare.earlier_run(config)
        preview(config, display)


def preview(config: Config, display: Display) -> Prepared:
    """Show one rendered example, the audit and the plan."""
    from ray_sql import rows

    prepared = prepare.prepare(config, display.counter("reading data"))
    example = prepared.corpus.splits["train"][0]
    row = rows.encode(example, prepared.corpus.schemas, prepared.tokenizer, config)
    display.line("--- prompt ---")
    display.line(str(prepared.tokenizer.decode(row.input_ids[: row.prompt_length])))
    display.line("--- answer (carries the loss) ---")
    display.line(str(prepared.tokenizer.decode(row.input_ids[row.prompt_length :])))
    display.line("--- plan ---")
    for line in prepare.plan(prepared, config):
        display.line(line)
    return prepared


def begin(config: Config, prepared: Prepared, own: Mapping[str, str] | None = None) -> tracking.Run:
    """The MLflow run of this training run: the one an earlier attempt began, or a new one.

    `own` are tags by which it is found, should its id be lost.
    """
    folder = RunFolder(config.run_dir)
    record = tracking.start(
        config.tracking,
        config.public(),
        name=config.output_name,
        tags=_tags(config, prepared),
        spool=spool(config),
        run_id=folder.read_mlflow_run_id(),
        own=own,
    )
    if not record.run_id:
        return record
    folder.write_mlflow_run(record.run_id, mask_password(record.uri))
    for split in ("train", *config.split):
        record.dataset(
            f"{config.dataset_id[:480]}: {split}",
            prepared.corpus.fingerprint(),
            config.dataset_id,
            split,
        )
    return record


def _close_earlier(config: Config) -> None:
    """End in MLflow what a run of this name left running there: nobody goes on with it."""
    if run_id := RunFolder(config.run_dir).read_mlflow_run_id():
        tracking.close(config.tracking, run_id, {})


def spool(config: Config) -> Path:
    """Where records wait while MLflow does not answer."""
    return config.cache / "spool" / f"{config.output_name}-{config.identity()}.jsonl"


def _tags(config: Config, prepared: Prepared) -> dict[str, str]:
    tags = {
        "task_type": config.task_type,
        "data_fingerprint": prepared.corpus.fingerprint(),
        "template_hash": str(prepared.contract["template_hash"]),
        "git_commit": _git_commit(),
        "ray_job_id": os.environ.get("RAY_JOB_SUBMISSION_ID", ""),
    }
    return {key: value for key, value in tags.items() if value}


def _git_commit() -> str:
    """The commit of the folder the job runs in, where it is one and git is installed."""
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False
        )
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _train_and_measure(
    config: Config,
    prepared: Prepared,
    asked: Sequence[Question],
    record: tracking.Run,
    display: Display,
    timeline: StartupClock,
) -> dict[str, Any]:
    started = time.monotonic()
    points = progress.Progress(config, record, display, timeline)
    with publish.beside_training(config) as points.on_checkpoint:
        fitted = train.fit(config, prepared.model_folder, points)
    display.line(
        f"best      {fitted.best.name} of {fitted.steps} steps, {_validation_line(fitted)}"
    )
    measured = measure.of_models(
        config,
        asked,
        prepared.corpus.schemas,
        prepared.model_folder,
        RunFolder(config.run_dir).adapter.uri,
        display,
        points,
    )
    points.close()
    facts = {
        "best_step": fitted.best.step,
        "steps": fitted.steps,
        "training_seconds": round(fitted.seconds, 1),
        "startup_seconds": timeline.stages(),
        "seconds": round(time.monotonic() - started, 1),
    }
    return conclude(config, prepared, measured, record, facts)


def conclude(
    config: Config,
    prepared: Prepared,
    measured: Measured,
    record: tracking.Run,
    facts: Mapping[str, Any],
    artifact: str = "adapter",
) -> dict[str, Any]:
    """Write and record what was measured of a run whose adapter lies in its folder; `facts` say how it was made, `artifact` what
    MLflow is to call the adapter. Returns what `metrics.json` holds."""
    metrics = {
        "task_type": config.task_type,
        "model_name": config.model_name,
        "dataset_id": config.dataset_id,
        "data_fingerprint": prepared.corpus.fingerprint(),
        "identity": config.identity(),
        "mlflow_run_id": record.run_id,
        "tracking_uri": mask_password(record.uri),
        **facts,
        **measure.summarise(measured, config),
    }
    folder = RunFolder(config.run_dir)
    measure.write(folder, measured, metrics)
    drawn = figures.figures(metrics, measured)
    html.write(folder, config.output_name, metrics, measured, drawn)
    log_results(record, config, measured, metrics, drawn, artifact)
    folder.mark_finished()
    return metrics


def _validation_line(fitted: FitResult) -> str:
    if fitted.best.objective is None:
        return "the last one: no validation questions to choose by"
    return f"the best on validation:{progress.validation_scores(fitted.best.metrics).removeprefix(', validation')}"


def log_results(
    record: tracking.Run,
    config: Config,
    measured: Measured,
    metrics: Mapping[str, Any],
    figures: Mapping[str, Any],
    artifact: str,
) -> None:
    """The scores, per-question table, figures and files of a run, in MLflow, in place of those of an earlier time."""
    from ray_sql.evaluate.scoring import flat

    # a study may be given more trials, and then has another winner: MLflow shows the scores of the highest step
    step = metrics["sweep"]["trials"] if "sweep" in metrics else metrics.get("steps", 0)
    for name in reversed(measured):  # the UI lists metrics as they came: what one looks for first
        for split, scores in metrics[name].items():
            record.log(step, flat(scores, f"{name}/{split}"), replace=True)
    # the UI shows the first columns and rows without scrolling: what one looks at first is what the tuned model got wrong
    shown = (
        "verdict",
        "question",
        "gold",
        "predicted",
        "error",
        "db_id",
        "hardness",
        "split",
        "model",
    )
    rows = [{"model": name, **row} for name in reversed(measured) for row in measured[name]]
    record.table([{key: row.get(key) for key in shown} for row in rows], "predictions.json")
    for file, figure in figures.items():
        record.figure(figure, f"figures/{file}")
    copies = spool(config).with_suffix("") / "run"
    for path in RunFolder(config.run_dir).artifacts(copies):
        record.artifact(path, artifact if path.is_dir() else "")
    if not spool(config).exists():  # else the copies are still to be sent
        shutil.rmtree(copies, ignore_errors=True)


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Score a predictions file, or a base model and its adapter, on `config.split`; returns what `metrics.json` holds."""
    run, folder = config.as_run(), RunFolder(config.run_dir)
    folder.finish_removal()
    if folder.holds_training_run():
        raise ConfigError(
            f"{config.run_dir} holds a training run; give the evaluation an --output_name of its own"
        )
    with Display() as display:
        if config.dry_run:
            for line in _evaluation_plan(config):
                display.line(line)
            return {}
        if config.predictions_file:
            measured = measure.of_file(absolute(config.predictions_file), run, display)
        else:
            measured = _evaluate_models(run, config.adapter, display)
        metrics = {
            "task_type": config.task_type,
            "dataset_id": config.dataset_id,
            **measure.summarise(measured, run),
        }
        folder.write_settings(config.public())
        measure.write(folder, measured, metrics)
        drawn = figures.figures(metrics, measured)
        html.write(folder, config.output_name, metrics, measured, drawn)
        show(metrics, run, display)
    return metrics


def _evaluation_plan(config: EvaluateConfig) -> Iterator[str]:
    """What an evaluation would do, after reading what it would read; with a model, one of its prompts."""
    run = config.as_run()
    corpus = data.load_split(run, run.split)
    if config.predictions_file:
        said = measure.read_predictions(absolute(config.predictions_file))
        source = f"{len(said)} predictions of {config.predictions_file}"
    else:
        from ray_sql import models

        folder, _ = models.resolve(run.model_name, run.cache, run.read_token)
        tokenizer = models.load_tokenizer(folder)
        yield f"--- prompt ---\n{tokenizer.decode(measure.questions(corpus, tokenizer, run)[0].input_ids)}\n--- plan ---"
        source = config.model_name + (f" and --adapter {config.adapter}" if config.adapter else "")
    counts = ", ".join(f"{len(corpus.splits[split])} of {split}" for split in config.split)
    yield f"would score {source} on {counts}, semantics {config.evaluate.semantics}, and write {config.run_dir}"


def _evaluate_models(config: Config, adapter: str | None, display: Display) -> Measured:
    from ray_sql import generate, models

    corpus = data.load_split(config, config.split)
    measure.check_executable(corpus, config)
    adapter = storage.absolute_uri(adapter) if adapter else None
    contract = AdapterFolder(adapter).read_contract() if adapter else None
    pinned = models.revision_of(contract, config.model_name)
    folder, revision = models.resolve(config.model_name, config.cache, config.read_token, pinned)
    if adapter:
        measure.check_adapter(adapter, config, folder, revision)
    asked = measure.questions(corpus, models.load_tokenizer(folder), config)
    generate.check_window(folder, asked, config.evaluate.max_new_tokens)
    points = progress.Progress(config, tracking.null_run(), display)
    return measure.of_models(config, asked, corpus.schemas, folder, adapter, display, points)


def show(metrics: Mapping[str, Any], config: Config, display: Display) -> None:
    """The result as a table for people, and where everything is."""
    folder = RunFolder(config.run_dir)
    models = [name for name in ("base", "default", "tuned", "file") if name in metrics]
    name, title = (
        ("execution_accuracy", "execution accuracy")
        if metrics["task_type"] == "sql"
        else ("strict_recall", "strict recall")
    )
    rule = (
        f", {next(iter(metrics[models[-1]].values()))['semantics']} semantics"
        if name == "execution_accuracy"
        else ""
    )
    table = Table(
        title=f"{config.output_name}: {title}{rule} [95 % interval]", title_justify="left"
    )
    for column in ("split", "", "n", *models):
        table.add_column(column, justify="right" if column in models or column == "n" else "left")
    for split, scores in metrics[models[-1]].items():
        by_model = [metrics[model][split] for model in models]
        table.add_row(
            split,
            title,
            str(scores["n"]),
            *(percent(s[name], s["interval"], s["n"]) for s in by_model),
        )
        for level, group in scores.get(
            "by_hardness", {}
        ).items():  # not in the metrics.json of schema runs of old
            groups = [s["by_hardness"].get(level, group) for s in by_model]
            table.add_row(
                "",
                f"  {level}",
                str(group["n"]),
                *(percent(g[name], g["interval"]) for g in groups),
            )
        if metrics["task_type"] == "sql":
            for key, label in html.SECONDARY.items():
                if key in scores:
                    shares = (
                        percent(s[key], s.get(f"{key}_interval"), s.get(f"{key}_n", s["n"]))
                        for s in by_model
                    )
                    table.add_row("", label, "", *shares)
        else:
            for key in ("exact_match", "table_f1", "column_f1", "unparsable"):
                cells = [percent(s.get(key, 0.0), s.get(f"{key}_interval")) for s in by_model]
                table.add_row("", key.replace("_", " "), "", *cells)
        if scores["gold_errors"]:
            table.add_row("", "gold fails (not counted)", str(scores["gold_errors"]))
        table.add_section()
    display.console.print(table)
    for split, test in metrics.get("compared", {}).items():
        display.line(
            f"{split}: tuned alone is right on {test['only_tuned']}, base alone on {test['only_base']} "
            f"(McNemar p = {test['mcnemar_p']:.2g})"
        )
    for split, test in metrics.get("compared_default", {}).items():
        display.line(
            f"{split}: tuned alone is right on {test['only_tuned']}, the default settings alone on {test['only_default']} "
            f"(McNemar p = {test['mcnemar_p']:.2g})"
        )
    if "training_seconds" in metrics:
        display.line(
            f"time         {metrics['seconds']:.0f} s, of them training {metrics['training_seconds']:.0f} s"
        )
        display.line(f"adapter      {folder.adapter}")
    display.line(f"predictions  {folder.predictions()}")
    display.line(f"report       {folder.report}")
    if metrics.get("mlflow_run_id"):
        display.line(f"MLflow run   {metrics['mlflow_run_id']}")
        place = metrics["tracking_uri"]
        own = f"make ui    (mlflow ui --backend-store-uri {place})"
        display.line(f"MLflow UI    {place if place.startswith('http') else own}")
