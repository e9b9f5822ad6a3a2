"""Ask one generator three times: over full schemas, a linker's links, and gold ones; one report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ray_sql import evaluate
from ray_sql.config import Config, EvaluateConfig, build, merge, nested
from ray_sql.config.sections import GOLD, NO_LINKS
from ray_sql.display import Display, percent
from ray_sql.evaluate import stages
from ray_sql.evaluate.scored import load_scored
from ray_sql.report import html
from ray_sql.store import storage
from ray_sql.store.run_folder import RunFolder

WAYS = {"full": stages.FULL, "predicted": stages.PREDICTED, "oracle": stages.GOLD}
"""The end of an evaluation's name → the way in which it asks."""


def with_measured_noise(generator: Config, linker: Config) -> Config:
    """Return a generator's settings with the noise of its linker's greedy answers to validation."""
    changes = {
        "split": ("validation",),
        "output_name": f"{linker.output_name}-validation",
        "linking.keep": None,
        "evaluate": linker.evaluate.greedy().model_dump() | {"baseline": False},
    }
    scores = evaluate.run(_evaluation(linker, changes))["tuned"]["validation"]
    rates = {name: round(scores.get(name, 0.0), 2) for name in ("spare_tables", "spare_columns")}
    return generator.changed({f"prompt.{name}": rate for name, rate in rates.items()})


def report(config: Config, linker: Config, generator: Config) -> dict[str, Any]:
    """Ask the generator in all ways, write the report of both stages, and return its numbers."""
    folder = RunFolder(config.run_dir)
    links = {"full": NO_LINKS, "predicted": RunFolder(linker.run_dir).predictions(), "oracle": GOLD}
    answers, tokens = {}, {}
    for name, place in links.items():
        changes = {"prompt.links": place, "output_name": f"{config.output_name}-{name}"}
        asked = _evaluation(generator, changes)
        tokens[WAYS[name]] = evaluate.run(asked)["prompts"]
        answers[WAYS[name]] = RunFolder(asked.run_dir).read_predictions()
    form = generator.linking.form_of(generator.prompt.schema_form)
    result = stages.account(answers, load_scored(asked, asked.adapter).schemas, form)
    for way, counts in tokens.items():
        result["ways"][way] |= counts
    linked = RunFolder(linker.run_dir).read_metrics() or {}
    result["linker"] = linked.get("tuned", {})
    folder.write_stages(result)
    _write_page(folder, config, result)
    with Display() as display:
        for line in lines(result):
            display.line(line)
        display.line(f"report       {folder.report}")
    return result


def _evaluation(run: Config, changes: Mapping[str, Any]) -> EvaluateConfig:
    """Return the settings of an evaluation of a finished run's adapter."""
    own = {name: value for name, value in run.given().items() if name in Config.model_fields}
    own = {name: value for name, value in own.items() if name not in ("overwrite", "publish")}
    fixed = {"adapter": RunFolder(run.run_dir).adapter.uri, "evaluate.baseline": False}
    return build(EvaluateConfig, merge(own, nested({**fixed, **changes})), {"changes": changes})


HEADER = ("schema", "execution accuracy", "n", "prompt tokens", "computed", "seconds", "in full")


def cells(result: Mapping[str, Any]) -> list[list[str]]:
    """Return a row of the table for each way; tokens and seconds are those of a question."""
    return [
        [
            way,
            percent(one["execution_accuracy"], one["interval"], result["n"]),
            str(result["n"]),
            f"{one['prompt_tokens']:.0f}",
            f"{one['computed_tokens']:.0f}",
            f"{one['seconds']:.2f}",
            str(one["full_schema"]),
        ]
        for way, one in result["ways"].items()
    ]


def lines(result: Mapping[str, Any]) -> list[str]:
    """Return the report as lines for a terminal."""
    table = [list(HEADER), *cells(result)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    rows = (
        "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in table
    )
    return [*rows, *sentences(result)]


def sentences(result: Mapping[str, Any]) -> list[str]:
    """Return the paired tests, and what linking costs and saves, in words."""
    said = []
    for pair, test in result["tests"].items():
        a, _, b = pair.partition(" / ")
        said.append(
            f"{a} alone is right on {test['only_first']}, {b} alone on {test['only_second']} "
            f"(McNemar p = {test['mcnemar_p']:.2g})"
        )
    loss = result["loss"]
    said.append(
        f"with predicted links {loss['lost_to_linking']} questions are lost to linking (of "
        f"{loss['needed_name_missing']} whose prompt lacks a needed name), "
        f"{loss['lost_to_generation']} to generation; linking saves {loss['saved_by_linking']} "
        f"that the full schema loses, and spoils {loss['spoiled_by_linking']}"
    )
    for split, scores in result["linker"].items():
        before, n = scores["strict_recall"], scores["n"]
        after = scores.get("completed_strict_recall", before)
        said.append(
            f"linker on {split}: strict recall {percent(before)} as answered, {percent(after)} "
            f"with keys and join paths (n = {n})"
        )
    return said


def _write_page(folder: RunFolder, config: Config, result: Mapping[str, Any]) -> None:
    page = html.render(
        "stages.jinja",
        f"{config.output_name}: links, then SQL",
        {"base model": config.model_name, "data": config.dataset_id},
        {},
        header=HEADER,
        rows=cells(result),
        sentences=sentences(result),
    )
    storage.write_text(folder.report, page)
