"""On a GPU: shared rows have the gradients of separate ones, and training and generation work.

    python -m pytest -m gpu tests/test_gpu.py

Needs torch, transformers, peft, trl and bitsandbytes; no network, no Ray and no MLflow."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ray_sql import generate, models
from ray_sql.cluster.events import TrainOutcome
from ray_sql.generate import hf_generate
from ray_sql.generate.answers import Decoding, answer_questions
from ray_sql.models import packed_attention, seen
from ray_sql.rows import passes
from ray_sql.rows.probe import why_not_share
from ray_sql.train import trainer
from ray_sql.train.step_clock import StepClock
from tests.conftest import load_base
from tests.sharing import family, gradients, relative_error, some_rows

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

SHAPES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {
        "hidden_size": 384,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
    },  # six heads a key, as Qwen2.5-1.5B
    "qwen3": {"head_dim": 64},
    "mistral": {"head_dim": 128},
    "gemma": {"head_dim": 256},
    "phi3": {},
    "olmoe": {},
}
LONG = {"schema": 300, "count": 12}
"""Rows of several blocks of FlexAttention."""


@pytest.fixture(autouse=True)
def fresh() -> None:
    """Compute float32 as float32, and meet nothing that was compiled for another test's model."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.compiler.reset()
    packed_attention.flex_works.cache_clear()


def compare(
    folder: Path,
    config: Any,
    scratch: Path,
    prepare: Any = packed_attention.install,
    shared_by: int = 8,
) -> tuple[float, float, list[str]]:
    """Return the relative errors of loss and LoRA gradients, and the attention used.

    Shared rows are compared with separate ones.
    """
    used = []

    def remember(model: Any) -> None:
        prepare(model)
        used.append(model.config._attn_implementation)

    data = some_rows(**LONG)
    (loss, alone), (shared_loss, shared) = (
        gradients(folder, data, config, count, scratch, "cuda:0", remember)
        for count in (1, shared_by)
    )
    return abs(shared_loss / loss - 1), relative_error(shared, alone), used


@pytest.mark.parametrize("kind", sorted(SHAPES))
@pytest.mark.parametrize(
    "prepare", [packed_attention.install, packed_attention.use_mask], ids=["flex", "mask"]
)
def test_shared_rows_have_the_gradients_of_separate_ones(
    make_config: Any, tmp_path: Path, kind: str, prepare: Any
) -> None:
    config = make_config(
        **{"quantization.load_in_4bit": False, "lora.lora_dropout": 0, "grad_accum_steps": 12}
    )
    folder = family(kind, tmp_path / "model", **SHAPES[kind])
    base = load_base(folder, config, "cuda:0")
    prepare(base)
    assert why_not_share(base, 330, 450) is None
    loss, error, used = compare(folder, config, tmp_path, prepare)
    print(f"{kind} {used[-1]}: loss off by {loss:.1e}, gradients by {error:.1e}")
    assert loss < 1e-5 and error < 1e-5


@pytest.mark.parametrize(
    "prepare", [packed_attention.install, packed_attention.use_mask], ids=["flex", "mask"]
)
def test_a_pass_of_several_shared_rows_has_them_too(
    make_config: Any, tmp_path: Path, prepare: Any
) -> None:
    settings = {
        "quantization.load_in_4bit": False,
        "lora.lora_dropout": 0,
        "train_batch_size": 6,
        "grad_accum_steps": 2,
    }
    config, folder = make_config(**settings), family("qwen2", tmp_path / "model", **SHAPES["qwen2"])
    assert [
        len(one)
        for one in passes(some_rows(**LONG), replace(config.batching, examples_per_row=2), 0, 1)
    ] == [3, 3]
    loss, error, used = compare(folder, config, tmp_path, prepare, shared_by=2)
    print(f"{used[-1]}: loss off by {loss:.1e}, gradients by {error:.1e}")
    assert loss < 1e-5 and error < 1e-5
    assert used[-1] == (
        packed_attention.NAME if prepare is packed_attention.install else packed_attention.MASKED
    )


def test_flex_attention_is_what_a_gpu_uses(make_config: Any, tmp_path: Path) -> None:
    for kind, dtype in (("llama", True), ("qwen2", True), ("qwen2", False)):
        config = make_config(**{"train.bf16": dtype})
        base = load_base(
            family(kind, tmp_path / f"{kind}-{dtype}", **SHAPES[kind]), config, "cuda:0"
        )
        packed_attention.install(base)
        assert base.config._attn_implementation == packed_attention.NAME, "the log says why not"


@pytest.mark.parametrize(
    "prepare", [packed_attention.install, packed_attention.use_mask], ids=["flex", "mask"]
)
@pytest.mark.parametrize(
    "settings",
    [{"train.bf16": True}, {"train.bf16": True, "train.gradient_checkpointing": True}],
    ids=["bf16-nf4", "bf16-nf4-checkpointing"],
)
def test_in_bfloat16_they_differ_by_rounding(
    make_config: Any, tmp_path: Path, settings: dict[str, Any], prepare: Any
) -> None:
    config = make_config(
        **{"train.gradient_checkpointing": False, "lora.lora_dropout": 0, "grad_accum_steps": 12}
        | settings
    )
    loss, error, used = compare(
        family("qwen2", tmp_path / "model", **SHAPES["qwen2"]), config, tmp_path, prepare
    )
    print(f"{used[-1]}: loss off by {loss:.1e}, gradients by {error:.1e}")
    assert loss < 2e-2 and error < 2e-2


@pytest.mark.parametrize(
    "prepare", [packed_attention.install, packed_attention.use_mask], ids=["flex", "mask"]
)
def test_over_nf4_with_checkpointing_the_gradients_are_those_of_separate_rows(
    make_config: Any, tmp_path: Path, prepare: Any
) -> None:
    config = make_config(
        **{
            "train.gradient_checkpointing": True,
            "lora.lora_dropout": 0,
            "grad_accum_steps": 12,
            "train.bf16": False,
        }
    )
    loss, error, used = compare(
        family("qwen2", tmp_path / "model", **SHAPES["qwen2"]), config, tmp_path, prepare
    )
    print(f"{used[-1]}: loss off by {loss:.1e}, gradients by {error:.1e}")
    assert loss < 1e-5 and error < 1e-5


def test_a_wrong_block_mask_is_noticed_and_the_mask_used(
    make_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = load_base(family("llama", tmp_path), make_config(), "cuda:0")
    right = seen.block_mask
    monkeypatch.setattr(
        seen, "block_mask", lambda segments, *rest: right(torch.zeros_like(segments), *rest)
    )
    assert why_not_share(base, 330, 450) is None
    assert base.config._attn_implementation == packed_attention.MASKED


def test_two_steps_of_training_with_the_defaults_of_a_gpu(make_config: Any, tmp_path: Path) -> None:
    config = make_config(**{"train.bf16": None, "grad_accum_steps": 6, "save_steps": 2})
    folder, seen, saved = family("qwen2", tmp_path / "model", **SHAPES["qwen2"]), [], []
    base = load_base(folder, config, "cuda:0")
    tokenizer = models.load_tokenizer(str(folder))
    outcome = trainer.train(
        base,
        tokenizer,
        some_rows(**LONG),
        config,
        replace(config.batching, examples_per_row=8),
        trainer.TrainerHooks(
            on_log=lambda step, steps, values: seen.append(values["loss"]),
            on_save=lambda step, place, model: saved.append(
                (step, sorted(file.name for file in place.iterdir()))
            ),
        ),
        tmp_path / "scratch",
    )
    assert outcome == TrainOutcome(2, 2, None)
    assert len(seen) == 2 and all(
        0 < loss < trainer.divergence_limit(len(tokenizer)) for loss in seen
    )
    assert saved[0][0] == 2 and {"adapter_model.safetensors", "optimizer.pt"} <= set(saved[0][1])
    assert trainer.arguments(config, tmp_path, 2).optim == "paged_adamw_8bit"


def test_answers_on_a_gpu_are_those_of_one_by_one_decoding(
    make_config: Any, tmp_path: Path
) -> None:
    config = make_config(**{"quantization.load_in_4bit": False, "train.bf16": False})
    folder = family("qwen2", tmp_path, **SHAPES["qwen2"])
    model, tokenizer = (load_base(folder, config, "cuda:0"), models.load_tokenizer(str(folder)))
    packed_attention.install(model)
    asked = [
        generate.Question(row.id, "dev", row.db_id, "", "", None, None, row.input_ids)
        for row in some_rows(**LONG)
    ]
    alone = [
        hf_generate.answer_batch(model, tokenizer, [one.input_ids], 24)[0].raw for one in asked
    ]
    assert any(alone)
    for max_num_seqs in (None, 1, 5):
        decoding = Decoding(24, max_num_seqs=max_num_seqs)
        answers = answer_questions(model, tokenizer, asked, decoding)
        assert [one.raw for one in answers] == alone


def test_the_phases_of_a_step_are_its_time_on_the_device() -> None:
    clock, square = StepClock(torch.device("cuda")), torch.rand(4096, 4096, device="cuda")
    square @ square
    torch.cuda.synchronize()
    for phase, times in (("forward", 20), ("backward", 40), ("report", 0)):
        clock.enter(phase)  # type: ignore[arg-type]
        for _ in range(times):
            square @ square
    assert not torch.cuda.current_stream().query(), "the device is at work: nothing was waited for"
    seconds = clock.read().seconds
    assert torch.cuda.current_stream().query(), "reading the clock waits for the device"
    assert seconds["backward"] > seconds["forward"] > seconds["report"]
