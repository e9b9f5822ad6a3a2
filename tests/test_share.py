"""Shared rows compute what separate rows compute: loss, gradients, and optimizer steps."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from ray_sql import rows
from ray_sql.models import packed_attention, seen
from ray_sql.models.seen import Seen, visible
from ray_sql.rows import TokenizedExample, passes, share, step_order
from ray_sql.rows.batch import Steps, collate
from ray_sql.rows.probe import why_not_share
from ray_sql.rows.share import common_prefix, epoch_order, padded_tokens
from tests.conftest import load_base
from tests.sharing import (
    BY_BOTH_ATTENTIONS,
    FAMILIES,
    IN_BOTH_PRECISIONS,
    ONE_EPOCH,
    PASSES_OF_ROWS,
    STEP_OF_SHARED_ROWS,
    assert_shares,
    build,
    family,
    gradients,
    gradients_of,
    relative_error,
    rows_of_questions,
    some_rows,
)


@pytest.mark.parametrize("kind", sorted(FAMILIES))
@IN_BOTH_PRECISIONS
def test_shared_rows_have_the_gradients_of_separate_ones(
    make_config: Any, tmp_path: Path, kind: str, settings: dict[str, Any]
) -> None:
    config = make_config(**settings, **STEP_OF_SHARED_ROWS)
    folder, data = family(kind, tmp_path / "model"), some_rows()
    assert why_not_share(load_base(folder, config), 60, 120) is None
    assert_shares(folder, data, config, tmp_path)


@BY_BOTH_ATTENTIONS
@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma", "phi3"])
def test_a_pass_of_several_shared_rows_has_them_too(
    make_config: Any, tmp_path: Path, kind: str, prepare: Callable[[Any], None]
) -> None:
    config = make_config(**PASSES_OF_ROWS)
    folder, data = family(kind, tmp_path / "model"), some_rows(11)
    made = passes(data, replace(config.batching, examples_per_row=2), 0, 1)
    assert [len(each) for each in made] == [3, 3], "shared rows of several lengths and a plain one"
    assert sorted(bool(row.prefix) for each in made for row in each) == [False] + [True] * 5
    assert_shares(folder, data, config, tmp_path, 2, prepare)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma"])
@pytest.mark.parametrize("task", ["sql", "schema"])
def test_the_same_holds_for_the_prompts_and_answers_of_both_tasks(
    make_config: Any, tmp_path: Path, task: str, kind: str
) -> None:
    config = make_config(task_type=task, **ONE_EPOCH)
    folder = family(kind, tmp_path / "model")
    made = rows_of_questions(folder, config)
    computed, alone_computed = rows.count_tokens(made, config.batching)
    assert computed < 0.8 * alone_computed, "schemas are shared"
    assert_shares(folder, made, config, tmp_path)


def test_attention_weights_that_are_not_kept_are_computed_again(
    make_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(**STEP_OF_SHARED_ROWS)
    folder, data = family("llama", tmp_path / "model"), some_rows()
    kept = gradients(folder, data, config, 8, tmp_path)
    monkeypatch.setattr(packed_attention, "MAX_SAVED_WEIGHTS", 0)
    again = gradients(folder, data, config, 8, tmp_path)
    assert again[0] == kept[0] and relative_error(again[1], kept[1]) < 1e-7


@pytest.mark.parametrize("window", [None, 12])
@pytest.mark.parametrize("heads", [4, 2])
def test_a_block_mask_says_what_the_mask_says(heads: int, window: int | None) -> None:
    made = collate(share(some_rows(9, databases=2), 9, 10_000), pad=0)
    who = Seen(made.segments, made.position_ids, torch.float32)
    draw = torch.Generator().manual_seed(0)
    shape = (len(made.segments), 4, made.segments.shape[1], 16)
    query = torch.randn(shape, generator=draw)
    key, value = torch.randn(2, shape[0], heads, *shape[2:], generator=draw)
    # FlexAttention has no backward on a CPU; tests/test_gpu.py compares gradients
    flexed = packed_attention.flex(query, key, value, who.block_mask(window), 0.3)
    repeated = (tensor.repeat_interleave(4 // heads, dim=1) for tensor in (key, value))
    masked = torch.nn.functional.scaled_dot_product_attention(
        query, *repeated, attn_mask=who.mask(window), scale=0.3
    )
    assert float((flexed - masked).norm() / masked.norm()) < 1e-5


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma"])
def test_in_bfloat16_they_differ_by_rounding(make_config: Any, tmp_path: Path, kind: str) -> None:
    config = make_config(**{"lora.lora_dropout": 0, "grad_accum_steps": 12, "train.bf16": True})
    folder, data = family(kind, tmp_path / "model"), some_rows()
    assert_shares(folder, data, config, tmp_path, farthest=(2e-2, 2e-2))


@pytest.mark.parametrize("batch", [1, 4], ids=["row-a-pass", "rows-a-pass"])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma"])
def test_two_ranks_halves_of_a_step_add_up_to_the_whole(
    make_config: Any, tmp_path: Path, kind: str, batch: int
) -> None:
    parts = {"train_batch_size": batch, "grad_accum_steps": 4 // batch, "scaling.num_workers": 2}
    config = make_config(**{"lora.lora_dropout": 0, **parts})
    folder, data = family(kind, tmp_path / "model"), some_rows(8)
    built = build(folder, data, config, tmp_path)
    alone = replace(config.batching, examples_per_row=1)
    shared = replace(config.batching, examples_per_row=8 // batch)
    wanted = Steps(data, alone, 0, 1, pad=0)[0]
    found = []
    for steps in ([Steps(data, shared, rank, 2, pad=0)[0] for rank in (0, 1)], [wanted]):
        built.model.zero_grad()
        for step in steps:
            built.training_step(built.model, step)
        found.append(gradients_of(built.model))
    assert relative_error(*found) < 1e-5


def test_a_rank_without_an_example_exchanges_gradients_of_nothing(
    make_config: Any, tmp_path: Path
) -> None:
    config = make_config(**{"lora.lora_dropout": 0, "scaling.num_workers": 2})
    folder, data = family("llama", tmp_path / "model"), some_rows(1)
    built = build(folder, data, config, tmp_path)
    idle = Steps(data, config.batching, 1, 2, pad=0)[0]
    assert float(built.training_step(built.model, idle)) == 0 and idle.labels > 0
    assert all(not w.grad.any() for w in built.model.parameters() if w.requires_grad)


@pytest.mark.parametrize("examples_per_row", [1, 3, 8])
def test_every_epoch_sees_every_example_once_in_steps_of_the_global_batch(
    make_config: Any, examples_per_row: int
) -> None:
    config, data = (
        make_config(**{"grad_accum_steps": 5, "num_epochs": 2}),
        some_rows(23, databases=3),
    )
    steps = step_order(data, replace(config.batching, examples_per_row=examples_per_row))
    assert len(steps) == config.batching.steps(23) == 10
    first, second = ([index for step in half for index in step] for half in (steps[:5], steps[5:]))
    assert sorted(first) == sorted(second) == list(range(23)) and first != second
    assert [len(step) for step in steps] == [5, 5, 5, 5, 3] * 2


def test_the_plan_depends_on_the_seed_and_not_on_the_workers(make_config: Any) -> None:
    data = some_rows(23, databases=3)
    one, same, other = (
        step_order(data, replace(make_config(**changes).batching, examples_per_row=8))
        for changes in (
            {"grad_accum_steps": 8},
            {"grad_accum_steps": 4, "scaling.num_workers": 2},
            {"grad_accum_steps": 8, "seed": 15},
        )
    )
    assert one == same != other


def test_groups_follow_each_other_in_a_random_order() -> None:
    databases = ["a"] * 10 + ["b"] * 7 + ["c"]
    order = epoch_order(databases, 4, random.Random(0))
    groups = [[databases[index] for index in order[start : start + 4]] for start in range(0, 18, 4)]
    assert sorted(order) == list(range(18))
    assert sum(len(set(group)) == 1 for group in groups[:4]) == 3, (
        "two of a, one of b, and one of what is left of all three"
    )
    alone = epoch_order(databases, 1, random.Random(0))
    assert sum(databases[one] != databases[two] for one, two in pairwise(alone)) > 5


@pytest.mark.parametrize(
    ("batch", "shared"),
    [
        (1, 1),
        (2, 1),
        (4, 2),
        (8, 4),
        (9, 3),
        (13, 4),
        (14, 2),
        (16, 4),
        (32, 4),
        (36, 6),
        (64, 8),
        (256, 8),
    ],
)
def test_auto_leaves_a_step_rows_of_several_databases(
    make_config: Any, batch: int, shared: int
) -> None:
    automatic, set_to_32 = (
        make_config(**{"grad_accum_steps": batch, "rows.examples_per_row": setting}).batching
        for setting in ("auto", 32)
    )
    assert automatic.examples_per_row == shared
    assert set_to_32.examples_per_row == min(batch, 32)


def test_a_databases_groups_are_spread_over_the_epoch() -> None:
    databases = ["a"] * 64 + ["b"] * 16
    for seed in range(20):
        order = epoch_order(databases, 4, random.Random(seed))
        groups = [databases[order[start]] for start in range(0, 80, 4)]
        fourths = [groups[start : start + 5].count("b") for start in range(0, 20, 5)]
        assert max(fourths) <= 2, (
            f"four of twenty groups are b's, one placed in each fourth: {groups}"
        )


def test_rows_hold_one_database_and_no_more_than_they_may() -> None:
    data = some_rows(20, databases=3)
    made = share(data, 4, 10_000)
    assert sorted(row.id for one in made for row in one.examples) == sorted(row.id for row in data)
    assert all(
        len({row.db_id for row in one.examples}) == 1 and len(one.examples) <= 4 for one in made
    )
    short = share(data, 4, 80)
    assert all(one.tokens <= 80 for one in short if one.prefix) and len(short) > len(made)
    assert all(one.prefix == 40 for one in made if len(one.examples) > 1)


def test_a_question_keeps_a_token_of_its_prompt_even_if_it_is_asked_twice() -> None:
    (row,) = some_rows(1)
    (shared,) = share([row, row, row], 8, 10_000)
    assert shared.prefix == row.prompt_length - 1
    assert common_prefix([row.input_ids, row.input_ids[:7] + [9999]]) == 7


def test_a_trimmed_schema_does_not_cost_the_others_their_prefix() -> None:
    whole = some_rows(4, databases=1)
    trimmed = TokenizedExample(
        "t", whole[0].db_id, [7] + whole[0].input_ids[1:], whole[0].prompt_length
    )
    made = share([*whole[:2], trimmed, *whole[2:]], 8, 10_000)
    assert sorted(one.prefix for one in made) == [0, 40] and len(made) == 2
    part = TokenizedExample(
        "p", whole[0].db_id, whole[0].input_ids[:9] + [7] * 40, whole[0].prompt_length
    )
    assert sorted(one.prefix for one in share([part, *whole], 8, 10_000)) == [0, 40]


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize(("batch", "shared"), [(2, 8), (8, 2), (16, 2)])
def test_ranks_share_a_step_about_equally(
    make_config: Any, world: int, batch: int, shared: int
) -> None:
    data = some_rows(16, databases=2)
    config = make_config(**{"train_batch_size": batch})
    batching = replace(config.batching, examples_per_row=shared)
    shares = [passes(data, batching, rank, world) for rank in range(world)]
    seen = [row.id for each in shares for rows_ in each for one in rows_ for row in one.examples]
    assert sorted(seen) == sorted(row.id for row in data)
    loads = [sum(one.tokens for rows_ in each for one in rows_) for each in shares]
    assert min(loads) > 0.5 * max(loads)
    held = [
        sum(len(one.examples) for one in rows_)
        for each in shares
        for rows_ in each
        if len(rows_) > 1
    ]
    assert all(examples <= batch for examples in held) and bool(held) == (batch > shared)
    assert sum(map(len, shares)) <= world * -(-len(data) // (world * max(batch, shared))) + world


@pytest.mark.parametrize(("batch", "shared"), [(8, 2), (32, 8), (1, 8), (8, 1)])
def test_every_halving_makes_the_largest_pass_smaller(
    make_config: Any, batch: int, shared: int
) -> None:
    data = some_rows(32, databases=4, schema=400)
    config = make_config(
        **{
            "train_batch_size": batch,
            "grad_accum_steps": 32 // batch,
            "rows.examples_per_row": shared,
        }
    )
    computed, sizes = [], []
    for halvings in range(config.batching.examples_per_pass.bit_length()):
        made = passes(data, replace(config.batching, microbatch_halvings=halvings), 0, 1)
        computed.append(max(map(padded_tokens, made)))
        sizes.append(max(sum(len(row.examples) for row in one) for one in made))
    assert (
        sizes == [max(batch, shared) >> halvings for halvings in range(len(sizes))]
        and sizes[-1] == 1
    )
    assert computed == sorted(set(computed), reverse=True), (
        "every pass is smaller than the one before"
    )
    if batch > shared:
        assert computed[1] < 0.6 * computed[0], "rows go first"


def test_rows_of_very_different_lengths_are_passes_of_their_own(make_config: Any) -> None:
    long, short = (
        some_rows(4, databases=1, schema=300),
        [replace(row, db_id="other") for row in some_rows(1, schema=40)],
    )
    batching = replace(make_config(**{"train_batch_size": 8}).batching, examples_per_row=4)
    made = passes([*long, *short], batching, 0, 1)
    assert [len(one) for one in made] == [1, 1], "padding would be most of it"


def test_a_question_sees_the_prefix_and_itself() -> None:
    segments = torch.tensor([[0, 0, 1, 1, 2, 2, -1]])
    positions = torch.tensor([[0, 1, 2, 3, 2, 3, 0]])
    sees = visible(segments, positions)[0]
    assert sees.int().tolist() == [
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0],
        [1, 1, 0, 0, 1, 0, 0],
        [1, 1, 0, 0, 1, 1, 0],
        [1, 1, 0, 0, 0, 0, 1],
    ]


def test_positions_of_a_shared_row_are_those_of_its_examples(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=300, n_positions=60, n_embd=32, n_layer=1, n_head=2)
    )
    assert why_not_share(model, 60, 480) is None, (
        "a row may be longer than the model's last position"
    )


def test_a_window_that_only_our_attention_counts_in_positions_is_refused_elsewhere(
    make_config: Any, tmp_path: Path
) -> None:
    config = make_config(**{"quantization.load_in_4bit": False})
    base = load_base(family("mistral", tmp_path / "model", sliding_window=32), config)
    base.set_attn_implementation("eager")
    assert "window of 32 tokens, but the longest example has 60" in (
        why_not_share(base, 60, 120) or ""
    )
    assert why_not_share(base, 32, 120) is None


def test_positions_that_change_with_a_rows_length_are_refused(
    make_config: Any, tiny_model: Path
) -> None:
    base = load_base(tiny_model, make_config())
    base.config.max_position_embeddings = 60
    base.config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    assert "after 60 tokens" in (why_not_share(base, 80, 160) or "")


def test_a_state_space_model_is_refused(make_config: Any, tmp_path: Path) -> None:
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    model = MambaForCausalLM(
        MambaConfig(vocab_size=300, hidden_size=32, num_hidden_layers=1, state_size=4)
    )
    assert why_not_share(model, 60, 120)


def test_a_model_that_the_fast_attention_fails_for_gets_a_mask(
    make_config: Any, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = load_base(tiny_model, make_config())
    monkeypatch.setattr(seen, "spans", lambda *_: 1 / 0)
    assert why_not_share(base, 60, 120) is None
    assert base.config._attn_implementation == packed_attention.MASKED
    packed_attention.install(base)
    assert base.config._attn_implementation == packed_attention.MASKED, (
        "what failed once is not tried again"
    )


def test_a_model_that_ignores_its_mask_is_refused(make_config: Any, tiny_model: Path) -> None:
    base = load_base(tiny_model, make_config())
    forward = base.forward
    base.forward = lambda attention_mask=None, shared_rows_seen=None, **given: forward(**given)
    assert "gives other logits" in (why_not_share(base, 60, 120) or "")


@pytest.mark.parametrize(
    ("databases", "step", "workers", "setting", "shared"),
    [
        ("a", 8, 1, "auto", 8),
        ("aaa", 16, 1, "auto", 8),
        ("a", 12, 1, "auto", 6),
        ("a", 2, 1, "auto", 2),
        ("a", 8, 4, "auto", 2),  # a row for every worker
        ("ab", 8, 1, "auto", 4),  # a step mixes databases
        ("a", 8, 1, 3, 3),
        ("a", 8, 1, 1, 1),
    ],
)
def test_one_database_has_nothing_to_mix(
    databases: str, step: int, workers: int, setting: Any, shared: int, make_config: Any
) -> None:
    config = make_config(
        **{
            "grad_accum_steps": step // workers,
            "scaling.num_workers": workers,
            "rows.examples_per_row": setting,
        }
    )
    assert config.batching_of(databases).examples_per_row == shared
