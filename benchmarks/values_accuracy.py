"""Measure what cells in prompts do for accuracy: train and ask with them and without, in pairs.

    RAY_SQL_SHARED=… python -m benchmarks.values_accuracy                  (--quick: a few examples)

SmolLM2-135M is trained twice on the demo's data, and twice on a part of real Spider, as
`benchmarks.two_stages` does: with `prompt.values none` and with `matched`. Each is asked as it was
trained. The questions whose gold compares a column with a text are counted apart, for cells can
help these alone. The demo takes half an hour on 2 cores, Spider's part an hour. Given again after a
cut, it passes over what is finished. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
from typing import Any

from benchmarks.spider import CONFIGS
from benchmarks.two_stages import settings
from benchmarks.values import text_literals
from ray_sql import data, finetune
from ray_sql.config import Config, load
from ray_sql.display import percent
from ray_sql.evaluate.shares import interval
from ray_sql.metrics.judged import JudgedRow, is_right
from ray_sql.metrics.paired import paired_test
from ray_sql.store.run_folder import RunFolder

KINDS = ("none", "matched")
"""What `prompt.values` is set to."""


def main(argv: list[str] | None = None) -> None:
    """Train, ask, and print what RESULTS.md quotes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a few examples, to see that it works")
    parser.add_argument("--data", default="demo,spider", help="one of them, or both")
    parser.add_argument("--output_dir", default="out")
    arguments = parser.parse_args(argv)
    names = arguments.data.split(",")
    shared = os.environ.get("RAY_SQL_SHARED")
    if "spider" in names and not shared:
        parser.error("RAY_SQL_SHARED is not set: it names a folder with Spider in data/spider")
    arguments.dataset_id, arguments.model_name = f"{shared}/data/spider", "demo"
    make = {"demo": demo, "spider": spider}
    figures = {name: measure([make[name](arguments, kind) for kind in KINDS]) for name in names}
    print("\n| questions | n | without cells | with cells | only without, only with | p |")
    print("|---|---|---|---|---|---|")
    for name, groups in figures.items():
        for group, one in groups.items():
            print(f"| {name}, {group} | {one['n']} | {shown(one, 'none')} | ", end="")
            print(f"{shown(one, 'matched')} | {one['only_none']}, {one['only_matched']} | ", end="")
            print(f"{one['mcnemar_p']:.2g} |")
    print(json.dumps(figures))


def demo(arguments: argparse.Namespace, kind: str) -> Config:
    """Return the settings of `make demo`, with cells in prompts or without."""
    quick = {"data.limit": 24, "evaluate.limit": 16} if arguments.quick else {}
    return load(
        Config,
        ["--config", str(CONFIGS / "demo.yaml")],
        **quick,
        **{
            "output_dir": arguments.output_dir,
            "output_name": f"values-{'quick' if arguments.quick else 'demo'}-{kind}",
            "evaluate.baseline": False,
            "prompt.values": kind,
        },
    )


def spider(arguments: argparse.Namespace, kind: str) -> Config:
    """Return the settings of a generator on a part of Spider, with cells in prompts or without."""
    size = "quick" if arguments.quick else "cut"
    name = f"stages-{size}-full-sql" if kind == "none" else f"values-{size}-spider"
    return settings(arguments, "sql", {"output_name": name, "prompt.values": kind})


def measure(configs: list[Config]) -> dict[str, dict[str, Any]]:
    """Train and ask each, and return the scores of all questions and of those with a text."""
    for config in configs:
        finetune.run(config)
    before, after = (RunFolder(config.run_dir).read_predictions() for config in configs)
    schemas = data.load_split(configs[0], configs[0].split).schemas
    answers = {(row["split"], row["id"]): row for row in after}
    pairs = [(row, answers[row["split"], row["id"]]) for row in before]
    counted = [pair for pair in pairs if "gold_error" not in {row["verdict"] for row in pair}]
    with_text = [
        (one, other)
        for one, other in counted
        if any(text_literals(one["gold"], schemas[one["db_id"]]))
    ]
    return {"all": scores(counted), "gold with a text": scores(with_text)}


def scores(pairs: list[tuple[JudgedRow, JudgedRow]]) -> dict[str, Any]:
    """Return accuracy without cells and with them, and the paired test between the two."""
    marks = [(is_right(without), is_right(matched)) for without, matched in pairs]
    figures: dict[str, Any] = {"n": len(marks), **paired_test(marks).named(*KINDS)}
    for kind, right in zip(KINDS, zip(*marks, strict=True), strict=True):
        figures[kind] = round(sum(right) / len(marks), 4)
        figures[f"{kind}_interval"] = [
            round(bound, 4) for bound in interval(sum(right), len(marks))
        ]
    return figures


def shown(figures: dict[str, Any], kind: str) -> str:
    """Return an accuracy with its interval, as the table shows it."""
    return percent(figures[kind], figures[f"{kind}_interval"], figures["n"])


if __name__ == "__main__":
    main()
