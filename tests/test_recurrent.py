"""Layers that carry a state share: a schema goes through one once, for all questions of a row."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ray_sql import finetune, rows
from ray_sql.models import recurrent
from ray_sql.models.recurrent import SharedStates
from ray_sql.models.triangular import InvertedOnce
from ray_sql.rows import passes
from ray_sql.rows.batch import collate
from ray_sql.rows.probe import why_not_share
from tests.conftest import load_base
from tests.sharing import (
    BY_BOTH_ATTENTIONS,
    IN_BOTH_PRECISIONS,
    ONE_EPOCH,
    PASSES_OF_ROWS,
    STEP_OF_SHARED_ROWS,
    assert_shares,
    change_weights,
    family,
    gradients,
    relative_error,
    rows_of_questions,
    some_rows,
)

HEADS = {"num_key_value_heads": 2, "head_dim": 16}
DELTA = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 16, "mamba_chunk_size": 16}
SHAPES: dict[str, dict[str, Any]] = {
    "qwen3_5_text": HEADS | DELTA,
    "lfm2": {"num_key_value_heads": 2, "layer_types": ["conv", "full_attention"]},
    "granitemoehybrid": MAMBA
    | {
        "num_key_value_heads": 2,
        "layer_types": ["linear_attention", "full_attention"],
        "num_local_experts": 0,
        "shared_intermediate_size": 96,
    },
}
"""The families that the docs name: Gated DeltaNet, short convolutions, Mamba-2."""
OTHERS: dict[str, dict[str, Any]] = {
    "qwen3_next": HEADS | DELTA | {"num_experts": 4, "num_experts_per_tok": 2},
    "qwen3_5_moe_text": HEADS | DELTA | {"num_experts": 4, "num_experts_per_tok": 2},
    "olmo_hybrid": DELTA | {"num_key_value_heads": 4, "pad_token_id": 0},
    "lfm2_moe": SHAPES["lfm2"] | {"num_experts": 4, "num_experts_per_tok": 2},
    "bamba": MAMBA | {"num_key_value_heads": 2, "attn_layer_indices": [1]},
    "falcon_h1": MAMBA | {"num_key_value_heads": 2, "mamba_d_ssm": 128},
    "nemotron_h": {
        "num_key_value_heads": 2,
        "head_dim": 16,
        "mamba_num_heads": 4,
        "mamba_head_dim": 32,
        "ssm_state_size": 16,
        "n_groups": 1,
        "chunk_size": 16,
        "layers_block_type": ["mamba", "attention"],
    },
}
"""Families whose layers ask for their state as those do."""
WITHOUT_OUTPUTS = ["in_proj", "q_proj", "v_proj"]
"""Layers for LoRA where peft refuses those that Mamba's fused kernels compute."""


def hybrid(kind: str, folder: Path) -> Path:
    """A tiny random model of a family, whose states fade by up to a half with every token.

    Transformers draws up to a ten-millionth. Then float32 loses four digits to where a chunk of
    tokens begins, in rows of one example too. `test_float64` has the weights as drawn.
    """
    family(kind, folder, **(SHAPES | OTHERS)[kind])

    def faded(name: str, weight: torch.Tensor) -> torch.Tensor:
        if not name.endswith("A_log"):
            return weight
        return torch.linspace(0.01, 0.5, len(weight)).log().to(weight.dtype)

    change_weights(folder, faded)
    return folder


@pytest.mark.parametrize("kind", SHAPES)
@IN_BOTH_PRECISIONS
def test_shared_rows_have_the_gradients_of_separate_ones(
    make_config: Any, tmp_path: Path, kind: str, settings: dict[str, Any]
) -> None:
    config = make_config(**settings, **STEP_OF_SHARED_ROWS)
    folder, data = hybrid(kind, tmp_path / "model"), some_rows(schema=90)
    assert why_not_share(load_base(folder, config), 110, 200) is None
    assert_shares(folder, data, config, tmp_path)


@pytest.mark.parametrize("kind", SHAPES)
def test_in_bfloat16_they_differ_by_rounding(make_config: Any, tmp_path: Path, kind: str) -> None:
    config = make_config(**{"lora.lora_dropout": 0, "grad_accum_steps": 12, "train.bf16": True})
    folder, data = hybrid(kind, tmp_path / "model"), some_rows()
    assert_shares(folder, data, config, tmp_path, farthest=(2e-2, 3e-2))


@pytest.mark.parametrize("kind", OTHERS)
def test_other_families_share_too(make_config: Any, tmp_path: Path, kind: str) -> None:
    settings = {"quantization.load_in_4bit": False, "lora.lora_dropout": 0, "grad_accum_steps": 6}
    if kind in ("falcon_h1", "nemotron_h"):
        settings["lora.target_modules"] = WITHOUT_OUTPUTS
    config = make_config(**settings)
    folder, data = hybrid(kind, tmp_path / "model"), some_rows(6)
    base = load_base(folder, config)
    assert recurrent.has_layers(base)
    assert why_not_share(base, 60, 120) is None
    assert_shares(folder, data, config, tmp_path)


@BY_BOTH_ATTENTIONS
@pytest.mark.parametrize("kind", SHAPES)
def test_a_pass_of_several_shared_rows_has_them_too(
    make_config: Any, tmp_path: Path, kind: str, prepare: Callable[[Any], None]
) -> None:
    config = make_config(**PASSES_OF_ROWS)
    folder, data = hybrid(kind, tmp_path / "model"), some_rows(11)
    made = passes(data, replace(config.batching, examples_per_row=2), 0, 1)
    assert [len(each) for each in made] == [3, 3], "shared rows of several lengths and a plain one"
    assert_shares(folder, data, config, tmp_path, 2, prepare)


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("task", ["sql", "schema"])
def test_the_same_holds_for_the_prompts_and_answers_of_both_tasks(
    make_config: Any, tmp_path: Path, task: str, kind: str
) -> None:
    config = make_config(task_type=task, **ONE_EPOCH)
    folder = hybrid(kind, tmp_path / "model")
    assert_shares(folder, rows_of_questions(folder, config), config, tmp_path)


def test_every_place_of_a_pass_gets_its_own_result() -> None:
    data = some_rows(11, databases=3)
    made = collate([*rows.share(data, 4, 10_000), rows.SharedRow((data[0],), 0)], pad=0)
    hidden = torch.arange(made.segments.numel() * 2.0).view(*made.segments.shape, 2)
    layout = SharedStates.of(made.segments, torch.device("cpu"))
    computed = []

    def call(given: torch.Tensor, state: recurrent.State) -> torch.Tensor:
        computed.append(given.shape[0] * given.shape[1])
        state.conv = state.recurrent = given[:, -1]
        return given

    output = layout.compute(0, call, hidden)
    real = made.segments >= 0
    assert torch.equal(output[real], hidden[real])
    assert not output[~real].any()
    assert sum(computed) < 1.3 * int(real.sum()), "a prefix is computed once"


def test_a_question_begins_with_the_state_of_its_own_prefix() -> None:
    data = some_rows(9, databases=3)
    made = collate(rows.share(data, 3, 10_000), pad=0)
    layout = SharedStates.of(made.segments, torch.device("cpu"))
    hidden = torch.arange(len(made.segments)).view(-1, 1, 1).expand(*made.segments.shape, 1)

    def call(given: torch.Tensor, state: recurrent.State) -> torch.Tensor:
        if state.recurrent is not None:
            assert torch.equal(state.recurrent, given[:, 0]), "of its own row"
        state.conv = state.recurrent = given[:, -1]
        return given

    layout.compute(0, call, hidden)


@pytest.mark.parametrize(
    ("least", "groups"), [(0.7, [[1, 4], [0, 3], [2]]), (0.0, [[1, 4, 0, 3, 2]])]
)
def test_questionsof_like_length_are_computed_together(
    least: float, groups: list[list[int]]
) -> None:
    assert recurrent.of_like_length([60, 100, 8, 45, 70], least) == groups


def test_a_model_whose_layers_are_told_nothing_is_refused(
    make_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(**{"quantization.load_in_4bit": False})
    monkeypatch.setattr(recurrent, "LAYERS", {})
    base = load_base(hybrid("lfm2", tmp_path / "model"), config)
    assert "Lfm2ShortConv carry a state" in (why_not_share(base, 60, 120) or "")


def one_of_two(rank: int, port: int, config: Any, folders: list[Path], scratch: Path) -> None:
    """Save the gradients that a rank of two has after a step, for each model."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= address | ranks
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    for folder in folders:
        found = gradients(folder, some_rows(), config, 8, scratch / str(rank))
        torch.save(found[1], scratch / f"{folder.name}-{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_workers_have_the_gradients_of_one(make_config: Any, tmp_path: Path) -> None:
    folders = [hybrid(kind, tmp_path / kind) for kind in SHAPES]
    settings = {"lora.lora_dropout": 0, "train_batch_size": 3}
    two = make_config(**settings, **{"grad_accum_steps": 2, "scaling.num_workers": 2})
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(one_of_two, (port, two, folders, tmp_path), nprocs=2)
    one = make_config(**settings, **{"grad_accum_steps": 4})
    for folder in folders:
        _, alone = gradients(folder, some_rows(), one, 1, tmp_path)
        ranks = [torch.load(tmp_path / f"{folder.name}-{rank}.pt") for rank in (0, 1)]
        assert relative_error(ranks[0], ranks[1]) == 0, "gradients are exchanged"
        assert relative_error(ranks[0], alone) < 1e-5


def test_a_run_shares_rows_and_schemas(
    make_config: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = hybrid("qwen3_5_text", tmp_path / "model")
    settings = {"train.max_steps": 2, "evaluate.select_examples": 2}
    # more than one example a row, as set here, is refused where a model cannot share
    finetune.run(make_config(model_name=str(folder), **settings))
    assert (tmp_path / "out/run/metrics.json").exists()
    assert "computed whole" not in capsys.readouterr().out


def test_a_system_is_solved_with_the_gradients_of_torchs_solver() -> None:
    draw = torch.Generator().manual_seed(0)

    def solve(mode: Any) -> list[torch.Tensor]:
        draw.manual_seed(0)
        shapes = (2, 3, 20, 20), (2, 3, 20, 7), (2, 3, 20, 5)
        system, *rights = (
            torch.randn(shape, generator=draw, dtype=torch.float64).requires_grad_()
            for shape in shapes
        )
        scaled = 0.1 * system
        with mode:
            solved = [
                torch.linalg.solve_triangular(scaled, right, upper=False, unitriangular=True)
                for right in rights
            ]
        sum((one**2).sum() for one in solved).backward()
        return [*solved, *(one.grad for one in (system, *rights))]  # type: ignore[list-item]

    for ours, theirs in zip(solve(InvertedOnce()), solve(nullcontext()), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    with InvertedOnce():
        upper = torch.linalg.solve_triangular(torch.eye(2), torch.ones(2, 1), upper=True)
    assert upper.tolist() == [[1.0], [1.0]], "another kind of system is torch's own"
