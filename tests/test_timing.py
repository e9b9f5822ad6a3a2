"""Where a step's time goes, and what Ray's dashboard shows of a run."""

from __future__ import annotations

import urllib.request
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from ray_sql import cluster, train
from ray_sql.cluster.events import Event, NodeUsed, TrainJob, TrainOutcome, TrainPoint
from ray_sql.finetune import prepare
from ray_sql.train import node_use, step_clock
from ray_sql.train.step_clock import Reading, StepClock

PHASES = ["time/data", "time/forward", "time/backward", "time/optimizer", "time/report"]
RECEIVED = "system/network_receive_megabytes"


class Ticks:
    """A clock that goes on by one whenever it is read."""

    def __init__(self) -> None:
        self.now = 0

    def perf_counter(self) -> float:
        self.now += 1
        return float(self.now)


@pytest.fixture
def ticks(monkeypatch: pytest.MonkeyPatch) -> Ticks:
    """Count ticks where step clocks read the time."""
    clock = Ticks()
    monkeypatch.setattr(step_clock, "time", clock)
    return clock


def test_the_phases_of_a_clock_are_all_the_time_there_is(ticks: Ticks) -> None:
    clock = StepClock(torch.device("cpu"))
    assert clock.read() == Reading(0, {})
    for _ in range(2):
        clock.enter("forward")
        ticks.now += 20
        clock.enter("backward")
        ticks.now += 10
        clock.enter("report")
    first = clock.read()
    ticks.now += 30
    second = clock.read()
    assert first == Reading(2, {"forward": 42, "backward": 22, "report": 2})
    assert second == Reading(0, {"report": 31}), "a phase that is under way goes on"
    assert first.metrics()["time/forward"] == 21


def test_every_point_says_where_the_time_went(
    make_config: Any, ticks: Ticks, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(
        **{"train.max_steps": 7, "train.logging_steps": 3, "evaluate.select_examples": 0}
    )
    prepared = prepare.prepare(config)
    prepare.write_inputs(prepared)
    points: list[TrainPoint] = []
    nodes: list[NodeUsed] = []
    reads: list[int] = []
    read = StepClock.read

    def noted(clock: StepClock) -> Reading:
        reading = read(clock)
        reads.append(ticks.now)
        return reading

    def on_event(event: Event) -> None:
        if isinstance(event, TrainPoint):
            points.append(event)
        if isinstance(event, NodeUsed):
            nodes.append(event)

    monkeypatch.setattr(StepClock, "read", noted)
    train.fit(config, prepared.model_folder, on_event)
    assert [point.step for point in points] == [1, 3, 6] and len(reads) == 3
    assert nodes[0].step == 2 and nodes[0].values["system/disk_usage_percentage"] > 0
    for point in points:
        assert all(point.values[phase] > 0 for phase in PHASES)
        assert point.values["system/process_memory_gib"] > 0.1
    for (before, after), (then, now) in zip(pairwise(points), pairwise(reads), strict=True):
        whole = sum(after.values[phase] for phase in PHASES)
        assert whole * (after.step - before.step) == pytest.approx(now - then)


@pytest.mark.slow
@pytest.mark.cluster
def test_a_slow_rank_shows_in_the_phases_of_the_others(
    make_config: Any, ray_with_metrics: str
) -> None:
    def loop(job: TrainJob, driver: cluster.DriverLink) -> TrainOutcome:
        """As a function in a function, its code goes to the workers."""
        import time

        import ray.train

        from ray_sql import train
        from ray_sql.train import trainer

        loss = trainer.completion_loss

        def sleeping(*given: Any) -> Any:
            time.sleep(0.3)
            return loss(*given)

        if ray.train.get_context().get_world_rank() == 1:
            trainer.completion_loss = sleeping  # type: ignore[assignment]
        try:
            return train.train_loop_per_worker(job, driver)
        finally:
            trainer.completion_loss = loss

    config = make_config(
        **{
            "scaling.num_workers": 2,
            "train.max_steps": 11,
            "train.logging_steps": 5,
            "evaluate.select_examples": 0,
        }
    )
    prepared = prepare.prepare(config)
    prepare.write_inputs(prepared)
    last: Mapping[str, float] = {}
    shown = ""

    def on_event(event: Event) -> None:
        nonlocal last, shown
        if isinstance(event, TrainPoint):
            last = event.values
            shown = urllib.request.urlopen(ray_with_metrics, timeout=10).read().decode()

    job = TrainJob(config.for_workers(), prepared.model_folder, None, None)
    cluster.run_workers(loop, job, config.scaling, config.run_dir, on_event)
    assert last["time/backward"] > last["time/forward"], (
        "on rank 0 the wait is in the exchange of gradients"
    )
    assert "ray_sql_loss{" in shown and 'run="run"' in shown


@pytest.mark.parametrize(
    ("told", "found"), [(42, {"gpu_1_utilization_percentage": 42.0}), (None, {})]
)
def test_a_gpu_that_does_not_tell_how_busy_it_is_keeps_no_run_from_training(
    monkeypatch: pytest.MonkeyPatch, told: int | None, found: dict[str, float]
) -> None:
    def utilization(_: Any) -> int:
        if told is None:
            raise Exception("NVML's errors have no other base")
        return told

    def is_part_of_a_gpu(_: Any) -> int:
        raise Exception("NVML knows no such device")

    monkeypatch.setattr(torch.cuda, "utilization", utilization)
    monkeypatch.setattr(torch.cuda, "device_memory_used", is_part_of_a_gpu)
    monkeypatch.setattr(torch.cuda, "power_draw", is_part_of_a_gpu)
    assert node_use.gpu_use(1) == found


@pytest.mark.parametrize(
    ("rank", "local_rank", "size", "group"),
    [(0, 0, 2, "system"), (1, 1, 2, None), (2, 0, 4, "system/node_1"), (3, 1, 4, None)],
)
def test_each_nodes_first_worker_reads_its_use_now_and_then(
    monkeypatch: pytest.MonkeyPatch, rank: int, local_rank: int, size: int, group: str | None
) -> None:
    import ray.train
    from ray.train.v2.api.context import LocalTrainContext

    context = LocalTrainContext("run", size, rank, local_rank, min(size, 2), rank // 2)
    monkeypatch.setattr(ray.train, "get_context", lambda: context)
    watch = node_use.NodeWatch(on=True)
    first = watch.read()
    assert {name.rpartition("/")[0] for name in first} == ({group} if group else set())
    if group:
        assert 0 < first[f"{group}/system_memory_usage_percentage"] < 100
    assert watch.read() == {}, "10 s are not over"
    assert node_use.NodeWatch(on=False).read() == {}


def test_a_node_that_cannot_be_read_keeps_no_run_from_training(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import ray.train
    from ray.train.v2.api.context import LocalTrainContext

    network, head = tmp_path / "net" / "dev", "Inter-| Receive\n face |bytes\n"
    network.parent.mkdir()
    monkeypatch.setattr(ray.train, "get_context", lambda: LocalTrainContext("run", 1, 0, 0, 1, 0))
    monkeypatch.setattr(node_use, "SECONDS", 0.0)
    monkeypatch.setattr(psutil, "PROCFS_PATH", str(tmp_path))
    watch = node_use.NodeWatch(on=True)
    first = watch.read()
    assert "system/disk_usage_percentage" in first
    assert not {"system/cpu_utilization_percentage", RECEIVED} & set(first)
    for received, megabytes in ((5e6, 0.0), (7e6, 2.0)):  # a card that appears later
        network.write_text(f"{head} later0: {received:.0f}{' 0' * 15}\n")
        assert watch.read()[RECEIVED] == megabytes
