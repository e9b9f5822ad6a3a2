"""Base models: 4-bit weights are NF4's, gradients pass them, and a load that fails says why."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import combinations
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from bitsandbytes.nn import Linear4bit

from ray_sql import models
from ray_sql.errors import ModelError
from ray_sql.models.twin import twin
from tests import hub
from tests.conftest import load_base, make_model


def layers(model: Any) -> list[Linear4bit]:
    return [module for module in model.modules() if isinstance(module, Linear4bit)]


def test_a_layer_multiplies_with_exactly_what_its_4_bits_stand_for(
    tiny_model: Path, make_config: Any
) -> None:
    model = load_base(tiny_model, make_config())
    x = torch.randn(3, 64)
    for layer in layers(model):
        expanded = bitsandbytes.functional.dequantize_4bit(
            layer.weight.data, layer.weight.quant_state
        )
        if layer.in_features == 64:
            assert torch.equal(layer(x), x @ expanded.T.to(x.dtype))
    assert len(layers(model)) == 14, "every linear layer of both blocks is in 4 bits"
    assert all(layer.weight.dtype == torch.uint8 for layer in layers(model))


@pytest.mark.parametrize("bf16", [False, True])
def test_gradients_pass_the_base_model_after_a_forward_in_eval_mode(
    tiny_model: Path, make_config: Any, bf16: bool
) -> None:
    """bitsandbytes 0.50.2 repacks 4-bit weights in eval mode for CPUs with AVX512-BF16.

    The repacked ones have no backward.
    """
    model = load_base(tiny_model, make_config(**{"train.bf16": bf16}))
    embeddings = (
        model.get_input_embeddings()(torch.tensor([[5, 6, 7, 8]])).detach().requires_grad_()
    )

    def gradient() -> torch.Tensor:
        embeddings.grad = None
        model.train()
        model(inputs_embeds=embeddings).logits.float().pow(2).sum().backward()
        assert embeddings.grad is not None
        return embeddings.grad.clone()

    before = gradient()
    model.eval()
    with torch.no_grad():
        model(inputs_embeds=embeddings)
    assert torch.equal(gradient(), before)


def test_double_quantisation_and_no_quantisation_load_too(
    tiny_model: Path, make_config: Any
) -> None:
    double = load_base(tiny_model, make_config(**{"quantization.bnb_4bit_use_double_quant": True}))
    assert all(layer.weight.quant_state.nested for layer in layers(double))
    plain = load_base(tiny_model, make_config(**{"quantization.load_in_4bit": False}))
    assert not layers(plain)


@pytest.mark.parametrize("in_4bit", [True, False])
def test_two_adapters_over_one_base_in_memory_do_not_meet(
    tiny_model: Path, make_config: Any, in_4bit: bool
) -> None:
    from peft import LoraConfig, get_peft_model

    from ray_sql.models.cpu_linear import merged

    model = load_base(tiny_model, make_config(**{"quantization.load_in_4bit": in_4bit}))
    tokens = torch.arange(10)[None]
    places = {weight.data_ptr() for weight in model.parameters()}
    answered = [model(tokens).logits]
    for base in (twin(model), model):
        assert {weight.data_ptr() for weight in base.parameters()} == places
        lora = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
        torch.manual_seed(len(answered))
        tuned = get_peft_model(base, lora).eval()
        with merged(tuned):
            answered.append(tuned(tokens).logits)
    assert not any(torch.allclose(*two, atol=1e-3) for two in combinations(answered, 2))
    with tuned.disable_adapter():
        assert torch.equal(tuned(tokens).logits, answered[0])


def test_a_folder_that_is_no_model_is_refused(tmp_path: Path, make_config: Any) -> None:
    with pytest.raises(ModelError, match=r"holds no config\.json"):
        models.resolve(str(tmp_path), tmp_path / "cache")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ModelError, match="tokenizer cannot be loaded"):
        models.load_tokenizer(str(tmp_path))


def test_an_adapter_of_another_model_is_refused(
    tiny_model: Path, tmp_path: Path, make_config: Any
) -> None:
    from peft import LoraConfig, get_peft_model

    other = load_base(make_model(tmp_path / "other", hidden_size=32), make_config())
    get_peft_model(
        other, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    ).save_pretrained(tmp_path / "a")
    with pytest.raises(ModelError, match="not an adapter for this base model"):
        models.load_adapter(load_base(tiny_model, make_config()), tmp_path / "a")


def ask(stand_in: hub.Hub, home: Path, code: str) -> Any:
    """Return what `code` prints after `resolve` and `on_this_node`, in a process with its cache.

    Such a process stands for another node.
    """
    setup = (
        "import json; from pathlib import Path; from ray_sql import models\n"
        "def resolve(*revision): return models.resolve('me/base', Path('none'), None, *revision)\n"
        "def on_this_node(f): return models.on_this_node(f, 'me/base', Path('none'))\n"
    )
    environment = os.environ | stand_in.environment(home)
    done = subprocess.run(
        [sys.executable, "-c", setup + code],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_a_model_of_the_hub_keeps_its_revision_and_is_fetched_where_it_is_not(
    tiny_model: Path, tmp_path: Path
) -> None:
    files = {file.name: file.read_bytes() for file in tiny_model.iterdir()}
    with hub.running() as stand_in:
        repo = stand_in.add("me/base", files)
        folder, first = ask(stand_in, tmp_path / "a", "print(json.dumps(resolve()))")
        newer = repo.commit(
            "main", "main: changed", files | {"config.json": files["config.json"] + b"\n"}
        ).oid
        both = "print(json.dumps([resolve()[1], resolve({!r})[1]]))"
        assert ask(stand_in, tmp_path / "a", both.format(first)) == [newer, first]
        (tmp_path / "a").rename(tmp_path / "gone")
        there = ask(stand_in, tmp_path / "b", f"print(json.dumps(on_this_node({folder!r})))")
        assert there.startswith(str(tmp_path / "b")) and Path(there).name == first
        assert (Path(there) / "config.json").read_bytes() == files["config.json"]
        (
            weights := Path(there) / "model.safetensors"
        ).unlink()  # as a fetch leaves it that was cut off, or is under way
        there = ask(stand_in, tmp_path / "b", f"print(json.dumps(on_this_node({there!r})))")
        assert weights.read_bytes() == files["model.safetensors"] and Path(there) == weights.parent


def test_a_folder_that_a_node_does_not_see_is_named(make_config: Any, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is not on every node; put it where all see it"):
        models.on_this_node(str(tmp_path / "elsewhere"), "me/base", tmp_path / "cache")
