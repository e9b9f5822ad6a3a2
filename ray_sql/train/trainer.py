"""TRL's SFTTrainer over tokenised rows: a frozen 4-bit base, a LoRA adapter, loss where the labels are.

Knows nothing of Ray: what should happen at a log or a save is handed in as functions, and the processes it trains with are found by
accelerate from the environment. A checkpoint holds adapter, optimizer, schedule, every rank's random state and the step, so that
a resumed run repeats the unbroken one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from itertools import islice
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_pt_utils import safe_globals
from trl import SFTConfig, SFTTrainer

from ray_sql import cluster, models
from ray_sql.cluster.events import TrainOutcome
from ray_sql.config import Batching, Config
from ray_sql.errors import ModelError
from ray_sql.models import cpu_linear, packed_attention
from ray_sql.rows import IGNORED, TokenizedExample, passes
from ray_sql.rows.batch import Pass, Step, Steps, collate, model_inputs
from ray_sql.train.step_clock import StepClock, memory_use

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

OnLog = Callable[[int, int, dict[str, float]], None]
"""(step, steps in all, values)"""
OnSave = Callable[[int, Path, "PreTrainedModel"], bool | None]
"""(step, local checkpoint folder, live model); called on every rank, False (on all alike) stops training"""
OnStep = Callable[[int], bool]
"""(step); called on every rank after every step, True (on all alike) saves a checkpoint there"""
OnBegin = Callable[[int, "PreTrainedModel"], bool | None]
"""(step, live model); called on every rank when a checkpoint, if any, is loaded; as OnSave"""


def train(
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[TokenizedExample],
    config: Config,
    batching: Batching,
    *,
    scratch: Path,
    resume_from: Path | None,
    on_log: OnLog,
    on_save: OnSave,
    on_step: OnStep | None = None,
    on_begin: OnBegin | None = None,
) -> TrainOutcome:
    """Train an adapter on `rows`, laid out by `batching`.

    `scratch` is a local folder for checkpoints on their way to `on_save`, which must be done with
    them when it returns. `resume_from` is a folder of this rank's own.
    """
    trainer = build(base, tokenizer, rows, config, batching, scratch)
    limit = divergence_limit(len(tokenizer))
    watch = _Watch(on_log, on_save, on_step, on_begin, scratch, limit, trainer.clock)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(watch)
    if resume_from:
        fit_random_state(resume_from, trainer.args.process_index, trainer.args.world_size)
    trainer.train(resume_from_checkpoint=str(resume_from) if resume_from else None)
    return TrainOutcome(trainer.state.global_step, trainer.state.max_steps, watch.failure)


class StepTrainer(SFTTrainer):  # type: ignore[misc]  # trl ships no types that mypy can follow
    """SFTTrainer whose batches are whole optimizer steps, so that how a step is laid out in forward passes does not change it.

    TRL's own loss, measured on 2 cores with a 135M model, takes a third of a step longer: it multiplies in float32, adds entropy and
    accuracy, and waits for the device at every batch.
    """

    def __init__(self, steps: Steps, **given: Any) -> None:
        super().__init__(**given)
        self._steps = steps
        self.clock = StepClock(self.args.device)

    def get_train_dataloader(self) -> DataLoader[Step]:
        """One item an optimizer step: this rank's part of it."""
        return DataLoader(self._steps, batch_size=1, collate_fn=itemgetter(0))

    def get_batch_samples(
        self, epoch_iterator: Iterator[Step], num_batches: int, device: Any
    ) -> tuple[list[Step], None]:
        """The next steps; a step knows itself how many labels it has."""
        self.clock.enter("data")
        if (
            self.control.should_training_stop
        ):  # as decided before the first step: transformers looks after a step only
            return [], None
        return list(islice(epoch_iterator, num_batches)), None

    def training_step(
        self,
        model: torch.nn.Module,
        inputs: Step,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """Gradients of the mean loss over all completion tokens that all ranks have in this step."""
        model.train()
        # DDP averages gradients over ranks, while the count is that of all ranks together
        share = self.accelerator.num_processes / inputs.labels
        total = torch.zeros((), device=self.args.device)
        for number, made in enumerate(inputs.passes, start=1):
            waits = number < len(inputs.passes)  # gradients are exchanged once, after the last pass
            with self.accelerator.no_sync(model) if waits else nullcontext():
                self.clock.enter("forward")
                with self.compute_loss_context_manager():
                    loss = completion_loss(model, made, self.model) * share
                self.clock.enter("backward")
                self.accelerator.backward(loss)
            total += loss.detach()
        self.clock.enter("optimizer")
        return total

    def floating_point_ops(self, inputs: Step) -> int:
        """Not counted: transformers' estimate knows no shared prefix."""
        return 0


def completion_loss(model: torch.nn.Module, made: Pass, config_of: PreTrainedModel) -> torch.Tensor:
    """Cross entropy summed over the labels of a pass, with logits only at places that have one in some row.

    In this task a tenth to a fifth of a row's tokens have one, and the vocabulary is the widest matrix of a small model. Rows of a
    pass of several do not have theirs at the same places.
    """
    targets = torch.nn.functional.pad(made.labels[:, 1:], (0, 1), value=IGNORED)
    keep = (targets != IGNORED).any(dim=0).nonzero().flatten()
    wanted, keep = (
        each.to(config_of.device, non_blocking=True) for each in (targets[:, keep], keep)
    )
    logits = model(**model_inputs(made, config_of), use_cache=False, logits_to_keep=keep).logits
    return torch.nn.functional.cross_entropy(
        logits.flatten(0, 1).float(), wanted.flatten(), ignore_index=IGNORED, reduction="sum"
    )


def held_out_loss(
    model: PreTrainedModel,
    rows: Sequence[TokenizedExample],
    batching: Batching,
    rank: int,
    world: int,
    pad: int,
) -> tuple[float, int]:
    """One rank's part of the loss over rows that are not trained on, without dropout: (sum over its answers' tokens, how many)."""
    training, total, labels = model.training, 0.0, 0
    model.eval()
    try:
        autocast = torch.autocast(
            model.device.type, torch.bfloat16, enabled=model.dtype == torch.bfloat16
        )
        with torch.no_grad(), autocast:
            for shared in passes(rows, batching, rank, world):
                made = collate(shared, pad)
                total += float(completion_loss(model, made, model))
                labels += int((made.labels != IGNORED).sum())
    finally:
        model.train(training)
    return total, labels


def build(
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[TokenizedExample],
    config: Config,
    batching: Batching,
    scratch: Path,
) -> StepTrainer:
    """The trainer, with LoRA weights in float32: bfloat16, which TRL casts them to, cannot hold an update below 0.4 %.

    Raises `ModelError` for settings that the libraries refuse: an unknown optimizer, modules that the model does not have.
    """
    from datasets import Dataset
    from peft import LoraConfig
    from peft.tuners.tuners_utils import BaseTunerLayer

    one = Dataset.from_dict(
        {"input_ids": [rows[0].input_ids], "labels": [rows[0].labels]}
    )  # TRL wants one; see Steps
    try:
        args = arguments(config, scratch, batching.steps(len(rows)))
        trainer = StepTrainer(
            Steps(rows, batching, args.process_index, args.world_size, tokenizer.pad_token_id),
            model=base,
            args=args,
            train_dataset=one,
            processing_class=tokenizer,
            peft_config=LoraConfig(task_type="CAUSAL_LM", **config.lora.model_dump()),
        )
    except ValueError as error:
        said = " ".join(str(error).split())[:300]
        raise ModelError(
            f"training cannot begin: {said}; see --train.optim and --lora.target_modules"
        ) from None
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.float32)
    for module in trainer.model.modules():
        if isinstance(module, BaseTunerLayer):
            # autocast casts what a layer multiplies; peft asks only CUDA's autocast, and on a CPU would cast to and fro
            module.cast_input_dtype_enabled = not trainer.args.bf16
            if args.use_cpu and config.lora.lora_dropout:
                module.lora_dropout["default"] = CpuDropout(config.lora.lora_dropout)
    cpu_linear.fuse(trainer.model)
    if batching.examples_per_row > 1:
        packed_attention.install(trainer.model)
    return trainer


class CpuDropout(torch.nn.Module):  # type: ignore[misc]  # torch is not followed by mypy
    """Dropout that draws 16 random bits an element where torch draws 64, one after the other: on a CPU torch's takes a quarter of a
    training step. The probability is exact to 1 / 65,536; the scale is that of the probability used."""

    def __init__(self, probability: float) -> None:
        super().__init__()
        self._dropped = round(probability * 2**16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`x` of any shape with elements set to 0 at random and the others scaled, in training; else `x` itself."""
        if not self.training:
            return x
        bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
        kept = bits.view(torch.int16)[: x.numel()].view(x.shape) >= self._dropped - 2**15
        return x * kept.to(x.dtype).mul_(
            2**16 / (2**16 - self._dropped)
        )  # one factor: the backward is one product too


def arguments(config: Config, scratch: Path, steps: int) -> SFTConfig:
    """TRL's settings. Rows are tokenised and measured already: nothing here may cut or prepare them again."""
    gpu = cluster.on_gpu(config.scaling)
    return SFTConfig(
        output_dir=str(scratch),
        seed=config.seed,
        per_device_train_batch_size=1,  # an item is a whole step
        gradient_accumulation_steps=1,
        learning_rate=config.learning_rate,
        max_steps=steps,
        lr_scheduler_type=config.train.lr_scheduler_type,
        warmup_steps=config.train.warmup_ratio,  # below 1 it is read as a share of all steps
        weight_decay=config.train.weight_decay,
        max_grad_norm=config.train.max_grad_norm,
        optim=config.train.optim or ("paged_adamw_8bit" if gpu else "adamw_torch_fused"),
        bf16=models.compute_dtype(config.train.bf16) == torch.bfloat16,
        activation_checkpointing=gpu
        if config.train.gradient_checkpointing is None
        else config.train.gradient_checkpointing,
        logging_steps=min(config.train.logging_steps, steps),
        logging_first_step=True,  # that it has begun is what one waits for
        logging_nan_inf_filter=False,  # it would show the last good loss in place of a NaN
        save_strategy="steps",
        save_steps=min(config.save_steps, steps),
        save_total_limit=1,
        use_cpu=not gpu,
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
        dataloader_pin_memory=gpu,
        ddp_broadcast_buffers=False,  # none of them ever changes; the ranks would wait for each other before every pass
        ddp_find_unused_parameters=False,  # every LoRA weight is used; the search for others costs a pass over the graph
        router_aux_loss_coef=0.0,  # the loss is the answers' alone, also of a mixture of experts
        report_to="none",
        disable_tqdm=True,
    )


def divergence_limit(vocabulary: int) -> float:
    """A loss half again as bad as guessing every token at random (ln V) can only come from a run that has diverged."""
    return 1.5 * math.log(vocabulary)


class _Watch(TrainerCallback):  # type: ignore[misc]  # transformers ships no types that mypy can follow
    """Passes logs and saves on, with where the time went, and stops a run whose loss is no number or exploding."""

    def __init__(
        self,
        on_log: OnLog,
        on_save: OnSave,
        on_step: OnStep | None,
        on_begin: OnBegin | None,
        scratch: Path,
        limit: float,
        clock: StepClock,
    ) -> None:
        self._on_log, self._on_save, self._on_step, self._on_begin = (
            on_log,
            on_save,
            on_step,
            on_begin,
        )
        self._scratch, self._limit, self._clock = scratch, limit, clock
        self.failure: str | None = None

    def on_train_begin(
        self, args: Any, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        if self._on_begin and self._on_begin(state.global_step, model) is False:
            control.should_training_stop = True

    def on_step_end(
        self, args: Any, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._clock.enter("report")
        if self._on_step and self._on_step(state.global_step):
            control.should_save = True

    def on_log(
        self,
        args: Any,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        values = {
            key: float(value)
            for key, value in (logs or {}).items()
            if isinstance(value, int | float)
        }
        loss, norm = values.get("loss"), values.get("grad_norm", 0.0)
        if loss is None:
            return  # the summary that ends a run, not a point of it
        if not math.isfinite(loss) or not math.isfinite(norm) or loss > self._limit:
            self.failure = _divergence(state.global_step, loss, norm, args)
            control.should_training_stop = True
            control.should_save = False
        reading = self._clock.read()
        if state.is_world_process_zero:
            self._on_log(
                state.global_step,
                state.max_steps,
                values | reading.metrics() | memory_use(args.device),
            )

    def on_save(
        self, args: Any, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        if any(
            not torch.isfinite(weight).all()
            for weight in model.parameters()
            if weight.requires_grad
        ):
            self.failure = self.failure or _divergence(state.global_step, math.nan, math.nan, args)
            control.should_training_stop = True
            return  # never kept: a resumed run would start from it
        folder = self._scratch / f"checkpoint-{state.global_step}"
        _gather_random_states(folder)
        if self._on_save(state.global_step, folder, model) is False:
            control.should_training_stop = True


def _divergence(step: int, loss: float, norm: float, args: Any) -> str:
    return (
        f"the loss diverged by step {step}: loss {loss:.3g}, gradient norm {norm:.3g}. Lower --learning_rate (now "
        f"{args.learning_rate:g}), raise --train.warmup_ratio, lower --train.max_grad_norm (now {args.max_grad_norm:g}), or look "
        "at the examples of that step"
    )


def _gather_random_states(folder: Path) -> None:
    """Bring every rank's random state into rank 0's folder: each node has only its own ranks' files, and rank 0's is what is kept."""
    import torch.distributed as dist

    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    own = folder / f"rng_state_{dist.get_rank()}.pth"
    states: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(states, own.read_bytes() if own.exists() else None)
    if dist.get_rank() == 0:
        for rank, state in enumerate(states):
            if state is not None:
                (folder / f"rng_state_{rank}.pth").write_bytes(state)


def fit_random_state(folder: Path, rank: int, world: int) -> None:
    """Give a rank the random state that transformers looks for in a checkpoint, whatever the number of ranks that saved it: its own, or
    rank 0's, as at the start of a run all ranks have the same."""
    names = ["rng_state.pth"] if world == 1 else [f"rng_state_{rank}.pth"]
    found = [
        folder / name
        for name in (*names, "rng_state_0.pth", "rng_state.pth")
        if (folder / name).is_file()
    ]
    if not found:
        return
    with safe_globals():
        state = torch.load(found[0], weights_only=True)
    if (
        cuda := state.get("cuda")
    ) is not None:  # one process keeps one GPU's, several keep those of all GPUs they see
        each = cuda if isinstance(cuda, list) else [cuda]
        state["cuda"] = (
            each[0]
            if world == 1
            else (each * torch.cuda.device_count())[: torch.cuda.device_count()]
        )
    torch.save(state, folder / names[0])
