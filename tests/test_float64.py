"""In float64, shared rows have the gradients of separate ones whatever the weights.

Other tests compare in float32, where some random models lose digits to rounding. They give those
milder weights. Here all weights are as transformers draws them.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM

from ray_sql.models import packed_attention
from ray_sql.rows import TokenizedExample
from ray_sql.rows.batch import Steps
from ray_sql.train.trainer import completion_loss
from tests import test_recurrent, test_windows
from tests.test_share import family, relative_error, some_rows

SHAPES = test_recurrent.SHAPES | test_windows.SHAPES


class Float64(TorchFunctionMode):
    """Computes in float64 where a model's code asks for float32."""

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if function is torch.Tensor.float:
            function = torch.Tensor.double

        def wider(value: Any) -> Any:
            return torch.float64 if value is torch.float32 else value

        given = {name: wider(value) for name, value in (kwargs or {}).items()}
        return function(*map(wider, args), **given)


def exact_gradients(
    folder: Path, data: list[TokenizedExample], config: Any, examples_per_row: int
) -> dict[str, torch.Tensor]:
    """Return the gradients that a step has for all weights of the model in a folder."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    packed_attention.install(model)
    batching = replace(config.batching, examples_per_row=examples_per_row)
    step = Steps(data, batching, 0, 1, pad=0)[0]
    assert any(bool((each.segments > 0).any()) for each in step.passes) == (examples_per_row > 1)
    with Float64():
        for each in step.passes:
            loss = completion_loss(model, each, model)
            assert loss.dtype == torch.float64
            loss.backward()
    found = {name: weight.grad for name, weight in model.named_parameters()}
    return {name: grad for name, grad in found.items() if grad is not None}


@pytest.mark.parametrize("kind", SHAPES)
def test_shared_rows_have_the_gradients_of_separate_ones(
    make_config: Any, tmp_path: Path, kind: str
) -> None:
    config = make_config(**{"train_batch_size": 3, "grad_accum_steps": 4})
    folder, data = family(kind, tmp_path / "model", **SHAPES[kind]), some_rows(schema=90)
    alone, shared = (exact_gradients(folder, data, config, count) for count in (1, 8))
    assert relative_error(shared, alone) < 1e-10
