"""Shared rows compute what separate rows compute: the same loss, the same gradient of every LoRA weight, the same steps."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from ray_sql import models, rows, trainer
from ray_sql.rows import Row, Shared
from ray_sql.rows.share import common_prefix, epoch_order, visible
from tests.conftest import make_model

FAMILIES = {
    "llama": {},
    "qwen2": {"num_key_value_heads": 2},
    "mistral": {"num_key_value_heads": 2, "sliding_window": None, "head_dim": 16},
    "gemma": {"num_key_value_heads": 1, "head_dim": 16},
    "phi3": {"num_key_value_heads": 2, "pad_token_id": 0},
    "gemma2": {"num_key_value_heads": 2, "head_dim": 16, "sliding_window": 4096},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 16},
}


def family(kind: str, folder: Path, **shape: Any) -> Path:
    """A tiny random model of a family, with the tests' tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    make_model(folder)
    vocabulary = len(AutoTokenizer.from_pretrained(folder))
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    made = AutoConfig.for_model(kind, vocab_size=vocabulary, max_position_embeddings=2048, **sizes | FAMILIES[kind] | shape)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(made).save_pretrained(folder)
    return folder


def some_rows(count: int = 12, databases: int = 2, seed: int = 0) -> list[Row]:
    """Random rows on a few databases: 40 tokens of schema, then 5 to 9 of question and 4 to 8 of answer."""
    draw = random.Random(seed)
    schemas = [[draw.randrange(3, 250) for _ in range(40)] for _ in range(databases)]
    made = []
    for number in range(count):
        prompt = schemas[number % databases] + [draw.randrange(3, 250) for _ in range(draw.randint(5, 9))]
        answer = [draw.randrange(3, 250) for _ in range(draw.randint(4, 8))]
        made.append(Row(str(number), f"db{number % databases}", prompt + answer, len(prompt)))
    return made


def gradients(folder: Path, data: list[Row], config: Any, together: int, scratch: Path) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and LoRA gradients of the first step, as the trainer computes them."""
    torch.manual_seed(0)
    base = models.load_base(str(folder), config)
    built = trainer.build(base, models.load_tokenizer(str(folder)), data, config, together, scratch)
    torch.manual_seed(1)
    for name, weight in built.model.named_parameters():
        if "lora_B" in name:  # zero at first, which would hide every gradient of lora_A
            weight.data.normal_(std=0.05)
    model = built.accelerator.prepare(built.model)
    loss = built.training_step(model, next(iter(built.get_train_dataloader())))
    return float(loss), {name: w.grad.clone() for name, w in built.model.named_parameters() if w.requires_grad}


def relative_error(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    """The largest relative difference of any weight's gradient."""
    assert found.keys() == wanted.keys() and all(float(grad.norm()) for grad in wanted.values())
    return max(float((found[name] - grad).norm() / grad.norm()) for name, grad in wanted.items())


@pytest.mark.parametrize("kind", sorted(FAMILIES))
@pytest.mark.parametrize(
    "settings",
    [{"quantization.load_in_4bit": False}, {"train.gradient_checkpointing": True}],
    ids=["fp32", "nf4-checkpointing"],
)
def test_shared_rows_have_the_gradients_of_separate_ones(
    make_config: Any, tmp_path: Path, kind: str, settings: dict[str, Any]
) -> None:
    config = make_config(**settings, **{"lora.lora_dropout": 0, "train_batch_size": 3, "grad_accum_steps": 4})
    folder, data = family(kind, tmp_path / "model"), some_rows()
    assert rows.why_not_share(models.load_base(str(folder), config), 60) is None
    alone = gradients(folder, data, config, 1, tmp_path)
    shared = gradients(folder, data, config, 8, tmp_path)
    assert shared[0] == pytest.approx(alone[0], rel=1e-5)
    assert relative_error(shared[1], alone[1]) < 1e-5


def test_in_bfloat16_they_differ_by_rounding(make_config: Any, tmp_path: Path) -> None:
    config = make_config(**{"lora.lora_dropout": 0, "grad_accum_steps": 12, "train.bf16": True})
    folder, data = family("llama", tmp_path / "model"), some_rows()
    alone, shared = (gradients(folder, data, config, together, tmp_path) for together in (1, 8))
    assert shared[0] == pytest.approx(alone[0], rel=2e-2)
    assert relative_error(shared[1], alone[1]) < 2e-2
