"""Questions → answers, in this process or on the workers of a run."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ray_sql import cluster, models
from ray_sql.cluster.events import AnswerGiven, AnswerJob, AnswerOutcome, DriverLink, Note
from ray_sql.cluster.ranks import agreed, gather_all, rank, world_size
from ray_sql.config import Config
from ray_sql.generate import decoder, hf_generate
from ray_sql.generate.answer_cache import Kept
from ray_sql.generate.ends import Ends
from ray_sql.generate.questions import Answer, Question, parse
from ray_sql.store import storage

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Progress = Callable[[int, int], None]
OnAnswer = Callable[[int, Answer], None]
"""Called with each answer as it comes, and the place of its question among those asked."""
OnWhole = Callable[[str], None]
"""Called with the reason why prompts that share a schema are computed whole."""
Ask = Callable[[str, Sequence[Question], OnAnswer], list[Answer] | None]
"""Answers by the model of a name, on all ranks together; every rank says its own as they come."""

VERSION = 4
"""Raise when the code of this folder makes other answers from the same questions."""


def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    asked: Sequence[Question],
    *,
    max_new_tokens: int,
    batch_size: int = 1,
    together: int | None = None,
    num_beams: int = 1,
    progress: Progress | None = None,
    on_answer: OnAnswer | None = None,
    on_whole: OnWhole | None = None,
) -> list[Answer]:
    """Answers in the order asked: greedy over shared prefixes, `together` questions at once (None: as many as memory allows).

    Beams, and models that cannot share a prefix (`shared.why_not`), go through transformers' `generate`, `batch_size` whole
    prompts of similar length at a time; `on_whole` is told why a model has to. The answers are the same in float32.
    """
    answers: dict[int, Answer] = {}

    def keep(number: int, said: Answer) -> None:
        answers[number] = said
        if on_answer:
            on_answer(number, said)
        if progress:
            progress(len(answers), len(asked))

    from ray_sql.models import cpu_linear  # here: it loads torch, which a driver can do without

    if not asked:
        return []
    training, cached = model.training, model.config.use_cache
    model.eval()
    model.config.use_cache = True
    try:
        with cpu_linear.merged(model):
            longest = max(len(one.input_ids) for one in asked) + max_new_tokens
            reason = decoder.why_not(model, longest) if num_beams == 1 else None
            if reason and on_whole:
                on_whole(reason)
            if num_beams == 1 and reason is None:
                _answer_shared(model, tokenizer, asked, max_new_tokens, together, keep)
            else:
                _answer_plain(model, tokenizer, asked, max_new_tokens, batch_size, num_beams, keep)
    finally:
        model.train(training)
        model.config.use_cache = cached
    return [answers[number] for number in range(len(asked))]


def _answer_shared(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    asked: Sequence[Question],
    max_new_tokens: int,
    together: int | None,
    keep: OnAnswer,
) -> None:
    prompts = [one.input_ids for one in asked]
    ends = Ends(model, tokenizer)

    def finished(number: int, said: list[int], seconds: float) -> None:
        tokens = ends.cut(said)
        keep(number, Answer(ends.text(tokens), len(prompts[number]), len(tokens), seconds))

    groups = decoder.group(prompts, [one.db_id for one in asked])
    decoder.decode(
        model,
        prompts,
        groups,
        max_new_tokens=max_new_tokens,
        together=together,
        ended=ends,
        finished=finished,
    )


def _answer_plain(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    asked: Sequence[Question],
    max_new_tokens: int,
    batch_size: int,
    num_beams: int,
    keep: OnAnswer,
) -> None:
    order = sorted(range(len(asked)), key=lambda number: -len(asked[number].input_ids))
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        said = hf_generate.answer_batch(
            model, tokenizer, [asked[n].input_ids for n in batch], max_new_tokens, num_beams
        )
        for number, one in zip(batch, said, strict=True):
            keep(number, one)


def answer_together(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    asked: Sequence[Question],
    config: Config,
    progress: Progress | None = None,
    *,
    num_beams: int = 1,
    on_answer: OnAnswer | None = None,
    on_whole: OnWhole | None = None,
) -> list[Answer] | None:
    """`answer`, every rank of the process group a share of the databases; all answers on rank 0, None on the others.

    `progress`, `on_answer` and `on_whole` are told of this rank's share.
    """

    def mine(share: Sequence[Question], tell: OnAnswer | None) -> list[Answer]:
        return answer(
            model,
            tokenizer,
            share,
            max_new_tokens=config.evaluate.max_new_tokens,
            batch_size=config.eval_batch_size,
            together=None
            if config.evaluate.max_num_seqs == "auto"
            else config.evaluate.max_num_seqs,
            num_beams=num_beams,
            progress=progress,
            on_answer=tell,
            on_whole=on_whole,
        )

    return _by_all_ranks(asked, config, mine, on_answer)


def _by_all_ranks(
    asked: Sequence[Question],
    config: Config,
    answer_share: Callable[[Sequence[Question], OnAnswer | None], list[Answer]],
    on_answer: OnAnswer | None,
) -> list[Answer] | None:
    shares = spread(asked, world_size(), config.evaluate.max_new_tokens)
    mine = shares[rank()]
    tell = None if on_answer is None else (lambda place, one: on_answer(mine[place], one))
    said = gather_all(answer_share([asked[number] for number in mine], tell))
    return _in_order(shares, said) if rank() == 0 else None


def _in_order(shares: Sequence[Sequence[int]], said: Sequence[Sequence[Answer]]) -> list[Answer]:
    """The ranks' answers in the order asked."""
    answers = {
        number: one
        for share, answers in zip(shares, said, strict=True)
        for number, one in zip(share, answers, strict=True)
    }
    return [answers[number] for number in range(len(answers))]


def spread(asked: Sequence[Question], world: int, max_new_tokens: int) -> list[list[int]]:
    """The numbers of the questions that each rank answers: whole databases, about equal in tokens.

    A database that is more than a rank's fair share is cut into parts, each of which computes its schema again.
    """
    groups = decoder.group([one.input_ids for one in asked], [one.db_id for one in asked])

    def tokens(numbers: Sequence[int], prefix: int) -> int:
        return prefix + sum(
            len(asked[number].input_ids) - prefix + max_new_tokens for number in numbers
        )

    fair = sum(tokens(one.questions, one.prefix) for one in groups) / world
    parts: list[tuple[int, list[int]]] = []
    for one in groups:
        count = min(
            len(one.questions), max(1, round(tokens(one.questions, one.prefix) / max(1.0, fair)))
        )
        cut = [one.questions[start::count] for start in range(count)]
        parts += [(tokens(numbers, one.prefix), numbers) for numbers in cut]
    shares: list[list[int]] = [[] for _ in range(world)]
    load = [0] * world
    for cost, numbers in sorted(parts, key=lambda part: -part[0]):
        to = load.index(min(load))
        load[to] += cost
        shares[to] += numbers
    return shares


def answer_loop_per_worker(job: AnswerJob, driver: DriverLink) -> AnswerOutcome:
    """Answer this worker's share of the questions with each model; rank 0 returns all answers.

    Answers in the files of an earlier attempt are not asked again, where this worker can read
    them. Every answer is sent as it comes.
    """
    config = Config(**job.settings)
    asked = parse(job.questions)
    answers = {}
    with tempfile.TemporaryDirectory(prefix="ray_sql-") as scratch:
        adapter = None
        if "tuned" in job.models:
            assert job.adapter is not None
            adapter = storage.fetch(job.adapter, Path(scratch))
        ask = _load_answerer(job, driver, config, adapter)
        # the base comes first: its layers are changed in place by the adapter's
        for model in job.models:
            # all ranks must agree on the rest; a dead worker's answers may be in the file alone
            known = gather_all({**job.known[model], **Kept(job.caches[model]).read()})[0]
            left = [index for index in range(len(asked)) if index not in known]

            def send(
                place: int, answer: Answer, model: str = model, left: list[int] = left
            ) -> None:
                driver.emit(AnswerGiven(model, left[place], answer))

            new = ask(model, [asked[index] for index in left], send)
            answers[model] = known | dict(zip(left, new or [], strict=False))
    return AnswerOutcome(answers)


def _load_answerer(job: AnswerJob, driver: DriverLink, config: Config, adapter: Path | None) -> Ask:
    model, tokenizer = agreed(
        lambda: models.load_on_node(job.model_folder, config, cluster.claim_device(config.scaling))
    )

    def ask(name: str, asked: Sequence[Question], say: OnAnswer) -> list[Answer] | None:
        nonlocal model
        if name == "tuned" and adapter:
            model = models.load_adapter(model, adapter)

        def note(reason: str) -> None:
            if rank() == 0:
                driver.emit(Note(f"every prompt is computed whole: {reason}"))

        return answer_together(
            model,
            tokenizer,
            asked,
            config,
            num_beams=config.evaluate.num_beams,
            on_answer=say,
            on_whole=note,
        )

    return ask
