"""Gather the results of a study, answers and scores of every stage, into one folder to share.

    ray-sql results out/spider-sql out/spider-oracle --output_name study --publish

Each run, or evaluation, has a folder with its answers, scores and settings. The README is made from
them. Scoring the answers again gives the same numbers. `publish` pushes the folder to the Hub as a
dataset.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ray_sql.config import ResultsConfig
from ray_sql.display import Display
from ray_sql.errors import ConfigError
from ray_sql.publish import hub as hubs
from ray_sql.publish.bundle import public_name, without_places
from ray_sql.report.description import code
from ray_sql.report.scores import markdown, notes, paired_lines, prose
from ray_sql.store import storage
from ray_sql.store.run_folder import CONFIG, METRICS, PREDICTIONS, README, RunFolder
from ray_sql.store.shapes import ScoredMetrics
from ray_sql.tasks import TASKS

MODELS = ("base", "default", "tuned", "file")


@dataclass(frozen=True)
class Stage:
    """A scored run or evaluation: its name, its scores, and its files by path."""

    name: str
    metrics: Mapping[str, Any]
    settings: Mapping[str, Any]
    files: Mapping[str, str]

    @property
    def models(self) -> dict[str, Any]:
        """The scores of each model that was asked, by split."""
        return {name: self.metrics[name] for name in MODELS if name in self.metrics}


def run(config: ResultsConfig) -> dict[str, Any]:
    """Write the results of `config.runs` into one folder, and push it if asked to."""
    display, folder = Display(), RunFolder(config.run_dir)
    stages = [read(RunFolder(storage.absolute_uri(place))) for place in config.runs]
    twice = {one.name for one in stages if [each.name for each in stages].count(one.name) > 1}
    if twice:
        raise ConfigError(
            f"--runs: two are called {min(twice)}, and each has a folder of its name; give one"
        )
    files = {
        README: readme(config.output_name, stages, config.hub.license)
    }  # first: it is the mark
    for stage in stages:
        files |= stage.files
    if config.dry_run:
        display.line(f"would write {len(files)} files to {config.run_dir}: {', '.join(files)}")
        return {}
    folder.require_ours(README)
    for path, text in files.items():
        storage.write_text(folder.place(path), text)
    display.line(f"results  {folder}: {', '.join(stage.name for stage in stages)}")
    if config.publish:
        hub = hubs.login(config.hub, config.output_name, config.write_token, "dataset")
        content = {path: text.encode() for path, text in files.items()}
        pushed = hub.push(content, f"Results of {', '.join(stage.name for stage in stages)}")
        display.line(f"pushed   {pushed.url}, commit {pushed.commit[:7]}")
    return {"files": sorted(files)}


def read(folder: RunFolder) -> Stage:
    """Return a run's scores, settings and answers, without the places of this machine.

    Raises `ConfigError` for a folder in which nothing was scored.
    """
    settings, metrics = folder.read_settings(), folder.read_metrics(ScoredMetrics)
    answers = {model: storage.read_text(folder.predictions(model)) for model in MODELS}
    alone = [model for model in MODELS if metrics and model in metrics]
    if len(alone) == 1:
        answers = {alone[0]: storage.read_text(folder.predictions(alone[0], alone=True))}
    if not settings or not metrics or not any(answers.values()):
        raise ConfigError(
            f"--runs {folder}: holds no scored run; give the folder of a run or an evaluation, "
            "with config.json, metrics.json and predictions.jsonl"
        )
    public = {name: public_name(metrics[name]) for name in ("dataset_id",)}
    if "model_name" in metrics:
        public["model_name"] = public_name(metrics["model_name"])
    hidden = ("tracking_uri", "mlflow_run_id")
    shown = {name: value for name, value in metrics.items() if name not in hidden} | public
    recipe = without_places(settings) | {"dataset_id": public["dataset_id"]}
    if recipe.get("model_name"):
        recipe["model_name"] = public_name(recipe["model_name"])
    files = {CONFIG: _json(recipe), METRICS: _json(shown)}
    files |= {
        RunFolder("").predictions(model, len(answers) == 1).lstrip("/"): text
        for model, text in answers.items()
        if text is not None and model in metrics
    }
    name = folder.name
    return Stage(name, shown, recipe, {f"{name}/{path}": text for path, text in files.items()})


def readme(title: str, stages: Sequence[Stage], license: str | None) -> str:
    """Return the README of the folder, with the Hub's metadata of a dataset."""
    head = ["---", *([f"license: {license}"] if license else [])]
    head += ["tags:", "- text-to-sql", "- ray_sql", "configs:"]
    for stage in stages:
        head += [f"- config_name: {stage.name}", f"  data_files: {stage.name}/{PREDICTIONS}"]
    parts = ["\n".join([*head, "---"]), f"# {title}", INTRO]
    for stage in stages:
        parts += _section(stage)
    return "\n\n".join(parts) + "\n"


INTRO = """Answers, verdicts and scores of text-to-SQL models. Each folder has `predictions.jsonl`,
one judged question a line, `metrics.json` with every score, and `config.json` with the settings.
Questions and gold SQL are those of the dataset that is named, under its own licence.

Square brackets hold 95 % intervals. Splits that end in `-oracle` show the links of the gold SQL in
their prompts, which nobody has for a new question."""


def _section(stage: Stage) -> Iterator[str]:
    task, models = TASKS[stage.metrics["task_type"]], stage.models
    base = stage.settings.get("model_name") or "a file of predictions"
    data = stage.metrics["dataset_id"]
    yield f"## {stage.name}"
    links = stage.metrics.get("links", "none")
    yield f"Task `{task.name}`, model {code(base)}, data {code(data)}, links {links}."
    yield markdown(models, task)
    said = [*notes(stage.metrics, list(models)[-1]), *paired_lines(stage.metrics)]
    if said:
        yield "\n".join(f"- {prose(line)}" for line in said)
    rule = ""
    if task.executes_sql:
        rule = f" --evaluate.semantics {stage.settings['evaluate']['semantics']}"
    yield (
        "Score it again, with the databases of the dataset:\n\n```sh\n"
        f"ray-sql evaluate --predictions_file {stage.name}/{PREDICTIONS} --task_type {task.name} "
        f"\\\n    --dataset_id {data}{rule} --output_name again\n```"
    )


def _json(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=2) + "\n"
