"""The links that scored questions are asked with: gold's, or a linker's, from its file or asked."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ray_sql import models, tracking
from ray_sql.config import Config, absolute
from ray_sql.config.sections import GOLD, NO_LINKS
from ray_sql.data import Corpus, with_values
from ray_sql.data.shown import AskedLinks
from ray_sql.database import Links
from ray_sql.display import Display
from ray_sql.errors import ConfigError, DataError
from ray_sql.evaluate import judge_links, matching, prediction_forms
from ray_sql.evaluate.choosing import voted_links
from ray_sql.evaluate.models import check_adapter, evaluate_models, scored_questions
from ray_sql.metrics.judged import JudgedRow
from ray_sql.report.progress import Progress
from ray_sql.store import storage
from ray_sql.store.run_folder import AdapterFolder, RunFolder
from ray_sql.tasks import SCHEMA


def asked_links(config: Config, corpus: Corpus, display: Display) -> AskedLinks:
    """Return the links of `prompt.links` for the scored questions.

    A linker's adapter is asked the same questions first. Raises `ConfigError` or `DataError` for a
    place that holds no links.
    """
    source, linking = config.prompt.asked_links, config.linking
    form = linking.form_of(config.prompt.schema_form)
    if source in (NO_LINKS, GOLD):
        return AskedLinks(source, form, linking.complete)
    if is_adapter(source):
        rows = _ask(config, storage.absolute_uri(source), corpus, display)
        found = {(row["split"], row["id"]): _links(row, linking.keep, source) for row in rows}
    else:
        found = _read(absolute(source), corpus, config.split, linking.keep)
    return AskedLinks(source, form, linking.complete, found)


def is_adapter(source: str) -> bool:
    """Tell the folder of a linker's adapter, which is asked, from a file of links."""
    folder = AdapterFolder(storage.absolute_uri(source))
    return source not in (NO_LINKS, GOLD) and folder.read_adapter_config() is not None


def _read(
    path: Path, corpus: Corpus, splits: tuple[str, ...], keep: float | None
) -> dict[tuple[str, str], Links | None]:
    """Return the links of a file of predictions by split and id, as far as its questions match."""
    flag = f"--prompt.links {path}"
    if not path.is_file():
        raise ConfigError(
            f"{flag}: is neither a linker's predictions.jsonl nor the folder of its adapter; give "
            "one of the two, none or gold"
        )
    examples = matching.questions_of(corpus, splits)
    file = prediction_forms.read(path, len(examples), corpus.schemas)
    matches = matching.match(file, examples, splits)
    found = {}
    for (place, record), match in zip(file.records.items(), matches.found, strict=True):
        if match:
            found[match[0], match[1].id] = _links(record, keep, f"{flag}, {place}")
    if not found:
        raise DataError(f"{flag}: has no answer to a question of --split {','.join(splits)}")
    return found


def _links(record: Mapping[str, Any], keep: float | None, where: str) -> Links | None:
    """Return the links of a linker's answer: the chosen ones, or those with enough votes."""
    if keep is None:
        return _parsed(record["predicted"], where)
    samples = record.get("candidates")
    if not samples:
        raise DataError(
            f"{where}: --linking.keep counts samples, and the linker's answer has none; ask it "
            "with --evaluate.samples, or leave linking.keep out"
        )
    answers = [_parsed(sample.get("links"), where) for sample in samples]
    if not any(answer is not None for answer in answers):
        return None
    return voted_links(answers, [1.0] * len(answers), keep)


def _parsed(value: Any, where: str) -> Links | None:
    text = None if value is None else judge_links.read(value, where)
    if text is None:
        return None
    links: Links = json.loads(text)
    return links


def _ask(config: Config, adapter: str, corpus: Corpus, display: Display) -> list[JudgedRow]:
    """Return the judged answers of a linker to the scored questions."""
    saved = AdapterFolder(adapter).read_settings()
    if saved is None or saved.get("task_type") != SCHEMA.name:
        raise ConfigError(
            f"--prompt.links {adapter}: is no adapter that finds links; give one of --task_type "
            "schema"
        )
    samples = config.evaluate.samples if config.linking.keep else 1
    if config.linking.keep and samples == 1:
        raise ConfigError(
            f"--linking.keep {config.linking.keep} counts the linker's samples, but "
            "evaluate.samples is 1: raise it, or leave linking.keep out"
        )
    linker = config.changed(
        {
            **{name: saved[name] for name in ("task_type", "model_name", "quantization")},
            "prompt": {**saved["prompt"], "links": NO_LINKS},
            "evaluate": {
                **config.evaluate.greedy().model_dump(),
                **{"samples": samples, "ves_iterations": 0, "baseline": False},
            },
            "linking.keep": None,
        }
    )
    told, own = config.prompt.description_chars, linker.prompt.description_chars
    if told != own:
        raise ConfigError(
            f"--prompt.links {adapter}: the linker was trained with prompt.description_chars {own},"
            f" and this run has {told}; train both with the same"
        )
    contract = AdapterFolder(adapter).read_contract()
    pinned = models.revision_of(contract, linker.model_name)
    folder, revision = models.resolve(linker.model_name, linker.cache, linker.read_token, pinned)
    tokenizer = models.load_tokenizer(folder)
    check_adapter(adapter, linker, tokenizer, revision)
    corpus = with_values(corpus, linker.prompt)
    questions = scored_questions(corpus, tokenizer, linker, AskedLinks())
    display.line(f"links     the linker {adapter} is asked {len(questions)} questions first")
    progress = Progress(RunFolder(config.run_dir), tracking.null_run(), display)
    called = {"tuned": "the linker"}
    evaluation = evaluate_models(
        linker, questions, corpus.schemas, folder, adapter, display, progress, called
    )
    return evaluation["tuned"]
