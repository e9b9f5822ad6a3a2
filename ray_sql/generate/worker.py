"""A worker's part in answering questions."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from ray_sql import cluster, models
from ray_sql.cluster.events import AnswerGiven, AnswerJob, AnswerOutcome, DriverLink, Note
from ray_sql.cluster.ranks import agreed, gather_all, rank
from ray_sql.config import Config
from ray_sql.generate.answer_cache import AnswerCache
from ray_sql.generate.name_guard import guards
from ray_sql.generate.questions import Answer, parse
from ray_sql.store import storage
from ray_sql.store.run_folder import RunFolder

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load_model(
    folder: str, config: Config, device: torch.device | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the base model that the driver has in `folder` on a worker's device, and a tokenizer.

    All ranks load it in one type. That is set, or what the run began in, or what rank 0 is faster
    in. An error of any rank is raised on all.
    """
    place = agreed(
        lambda: models.on_this_node(folder, config.model_name, config.cache, config.read_token)
    )
    given = config.train.bf16
    if given is None:
        given = RunFolder(config.run_dir).read_bf16()
    on_gpu = cluster.on_gpu(config.scaling)
    dtype = agreed(lambda: models.compute_dtype(given, place, config.cache, on_gpu))
    bf16 = str(gather_all(dtype)[0]) == "torch.bfloat16"
    base = agreed(lambda: models.load_base(place, config.quantization, bf16, device, config.cache))
    return base, agreed(lambda: models.load_tokenizer(place))


def answer_loop_per_worker(job: AnswerJob, driver: DriverLink) -> AnswerOutcome:
    """Answer this worker's share of the questions with each model; rank 0 returns all answers.

    Answers in the files of an earlier attempt are not asked again, where this worker can read
    them. Every answer is sent as it comes.
    """
    # it loads torch, which the driver, who names this function, does without
    from ray_sql.generate.answers import Decoding, answer_on_all_ranks

    config = Config(**job.settings)
    decoding = Decoding.from_settings(config.evaluate, config.eval_batch_size, config.seed)
    questions = parse(job.questions)
    outcome: dict[str, dict[int, Answer]] = {}

    def note_fallback(reason: str) -> None:
        if rank() == 0:
            driver.emit(Note(f"every prompt is computed whole: {reason}"))

    with tempfile.TemporaryDirectory(prefix="ray_sql-") as scratch:
        adapter = None
        if job.adapter and "tuned" in job.models:
            adapter = storage.fetch(job.adapter, Path(scratch))
        device = cluster.claim_device(config.scaling)
        model, tokenizer = load_model(job.model_folder, config, device)
        # the base comes first: its layers are changed in place by the adapter's
        for name in job.models:
            # all ranks must agree on the rest; a dead worker's answers may be in the file alone
            cached = AnswerCache(job.caches[name]).read()
            known = gather_all({**job.known[name], **cached})[0]
            left = [index for index in range(len(questions)) if index not in known]
            if name == "tuned" and adapter:
                model = models.load_adapter(model, adapter, place=job.adapter or "")

            def send(place: int, answer: Answer, name: str = name, left: list[int] = left) -> None:
                driver.emit(AnswerGiven(name, left[place], answer))

            new = answer_on_all_ranks(
                model,
                tokenizer,
                [questions[index] for index in left],
                decoding,
                None if job.names is None else guards(job.names, questions),
                on_answer=send,
                on_fallback=note_fallback,
            )
            outcome[name] = known | dict(zip(left, new or [], strict=False))
    return AnswerOutcome(outcome)
