"""docs/scaling.md says what benchmarks.studies.scaling_plan computes, and that computes with what
was measured and what PEFT makes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks.studies import scaling_plan as plan
from ray_sql.config import Config

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "scaling.md").read_text()


def test_the_pages_tables_are_the_scripts() -> None:
    for table in (plan.bytes_table(), plan.steps_table()):
        assert table in PAGE, "run: python -m benchmarks.studies.scaling_plan"


def test_speeds_are_those_of_the_results() -> None:
    text = (
        (ROOT / "benchmarks" / "RESULTS.md").read_text().partition("## A training step on a GPU")[2]
    )
    measured = {
        int(size): float(speed)
        for size, speed in re.findall(r"^\| (\d+) a row \| ([\d.]+) \|", text, re.MULTILINE)
    }
    assert measured == plan.EXAMPLES_PER_SECOND
    shown = {
        int(n): (float(speed), float(seconds))
        for n, speed, seconds in re.findall(
            r"^\| (\d+) \| ([\d.]+) \| (0\.\d+) \|$", PAGE, re.MULTILINE
        )
    }
    assert shown == {size: (speed, round(size / speed, 2)) for size, speed in measured.items()}


@pytest.mark.parametrize("r", [64, 16])
def test_weights_are_as_many_as_peft_makes(r: int) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, Qwen2Config

    shape = Qwen2Config(
        hidden_size=plan.HIDDEN,
        intermediate_size=plan.INNER,
        num_hidden_layers=plan.LAYERS,
        num_attention_heads=12,
        num_key_value_heads=2,
        vocab_size=151936,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape)
        model = get_peft_model(
            model,
            LoraConfig(r=r, target_modules=Config.model_fields["lora"].default.target_modules),
        )
    assert sum(
        weight.numel() for weight in model.parameters() if weight.requires_grad
    ) == plan.lora_parameters(r)
    assert f"{plan.lora_parameters(1):,} x r" in PAGE


def test_where_it_bends() -> None:
    assert plan.passes(2048, 64) == (32,) and plan.passes(2048, 8) == (32,) * 8
    assert plan.passes(64, 2) == (32,), "as many GPUs as the batch has full rows"
    assert plan.passes(64, 8) == (8,) and plan.passes(64, 64) == (1,), (
        "beyond that rows are emptier"
    )
    seconds = [plan.step(64, gpus, "100 Gb/s", 64).seconds for gpus in (2, 64)]
    assert seconds[0] < seconds[1], "and a step takes longer"
    assert plan.sent(64, 1) == 0
