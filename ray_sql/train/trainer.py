"""TRL's SFTTrainer over tokenised rows: a frozen 4-bit base, a LoRA adapter, loss on the labels.

It knows nothing of Ray. `TrainerHooks` say what happens at a log or a save, and accelerate finds
the other processes from the environment. A checkpoint holds adapter, optimizer, schedule, every
rank's random state and the step. So a resumed run repeats the unbroken one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
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

from ray_sql import cluster
from ray_sql.cluster.events import TrainOutcome
from ray_sql.cluster.ranks import gather_all, rank, world_size
from ray_sql.config import Batching, Config
from ray_sql.errors import ModelError
from ray_sql.models import cpu_linear, packed_attention
from ray_sql.models.patterns import check_patterns
from ray_sql.rows import IGNORED, TokenizedExample, passes
from ray_sql.rows.batch import Pass, Step, Steps, collate, model_inputs
from ray_sql.train.step_clock import StepClock, memory_use

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class TrainerHooks:
    """A caller's actions during training. Their results must be the same on all ranks."""

    on_log: Callable[[int, int, dict[str, float]], None]
    """(step, all steps, values); called on rank 0."""
    on_save: Callable[[int, Path, PreTrainedModel], bool | None]
    """(step, local checkpoint folder, live model); False stops training. It must be done with the
    folder when it returns."""
    on_step: Callable[[int], bool] | None = None
    """(step); called after every step; True saves a checkpoint there."""
    on_begin: Callable[[int, PreTrainedModel], bool | None] | None = None
    """(step, live model); called when a checkpoint, if any, is loaded; False stops training."""


def train(
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[TokenizedExample],
    config: Config,
    batching: Batching,
    hooks: TrainerHooks,
    scratch: Path,
    resume_from: Path | None = None,
) -> TrainOutcome:
    """Train an adapter on `examples`, laid out by `batching`.

    `scratch` is a local folder for checkpoints on their way to `on_save`. `resume_from` is a
    checkpoint's folder of this rank's own.
    """
    trainer = build(base, tokenizer, examples, config, batching, scratch)
    callback = _HookCallback(hooks, scratch, divergence_limit(len(tokenizer)), trainer.clock)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(callback)
    if resume_from:
        fit_random_state(resume_from, trainer.args.process_index, trainer.args.world_size)
    trainer.train(resume_from_checkpoint=str(resume_from) if resume_from else None)
    return TrainOutcome(trainer.state.global_step, trainer.state.max_steps, callback.failure)


class StepTrainer(SFTTrainer):  # type: ignore[misc]  # trl ships no types that mypy can follow
    """SFTTrainer whose batches are whole optimizer steps.

    So the layout of a step in forward passes does not change it. TRL's own loss takes a third
    of a step longer, measured on 2 cores with a 135M model. It multiplies in float32, adds entropy
    and accuracy, and waits for the device at every batch.
    """

    def __init__(self, steps: Steps, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._steps = steps
        self.clock = StepClock(self.args.device)

    def get_train_dataloader(self) -> DataLoader[Step]:
        """Return this rank's part of every optimizer step, one item a step."""
        return DataLoader(self._steps, batch_size=1, collate_fn=itemgetter(0))

    def get_batch_samples(
        self, epoch_iterator: Iterator[Step], num_batches: int, device: Any
    ) -> tuple[list[Step], None]:
        """Return the next steps, and no label count: a step knows its own."""
        self.clock.enter("data")
        # decided before the first step, perhaps: transformers looks after a step only
        if self.control.should_training_stop:
            return [], None
        return list(islice(epoch_iterator, num_batches)), None

    def training_step(
        self,
        model: torch.nn.Module,
        inputs: Step,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """Add the gradients of the mean loss over all ranks' completion tokens in this step."""
        model.train()
        # DDP averages gradients over ranks, while the labels are those of all ranks
        share = self.accelerator.num_processes / inputs.labels
        total = torch.zeros((), device=self.args.device)
        for number, batch in enumerate(inputs.passes, start=1):
            # gradients are exchanged once, after the last pass
            waits = number < len(inputs.passes)
            with self.accelerator.no_sync(model) if waits else nullcontext():
                self.clock.enter("forward")
                with self.compute_loss_context_manager():
                    loss = completion_loss(model, batch, self.model) * share
                self.clock.enter("backward")
                self.accelerator.backward(loss)
            total += loss.detach()
        self.clock.enter("optimizer")
        return total

    def floating_point_ops(self, inputs: Step) -> int:
        """Count nothing: transformers' estimate knows no shared prefix."""
        return 0


def completion_loss(
    model: torch.nn.Module, batch: Pass, inner_model: PreTrainedModel
) -> torch.Tensor:
    """Return the cross entropy summed over the labels of a pass.

    Logits are computed only at places that have a label in some row. In this task a tenth to a
    fifth of a row's tokens have one, and the vocabulary is the widest matrix of a small model. The
    rows of a pass have their labels at different places. `inner_model` is `model` without DDP.
    """
    targets = torch.nn.functional.pad(batch.labels[:, 1:], (0, 1), value=IGNORED)
    places = (targets != IGNORED).any(dim=0).nonzero().flatten()
    targets = targets[:, places].to(inner_model.device, non_blocking=True)
    places = places.to(inner_model.device, non_blocking=True)
    inputs = model_inputs(batch, inner_model)
    logits = model(**inputs, use_cache=False, logits_to_keep=places).logits
    return torch.nn.functional.cross_entropy(
        logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction="sum"
    )


def held_out_loss(
    model: PreTrainedModel,
    examples: Sequence[TokenizedExample],
    batching: Batching,
    rank: int,
    world: int,
    pad: int,
) -> tuple[float, int]:
    """Return one rank's (loss summed over answer tokens, their number), without dropout."""
    training, total, labels = model.training, 0.0, 0
    model.eval()
    half = model.dtype == torch.bfloat16
    try:
        with torch.no_grad(), torch.autocast(model.device.type, torch.bfloat16, enabled=half):
            for rows in passes(examples, batching, rank, world):
                batch = collate(rows, pad)
                total += float(completion_loss(model, batch, model))
                labels += int((batch.labels != IGNORED).sum())
    finally:
        model.train(training)
    return total, labels


def build(
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[TokenizedExample],
    config: Config,
    batching: Batching,
    scratch: Path,
) -> StepTrainer:
    """Return the trainer, with LoRA weights in float32.

    TRL casts them to bfloat16, which cannot hold an update below 0.4 %. Raises `ModelError` for
    settings that the libraries refuse: an unknown optimizer, modules that the model does not have.
    """
    from datasets import Dataset
    from peft import LoraConfig
    from peft.tuners.tuners_utils import BaseTunerLayer

    modules = [name for name, _ in base.named_modules()]
    check_patterns(config.lora.model_dump(), modules, "--lora")
    # TRL wants a dataset; the trainer reads Steps
    first = examples[0]
    dataset = Dataset.from_dict({"input_ids": [first.input_ids], "labels": [first.labels]})
    try:
        steps = batching.steps(len(examples))
        args = arguments(config, scratch, steps, bf16=base.dtype == torch.bfloat16)
        trainer = StepTrainer(
            Steps(examples, batching, args.process_index, args.world_size, tokenizer.pad_token_id),
            model=base,
            args=args,
            train_dataset=dataset,
            processing_class=tokenizer,
            peft_config=LoraConfig(task_type="CAUSAL_LM", **config.lora.model_dump()),
        )
    except ValueError as error:
        reason = " ".join(str(error).split())[:300]
        raise ModelError(
            f"training cannot begin: {reason}; see --train.optim and --lora.target_modules"
        ) from None
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.float32)
    for module in trainer.model.modules():
        if isinstance(module, BaseTunerLayer):
            # autocast casts the factors of a product; peft asks only CUDA's autocast, and on a CPU
            # would cast to and fro
            module.cast_input_dtype_enabled = not args.bf16
            if args.use_cpu and config.lora.lora_dropout:
                module.lora_dropout["default"] = CpuDropout(config.lora.lora_dropout)
    cpu_linear.fuse(trainer.model)
    if batching.examples_per_row > 1:
        packed_attention.install(trainer.model)
    return trainer


class CpuDropout(torch.nn.Module):  # type: ignore[misc]  # torch is not followed by mypy
    """Dropout that draws 16 random bits an element.

    Torch draws 64, one after the other, and on a CPU its dropout takes a quarter of a training
    step. The probability is exact to 1 / 65,536; the scale is that of the probability used.
    """

    def __init__(self, probability: float) -> None:
        super().__init__()
        self._dropped = round(probability * 2**16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return `x`, of any shape; in training with random zeros and the rest scaled."""
        if not self.training:
            return x
        bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
        kept = bits.view(torch.int16)[: x.numel()].view(x.shape) >= self._dropped - 2**15
        # one factor: the backward is one product too
        return x * kept.to(x.dtype).mul_(2**16 / (2**16 - self._dropped))


def arguments(config: Config, scratch: Path, steps: int, bf16: bool) -> SFTConfig:
    """Return TRL's settings. Nothing here may cut or prepare the tokenised rows again."""
    settings, gpu = config.train, cluster.on_gpu(config.scaling)
    checkpointing = settings.gradient_checkpointing
    return SFTConfig(
        output_dir=str(scratch),
        seed=config.seed,
        per_device_train_batch_size=1,  # an item is a whole step
        gradient_accumulation_steps=1,
        learning_rate=config.learning_rate,
        max_steps=steps,
        lr_scheduler_type=settings.lr_scheduler_type,
        warmup_steps=settings.warmup_ratio,  # below 1 it is read as a share of all steps
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        optim=settings.optim or ("paged_adamw_8bit" if gpu else "adamw_torch_fused"),
        bf16=bf16,
        activation_checkpointing=gpu if checkpointing is None else checkpointing,
        logging_steps=min(settings.logging_steps, steps),
        logging_first_step=True,  # the sign that training has begun
        logging_nan_inf_filter=False,  # it would show the last good loss in place of a NaN
        save_strategy="steps",
        save_steps=min(config.save_steps, steps),
        save_total_limit=1,
        use_cpu=not gpu,
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
        dataloader_pin_memory=gpu,
        # no buffer ever changes; the ranks would wait for each other before every pass
        ddp_broadcast_buffers=False,
        # every LoRA weight is used; the search for others costs a pass over the graph
        ddp_find_unused_parameters=False,
        router_aux_loss_coef=0.0,  # the loss is the answers' alone, also of a mixture of experts
        report_to="none",
        disable_tqdm=True,
    )


def divergence_limit(vocabulary: int) -> float:
    """Return a loss half again as bad as guessing every token at random (ln V).

    Only a run that has diverged gets there.
    """
    return 1.5 * math.log(vocabulary)


class _HookCallback(TrainerCallback):  # type: ignore[misc]  # transformers has no types for mypy
    """Calls the hooks, adds where the time went, and stops a run whose loss diverged."""

    def __init__(
        self, hooks: TrainerHooks, scratch: Path, loss_limit: float, clock: StepClock
    ) -> None:
        self._hooks, self._scratch, self._clock = hooks, scratch, clock
        self._loss_limit = loss_limit
        self.failure: str | None = None

    def on_train_begin(
        self, args: Any, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        if self._hooks.on_begin and self._hooks.on_begin(state.global_step, model) is False:
            control.should_training_stop = True

    def on_step_end(
        self, args: Any, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._clock.enter("report")
        if self._hooks.on_step and self._hooks.on_step(state.global_step):
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
        if not math.isfinite(loss) or not math.isfinite(norm) or loss > self._loss_limit:
            self.failure = _divergence(state.global_step, loss, norm, args)
            control.should_training_stop = True
            control.should_save = False
        times = self._clock.read().metrics()
        if state.is_world_process_zero:
            values |= times | memory_use(args.device)
            self._hooks.on_log(state.global_step, state.max_steps, values)

    def on_save(
        self, args: Any, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        trained = (weight for weight in model.parameters() if weight.requires_grad)
        if any(not torch.isfinite(weight).all() for weight in trained):
            self.failure = self.failure or _divergence(state.global_step, math.nan, math.nan, args)
            control.should_training_stop = True
            return  # never kept: a resumed run would start from it
        folder = self._scratch / f"checkpoint-{state.global_step}"
        _gather_random_states(folder)
        if self._hooks.on_save(state.global_step, folder, model) is False:
            control.should_training_stop = True


def _divergence(step: int, loss: float, norm: float, args: Any) -> str:
    return (
        f"the loss diverged by step {step}: loss {loss:.3g}, gradient norm {norm:.3g}. Lower "
        f"--learning_rate (now {args.learning_rate:g}), raise --train.warmup_ratio, lower "
        f"--train.max_grad_norm (now {args.max_grad_norm:g}), or look at the examples of that step"
    )


def _gather_random_states(folder: Path) -> None:
    """Bring every rank's random state into rank 0's folder, which is the one that is kept.

    Each node has only the files of its own ranks.
    """
    if world_size() == 1:
        return
    own = folder / f"rng_state_{rank()}.pth"
    states = gather_all(own.read_bytes() if own.exists() else None)
    if rank() == 0:
        for number, state in enumerate(states):
            if state is not None:
                (folder / f"rng_state_{number}.pth").write_bytes(state)


def fit_random_state(folder: Path, rank: int, world: int) -> None:
    """Write the random state that transformers looks for, whatever the ranks that saved it.

    It is the rank's own, or else rank 0's: at the start of a run all ranks have the same.
    """
    wanted = folder / ("rng_state.pth" if world == 1 else f"rng_state_{rank}.pth")
    candidates = (wanted, folder / "rng_state_0.pth", folder / "rng_state.pth")
    saved = next((file for file in candidates if file.is_file()), None)
    if saved is None:
        return
    with safe_globals():
        state = torch.load(saved, weights_only=True)
    cuda = state.get("cuda")
    if cuda is not None:
        # one process keeps one GPU's state, several keep those of all GPUs they see
        by_gpu = cuda if isinstance(cuda, list) else [cuda]
        count = torch.cuda.device_count()
        state["cuda"] = by_gpu[0] if world == 1 else (by_gpu * count)[:count]
    torch.save(state, wanted)
