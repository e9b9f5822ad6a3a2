"""Layers that slide over a window share: it counts positions, not places in the row."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ray_sql.models import packed_attention
from ray_sql.models.seen import visible
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
    rows_of_questions,
    some_rows,
)

WINDOW = {"sliding_window": 16}
BOTH = WINDOW | {"layer_types": ["sliding_attention", "full_attention"], "head_dim": 16}
SHAPES: dict[str, dict[str, Any]] = {
    "mistral": WINDOW,
    "phi3": WINDOW,
    "gemma2": BOTH | {"attn_logit_softcapping": 0.5},
    "gemma3_text": BOTH | {"num_key_value_heads": 2},
    "gemma4_text": BOTH
    | {
        "num_hidden_layers": 3,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        "num_kv_shared_layers": 1,
        "num_key_value_heads": 2,
        "global_head_dim": 32,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 700,
    },
}
"""Windows shorter than a schema, one of whose scores are capped where they would often be more."""


def sliding(kind: str, folder: Path) -> Path:
    """A tiny random model of a family, whose attention is not sharper than a trained one's.

    Gemma 4 divides scores by nothing. With norms of 1 a rounding in them shows in the gradients.
    `test_float64` has the weights as drawn.
    """
    family(kind, folder, **SHAPES[kind])
    if kind == "gemma4_text":
        change_weights(folder, lambda name, w: w / 8 if name.endswith("q_norm.weight") else w)
    return folder


@pytest.mark.parametrize("kind", SHAPES)
@IN_BOTH_PRECISIONS
def test_shared_rows_have_the_gradients_of_separate_ones(
    make_config: Any, tmp_path: Path, kind: str, settings: dict[str, Any]
) -> None:
    config = make_config(**settings, **STEP_OF_SHARED_ROWS)
    folder, data = sliding(kind, tmp_path / "model"), some_rows()
    base = load_base(folder, config)
    assert why_not_share(base, 60, 120) is None
    assert base.config._attn_implementation == packed_attention.NAME
    assert_shares(folder, data, config, tmp_path)


@BY_BOTH_ATTENTIONS
@pytest.mark.parametrize("kind", SHAPES)
def test_a_pass_of_several_shared_rows_has_them_too(
    make_config: Any, tmp_path: Path, kind: str, prepare: Callable[[Any], None]
) -> None:
    config = make_config(**PASSES_OF_ROWS)
    folder, data = sliding(kind, tmp_path / "model"), some_rows(11)
    assert_shares(folder, data, config, tmp_path, 2, prepare)


@pytest.mark.parametrize("task", ["sql", "schema"])
def test_the_same_holds_for_the_prompts_and_answers_of_both_tasks(
    make_config: Any, tmp_path: Path, task: str
) -> None:
    config = make_config(task_type=task, **ONE_EPOCH)
    folder = family("gemma3_text", tmp_path / "model", **SHAPES["gemma3_text"])
    assert_shares(folder, rows_of_questions(folder, config), config, tmp_path)


def test_a_window_counts_positions() -> None:
    segments = torch.tensor([[0, 0, 0, 1, 1, 2, 2, -1]])
    positions = torch.tensor([[0, 1, 2, 3, 4, 3, 4, 0]])
    assert visible(segments, positions, window=2)[0].int().tolist() == [
        [1, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0, 0],
        [0, 1, 1, 0, 0, 0, 0, 0],
        [0, 0, 1, 1, 0, 0, 0, 0],
        [0, 0, 0, 1, 1, 0, 0, 0],
        [0, 0, 1, 0, 0, 1, 0, 0],
        [0, 0, 0, 0, 0, 1, 1, 0],
        [1, 1, 1, 0, 0, 0, 0, 1],
    ]


def test_a_window_that_a_layer_does_not_say_is_refused(make_config: Any, tmp_path: Path) -> None:
    config = make_config(**{"quantization.load_in_4bit": False})
    base = load_base(family("gemma3_text", tmp_path / "model", **SHAPES["gemma3_text"]), config)
    base.model.layers[0].self_attn.sliding_window = None
    assert "do not say that they slide over 16" in (why_not_share(base, 60, 120) or "")
    assert why_not_share(base, 16, 120) is None


def test_attention_in_chunks_is_refused(make_config: Any, tiny_model: Path) -> None:
    base = load_base(tiny_model, make_config())
    base.config.attention_chunk_size = 32
    assert "cut into chunks of 32 tokens" in (why_not_share(base, 60, 120) or "")
    assert why_not_share(base, 32, 120) is None
