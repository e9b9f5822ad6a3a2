"""Measure models on the splits that are to be scored: answers, verdicts, and the files and MLflow records that hold them.

`of_models` asks a base model and its adapter on the workers; `of_file` scores predictions that somebody else made, with no model
loaded. Both end in the same rows and the same `metrics.json`.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray_sql import cluster, data, generate, models
from ray_sql.cluster.events import AnswerGiven, AnswerJob, AnswersCounted
from ray_sql.config import Config
from ray_sql.data import Corpus, Example, linking, prompts
from ray_sql.database import Schema
from ray_sql.display import Display
from ray_sql.errors import ContractError, DataError
from ray_sql.evaluate import scoring
from ray_sql.evaluate.scoring import Row
from ray_sql.generate import AnswerCache, Question
from ray_sql.metrics import hardness
from ray_sql.metrics.judged import is_right
from ray_sql.metrics.paired import PairedTest, paired_test
from ray_sql.store import storage
from ray_sql.store.run_folder import AdapterFolder, RunFolder
from ray_sql.tasks import TASKS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

COUNTED = ("prompt_tokens", "new_tokens", "generation_seconds")
"""What a predictions file may say of how an answer was made; kept, for the figure of accuracy by length of the prompt."""
Measured = dict[str, list[Row]]
"""Judged rows of all splits, by model: `base`, `tuned`, or `file`."""


def of_models(
    config: Config,
    asked: Sequence[Question],
    schemas: Mapping[str, Schema],
    model_folder: str,
    adapter: str | None,
    display: Display,
    on_event: cluster.OnEvent,
) -> Measured:
    """Ask the base model (if `evaluate.baseline`, or without an adapter) and the base with `adapter`, and judge the answers."""
    wanted = (["base"] if config.evaluate.baseline or adapter is None else []) + (
        ["tuned"] if adapter else []
    )
    kept = {
        name: _kept(config, asked, model_folder, adapter if name == "tuned" else None)
        for name in wanted
    }
    said = {name: one.read() for name, one in kept.items()}
    missing = [name for name in wanted if len(said[name]) < len(asked)]
    for name in (name for name in wanted if said[name]):
        display.line(
            f"{name}: {len(said[name])} of {len(asked)} answers are there from before ({kept[name].file})"
        )

    def keep(event: cluster.Event) -> None:
        if isinstance(event, AnswerGiven):
            answers = said[event.model]
            kept[event.model].add(event.question, event.answer)
            answers[event.question] = event.answer
            event = AnswersCounted(event.model, len(answers), len(asked))
        on_event(event)

    if missing:
        job = AnswerJob(
            settings=config.for_workers(),
            model_folder=model_folder,
            adapter=adapter,
            models=missing,
            questions=generate.dump(asked),
            known={name: dict(said[name]) for name in missing},
            caches={name: str(kept[name].file) for name in missing},
        )
        outcome = cluster.run_workers(
            generate.answer_loop_per_worker, job, config.scaling, config.run_dir, keep
        )
        for name, answered in outcome.answers.items():
            said[name] = dict(answered)
            kept[name].write(said[name])
    judged = {}
    with scoring.executor(config) as executor:
        for name in wanted:
            answers = [said[name][number] for number in range(len(asked))]
            counter = display.counter(f"executing {name}'s SQL")
            judged[name] = scoring.score(asked, answers, config, schemas, counter, executor)
    return judged


def questions(corpus: Corpus, tokenizer: PreTrainedTokenizerBase, config: Config) -> list[Question]:
    """The questions of `config.split`, at most `evaluate.limit` of each."""
    asked = []
    for split in config.split:
        examples = data.sample(corpus.splits[split], config.evaluate.limit, config.seed)
        asked += generate.make_questions(examples, split, corpus, tokenizer, config)
    return asked


def of_file(path: Path, config: Config, display: Display) -> Measured:
    """Judge the predictions in the file `path` against the gold of the dataset's splits, or their own."""
    corpus = data.load_split(config, config.split)
    check_executable(corpus, config)
    predictions = read_predictions(path)
    found = _match(
        path,
        predictions,
        [(split, e) for split in config.split for e in corpus.splits[split]],
        config,
    )
    rows = [
        _file_row(prediction, match, f"{path}, line {line}", corpus, config)
        for (line, prediction), match in zip(predictions.items(), found, strict=True)
    ]
    databases = [corpus.executable(row["db_id"]) for row in rows]
    missing = sum(len(corpus.splits[split]) for split in config.split) - sum(
        match is not None for match in found
    )
    if missing > 0:
        display.line(
            f"{path} answers only a part: {missing} questions of --split {','.join(config.split)} have no prediction"
        )
    judged = scoring.judge_rows(
        rows, databases, config, corpus.schemas, display.counter("executing predictions")
    )
    return {"file": judged}


def read_predictions(path: Path) -> dict[int, dict[str, Any]]:
    """Line number → prediction, from JSON lines with `predicted`, or one SQL query a line (what follows a tab is cut)."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"--predictions_file {path}: cannot be read as UTF-8 text ({error})"
        ) from None
    if not text.strip():
        raise DataError(f"--predictions_file {path}: is empty; give one prediction a line")
    if not text.lstrip().startswith("{"):
        lines = text.removesuffix("\n").split("\n")
        return {number: {"predicted": line.split("\t")[0]} for number, line in enumerate(lines, 1)}
    records = data.parse_lines(path, text)
    for number, record in records.items():
        if not isinstance(record, dict) or "predicted" not in record:
            have = ", ".join(sorted(record)) if isinstance(record, dict) else type(record).__name__
            raise DataError(f"{path}, line {number}: no field 'predicted'; found {have}")
    return records


def summarise(measured: Measured, config: Config) -> dict[str, dict[str, Any]]:
    """Scores by model and split, and `compared`: the paired test of tuned against base on the questions both answered; of a sweep's
    champion `compared_default` too, against the default settings."""
    summary: dict[str, dict[str, Any]] = {}
    for name, rows in measured.items():
        splits = dict.fromkeys(row["split"] for row in rows)
        summary[name] = {
            s: scoring.summarise([row for row in rows if row["split"] == s], config) for s in splits
        }
    if "base" in measured and "tuned" in measured:
        summary["compared"] = {
            split: paired(measured, "base", split).named("base", "tuned")
            for split in summary["tuned"]
        }
    if "default" in measured:
        summary["compared_default"] = {
            split: paired(measured, "default", split).named("default", "tuned")
            for split in summary["tuned"]
        }
    return summary


def write(folder: RunFolder, measured: Measured, metrics: Mapping[str, Any]) -> None:
    """`predictions.jsonl` (of the tuned model where there is one), those of others beside it (`base_predictions.jsonl`), then
    `metrics.json`."""
    for name, rows in measured.items():
        folder.write_predictions(name, rows, alone=len(measured) == 1)
    folder.write_metrics(metrics)


def check_executable(corpus: Corpus, config: Config) -> None:
    """Raise `DataError` where SQL is to be scored and the databases are of a kind that none can be executed on."""
    if (
        config.task_type == "sql"
        and corpus.databases
        and not any(map(corpus.executable, corpus.databases))
    ):
        raise DataError(
            f"--data.databases: nothing can be scored: {data.why_not_executable(corpus)}"
        )


def check_adapter(adapter: str, config: Config, model_folder: str, revision: str | None) -> None:
    """Raise `ContractError` if the adapter was trained under another prompt, schema text, tokenizer or base model."""
    saved = AdapterFolder(adapter).read_contract()
    if saved is None:
        raise ContractError(
            f"--adapter {adapter}: holds no contract.json; give the adapter folder of a ray_sql run"
        )
    current = prompts.contract(config, models.load_tokenizer(model_folder), revision)
    prompts.check_contract(saved, current, adapter)


def _kept(
    config: Config, asked: Sequence[Question], model_folder: str, adapter: str | None
) -> AnswerCache:
    """Where a model's answers are kept: a file whose name changes with whatever they depend on, which is its weights' identity,
    precision, limits, the libraries that compute and the prompts."""
    files = sorted(
        (file.name, file.stat().st_size, file.stat().st_mtime_ns)
        for file in Path(model_folder).iterdir()
    )
    parts = [
        generate.VERSION,
        model_folder,
        files,
        digest(adapter),
        [
            config.quantization.model_dump(),
            str(models.compute_dtype(config.train.bf16)),
            config.scaling.use_gpu,
            config.eval_batch_size,
        ],
        [version(package) for package in ("torch", "transformers", "peft", "bitsandbytes")],
        config.evaluate.model_dump(include={"max_new_tokens", "max_num_seqs", "num_beams"}),
        [(question.db_id, question.input_ids) for question in asked],
    ]
    key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]
    return AnswerCache(config.cache / "answers" / f"{key}.jsonl")


def digest(adapter: str | None) -> str | None:
    """Changes with the content of an adapter."""
    if adapter is None:
        return None
    found = hashlib.sha256()
    with tempfile.TemporaryDirectory(prefix="ray_sql-") as scratch:
        for file in sorted(storage.fetch(adapter, Path(scratch)).glob("adapter_*")):
            found.update(file.name.encode() + file.read_bytes())
    return found.hexdigest()


def _match(
    path: Path,
    predictions: Mapping[int, Row],
    examples: Sequence[tuple[str, Example]],
    config: Config,
) -> list[tuple[str, Example] | None]:
    """The example of each prediction: by id and, where given, split; by order where no line has an id; None for its own gold."""
    splits = ",".join(config.split)
    if not any("id" in prediction or _has_gold(prediction) for prediction in predictions.values()):
        if len(predictions) != len(examples):
            raise DataError(
                f"{path}: {len(predictions)} lines, but --split {splits} has {len(examples)} examples; without ids the two must "
                "be in the same order and equal in number"
            )
        return list(examples)
    by_id: dict[str, dict[str, Example]] = defaultdict(dict)
    for split, example in examples:
        by_id[example.id][split] = example
    matches: list[tuple[str, Example] | None] = []
    seen: set[tuple[str, str]] = set()
    for line, prediction in predictions.items():
        known = by_id.get(str(prediction.get("id")), {})
        found = [
            (split, e) for split, e in known.items() if split == prediction.get("split", split)
        ]
        if len(found) != 1 and not _has_gold(prediction):
            raise DataError(
                f"{path}, line {line}: id {prediction.get('id')!r} is in {len(found) or 'none'} of --split {splits}; give the line "
                f"{'its `split` too' if found else 'an id of the split, or its own db_id and gold'}"
            )
        match = found[0] if len(found) == 1 else None
        if match and (match[0], match[1].id) in seen:
            raise DataError(
                f"{path}, line {line}: id {prediction['id']!r} was predicted before; keep one line of it"
            )
        if match:
            seen.add((match[0], match[1].id))
        matches.append(match)
    return matches


def _has_gold(prediction: Mapping[str, Any]) -> bool:
    return "db_id" in prediction and "gold" in prediction


def _file_row(
    prediction: Row, match: tuple[str, Example] | None, where: str, corpus: Corpus, config: Config
) -> Row:
    split, example = match or (str(prediction.get("split", "file")), None)
    if example is None or _has_gold(prediction):
        db_id, gold = (
            str(prediction["db_id"]),
            _text(prediction["gold"], config, f"{where}: gold") or "",
        )
    else:
        db_id, gold = example.db_id, generate.gold_answer(example, corpus, TASKS[config.task_type])
    if db_id not in corpus.databases and db_id not in corpus.schemas:
        raise DataError(
            f"{where}: unknown db_id {db_id!r}; the dataset has no database of that name"
        )
    level = prediction.get("hardness") or (example.hardness if example else None)
    return {
        "id": str(prediction.get("id", example.id if example else where.rsplit(" ", 1)[-1])),
        "split": split,
        "db_id": db_id,
        "hardness": level
        or (hardness(gold) if config.task_type == "sql" else example and hardness(example.gold)),
        "question": prediction.get("question") or (example.question if example else ""),
        "gold": gold,
        "predicted": _text(prediction["predicted"], config, f"{where}: predicted"),
        **{
            name: value
            for name in COUNTED
            if isinstance(value := prediction.get(name), int | float)
        },
    }


def _text(value: Any, config: Config, where: str) -> str | None:
    """SQL as it is; links (JSON, as text or not) as JSON text, None where they cannot be read."""
    if config.task_type == "schema":
        links = linking.parse_links(value if isinstance(value, str) else json.dumps(value))
        return None if links is None else json.dumps(links)
    if value is not None and not isinstance(value, str):
        raise DataError(f"{where} must be SQL as text, found {type(value).__name__}")
    return value


def paired(measured: Measured, other: str, split: str | None = None) -> PairedTest:
    """Compare the model `other` (a) with the tuned one (b), on a split or on all questions.

    The rows of all models are in the same order.
    """
    return paired_test(
        (is_right(theirs), is_right(tuned))
        for theirs, tuned in zip(measured[other], measured["tuned"], strict=True)
        if split in (None, tuned["split"])
        and "gold_error" not in (theirs["verdict"], tuned["verdict"])
    )
