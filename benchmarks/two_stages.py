"""Measure links, then SQL: generators trained on three forms of schemas, each asked in three ways.

    RAY_SQL_SHARED=… python -m benchmarks.two_stages            (--quick: a few examples)

A linker and three generators are trained on a part of real Spider, as `benchmarks.spider` does:
over full schemas, over gold links alone (`reduced`), and over gold links among noise with the
linker's own rates (`noisy`). Each generator answers dev's questions over full schemas, over the
linker's links, and over gold ones, which is an oracle. Tokens that are computed, and seconds, are
in the same tables.

The linker is asked 8 samples a question, and is scored as answered, with its links completed, and
at three settings of the dial `linking.keep`.

It takes one or two hours on 2 cores. Given again after a cut, it passes over what is finished, and
answers that were given are not asked again. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Mapping
from typing import Any

from benchmarks.spider import CONFIGS, CUT, FULL, QUICK
from ray_sql import data, finetune
from ray_sql.config import Config, load
from ray_sql.data import linking
from ray_sql.database import Schema
from ray_sql.display import percent
from ray_sql.evaluate import judge_links
from ray_sql.evaluate.choosing import voted_links
from ray_sql.store.run_folder import RunFolder
from ray_sql.tune import two_stages

FORMS = ("full", "reduced", "noisy")
DIAL = (0.75, 0.5, 0.125)
"""Shares of the samples that must name a table or column, from precise to complete."""
LINKER_SCORES = (
    *("strict_recall", "completed_strict_recall", "table_precision", "table_recall", "table_f1"),
    *("column_precision", "column_recall", "column_f1", "completed_table_precision"),
    *("completed_column_precision", "hallucinated_names", "unparsable", "spare_tables"),
    *("spare_columns", "n"),
)


def main(argv: list[str] | None = None) -> None:
    """Train, ask, and print what RESULTS.md quotes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a few examples, to see that it works")
    parser.add_argument("--model_name", default="demo", help="base model of all four")
    parser.add_argument("--dataset_id", help="Spider's folder; by default that of RAY_SQL_SHARED")
    parser.add_argument("--output_dir", default="out")
    arguments = parser.parse_args(argv)
    shared = os.environ.get("RAY_SQL_SHARED")
    if not shared and not arguments.dataset_id:
        parser.error("give --dataset_id, or RAY_SQL_SHARED with Spider in data/spider")
    arguments.dataset_id = arguments.dataset_id or f"{shared}/data/spider"
    started = time.monotonic()
    linker = settings(arguments, "schema", {"evaluate.samples": 4 if arguments.quick else 8})
    links = finetune.run(linker)["tuned"]["dev"]
    reports = {form: measure(arguments, form, linker) for form in FORMS}
    result = {
        "accuracy": {form: accuracies(report) for form, report in reports.items()},
        "tests": {form: report["tests"] for form, report in reports.items()},
        "loss": {form: report["loss"] for form, report in reports.items()},
        "linker": {name: rounded(links[name]) for name in LINKER_SCORES if name in links},
        "dial": dial(linker),
        "n": reports["full"]["n"],
        "seconds": round(time.monotonic() - started),
    }
    show(reports, result)
    print(json.dumps(result))


def settings(arguments: argparse.Namespace, task: str, changes: Mapping[str, Any]) -> Config:
    """Return the settings of a training run, named by its task and its size."""
    size = "quick" if arguments.quick else "cut"
    cut = {name: value for name, value in CUT.items() if name not in ("overwrite", "model_name")}
    return load(
        Config,
        ["--config", str(CONFIGS / f"spider-{task}.yaml")],
        **cut | (QUICK if arguments.quick else FULL),
        **{
            "model_name": arguments.model_name,
            "dataset_id": arguments.dataset_id,
            "output_dir": arguments.output_dir,
            "output_name": f"stages-{size}-{task}",
            "evaluate.baseline": False,
            **changes,
        },
    )


def measure(arguments: argparse.Namespace, form: str, linker: Config) -> dict[str, Any]:
    """Train a generator on a form of schemas, ask it in three ways, and return the report."""
    name = f"stages-{'quick' if arguments.quick else 'cut'}-{form}"
    changes = {"prompt.schema_form": form, "output_name": f"{name}-sql"}
    generator = settings(arguments, "sql", changes)
    if form == "noisy":
        generator = two_stages.with_measured_noise(generator, linker)
    finetune.run(generator)
    return two_stages.report(generator.changed({"output_name": name}), linker, generator)


def accuracies(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return the numbers of each way of asking."""
    return {
        way: {name: rounded(value) for name, value in scores.items()}
        for way, scores in report["ways"].items()
    }


def rounded(value: Any) -> Any:
    """Return a number, or the numbers of an interval, with four decimals."""
    if isinstance(value, list):
        return [round(number, 4) for number in value]
    return round(value, 4) if isinstance(value, float) else value


def dial(linker: Config) -> dict[str, dict[str, Any]]:
    """Return the linker's scores at each setting of `linking.keep`."""
    schemas = data.load_split(linker, linker.split).schemas
    rows = RunFolder(linker.run_dir).read_predictions()
    return {str(keep): at_setting(rows, schemas, keep, linker) for keep in DIAL}


def at_setting(
    rows: list[dict[str, Any]], schemas: Mapping[str, Schema], keep: float, linker: Config
) -> dict[str, Any]:
    """Return the scores of the names that this share of the samples has."""
    voted = []
    for row in rows:
        answers = [linking.parse_links(sample["links"] or "") for sample in row["candidates"]]
        links = voted_links(answers, [1.0] * len(answers), keep)
        voted.append(row | {"predicted": json.dumps(links) if any(answers) else None})
    judged = judge_links.judge(voted, [None] * len(voted), schemas, linker.evaluate)
    scores = judge_links.summarise(judged, linker.evaluate)
    return {name: rounded(scores[name]) for name in LINKER_SCORES if name in scores}


def show(reports: Mapping[str, Mapping[str, Any]], result: Mapping[str, Any]) -> None:
    """Print the tables of RESULTS.md."""
    print(f"\n| trained on | {' | '.join(reports['full']['ways'])} |")
    print("|---|---|---|---|")
    for form, report in reports.items():
        cells = [
            f"{percent(one['execution_accuracy'], one['interval'], report['n'])}, "
            f"{one['computed_tokens']:.0f} of {one['prompt_tokens']:.0f} tokens, "
            f"{one['seconds']:.2f} s"
            for one in report["ways"].values()
        ]
        print(f"| {form} | {' | '.join(cells)} |")
    print("\n| links | strict recall | completed | precision of completed tables, columns |")
    print("|---|---|---|---|")
    dialled = {f"kept by {keep} of the samples": one for keep, one in result["dial"].items()}
    for name, scores in {"greedy answer": result["linker"], **dialled}.items():
        cells = [
            percent(scores.get(key, 0.0))
            for key in (
                *("strict_recall", "completed_strict_recall"),
                *("completed_table_precision", "completed_column_precision"),
            )
        ]
        print(f"| {name} | {cells[0]} | {cells[1]} | {cells[2]}, {cells[3]} |")


if __name__ == "__main__":
    main()
