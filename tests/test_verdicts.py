"""A model that was found to share rows rightly is not tried again, unless anything has changed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ray_sql import finetune
from ray_sql.config import Config
from ray_sql.models import packed_attention, seen
from ray_sql.rows import verdicts
from ray_sql.rows.probe import why_not_share
from tests.conftest import load_base
from tests.test_share import family

LENGTHS = (60, 120)
"""Tokens of the longest example, and of a row."""


def tries(base: Any, cache: Path, lengths: tuple[int, int] = LENGTHS) -> int:
    """Return how often a model was called to tell that it shares rows."""
    forward, called = base.forward, []

    def counted(**given: Any) -> Any:
        called.append(1)
        return forward(**given)

    base.forward = counted
    assert why_not_share(base, *lengths, cache) is None
    base.forward = forward
    return len(called)


@pytest.mark.parametrize("four_bit", [True, False])
def test_a_model_is_tried_once(
    make_config: Any, tiny_model: Path, tmp_path: Path, four_bit: bool
) -> None:
    config = make_config(**{"quantization.load_in_4bit": four_bit})
    assert [tries(load_base(tiny_model, config), tmp_path) for _ in range(3)] == [2, 0, 0]
    kept = load_base(tiny_model, config)
    assert tries(kept, tmp_path) == 0
    assert kept.config._attn_implementation == packed_attention.NAME


def bigger_weight(base: Any) -> None:
    base.model.layers[1].input_layernorm.weight.data[3] += 1e-3


def bigger_scale(base: Any) -> None:
    base.model.layers[1].mlp.up_proj.weight.quant_state.absmax[0] += 1e-3


def other_setting(base: Any) -> None:
    base.config.rms_norm_eps *= 2


def other_attention(base: Any) -> None:
    packed_attention.use_mask(base)


@pytest.mark.parametrize(
    "change",
    [bigger_weight, bigger_scale, other_setting, other_attention],
    ids=lambda change: change.__name__,
)
def test_another_model_is_tried(
    make_config: Any, tiny_model: Path, tmp_path: Path, change: Callable[[Any], None]
) -> None:
    tries(load_base(tiny_model, make_config()), tmp_path)
    base = load_base(tiny_model, make_config())
    change(base)
    assert tries(base, tmp_path) == 2


def test_another_compute_type_family_or_length_is_tried(
    make_config: Any, tiny_model: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    tries(load_base(tiny_model, make_config()), cache)
    assert tries(load_base(tiny_model, make_config(**{"train.bf16": True})), cache) == 2
    assert tries(load_base(family("qwen2", tmp_path / "model"), make_config()), cache) == 2
    for lengths in ((61, 120), (60, 121)):
        assert tries(load_base(tiny_model, make_config()), cache, lengths) == 2
    assert tries(load_base(tiny_model, make_config()), cache) == 0


@pytest.mark.parametrize("library", verdicts.LIBRARIES)
def test_another_version_of_a_library_tries_again(
    make_config: Any,
    tiny_model: Path,
    tmp_path: Path,
    library: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tries(load_base(tiny_model, make_config()), tmp_path)
    found = verdicts.version

    def newer(name: str) -> str:
        return "99.0" if name == library else found(name)

    monkeypatch.setattr(verdicts, "version", newer)
    assert tries(load_base(tiny_model, make_config()), tmp_path) == 2


def test_another_processor_or_code_of_ours_tries_again(
    make_config: Any, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries(load_base(tiny_model, make_config()), tmp_path)
    monkeypatch.setattr(verdicts, "OWN_CODE", ("models",))
    assert tries(load_base(tiny_model, make_config()), tmp_path) == 2
    monkeypatch.setattr(verdicts, "processor", lambda: ["another"])
    assert tries(load_base(tiny_model, make_config()), tmp_path) == 2


def test_a_model_that_needs_a_mask_gets_it_without_a_try(
    make_config: Any, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(seen, "spans", lambda *_: 1 / 0)
        assert why_not_share(load_base(tiny_model, make_config()), *LENGTHS, tmp_path) is None
    base = load_base(tiny_model, make_config())
    assert tries(base, tmp_path) == 0
    assert base.config._attn_implementation == packed_attention.MASKED


def test_a_refusal_is_not_kept(make_config: Any, tiny_model: Path, tmp_path: Path) -> None:
    base = load_base(tiny_model, make_config())
    forward = base.forward
    base.forward = lambda attention_mask=None, shared_rows_seen=None, **given: forward(**given)
    for _ in range(2):
        assert "gives other logits" in (why_not_share(base, *LENGTHS, tmp_path) or "")
    assert not list(tmp_path.rglob("*.json"))


@pytest.mark.parametrize("content", ["", "[]", '{"masked": "perhaps"}', "\0"])
def test_a_damaged_verdict_is_made_again(
    make_config: Any, tiny_model: Path, tmp_path: Path, content: str
) -> None:
    tries(load_base(tiny_model, make_config()), tmp_path)
    (file,) = tmp_path.rglob("*.json")
    whole = file.read_text()
    file.write_text(content)
    assert tries(load_base(tiny_model, make_config()), tmp_path) == 2
    assert file.read_text() == whole


def test_a_cache_that_cannot_be_written_costs_only_time(
    make_config: Any, tiny_model: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    assert tries(load_base(tiny_model, make_config()), tmp_path / "file") == 2


def test_a_run_tries_its_model_once(make_config: Any) -> None:
    changes = {"train.max_steps": 1, "evaluate.select_examples": 0, "overwrite": True}
    adapters = []
    for name in ("first", "second"):
        config: Config = make_config(output_name=name, **changes)
        finetune.run(config)
        adapters.append((Path(config.run_dir) / "adapter/adapter_model.safetensors").read_bytes())
        assert len(list((config.cache / "shared_rows").iterdir())) == 1
    assert adapters[0] == adapters[1]
