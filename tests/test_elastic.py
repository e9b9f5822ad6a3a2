"""A run that is told to stop, or that a node goes away, saves at the next step and repeats none.

Workers come and go, and the curve stays. The signals to this process are real, and so are the nodes
of a real cluster, added, drained and killed while 4-bit training goes on.
"""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Trainer

from benchmarks.ray_cluster import ray_cluster
from ray_sql import cli, cluster, train
from ray_sql.cluster.events import CheckpointSaved, Event, Note, TrainPoint
from ray_sql.config import Config
from ray_sql.config.sections import ScalingSection
from ray_sql.finetune import prepare
from ray_sql.store import checkpoints
from ray_sql.store.run_folder import RunFolder
from ray_sql.train import trainer
from ray_sql.train.preemption import PreemptionWatch
from tests.waiting import HANGS, wait_until

SETTINGS = {
    "train.max_steps": 8,
    "save_steps": 4,
    "lora.lora_dropout": 0.1,
    "learning_rate": 1e-2,
    "evaluate.select_examples": 2,
    "tune.objective": "eval_loss",  # so that two measures are equal only where two adapters are
}


STEPS = 240
ON_NODES = {
    "lora.lora_dropout": 0,
    "learning_rate": 1e-3,
    "rows.examples_per_row": 1,
    "evaluate.select_examples": 0,
    "scaling.use_gpu": False,
    "scaling.resources_per_worker": {"CPU": 1},
}


class Log:
    """The events of a run: loss and learning rate of every step in their order, checkpoints, notes.

    `at` is called with every new step.
    """

    def __init__(self, at: Any = None) -> None:
        self.points: list[tuple[int, float, float]] = []
        self.saved: list[tuple[int, float | None]] = []
        self.notes: list[str] = []
        self._at = at

    @property
    def order(self) -> list[int]:
        return [step for step, _, _ in self.points]

    @property
    def sizes(self) -> list[int]:
        """Return the numbers of workers that it trained with, one after the other."""
        return [int(note.split()[2]) for note in self.notes if note.startswith("training with")]

    @property
    def losses(self) -> dict[int, float]:
        return {step: loss for step, loss, _ in self.points}

    @property
    def rates(self) -> dict[int, float]:
        return {step: rate for step, _, rate in self.points}

    def __call__(self, event: Event) -> None:
        match event:
            case Note(text):
                self.notes.append(text)
            case CheckpointSaved(step, _, objective):
                self.saved.append((step, objective))
            case TrainPoint(step, _, values):
                self.points.append((step, values["loss"], values["learning_rate"]))
                if self._at:
                    self._at(step)


def fit(config: Config, on_event: Any) -> train.FitResult:
    prepared = prepare.prepare(config)
    prepare.write_inputs(prepared)
    return train.fit(config, prepared.model_folder, on_event)


def told(number: int, *steps: int) -> Log:
    """Return a log that sends this process a signal when it hears of one of `steps`."""
    return Log(lambda step: os.kill(os.getpid(), number) if step in steps else None)


@pytest.fixture(autouse=True)
def ctrl_c() -> Iterator[None]:
    """Ctrl-C as on a terminal: a process in a shell's background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def as_a_job() -> Iterator[None]:
    """SIGTERM as every job takes it."""
    before = signal.signal(signal.SIGTERM, cli.exit_on_signal)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A cluster of the test's own, with a head on which no worker fits."""
    import ray

    monkeypatch.setenv("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "1")
    monkeypatch.setenv(
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "30"
    )  # so long it waits for a node that is gone
    with ray_cluster(num_cpus=0) as made:
        monkeypatch.setenv("RAY_ADDRESS", made.address)
        ray.init(
            made.address, logging_level="ERROR", log_to_driver=False
        )  # now: this process belongs to the head
        yield made
        ray.shutdown()


def wait_for(seen: Callable[[], bool], thread: threading.Thread, seconds: float = 600) -> None:
    """Wait until something is seen; fail when the run ends without it, or it takes too long."""
    end = time.monotonic() + seconds
    while not seen():
        assert thread.is_alive() and time.monotonic() < end
        time.sleep(0.05)


def beside(config: Config, log: Log) -> threading.Thread:
    """Start a run in a thread, while this one adds and removes nodes."""
    thread = threading.Thread(target=fit, args=(config, log), daemon=True)
    thread.start()
    return thread


def test_a_checkpoint_that_was_to_be_measured_is_when_the_run_goes_on(
    make_config: Any, as_a_job: None
) -> None:
    whole, first, second, third = Log(), told(signal.SIGTERM, 3), told(signal.SIGTERM, 7), Log()
    fit(make_config(output_name="whole", **SETTINGS), whole)
    config = make_config(output_name="stopped", **SETTINGS)
    for log in (first, second):
        with pytest.raises(SystemExit):
            fit(config, log)
        signal.signal(signal.SIGTERM, cli.exit_on_signal)
    result = fit(config, third)
    assert first.saved == [(4, None)] and second.saved[-1] == (8, None)
    assert dict(second.saved[:1] + third.saved) == pytest.approx(dict(whole.saved))
    assert third.order == [] and result.best.objective is not None


@pytest.mark.slow
@pytest.mark.cluster
def test_workers_come_and_go_and_the_curve_stays(
    make_config: Any, nodes: Any, tmp_path: Path
) -> None:
    whole, log = Log(), Log()
    settings = ON_NODES | {"train.max_steps": STEPS, "save_steps": 5}
    nodes.add_node(num_cpus=1)
    elastic = {
        "scaling.num_workers": (1, 2),
        "scaling.elastic_resize_monitor_interval_s": 1,
        "grad_accum_steps": 4,
    }
    thread = beside(make_config(output_name="elastic", **settings | elastic), log)
    wait_for(lambda: len(log.order) >= 5, thread)
    second = nodes.add_node(num_cpus=1)
    wait_for(lambda: log.sizes[-1] == 2, thread)
    resized = len(log.order)
    wait_for(lambda: len(log.order) >= resized + 5, thread)
    nodes.remove_node(second, allow_graceful=False)
    thread.join(600)
    assert not thread.is_alive()
    fit(make_config(output_name="whole", grad_accum_steps=8, **settings), whole)
    farthest = max(abs(loss - whole.losses[step]) for step, loss, _ in log.points)
    print(
        f"workers {log.sizes}, {len(log.order) - STEPS} of {STEPS} steps repeated, losses differ "
        "by "
        f"up to {farthest:.1e}"
    )
    assert log.sizes == [1, 2, 1]
    assert len(log.order) - STEPS <= 2 * 6, "what was repeated, at two restarts"
    assert sorted(log.losses) == whole.order == list(range(1, STEPS + 1))
    assert log.rates == whole.rates
    assert log.losses == pytest.approx(whole.losses, abs=1e-4), (
        "the same examples, in the same steps"
    )


@pytest.mark.slow
@pytest.mark.cluster
def test_a_node_that_is_to_go_leaves_a_checkpoint_behind(make_config: Any, nodes: Any) -> None:
    import ray
    from ray._raylet import GcsClient
    from ray.core.generated.autoscaler_pb2 import DRAIN_NODE_REASON_PREEMPTION

    there = {one.node_id: one for one in (nodes.add_node(num_cpus=1), nodes.add_node(num_cpus=1))}
    log = Log()
    settings = {
        "scaling.num_workers": 1,
        "scaling.max_failures": 0,
        "train.max_steps": 60,
        "save_steps": 1000,
    }
    thread = beside(make_config(**ON_NODES | settings | {"grad_accum_steps": 8}), log)
    wait_for(lambda: len(log.order) >= 3, thread)
    free = ray._private.state.available_resources_per_node()
    (busy,) = (node for node in there if not free[node].get("CPU"))
    soon = int(1000 * (time.time() + 20))
    assert GcsClient(address=nodes.address).drain_node(
        busy, DRAIN_NODE_REASON_PREEMPTION, "spot", soon
    )[0]
    wait_for(lambda: bool(log.saved), thread)
    saved, _ = log.saved[0]
    wait_for(lambda: log.order[-1] > saved, thread)
    nodes.remove_node(there[busy], allow_graceful=False)
    thread.join(120)
    once = log.order.index(saved + 1)
    again = log.order.index(saved + 1, once + 1)
    assert log.order == [*range(1, log.order[again - 1] + 1), *range(saved + 1, 61)], (
        "went on from the checkpoint"
    )
    before = {step: loss for step, loss, _ in log.points[once:again]}
    assert before == pytest.approx({step: log.losses[step] for step in before}, abs=1e-6)
    assert log.saved[1:] == [(60, None)]


@pytest.mark.slow
@pytest.mark.cluster
def test_two_workers_that_are_told_to_stop_save_at_the_same_step(
    make_config: Any, ray_local: None, as_a_job: None
) -> None:
    settings = ON_NODES | {"train.max_steps": 60, "save_steps": 100}
    whole, first, second = Log(), told(signal.SIGTERM, 3), Log()
    fit(make_config(output_name="whole", grad_accum_steps=4, **settings), whole)
    config = make_config(output_name="stopped", **settings | {"scaling.num_workers": 2})
    with pytest.raises(SystemExit):
        fit(config, first)
    assert len(first.saved) == 1, first.notes
    ((saved, objective),) = first.saved
    assert first.order == list(range(1, saved + 1)) and saved < 60 and objective is None
    fit(config, second)
    assert second.order == list(range(saved + 1, 61))
    assert first.losses | second.losses == pytest.approx(whole.losses, abs=1e-4)
    assert first.rates | second.rates == whole.rates


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_told_to_stop_saves_first_and_repeats_no_step(
    make_config: Any, as_a_job: None, number: int
) -> None:
    whole, first, second = Log(), told(number, 2), Log()
    fit(make_config(output_name="whole", **SETTINGS), whole)
    config = make_config(output_name="stopped", **SETTINGS)
    with pytest.raises(SystemExit if number == signal.SIGTERM else KeyboardInterrupt) as caught:
        fit(config, first)
    if number == signal.SIGTERM:
        assert caught.value.code == 143
    assert first.order == [1, 2, 3] and first.saved == [(3, None)], (
        "saved at the end of the step it was in, unmeasured"
    )
    assert first.notes[-1] == "stopped; checkpoint-3 is saved: the same command goes on from there"
    fit(config, second)
    assert second.order == [4, 5, 6, 7, 8]
    assert first.losses | second.losses == pytest.approx(whole.losses, abs=1e-6)
    assert dict(second.saved) == pytest.approx(dict(whole.saved)), (
        "what was to be measured is, and comes out the same"
    )


def test_a_run_saves_at_its_step_however_long_it_takes_to_say_so(
    make_config: Any, as_a_job: None
) -> None:
    log = told(signal.SIGTERM, 2)

    def slow(event: Event) -> None:
        if isinstance(event, Note) and event.text.startswith("told to stop"):
            wait_until(lambda: log.saved)
        log(event)

    with pytest.raises(SystemExit):
        fit(make_config(**SETTINGS), slow)
    assert log.order == [1, 2, 3] and log.saved == [(3, None)]


def test_a_run_in_this_process_asks_after_every_step_however_slow_that_was() -> None:
    def loop(_: None, driver: cluster.DriverLink) -> list[int]:
        asked = []

        def stopping() -> bool:
            time.sleep(0.02)
            asked.append(step)
            return False

        watch = PreemptionWatch(stopping, is_free=driver.in_process)
        for step in range(1, 5):
            watch(step)
        return asked

    scaling = ScalingSection(num_workers=0)
    assert cluster.run_workers(loop, None, scaling, "", lambda _: None) == [1, 2, 3, 4]


def test_told_twice_a_run_stops_at_once(make_config: Any) -> None:
    def twice(step: int) -> None:
        if step == 3:
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.2)

    log = Log(twice)
    config = make_config(**SETTINGS)
    with pytest.raises(KeyboardInterrupt):
        fit(config, log)
    assert log.order == [1, 2, 3] and checkpoints.complete(RunFolder(config.run_dir)) == []
    assert log.notes[-1] == "stopped; no checkpoint yet: the same command begins again"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_workers_that_do_not_end_are_not_waited_for(
    make_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster.stop, "STOP_SECONDS", 0.5)

    may_end, ended = threading.Event(), threading.Event()

    def busy(step: int) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        may_end.wait(HANGS)
        ended.set()

    with pytest.raises(KeyboardInterrupt):
        fit(make_config(**SETTINGS), Log(busy))
    assert not ended.is_set(), "the run ended while its worker was busy"
    may_end.set()
    wait_until(lambda: "ray_sql-fit" not in {thread.name for thread in threading.enumerate()})


@pytest.mark.parametrize(
    ("saved_by", "rank", "world", "own"),
    [(1, 0, 2, 0), (1, 1, 2, 0), (2, 0, 1, 0), (2, 1, 3, 1), (2, 2, 3, 0)],
)
def test_every_rank_finds_a_random_state_whoever_saved_the_checkpoint(
    tmp_path: Path, saved_by: int, rank: int, world: int, own: int
) -> None:
    for seed, name in enumerate(
        ["rng_state.pth"] if saved_by == 1 else ["rng_state_0.pth", "rng_state_1.pth"]
    ):
        state = {
            "python": random.Random(seed).getstate(),
            "numpy": np.random.RandomState(seed).get_state(),
            "cpu": torch.Generator().manual_seed(seed).get_state(),
        }
        torch.save(state, tmp_path / name)
    trainer.fit_random_state(tmp_path, rank, world)
    asks = SimpleNamespace(
        args=SimpleNamespace(world_size=world, process_index=rank, parallel_mode=None)
    )
    with torch.random.fork_rng():
        Trainer._load_rng_state(asks, str(tmp_path))
        drawn = torch.rand(3)
    assert torch.equal(drawn, torch.rand(3, generator=torch.Generator().manual_seed(own)))


def test_a_gpus_random_state_has_the_form_that_one_rank_or_several_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    one, several = torch.tensor([1], dtype=torch.uint8), torch.tensor([2], dtype=torch.uint8)
    torch.save({"cuda": one}, tmp_path / "rng_state.pth")
    trainer.fit_random_state(tmp_path, 1, 2)
    assert torch.load(tmp_path / "rng_state_1.pth")["cuda"] == [one, one]
    torch.save({"cuda": [several] * 4}, tmp_path / "rng_state_0.pth")
    trainer.fit_random_state(tmp_path, 0, 2)
    assert torch.load(tmp_path / "rng_state_0.pth")["cuda"] == [several, several], (
        "fewer GPUs here than there"
    )
    (tmp_path / "rng_state.pth").unlink()
    trainer.fit_random_state(tmp_path, 0, 1)
    assert torch.load(tmp_path / "rng_state.pth")["cuda"] == several
