"""Fused layers train as peft's do, merged ones answer as theirs do, and both can be undone."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from ray_sql.models import cpu_linear
from tests.conftest import load_base, make_model

IDS = torch.tensor([[5, 6, 7, 8, 9, 10]])


class EveryOther(torch.nn.Module):
    """A dropout that is the same every time."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kept = torch.ones_like(x)
        kept[..., ::2] = 0
        return x * kept * 2


@pytest.fixture
def build(tiny_model: Path, make_config: Any) -> Any:
    def make(bf16: bool = False, **lora: Any) -> Any:
        base = load_base(tiny_model, make_config(**{"train.bf16": bf16}))
        given = {
            "task_type": "CAUSAL_LM",
            "r": 4,
            "lora_alpha": 12,
            "target_modules": "all-linear",
            **lora,
        }
        torch.manual_seed(2)
        model = get_peft_model(base, LoraConfig(**given)).train()
        for name, weight in model.named_parameters():
            if "lora_" in name and "magnitude" not in name:
                weight.data.normal_(std=0.1)
        return model

    return make


def gradients(model: Any, bf16: bool = False) -> dict[str, torch.Tensor]:
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss = model(IDS, labels=IDS).loss
    loss.backward()
    found = {
        name: weight.grad.clone()
        for name, weight in model.named_parameters()
        if weight.requires_grad
    }
    return found | {"loss": loss.detach()}


def fused(model: Any) -> int:
    return sum(
        "forward" in vars(module) and hasattr(module, "lora_A") for module in model.modules()
    )


@pytest.mark.parametrize("dropout", [False, True])
def test_loss_and_gradients_are_pefts(build: Any, dropout: bool) -> None:
    model = build()
    for module in model.modules():
        if dropout and hasattr(module, "lora_dropout"):
            module.lora_dropout["default"] = EveryOther()
    before = gradients(model)
    cpu_linear.fuse(model)
    assert fused(model) == 14
    after = gradients(model)
    assert len(after) == 29
    for name, gradient in before.items():
        assert (after[name] - gradient).norm() <= 1e-5 * gradient.norm(), name
    assert not all(torch.equal(after[name], gradient) for name, gradient in before.items())


def test_in_bfloat16_they_are_as_near_to_exact_ones_as_pefts(build: Any) -> None:
    exact, model = gradients(build()), build(bf16=True)

    def error(found: dict[str, torch.Tensor]) -> float:
        return sum(
            float((found[name] - gradient).norm() / gradient.norm())
            for name, gradient in exact.items()
        )

    pefts = gradients(model, bf16=True)
    cpu_linear.fuse(model)
    ours = gradients(model, bf16=True)
    assert 0 < error(ours) < 1.1 * error(pefts)
    assert {name: gradient.dtype for name, gradient in ours.items()} == {
        name: g.dtype for name, g in pefts.items()
    }


def test_what_is_more_than_two_matrices_stays_pefts(build: Any) -> None:
    model = build(use_dora=True)
    cpu_linear.fuse(model)
    with cpu_linear.merged(model):
        assert fused(model) == 0


def test_biases_that_are_trained_get_their_gradients(
    build: Any, tmp_path: Path, make_config: Any
) -> None:
    folder = make_model(tmp_path, attention_bias=True)
    base = load_base(folder, make_config(**{"train.bf16": False}))
    model = get_peft_model(
        base, LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", bias="lora_only")
    ).train()
    cpu_linear.fuse(model)
    biases = {
        name
        for name, weight in model.named_parameters()
        if weight.requires_grad and name.endswith("bias")
    }
    assert biases and biases <= set(gradients(model))


@pytest.mark.parametrize("fuse", [False, True], ids=["of peft", "fused"])
def test_an_adapter_is_merged_while_it_answers_and_apart_again_after(
    build: Any, fuse: bool
) -> None:
    model = build()
    if fuse:
        cpu_linear.fuse(model)
    with torch.no_grad():
        apart = model(IDS).logits
        with cpu_linear.merged(model):
            together = model(IDS).logits
        torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-4)
        assert not torch.equal(together, apart)
        assert torch.equal(model(IDS).logits, apart) and fused(model) == (14 if fuse else 0)
        with pytest.raises(ZeroDivisionError), cpu_linear.merged(model):
            raise ZeroDivisionError
        assert torch.equal(model(IDS).logits, apart)
        with model.disable_adapter():
            base = model(IDS).logits
        assert not torch.allclose(base, apart, rtol=1e-2, atol=1e-2)
