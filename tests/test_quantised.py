"""A base model in 4 bits is kept for the next load, the same to the bit, or quantised again."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from transformers import PreTrainedModel

from ray_sql import models
from ray_sql.config.sections import QuantizationSection

NF4 = QuantizationSection()


@pytest.fixture
def quantised(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that grows by one for every weight that is quantised."""
    counted: list[int] = []
    quantize = Params4bit._quantize

    def noted(self: Any, device: Any) -> Any:
        counted.append(1)
        return quantize(self, device)

    monkeypatch.setattr(Params4bit, "_quantize", noted)
    return counted


def load(folder: Path, cache: Path | None, bf16: bool = False, **settings: Any) -> Any:
    section = NF4.model_copy(update=settings)
    return models.load_base(str(folder), section, bf16, torch.device("cpu"), cache)


def state(model: Any) -> list[torch.Tensor]:
    """Return all that a model computes with."""
    expanded = [one.forward.weight for one in model.modules() if isinstance(one, Linear4bit)]
    assert len(expanded) == 14
    logits = model(torch.arange(3, 40)[None]).logits
    return [*model.parameters(), *model.buffers(), *expanded, logits]


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("double", [False, True])
def test_a_kept_model_is_the_same_to_the_bit(
    tiny_model: Path, tmp_path: Path, quantised: list[int], bf16: bool, double: bool
) -> None:
    settings = {"bnb_4bit_use_double_quant": double}
    plain = load(tiny_model, None, bf16, **settings)
    load(tiny_model, tmp_path, bf16, **settings)
    assert len(quantised) == 28
    kept = load(tiny_model, tmp_path, bf16, **settings)
    assert len(quantised) == 28, "the last one was read"
    pairs = zip(state(plain), state(kept), strict=True)
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)
    for mine, other in zip(plain.parameters(), kept.parameters(), strict=True):
        assert mine.requires_grad == other.requires_grad
    assert kept.name_or_path == plain.name_or_path, "PEFT writes it beside the adapter"
    assert kept.config.name_or_path == plain.config.name_or_path
    assert kept.training == plain.training


def test_what_another_load_needs_is_quantised_again(
    tiny_model: Path, tmp_path: Path, quantised: list[int]
) -> None:
    folder, cache = tmp_path / "model", tmp_path / "cache"
    shutil.copytree(tiny_model, folder)
    load(folder, cache)
    for given in ({"bf16": True}, {"bnb_4bit_quant_type": "fp4"}):
        load(folder, cache, **given)  # type: ignore[arg-type]
    weights = folder / "model.safetensors"
    os.utime(weights, ns=(1, weights.stat().st_mtime_ns + 1))
    load(folder, cache)
    assert len(quantised) == 4 * 14
    load(folder, cache, load_in_4bit=False)
    assert len(list((cache / "quantised").iterdir())) == 4


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
@pytest.mark.parametrize("content", [None, b"", b"{}"])
def test_a_damaged_one_is_made_again(
    tiny_model: Path, tmp_path: Path, quantised: list[int], name: str, content: bytes | None
) -> None:
    first = load(tiny_model, tmp_path)
    (place,) = (tmp_path / "quantised").iterdir()
    if content is None:
        (place / name).unlink()
    else:
        (place / name).write_bytes(content)
    again = load(tiny_model, tmp_path)
    assert torch.equal(state(first)[-1], state(again)[-1]) and len(quantised) == 28
    load(tiny_model, tmp_path)
    assert len(quantised) == 28


def test_a_model_that_does_not_come_back_the_same_is_not_kept(
    tiny_model: Path, tmp_path: Path, quantised: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    save = PreTrainedModel.save_pretrained

    def other(self: Any, place: Path) -> None:
        embeddings = self.get_input_embeddings().weight.data
        embeddings[3, 3] += 1
        save(self, place)
        embeddings[3, 3] -= 1

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", other)
    load(tiny_model, tmp_path)
    (place,) = (tmp_path / "quantised").iterdir()
    assert not list(place.iterdir())
    monkeypatch.undo()
    load(tiny_model, tmp_path)
    assert not list(place.iterdir()), "it is not tried again"


def test_a_cache_that_cannot_be_written_costs_nothing_but_time(
    tiny_model: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    assert load(tiny_model, tmp_path / "file").device.type == "cpu"


def test_one_of_several_processes_keeps_it(tiny_model: Path, tmp_path: Path) -> None:
    load(tiny_model, tmp_path)
    (place,) = (tmp_path / "quantised").iterdir()
    other = place.with_name(f"{place.name}.new")
    place.rename(other)
    load(tiny_model, tmp_path)
    assert [*other.parent.iterdir()] == [other], "another process is at it"
    os.utime(other, (1, 1))  # it was killed long ago
    load(tiny_model, tmp_path)
    assert [*other.parent.iterdir()] == [place]


def test_a_model_that_nobody_reads_makes_room(tiny_model: Path, tmp_path: Path) -> None:
    load(tiny_model, tmp_path)
    (place,) = (tmp_path / "quantised").iterdir()
    os.utime(place, (1, 1))
    load(tiny_model, tmp_path)
    load(tiny_model, tmp_path, bf16=True)
    assert place.exists(), "it was just read"
    os.utime(place, (1, 1))
    load(tiny_model, tmp_path, bnb_4bit_quant_type="fp4")
    assert not place.exists() and len([*place.parent.iterdir()]) == 2
