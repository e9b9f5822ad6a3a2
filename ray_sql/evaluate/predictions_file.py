"""Read a file of predictions from any source, match its lines to gold, and judge them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ray_sql import data, generate
from ray_sql.config import Config
from ray_sql.data import Corpus, Example
from ray_sql.display import Display
from ray_sql.errors import DataError
from ray_sql.evaluate import scoring
from ray_sql.metrics import hardness
from ray_sql.metrics.judged import Evaluation, JudgedRow
from ray_sql.store.run_folder import RunFolder
from ray_sql.tasks import TASKS, Task

KEPT_NUMBERS = ("prompt_tokens", "new_tokens", "generation_seconds")
"""Numbers of a prediction that are kept, for the figure of accuracy by length of the prompt."""


def evaluate_file(path: Path, config: Config, display: Display) -> Evaluation:
    """Judge the predictions of a file against the gold of `config.split`, or their own gold."""
    task, settings = TASKS[config.task_type], config.evaluate
    corpus = data.load_split(config, config.split)
    require_executable(corpus, task)
    show_remarks(corpus, RunFolder(config.run_dir), display)
    predictions = read(path)
    examples = [(split, example) for split in config.split for example in corpus.splits[split]]
    matches = _match(path, predictions, examples, config.split)
    rows = [
        _row(prediction, match, f"{path}, line {line}", corpus, task)
        for (line, prediction), match in zip(predictions.items(), matches, strict=True)
    ]
    missing = len(examples) - sum(match is not None for match in matches)
    if missing > 0:
        display.line(
            f"{path} answers only a part: {missing} questions of --split {','.join(config.split)} "
            "have no prediction"
        )
    databases = [corpus.executable(row["db_id"]) for row in rows]
    counter = display.counter("executing predictions")
    schemas = corpus.judged_schemas(task)
    return {"file": scoring.judge_rows(rows, databases, schemas, task, settings, counter)}


def show_remarks(corpus: Corpus, folder: RunFolder, display: Display) -> None:
    """Say what was guessed in reading and left out, and list that in the run's folder."""
    for line in data.remarks(corpus.notes, corpus.left_out):
        display.line(line)
    if corpus.left_out:
        folder.write_left_out(map(asdict, corpus.left_out))


def require_executable(corpus: Corpus, task: Task) -> None:
    """Raise `DataError` if SQL is to be scored and no database of the corpus can execute it."""
    filled = corpus.databases.keys() - corpus.empty
    if task.executes_sql and filled and not any(map(corpus.executable, filled)):
        raise DataError(
            f"--data.databases: nothing can be scored: {data.why_not_executable(corpus)}"
        )


def read(path: Path) -> dict[int, dict[str, Any]]:
    """Return predictions by line number.

    The file holds JSON lines with `predicted`, or one SQL query a line, cut at its first tab.
    Raises `DataError` with the line that is neither.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"--predictions_file {path}: cannot be read as UTF-8 text ({error})"
        ) from None
    if not text.strip():
        raise DataError(f"--predictions_file {path}: is empty; give one prediction a line")
    if not text.lstrip().startswith("{"):
        queries = text.removesuffix("\n").split("\n")
        return {line: {"predicted": query.split("\t")[0]} for line, query in enumerate(queries, 1)}
    records = data.parse_lines(path, text)
    for line, record in records.items():
        if not isinstance(record, dict):
            fields = type(record).__name__
        elif "predicted" not in record:
            fields = ", ".join(sorted(record))
        else:
            continue
        raise DataError(f"{path}, line {line}: no field 'predicted'; found {fields}")
    return records


def _match(
    path: Path,
    predictions: Mapping[int, Mapping[str, Any]],
    examples: Sequence[tuple[str, Example]],
    splits: Sequence[str],
) -> list[tuple[str, Example] | None]:
    """Return (split, example) of each prediction; None for one that is not of the splits.

    Predictions are matched by id and, where given, split; by order where no line has an id.
    """
    scored = ",".join(splits)
    if not any("id" in prediction or _has_gold(prediction) for prediction in predictions.values()):
        if len(predictions) != len(examples):
            raise DataError(
                f"{path}: {len(predictions)} lines, but --split {scored} has {len(examples)} "
                "examples; without ids the two must be in the same order and equal in number"
            )
        return list(examples)
    by_id: dict[str, dict[str, Example]] = defaultdict(dict)
    for split, example in examples:
        by_id[example.id][split] = example
    matches: list[tuple[str, Example] | None] = []
    seen: set[tuple[str, str]] = set()
    for line, prediction in predictions.items():
        name = prediction.get("id")
        candidates = [
            (split, example)
            for split, example in by_id.get(str(name), {}).items()
            if split == prediction.get("split", split)
        ]
        if len(candidates) == 1:
            split, example = candidates[0]
            if (split, example.id) in seen:
                raise DataError(
                    f"{path}, line {line}: id {name!r} was predicted before; keep one line of it"
                )
            seen.add((split, example.id))
            matches.append(candidates[0])
        elif _has_gold(prediction):
            matches.append(None)
        else:
            way_out = "an id of the split, or its own db_id and gold"
            raise DataError(
                f"{path}, line {line}: id {name!r} is in {len(candidates) or 'none'} of --split "
                f"{scored}; give the line {'its `split` too' if candidates else way_out}"
            )
    return matches


def _has_gold(prediction: Mapping[str, Any]) -> bool:
    return "db_id" in prediction and "gold" in prediction


def _row(
    prediction: Mapping[str, Any],
    match: tuple[str, Example] | None,
    where: str,
    corpus: Corpus,
    task: Task,
) -> JudgedRow:
    """Return a row to be judged. A field of the line itself comes before that of its example."""
    read_answer = scoring.JUDGES[task.name].read
    if match:
        split, example = match
    else:
        line = where.rsplit(" ", 1)[-1]
        split, example = str(prediction.get("split", "file")), Example(line, "", "", "")
    if match and not _has_gold(prediction):
        db_id, gold = example.db_id, generate.gold_answer(example, corpus, task)
    else:
        db_id = str(prediction["db_id"])
        gold = read_answer(prediction["gold"], f"{where}: gold") or ""
    if db_id not in corpus.databases and db_id not in corpus.schemas:
        raise DataError(
            f"{where}: unknown db_id {db_id!r}; the dataset has no database of that name"
        )
    level = prediction.get("hardness") or example.hardness
    if not level and (match or task.executes_sql):
        level = hardness(gold if task.executes_sql else example.gold)
    numbers = {name: prediction.get(name) for name in KEPT_NUMBERS}
    return {
        "id": str(prediction.get("id", example.id)),
        "split": split,
        "db_id": db_id,
        "hardness": level,
        "question": prediction.get("question") or example.question,
        "gold": gold,
        "predicted": read_answer(prediction["predicted"], f"{where}: predicted"),
        **{name: value for name, value in numbers.items() if isinstance(value, int | float)},
    }
