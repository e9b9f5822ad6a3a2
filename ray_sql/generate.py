"""Questions → answers: batched greedy generation with a base model and, where given, its adapter.

A `Question` carries everything that asking and scoring need, prompt tokens included, and travels as a line of JSON, so that
generation runs on machines that see neither the dataset nor the databases.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray_sql import checkpoints, cluster, models, prompts
from ray_sql.config import Config, passwordless
from ray_sql.data import Corpus, Example
from ray_sql.linking import LinkError
from ray_sql.rows import encode_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Progress = Callable[[int, int], None]

VERSION = 1
"""Raise when the code below makes other answers from the same questions."""
FENCE = "```"
VALIDATION_FILE = "inputs/validation.jsonl"
"""Where a run's validation questions lie in its folder."""


@dataclass(frozen=True)
class Question:
    """One question, ready to be asked (`input_ids`) and scored (`gold`: SQL, or links as JSON text; `database`: path, URL or None)."""

    id: str
    split: str
    db_id: str
    question: str
    gold: str
    hardness: str | None
    database: str | None
    input_ids: list[int]


@dataclass(frozen=True)
class Answer:
    """What a model said: the raw text, how many tokens it read and wrote, and its share of the batch's seconds."""

    raw: str
    prompt_tokens: int
    new_tokens: int
    seconds: float


def questions(
    examples: Iterable[Example], split: str, corpus: Corpus, tokenizer: PreTrainedTokenizerBase, config: Config
) -> list[Question]:
    """The examples of a split as questions; under task `schema`, gold that cannot be linked becomes an empty `gold`."""
    made = []
    for example in examples:
        try:
            schema = prompts.schema_text(example, corpus.schemas, config)
        except LinkError:  # a reduced form of a schema that its gold does not fit; the question is asked all the same
            schema = prompts.schema_text(example, corpus.schemas, config.changed({"prompt.schema_form": "full"}))
        turns = prompts.messages(config.task_type, schema, example.question, example.evidence)
        made.append(
            Question(
                id=example.id,
                split=split,
                db_id=example.db_id,
                question=example.question,
                gold=gold(example, corpus, config),
                hardness=example.hardness,
                database=corpus.executable(example.db_id),
                input_ids=encode_prompt(tokenizer, prompts.render_prompt(tokenizer, turns)),
            )
        )
    return made


def gold(example: Example, corpus: Corpus, config: Config) -> str:
    """What an answer is compared with: SQL, or links as JSON; empty where the SQL cannot be linked."""
    if config.task_type == "sql":
        return example.gold
    try:
        return json.dumps(prompts.gold_links(example, corpus.schemas))
    except LinkError:
        return ""


def dump(asked: Iterable[Question]) -> str:
    """Questions as JSON lines; a database's password is not written down."""
    return "".join(
        json.dumps(asdict(replace(question, database=passwordless(question.database)))) + "\n" for question in asked
    )


def parse(text: str) -> list[Question]:
    """Questions from JSON lines."""
    return [Question(**json.loads(line)) for line in text.splitlines()]


def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    asked: Sequence[Question],
    *,
    batch_size: int,
    max_new_tokens: int,
    progress: Progress | None = None,
) -> list[Answer]:
    """Greedy answers in the order asked; batches hold prompts of similar length, padded on the left."""
    order = sorted(range(len(asked)), key=lambda index: -len(asked[index].input_ids))
    answers: dict[int, Answer] = {}
    training, cached = model.training, model.config.use_cache
    model.eval()
    model.config.use_cache = True
    try:
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            said = _answer_batch(model, tokenizer, [asked[index].input_ids for index in batch], max_new_tokens)
            answers |= dict(zip(batch, said, strict=True))
            if progress:
                progress(len(answers), len(order))
    finally:
        model.train(training)
        model.config.use_cache = cached
    return [answers[index] for index in range(len(asked))]


def answer_together(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    asked: Sequence[Question],
    config: Config,
    progress: Progress | None = None,
) -> list[Answer] | None:
    """`answer`, every rank of the process group a share of the questions; all answers on rank 0, None on the others.

    `progress` counts this rank's share.
    """
    import torch.distributed as dist

    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    mine = answer(
        model,
        tokenizer,
        asked[rank::world],
        batch_size=config.eval_batch_size,
        max_new_tokens=config.evaluate.max_new_tokens,
        progress=progress,
    )
    parts = gather_all(mine)
    return [parts[index % world][index // world] for index in range(len(asked))] if rank == 0 else None


def gather_all(value: Any) -> list[Any]:
    """Every rank's value, by rank, on every rank."""
    import torch.distributed as dist

    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, value)
    return parts


def answer_loop_per_worker(plan: dict[str, Any]) -> dict[str, Any]:
    """One worker's part of answering `plan["questions"]` with each of `plan["models"]`; rank 0 returns all answers by model.

    A model is `base`, or `tuned`: the base with the adapter at the URI `plan["adapter"]`.
    """
    config = Config(**plan["config"])
    asked = parse(plan["questions"])
    model = models.load_base(plan["model_folder"], config, cluster.claim_device(config))
    tokenizer = models.load_tokenizer(plan["model_folder"])
    said = {}
    with tempfile.TemporaryDirectory(prefix="ray_sql-") as scratch:
        for name in plan["models"]:  # the base comes first: its layers are changed in place by the adapter's
            if name == "tuned":
                model = models.load_adapter(model, checkpoints.fetch(plan["adapter"], Path(scratch) / "adapter"))

            def progress(done: int, total: int, name: str = name) -> None:
                plan["emit"]({"kind": "answers", "model": name, "done": done, "total": total})

            answers = answer_together(model, tokenizer, asked, config, progress)
            said[name] = [asdict(one) for one in answers or []]
    return {"answers": said}


def _answer_batch(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts_ids: list[list[int]], max_new_tokens: int
) -> list[Answer]:
    import torch
    from transformers import GenerationConfig

    started = time.monotonic()
    width = max(map(len, prompts_ids))
    pad = tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts_ids], device=model.device)
    mask = torch.tensor(
        [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts_ids], device=model.device
    )
    stops = _end_tokens(model, tokenizer)
    # a config of our own: a model's own may sample, which would make two evaluations differ
    greedy = GenerationConfig(max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=stops, pad_token_id=pad)
    # autocast as in training: LoRA weights are float32 there, and the same tensors must meet the same arithmetic
    autocast = torch.autocast(model.device.type, torch.bfloat16, enabled=model.dtype == torch.bfloat16)
    with torch.inference_mode(), autocast:
        out = model.generate(
            input_ids=ids,
            attention_mask=mask,
            generation_config=greedy,
            stopping_criteria=[_FencesClosed(tokenizer, width)],
        )
    seconds = (time.monotonic() - started) / len(prompts_ids)
    said = []
    for prompt, row in zip(prompts_ids, out[:, width:].tolist(), strict=True):
        end = next((position for position, token in enumerate(row) if token in stops), len(row))
        while end and row[end - 1] == pad:  # an answer that ended before the longest of its batch
            end -= 1
        text = tokenizer.decode(row[:end], skip_special_tokens=True)
        said.append(Answer(text, len(prompt), end, seconds))
    return said


def _end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that end an answer: the tokenizer's and whatever else the model's own generation config names."""
    own = model.generation_config.eos_token_id if model.generation_config else None
    named = own if isinstance(own, list) else [own]
    return sorted({token for token in [tokenizer.eos_token_id, *named] if token is not None})


class _FencesClosed:
    """Ends an answer once its code block is closed: all that follows would be ignored. Called by transformers after each token."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt_width: int) -> None:
        self._tokenizer, self._start = tokenizer, prompt_width
        self._closed: list[bool] = []

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        import torch

        self._closed = self._closed or [False] * len(input_ids)
        last = self._tokenizer.batch_decode(input_ids[:, -1:])
        for index, piece in enumerate(last):
            if not self._closed[index] and "`" in piece:
                said = self._tokenizer.decode(input_ids[index, self._start :])
                self._closed[index] = said.count(FENCE) >= 2
        return torch.tensor(self._closed, device=input_ids.device)
