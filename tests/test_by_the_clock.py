"""The benchmark by the clock saves what its seconds allow, goes on where it was cut, and draws."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from benchmarks import by_the_clock, shared_rows_quality
from benchmarks.by_the_clock import Cell, Clock, Scale, Setting, paired, table

SMALL = Scale((0.5, 1.0), 0.5, (1, 1), 5, 3, (1e-3,), 2)
"""Seconds in which a tiny model makes some steps, or none on a slow machine."""


def test_an_adapter_is_that_of_the_last_step_within_its_seconds() -> None:
    model, control = torch.nn.Linear(1, 1), SimpleNamespace(should_training_stop=False)
    model.bias.requires_grad = False
    seconds, saved, stopped = 0.0, [], []

    def save(model: Any, budget: float, steps: int, weights: dict[str, torch.Tensor]) -> None:
        nonlocal seconds
        seconds += 100  # of writing, which do not count
        assert list(weights) == ["weight"], "only what is trained"
        saved.append((budget, steps, float(weights["weight"])))

    clock = Clock([5, 10, 12], save, lambda: seconds)
    seconds += 1  # of loading the model
    clock.on_train_begin(None, None, control, model=model)
    for step, took in enumerate([3, 3, 5, 1], start=1):  # they end after 4, 7, 12 and 13 seconds
        seconds += took
        model.weight.data.fill_(step)
        clock.on_step_end(None, SimpleNamespace(global_step=step), control, model=model)
        stopped.append(control.should_training_stop)
    assert saved == [(5, 1, 1.0), (10, 2, 2.0), (12, 3, 3.0)]
    assert stopped == [False, False, False, True]


def test_seconds_without_a_step_save_the_weights_before_it() -> None:
    model, control = torch.nn.Linear(1, 1), SimpleNamespace(should_training_stop=False)
    before, seconds, saved = float(model.weight.detach()), 0.0, []
    clock = Clock([1, 2], lambda *given: saved.append(given[1:]), lambda: seconds)
    clock.on_train_begin(None, None, control, model=model)
    seconds = 9.0
    model.weight.data += 1
    clock.on_step_end(None, SimpleNamespace(global_step=1), control, model=model)
    assert [(budget, steps, float(kept["weight"])) for budget, steps, kept in saved] == [
        (1, 0, before),
        (2, 0, before),
    ]


def test_ways_are_paired_question_by_question() -> None:
    ours, theirs = (
        [Cell(Setting(way, 1e-3, 8, 8), 180, 9, right)]
        for way, right in (("shared", [True] * 7 + [False]), ("trl", [False] * 6 + [True, True]))
    )
    assert paired(ours, theirs) == [{"only_ours": 6, "only_theirs": 1, "p": 0.125}]
    assert "| ours, shared rows (rate 0.001, steps of 8, 8 a row) | 87.5 % [" in table(
        {"trl": theirs, "shared": ours}
    )


@pytest.fixture
def run(
    tiny_model: Path,
    spider_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Any:
    monkeypatch.setattr(by_the_clock, "QUICK", SMALL)
    monkeypatch.setitem(shared_rows_quality.SETTINGS, "cache_dir", str(tmp_path / "cache"))
    monkeypatch.setitem(shared_rows_quality.SETTINGS, "evaluate.max_new_tokens", 8)
    places = ["--model_name", str(tiny_model), "--dataset_id", str(spider_folder)]

    def run() -> Any:
        by_the_clock.main(["--quick", "--output_dir", str(tmp_path / "out"), *places])
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    return run


@pytest.mark.slow
def test_it_chooses_trains_asks_and_goes_on_where_it_was_cut(run: Any, tmp_path: Path) -> None:
    first = run()
    assert list(first["accuracy"]) == list(first["chosen"]) == ["trl", "plain", "shared"]
    assert all(cell["n"] == 3 for cells in first["accuracy"].values() for cell in cells)
    assert len(first["choice_losses"]) == 6
    for way, setting in first["chosen"].items():
        losses = first["choice_losses"]
        least = min(loss for name, loss in losses.items() if name.startswith(way))
        assert losses[Setting(**setting).name] == least
    out = tmp_path / "out"
    assert (out / "by_the_clock.png").stat().st_size > 10_000
    adapters = sorted(out.glob("*/adapter_model.safetensors"))
    assert len(adapters) == 6 and all(load_file(adapter) for adapter in adapters)

    files = [path for path in out.rglob("*") if path.is_file() and path.suffix != ".png"]
    written = {path: path.stat().st_mtime_ns for path in files}
    (cut,) = out.glob("trl-*-0.5s/right.json")
    cut.unlink()
    second = run()
    same = {path for path, time in written.items() if path.stat().st_mtime_ns == time}
    assert written.keys() - same == {cut, out / "settings.json"}, "nothing is trained again"
    assert second["accuracy"] == first["accuracy"]


@pytest.mark.slow
def test_a_folder_of_other_settings_is_refused(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/settings.json").write_text('{"model_name": "another"}')
    with pytest.raises(SystemExit, match="of another run than"):
        run()
