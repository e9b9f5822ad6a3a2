"""TRL's SFTTrainer over tokenised rows: a frozen 4-bit base, a LoRA adapter, loss where the labels are.

Knows nothing of Ray: what should happen at a log or a save is handed in as functions, and the processes it trains with are found by
accelerate from the environment. A checkpoint holds adapter, optimizer, schedule, every rank's random state and the step, so that
a resumed run repeats the unbroken one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_callback import PrinterCallback
from trl import SFTConfig, SFTTrainer

from ray_sql import cluster, models, prompts
from ray_sql.config import Config
from ray_sql.errors import ModelError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

IGNORED = -100
"""The label of a token that carries no loss."""

OnLog = Callable[[int, int, dict[str, float]], None]
"""(step, steps in all, values)"""
OnSave = Callable[[int, Path, "PreTrainedModel"], None]
"""(step, local checkpoint folder, live model); called on every rank"""


@dataclass(frozen=True)
class Outcome:
    """How training ended. `failure` is what to tell the user where the loss diverged."""

    step: int
    steps: int
    failure: str | None


def train(
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    config: Config,
    *,
    scratch: Path,
    resume_from: Path | None,
    on_log: OnLog,
    on_save: OnSave,
) -> Outcome:
    """Train an adapter; `scratch` is a local folder for checkpoints on their way to `on_save`, which must be done with them
    when it returns."""
    watch = _Watch(on_log, on_save, scratch, limit=divergence_limit(len(tokenizer)))
    trainer = build(base, tokenizer, rows, config, scratch)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(watch)
    trainer.train(resume_from_checkpoint=str(resume_from) if resume_from else None)
    return Outcome(trainer.state.global_step, trainer.state.max_steps, watch.failure)


class CompletionTrainer(SFTTrainer):  # type: ignore[misc]  # trl ships no types that mypy can follow
    """SFTTrainer with logits only where a label is: in this task that is a tenth to a fifth of the tokens.

    TRL 1.16 skips the others too, but multiplies in float32, adds entropy and accuracy, and waits for the device at every
    batch: measured on 2 cores with a 135M model, a third of a step.
    """

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """Cross entropy summed over the labels, divided by how many all ranks have in this step."""
        if return_outputs or num_items_in_batch is None:
            raise ValueError("this trainer only trains; models are measured by their answers")
        inputs = dict(inputs)
        targets = torch.nn.functional.pad(inputs.pop("labels")[:, 1:], (0, 1), value=IGNORED)
        keep = (targets != IGNORED).any(dim=0).nonzero().flatten()
        logits = model(**inputs, use_cache=False, logits_to_keep=keep).logits
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1).float(), targets[:, keep].flatten(), ignore_index=IGNORED, reduction="sum"
        )
        # DDP averages gradients over ranks, while the count is that of all ranks together
        return loss / num_items_in_batch * self.accelerator.num_processes


def build(
    base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Dataset, config: Config, scratch: Path
) -> CompletionTrainer:
    """The trainer, with LoRA weights in float32: bfloat16, which TRL casts them to, cannot hold an update below 0.4 %."""
    from peft import LoraConfig
    from peft.tuners.tuners_utils import BaseTunerLayer

    trainer = CompletionTrainer(
        model=base,
        args=arguments(config, scratch, len(rows)),
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=LoraConfig(task_type="CAUSAL_LM", **config.lora.model_dump()),
    )
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.float32)
    for module in trainer.model.modules():
        if isinstance(module, BaseTunerLayer):
            # autocast casts what a layer multiplies; peft asks only CUDA's autocast, and on a CPU would cast to and fro
            module.cast_input_dtype_enabled = not trainer.args.bf16
    return trainer


def arguments(config: Config, scratch: Path, rows: int) -> SFTConfig:
    """TRL's settings. Rows are tokenised and measured already: nothing here may cut or prepare them again."""
    gpu = cluster.on_gpu(config)
    steps = config.steps(rows)
    return SFTConfig(
        output_dir=str(scratch),
        seed=config.seed,
        per_device_train_batch_size=config.train_batch_size,
        gradient_accumulation_steps=config.accumulation,
        learning_rate=config.learning_rate,
        num_train_epochs=config.num_epochs,
        max_steps=config.train.max_steps,
        lr_scheduler_type=config.train.lr_scheduler_type,
        warmup_steps=config.train.warmup_ratio,  # below 1 it is read as a share of all steps
        weight_decay=config.train.weight_decay,
        max_grad_norm=config.train.max_grad_norm,
        optim=config.train.optim or ("paged_adamw_8bit" if gpu else "adamw_torch_fused"),
        bf16=models.compute_dtype(config) == torch.bfloat16,
        activation_checkpointing=gpu
        if config.train.gradient_checkpointing is None
        else config.train.gradient_checkpointing,
        logging_steps=min(config.train.logging_steps, steps),
        logging_nan_inf_filter=False,  # it would show the last good loss in place of a NaN
        save_strategy="steps",
        save_steps=min(config.save_steps, steps),
        save_total_limit=1,
        use_cpu=not gpu,
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
        dataloader_pin_memory=gpu,
        ddp_find_unused_parameters=False,  # every LoRA weight is used; the search for others costs a pass over the graph
        report_to="none",
        disable_tqdm=True,
    )


def divergence_limit(vocabulary: int) -> float:
    """A loss half again as bad as guessing every token at random (ln V) can only come from a run that has diverged."""
    return 1.5 * math.log(vocabulary)


def check_resumable(checkpoint: Path, contract: Mapping[str, Any], config: Config, name: str) -> None:
    """Raise if the checkpoint called `name`, fetched to `checkpoint`, does not continue into this run.

    `ModelError` for another LoRA rank or other modules; `ContractError` for another base model, task or prompt.
    """
    file, signed = checkpoint / "adapter_config.json", checkpoint / "contract.json"
    if not file.is_file() or not signed.is_file():
        raise ModelError(
            f"--prev_checkpoint {name}: holds no adapter_config.json and contract.json; give a checkpoint of a run"
        )
    saved, own = json.loads(file.read_text()), config.lora.model_dump()
    for key in ("r", "lora_alpha", "use_dora", "use_rslora"):
        if saved[key] != own[key]:
            what = "LoRA rank" if key == "r" else key
            raise ModelError(
                f"--prev_checkpoint {name}: its {what} is {saved[key]}, but --lora.{key} is {own[key]}; set --lora.{key} {saved[key]}"
            )
    prompts.check_contract(json.loads(signed.read_text()), contract, f"--prev_checkpoint {name}")


class _Watch(TrainerCallback):  # type: ignore[misc]  # transformers ships no types that mypy can follow
    """Passes logs and saves on, and stops a run whose loss is no number or exploding."""

    def __init__(self, on_log: OnLog, on_save: OnSave, scratch: Path, limit: float) -> None:
        self._on_log, self._on_save, self._scratch, self._limit = on_log, on_save, scratch, limit
        self.failure: str | None = None

    def on_log(
        self, args: Any, state: TrainerState, control: TrainerControl, logs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        values = {key: float(value) for key, value in (logs or {}).items() if isinstance(value, int | float)}
        loss, norm = values.get("loss"), values.get("grad_norm", 0.0)
        if loss is None:
            return  # the summary that ends a run, not a point of it
        if not math.isfinite(loss) or not math.isfinite(norm) or loss > self._limit:
            self.failure = _divergence(state.global_step, loss, norm, args)
            control.should_training_stop = True
            control.should_save = False
        if state.is_world_process_zero:
            self._on_log(state.global_step, state.max_steps, values)

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any) -> None:
        if any(not torch.isfinite(weight).all() for weight in model.parameters() if weight.requires_grad):
            self.failure = self.failure or _divergence(state.global_step, math.nan, math.nan, args)
            control.should_training_stop = True
            return  # never kept: a resumed run would start from it
        folder = self._scratch / f"checkpoint-{state.global_step}"
        _gather_random_states(folder)
        self._on_save(state.global_step, folder, model)


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
