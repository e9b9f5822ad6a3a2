"""The compute type is the one that this machine was measured to be faster in, for a run's life."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ray_sql import cluster, models, train
from ray_sql.cluster import device
from ray_sql.config import Config
from ray_sql.config.cores import physical_cores, usable_cores
from ray_sql.finetune import plan, prepare
from ray_sql.models import speed
from ray_sql.models.speed import Speed
from ray_sql.store.run_folder import RunFolder

FLOAT32, BFLOAT16 = Speed(1.0, 1.9), Speed(2.3, 1.0)
"""Seconds on a machine that is faster in this type."""
CPU = {"train.bf16": None, "scaling.use_gpu": False}


def plant(monkeypatch: pytest.MonkeyPatch, seconds: Speed) -> None:
    """Let this machine be measured to take these seconds."""
    monkeypatch.setattr(speed, "time_products", lambda products: seconds)


def plan_of(config: Config) -> str:
    lines = [line for line in plan.lines(prepare.prepare(config)) if line.startswith("compute")]
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize(
    ("seconds", "taken", "line"),
    [
        (FLOAT32, torch.float32, "float32: 1.9x as fast as bfloat16 here"),
        (BFLOAT16, torch.bfloat16, "bfloat16: 2.3x as fast as float32 here"),
        (Speed(1.05, 1.0), torch.float32, "float32: 1.0x as fast as bfloat16 here"),
    ],
    ids=["float32", "bfloat16", "a tie"],
)
def test_the_plan_takes_the_faster_type_whatever_the_processors_flags_say(
    seconds: Speed,
    taken: torch.dtype,
    line: str,
    make_config: Any,
    tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: taken == torch.float32)
    plant(monkeypatch, seconds)
    config = make_config(**CPU)
    assert plan_of(config) == f"compute   {line}"
    assert models.compute_dtype(None, str(tiny_model), config.cache, gpu=False) == taken
    assert plan_of(make_config(**CPU | {"train.bf16": False})) == (
        "compute   float32, as --train.bf16 false says"
    )


def test_a_run_goes_on_in_the_type_that_it_began_in(
    make_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = CPU | {"save_steps": 1, "evaluate.select_examples": 0}

    def fit(steps: int) -> Config:
        config: Config = make_config(**changes | {"train.max_steps": steps})
        prepared = prepare.prepare(config)
        prepare.write_inputs(prepared)
        train.fit(config, prepared.model_folder, lambda event: None)
        return config

    plant(monkeypatch, BFLOAT16)
    folder = RunFolder(fit(1).run_dir)
    assert (folder.adapter.read_contract() or {})["compute_type"] == "bfloat16"
    plant(monkeypatch, FLOAT32)
    for file in (make_config().cache / "speed").iterdir():
        file.unlink()  # as on another machine
    assert plan_of(make_config(**changes)) == "compute   bfloat16, as this run began"
    loaded = []
    load_base = models.load_base

    def noted(*given: Any) -> Any:
        loaded.append(load_base(*given).dtype)
        return load_base(*given)

    monkeypatch.setattr(models, "load_base", noted)
    fit(2)
    assert loaded == [torch.bfloat16] and folder.read_bf16()
    assert (folder.adapter.read_contract() or {})["compute_type"] == "bfloat16"
    assert "float32: 1.9x" in plan_of(make_config(**changes | {"overwrite": True}))


def test_a_machine_is_timed_once_for_a_kind_of_model(tmp_path: Path) -> None:
    products = [(64, 64), (64, 128)]
    first = speed.measure_speed(products, tmp_path)
    assert first.float32 > 0 and first.bfloat16 > 0
    (file,) = (tmp_path / "speed").iterdir()
    file.write_text(json.dumps({"float32": 7.0, "bfloat16": 9.0}))
    assert speed.measure_speed(products, tmp_path) == Speed(7.0, 9.0)
    for damage in ("", "[]", '{"float32": "fast"}', '{"float32": -1, "bfloat16": 0}'):
        file.write_text(damage)
        assert speed.measure_speed(products, tmp_path) == first
    speed.measure_speed([(64, 32)], tmp_path)
    assert len(list((tmp_path / "speed").iterdir())) == 2


def test_a_cache_that_cannot_be_written_is_no_reason_to_fail(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert speed.measure_speed([(64, 64)], tmp_path / "file").float32 > 0


def test_widths_beyond_a_bound_are_timed_at_the_bound() -> None:
    assert speed.time_products(((1, 10**7), (10**7, 1))).bfloat16 > 0


@pytest.mark.parametrize(
    ("quota", "cores"),
    [("max 100000", 8), ("400000 100000", 4), ("150000 100000", 2), ("50000 100000", 1)],
)
def test_a_containers_quota_bounds_the_threads(
    quota: str, cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    file = tmp_path / "cpu.max"
    file.write_text(f"{quota}\n")
    assert usable_cores([file]) == cores
    assert usable_cores([tmp_path / "missing"]) == 8
    spent, period = quota.replace("max", "-1").split()
    older = tmp_path / "cpu.cfs_quota_us"
    older.write_text(f"{spent}\n")
    (tmp_path / "cpu.cfs_period_us").write_text(f"{period}\n")
    assert usable_cores([older]) == cores


def test_cores_that_count_as_two_are_counted_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(4)))
    assert physical_cores(tmp_path, []) == 4, "the system does not tell"
    for cpu in range(4):
        place = tmp_path / f"cpu{cpu}" / "topology"
        place.mkdir(parents=True)
        (place / "thread_siblings_list").write_text(f"{cpu % 2},{cpu % 2 + 2}\n")
    assert (physical_cores(tmp_path, []), usable_cores([])) == (2, 4)


@pytest.mark.parametrize(("seconds", "fastest"), [({2: 1.0, 4: 1.5}, 2), ({2: 1.0, 4: 0.7}, 4)])
def test_the_number_of_threads_is_that_of_the_faster_turn(
    seconds: dict[int, float], fastest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = torch.get_num_threads()
    monkeypatch.setattr(
        speed, "_time", lambda products: Speed(seconds[torch.get_num_threads()], 9.0)
    )
    speed.fastest_threads.cache_clear()
    assert speed.fastest_threads((2, 4)) == fastest
    assert torch.get_num_threads() == before
    assert speed.fastest_threads((3,)) == 3, "nothing is timed where there is no choice"
    speed.fastest_threads.cache_clear()


@pytest.mark.parametrize(("parts", "most", "threads"), [(1, None, 4), (2, None, 2), (1, 3, 3)])
def test_processes_share_the_cores(
    parts: int, most: int | None, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = torch.get_num_threads()
    for count in ("usable_cores", "physical_cores"):
        monkeypatch.setattr(device, count, lambda: 4)
    try:
        cluster.set_threads(parts, most)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


def test_layers_of_several_widths_count_by_the_widest() -> None:
    assert models.inner_size(SimpleNamespace(hidden_size=8, intermediate_size=[16, 48])) == 48
    assert models.inner_size(SimpleNamespace(hidden_size=8, intermediate_size=None)) == 32
