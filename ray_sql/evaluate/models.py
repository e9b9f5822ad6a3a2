"""Ask a base model and its adapter on the workers, and judge their answers."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Collection, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from ray_sql import cluster, data, generate, models
from ray_sql.cluster.events import AnswerGiven, AnswerJob, AnswersCounted
from ray_sql.config import Config
from ray_sql.config.sections import AnswersSection
from ray_sql.data import Corpus
from ray_sql.data.contract import check_contract, make_contract
from ray_sql.data.shown import AskedLinks
from ray_sql.database import Schema
from ray_sql.display import Display
from ray_sql.errors import ContractError
from ray_sql.evaluate import scoring
from ray_sql.evaluate.endpoint import Endpoint, Turns
from ray_sql.generate import Answer, AnswerCache, Question
from ray_sql.metrics.judged import Evaluation, JudgedRow
from ray_sql.store import storage
from ray_sql.store.run_folder import AdapterFolder, RunFolder
from ray_sql.store.weights import require_whole
from ray_sql.tasks import TASKS, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


DECODING = {
    *("max_new_tokens", "max_num_seqs", "num_beams", "samples", "temperature", "top_p"),
    "ground",
}
"""Settings that answers depend on."""


def evaluate_models(
    config: Config,
    questions: Sequence[Question],
    schemas: Mapping[str, Schema],
    model_folder: str,
    adapter: str | None,
    display: Display,
    on_event: cluster.OnEvent,
    called: Mapping[str, str] | None = None,
) -> Evaluation:
    """Return the judged answers of the base model, of the base with `adapter`, or of both.

    The base model is asked under `evaluate.baseline` and where there is no adapter. Answers of an
    earlier attempt that was cut off are kept. `called` gives the display other names than `base`
    and `tuned`.
    """
    wanted = ["base"] if config.evaluate.baseline or adapter is None else []
    if adapter:
        wanted.append("tuned")
    shown = {model: (called or {}).get(model, model) for model in wanted}
    names = None
    if config.evaluate.ground == "constrain":
        names = {question.db_id: schemas[question.db_id].lower_names() for question in questions}
    answers = _ask(config, questions, model_folder, adapter, shown, names, display, on_event)
    task, settings = TASKS[config.task_type], config.evaluate
    with scoring.executor(settings) as shared:
        return {
            model: scoring.score(
                questions,
                [answers[model][index] for index in range(len(questions))],
                task,
                settings,
                schemas,
                display.counter(f"executing {shown[model]}'s SQL"),
                shared,
            )
            for model in wanted
        }


def _ask(
    config: Config,
    questions: Sequence[Question],
    model_folder: str,
    adapter: str | None,
    shown: Mapping[str, str],
    names: Mapping[str, Mapping[str, Collection[str]]] | None,
    display: Display,
    on_event: cluster.OnEvent,
) -> dict[str, dict[int, Answer]]:
    """Return the answers of each model by index of the question, asking only those not cached.

    `shown` are the models that are wanted, each with its name for the display.
    """
    adapters = {"base": None, "tuned": adapter}
    caches = {
        model: _answer_cache(config, questions, model_folder, adapters[model]) for model in shown
    }
    answers = {model: cache.read() for model, cache in caches.items()}
    for model, name in shown.items():
        if answers[model]:
            display.line(
                f"{name}: {len(answers[model])} of {len(questions)} answers are there from before "
                f"({caches[model].file})"
            )
    missing = [model for model in shown if len(answers[model]) < len(questions)]
    if not missing:
        return answers

    def keep(event: cluster.Event) -> None:
        if isinstance(event, AnswerGiven):
            caches[event.model].add(event.question, event.answer)
            answers[event.model][event.question] = event.answer
            event = AnswersCounted(shown[event.model], len(answers[event.model]), len(questions))
        on_event(event)

    job = AnswerJob(
        settings=config.for_workers(),
        model_folder=model_folder,
        adapter=adapter,
        models=missing,
        questions=generate.dump(questions),
        known={model: dict(answers[model]) for model in missing},
        caches={model: str(caches[model].file) for model in missing},
        names=names,
    )
    display.starting("the models that answer")
    outcome = cluster.run_workers(
        generate.answer_loop_per_worker, job, config.scaling, config.run_dir, keep
    )
    for model, answered in outcome.answers.items():
        answers[model] = dict(answered)
        caches[model].write(answers[model])
    return answers


def scored_questions(
    corpus: Corpus, tokenizer: PreTrainedTokenizerBase, config: Config, links: AskedLinks
) -> list[Question]:
    """Return the questions of `config.split`, at most `evaluate.limit` of each split.

    `links` make their schemas smaller.
    """
    encoder = generate.question_encoder(tokenizer, config, corpus.schemas)
    questions = []
    for split in config.split:
        examples = data.sample(corpus.splits[split], config.evaluate.limit, config.seed)
        questions += generate.make_questions(examples, split, corpus, encoder, links)
    return questions


def scored_conversations(
    corpus: Corpus, tokenizer: PreTrainedTokenizerBase, config: Config, links: AskedLinks
) -> list[Turns]:
    """Return the prompts of `scored_questions` as turns, for an endpoint."""
    encoder = generate.question_encoder(tokenizer, config, corpus.schemas)
    return [
        encoder.question_turns(example, links.show(split, example, corpus.schemas).schema)
        for split in config.split
        for example in data.sample(corpus.splits[split], config.evaluate.limit, config.seed)
    ]


def evaluate_endpoint(
    settings: AnswersSection,
    questions: Sequence[Question],
    conversations: Sequence[Turns],
    schemas: Mapping[str, Schema],
    task: Task,
    display: Display,
) -> list[JudgedRow]:
    """Return the judged answers of the endpoint at `evaluate.url`."""
    endpoint = Endpoint.find(settings)
    asking = display.counter(f"asking {endpoint.model}")
    answers = endpoint.answer_all(conversations, settings.max_new_tokens, asking)
    executing = display.counter("executing its SQL")
    return scoring.score(questions, answers, task, settings, schemas, executing)


def check_adapter(
    adapter: str, config: Config, tokenizer: PreTrainedTokenizerBase, revision: str | None
) -> None:
    """Raise `ContractError` unless an adapter was trained for this prompt, tokenizer and base.

    Raises `ModelError` if its weights are not those that its contract names.
    """
    saved = AdapterFolder(adapter).read_contract()
    if saved is None:
        raise ContractError(
            f"--adapter {adapter}: holds no contract.json; give the adapter folder of a ray_sql run"
        )
    current = make_contract(config, tokenizer, revision)
    check_contract(saved, current, adapter)
    require_whole(AdapterFolder(adapter))


def _answer_cache(
    config: Config, questions: Sequence[Question], model_folder: str, adapter: str | None
) -> AnswerCache:
    """Return the file that keeps a model's answers.

    Its name changes with everything that answers depend on: weights, precision, limits, prompts,
    and the libraries that compute.
    """
    weights = sorted(
        (file.name, file.stat().st_size, file.stat().st_mtime_ns)
        for file in Path(model_folder).iterdir()
    )
    parts = [
        generate.VERSION,
        model_folder,
        weights,
        adapter_digest(adapter) if adapter else None,
        [
            config.quantization.model_dump(),
            _compute_type(config.train.bf16, config.run_dir, model_folder, config.cache),
            config.scaling.use_gpu,
            config.eval_batch_size,
        ],
        [version(package) for package in ("torch", "transformers", "peft", "bitsandbytes")],
        config.evaluate.model_dump(include=DECODING),
        config.seed if config.evaluate.samples > 1 else None,
        [(question.db_id, question.input_ids) for question in questions],
    ]
    key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]
    return AnswerCache(config.cache / "answers" / f"{key}.jsonl")


def _compute_type(bf16: bool | None, run_dir: str, model_folder: str, cache: Path) -> str:
    """Return the type that a model answers in, as far as this machine is like its workers."""
    if bf16 is None:
        bf16 = RunFolder(run_dir).read_bf16()
    return str(models.compute_dtype(bf16, model_folder, cache))


def adapter_digest(adapter: str) -> str:
    """Return a digest of an adapter's files, at a path or URI."""
    digest = hashlib.sha256()
    with tempfile.TemporaryDirectory(prefix="ray_sql-") as scratch:
        for file in sorted(storage.fetch(adapter, Path(scratch)).glob("adapter_*")):
            digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()
