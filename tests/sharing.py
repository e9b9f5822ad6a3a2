"""Models, rows and comparisons for tests of rows that share: loss and gradients of one step."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ray_sql import models, rows
from ray_sql.data import load
from ray_sql.models import packed_attention
from ray_sql.rows import TokenizedExample
from ray_sql.train import trainer
from tests.conftest import load_base, make_encoder, make_model

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"num_key_value_heads": 2},
    "mistral": {"num_key_value_heads": 2, "sliding_window": None, "head_dim": 16},
    "gemma": {"num_key_value_heads": 1, "head_dim": 16},
    "phi3": {"num_key_value_heads": 2, "pad_token_id": 0},
    "gemma2": {"num_key_value_heads": 2, "head_dim": 16, "sliding_window": 4096},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 16},
    "olmoe": {"num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2},
}

IN_BOTH_PRECISIONS = pytest.mark.parametrize(
    "settings",
    [{"quantization.load_in_4bit": False}, {"train.gradient_checkpointing": True}],
    ids=["fp32", "nf4-checkpointing"],
)
BY_BOTH_ATTENTIONS = pytest.mark.parametrize(
    "prepare", [packed_attention.install, packed_attention.use_mask], ids=["by-parts", "mask"]
)
STEP_OF_SHARED_ROWS = {"lora.lora_dropout": 0, "train_batch_size": 3, "grad_accum_steps": 4}
PASSES_OF_ROWS = {"lora.lora_dropout": 0, "train_batch_size": 6, "grad_accum_steps": 2}
ONE_EPOCH = {"lora.lora_dropout": 0, "train_batch_size": 11, "grad_accum_steps": 2}
"""Settings of a first step: of a few rows, of passes of several rows, of all training questions."""


def family(kind: str, folder: Path, **shape: Any) -> Path:
    """A tiny random model of a family, with the tests' tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    make_model(folder)
    vocabulary = len(AutoTokenizer.from_pretrained(folder))
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    made = AutoConfig.for_model(
        kind,
        vocab_size=vocabulary,
        max_position_embeddings=2048,
        **sizes | FAMILIES.get(kind, {}) | shape,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(made).save_pretrained(folder)
    return folder


def some_rows(
    count: int = 12, databases: int = 2, seed: int = 0, schema: int = 40
) -> list[TokenizedExample]:
    """Return random examples on a few databases.

    They have `schema` tokens of schema, then 5 to 9 of question and 4 to 8 of answer.
    """
    draw = random.Random(seed)
    schemas = [[draw.randrange(3, 250) for _ in range(schema)] for _ in range(databases)]
    made = []
    for number in range(count):
        prompt = schemas[number % databases] + [
            draw.randrange(3, 250) for _ in range(draw.randint(5, 9))
        ]
        answer = [draw.randrange(3, 250) for _ in range(draw.randint(4, 8))]
        made.append(
            TokenizedExample(str(number), f"db{number % databases}", prompt + answer, len(prompt))
        )
    return made


def build(
    folder: Path,
    data: list[TokenizedExample],
    config: Any,
    scratch: Path,
    examples_per_row: int | None = None,
    device: str = "cpu",
    prepare: Callable[[Any], None] = packed_attention.install,
) -> Any:
    """Return a trainer whose adapter is not at its beginning; `prepare` gives it its attention."""
    torch.manual_seed(0)
    base = load_base(folder, config, device)
    prepare(base)
    batching = config.batching
    if examples_per_row:
        batching = replace(batching, examples_per_row=examples_per_row)
    built = trainer.build(base, models.load_tokenizer(str(folder)), data, config, batching, scratch)
    torch.manual_seed(1)
    for name, weight in built.model.named_parameters():
        if "lora_B" in name:  # zero at first, which would hide every gradient of lora_A
            weight.data.normal_(std=0.05)
    return built


def gradients_of(model: Any) -> dict[str, torch.Tensor]:
    """Return copies of the gradients of what is trained."""
    return {name: w.grad.clone() for name, w in model.named_parameters() if w.requires_grad}


def gradients(
    folder: Path,
    data: list[TokenizedExample],
    config: Any,
    examples_per_row: int,
    scratch: Path,
    device: str = "cpu",
    prepare: Callable[[Any], None] = packed_attention.install,
) -> tuple[float, dict[str, torch.Tensor]]:
    """Return loss and LoRA gradients of the trainer's first step."""
    built = build(folder, data, config, scratch, examples_per_row, device, prepare)
    if built.args.activation_checkpointing:  # transformers does it when a run begins
        built.model.activation_checkpointing_enable()
    model = built.accelerator.prepare(built.model)
    loss = built.training_step(model, next(iter(built.get_train_dataloader())))
    return float(loss), gradients_of(built.model)


def relative_error(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    """The largest relative difference of any weight's gradient."""
    assert found.keys() == wanted.keys() and all(float(grad.norm()) for grad in wanted.values())
    return max(float((found[name] - grad).norm() / grad.norm()) for name, grad in wanted.items())


def assert_shares(
    folder: Path,
    data: list[TokenizedExample],
    config: Any,
    scratch: Path,
    examples_per_row: int = 8,
    prepare: Callable[[Any], None] = packed_attention.install,
    farthest: tuple[float, float] = (1e-5, 1e-5),
) -> None:
    """Fail unless shared rows have the loss and the gradients of separate ones.

    They may be `farthest` from them, relatively.
    """
    alone = gradients(folder, data, config, 1, scratch)
    shared = gradients(folder, data, config, examples_per_row, scratch, prepare=prepare)
    assert shared[0] == pytest.approx(alone[0], rel=farthest[0])
    assert relative_error(shared[1], alone[1]) < farthest[1]


def rows_of_questions(folder: Path, config: Any) -> list[TokenizedExample]:
    """Return the training examples of a run, for the model of a folder."""
    corpus = load(config)
    encoder = make_encoder(models.load_tokenizer(str(folder)), config, corpus.schemas)
    return rows.build(corpus.splits["train"], encoder, config.rows)[0]


def change_weights(folder: Path, change: Callable[[str, torch.Tensor], torch.Tensor]) -> None:
    """Replace the weights of a model's folder by what `change(name, weight)` returns."""
    file = folder / "model.safetensors"
    weights = {name: change(name, weight) for name, weight in load_file(file).items()}
    save_file(weights, file, {"format": "pt"})
