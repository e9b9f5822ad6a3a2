"""Read a file of predictions from any source, match it with its gold, and judge it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from ray_sql import data, generate
from ray_sql.config import Config
from ray_sql.data import Corpus, Example
from ray_sql.display import Display
from ray_sql.errors import DataError
from ray_sql.evaluate import matching, prediction_forms, scoring
from ray_sql.evaluate.prediction_forms import Record, looks_like_sql, sql_in
from ray_sql.evaluate.scored import load_scored
from ray_sql.metrics import hardness
from ray_sql.metrics.judged import Evaluation, JudgedRow
from ray_sql.store.run_folder import RunFolder
from ray_sql.tasks import TASKS, Task

KEPT_NUMBERS = ("prompt_tokens", "new_tokens", "generation_seconds")
"""Numbers of a prediction that are kept, for the figure of accuracy by length of the prompt."""


def evaluate_file(path: Path, config: Config, display: Display) -> Evaluation:
    """Judge the predictions of a file against the gold of `config.split`, or their own gold."""
    task, settings = TASKS[config.task_type], config.evaluate
    corpus = load_scored(config)
    require_executable(corpus, task)
    show_remarks(corpus, RunFolder(config.run_dir), display)
    rows, notes = read_rows(path, corpus, config)
    for line in notes:
        display.line(line)
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


def read_rows(path: Path, corpus: Corpus, config: Config) -> tuple[list[JudgedRow], list[str]]:
    """Return the rows to be judged, at most `evaluate.limit` of each split, and what to say.

    Raises `DataError` with the place in the file that cannot be read or matched.
    """
    task, limit = TASKS[config.task_type], config.evaluate.limit
    examples = matching.questions_of(corpus, config.split)
    file = prediction_forms.read(path, len(examples), {*corpus.databases, *corpus.schemas})
    matches = matching.match(file, examples, config.split)
    kept = [
        (f"{path}, {place}", record, match)
        for (place, record), match in zip(file.records.items(), matches.found, strict=True)
        if not (match and isinstance(match[1], matching.LeftOutQuestion))
    ]
    found = [match for _, _, match in kept]
    rows = [_row(record, match, where, corpus, task) for where, record, match in kept]
    notes = [f"{len(file.records)} predictions of {path}, matched {matches.how}", *file.notes]
    if left_out := len(file.records) - len(kept):
        notes.append(f"{left_out} of them answer rows that are left out of the data")
    if limit:
        drawn = {
            (split, example.id)
            for split in config.split
            for example in data.sample(corpus.splits[split], limit, config.seed)
        }
        rows = _drawn(rows, found, drawn, limit, config.seed)
        notes.append(f"{len(rows)} of them are scored (--evaluate.limit {limit})")
    answered = sum(match is not None for match in found)
    missing = sum(len(corpus.splits[split]) for split in config.split) - answered
    if answered and missing:
        notes.append(
            f"{path} answers only a part: {missing} questions of --split "
            f"{','.join(config.split)} have no prediction"
        )
    return rows, [*notes, *_unusual(rows, task)]


def _drawn(
    rows: Sequence[JudgedRow],
    found: Sequence[matching.Match | None],
    drawn: Collection[tuple[str, str]],
    limit: int,
    seed: int,
) -> list[JudgedRow]:
    """Return the rows of the questions that are drawn, as a model would be asked them.

    Rows that belong to no question of the splits are drawn among themselves.
    """
    own = [index for index, match in enumerate(found) if match is None]
    kept = set(data.sample(own, limit, seed))
    return [
        row
        for index, (row, match) in enumerate(zip(rows, found, strict=True))
        if index in kept or (match and (match[0], match[1].id) in drawn)
    ]


def _unusual(rows: Sequence[JudgedRow], task: Task) -> Iterator[str]:
    """Yield what is to be said of predictions that are not plain SQL."""
    if not task.executes_sql:
        return
    of_all = f"of {len(rows)} predictions"
    if taken := sum("raw" in row for row in rows):
        yield (
            f"{taken} {of_all} were in code fences or behind words such as `SQL:`; the SQL in them "
            "is scored"
        )
    odd = [row for row in rows if row["predicted"] and not looks_like_sql(row["predicted"])]
    if odd:
        text = " ".join(odd[0]["predicted"].split())[:60]
        yield f"{len(odd)} {of_all} do not begin like a query, as that of {odd[0]['id']}: {text!r}"


def require_executable(corpus: Corpus, task: Task) -> None:
    """Raise `DataError` if SQL is to be scored and no database of the corpus can execute it."""
    filled = corpus.databases.keys() - corpus.empty
    if task.executes_sql and filled and not any(map(corpus.executable, filled)):
        raise DataError(
            f"--data.databases: nothing can be scored: {data.why_not_executable(corpus)}"
        )


def _row(
    record: Record, match: matching.Match | None, where: str, corpus: Corpus, task: Task
) -> JudgedRow:
    """Return a row to be judged. A field of the record comes before that of its example."""
    read_answer = scoring.JUDGES[task.name].read
    if match:
        split, example = match
    else:
        name = str(record.get("id", where.rsplit(" ", 1)[-1]))
        split, example = str(record.get("split") or "file"), Example(name, "", "", "")
    if match and not matching.has_gold(record):
        db_id, gold = example.db_id, generate.gold_answer(example, corpus, task)
        others = example.other_golds
    else:
        others = ()
        known = [*corpus.databases, *corpus.schemas]
        db_id = data.databases.called(str(record["db_id"]), dict.fromkeys(known))
        gold = read_answer(record["gold"], f"{where}: gold") or ""
    if db_id not in corpus.databases and db_id not in corpus.schemas:
        raise DataError(
            f"{where}: unknown db_id {db_id!r}; the dataset has no database of that name"
        )
    level = record.get("hardness") or example.hardness
    if not level and (match or task.executes_sql):
        level = hardness(gold if task.executes_sql else example.gold)
    given = read_answer(record["predicted"], f"{where}: predicted")
    predicted = sql_in(given) if given and task.executes_sql else given
    numbers = {name: record.get(name) for name in KEPT_NUMBERS}
    return {
        "id": example.id,
        "split": split,
        "db_id": db_id,
        "hardness": level,
        "question": record.get("question") or example.question,
        "gold": gold,
        **({"other_golds": list(others)} if others and task.executes_sql else {}),
        "predicted": predicted,
        **({"raw": given} if predicted != given else {}),
        **{name: value for name, value in numbers.items() if isinstance(value, int | float)},
    }
