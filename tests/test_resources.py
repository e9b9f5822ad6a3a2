"""Capacity is computed from the nodes that are there and those that the autoscaler may add."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ray_sql import cluster
from ray_sql.config.sections import ScalingSection
from ray_sql.errors import ConfigError


def set_nodes(monkeypatch: pytest.MonkeyPatch, *nodes: dict[str, float]) -> None:
    monkeypatch.setattr(cluster.resources, "cluster_nodes", lambda: list(nodes))


def section(**settings: Any) -> ScalingSection:
    return ScalingSection.model_validate(settings)


def test_trainings_are_counted_by_what_their_workers_take(monkeypatch: pytest.MonkeyPatch) -> None:
    set_nodes(monkeypatch, {"CPU": 64.0, "GPU": 4.0})
    two = cluster.training_capacity(section(num_workers=2))
    assert (two.trainings, two.per_training, two.unit) == (2, {"GPU": 2}, ("GPU", 2))
    assert two.arithmetic == "4 GPU here / 2 a trial (2 x 1) = 2"
    by_cores = section(resources_per_worker={"CPU": 32})
    assert cluster.training_capacity(by_cores).trainings == 2
    tenths = section(resources_per_worker={"GPU": 0.1})
    assert cluster.training_capacity(tenths).trainings == 40, "1.0 // 0.1 is 9"


def test_a_worker_must_fit_on_a_node(monkeypatch: pytest.MonkeyPatch) -> None:
    large = {"CPU": 8.0, "GPU": 3.0}
    set_nodes(monkeypatch, large, large, {"CPU": 4.0})
    both = cluster.training_capacity(section(resources_per_worker={"GPU": 2}))
    assert (both.trainings, both.nodes) == (2, 2), "not 6 GPU / 2 = 3: one is left over on each"
    text = "2 workers of 2 GPU fit on 3 nodes (the largest has 3) / 1 a trial = 2"
    assert both.arithmetic == text
    without = cluster.training_capacity(section(use_gpu=False, num_workers=4))
    assert without.per_worker == {"CPU": 4}, (
        "16 of 20 CPUs: 5 each would fit only twice on the large nodes"
    )


def test_a_machine_that_cannot_hold_the_workers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    set_nodes(monkeypatch, {"CPU": 2.0})
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    needs = r"num_workers 4 needs 4 CPU, but this machine has 2; use fewer workers"
    with pytest.raises(ConfigError, match=needs):
        cluster.scaling_config(section(num_workers=4))
    monkeypatch.setenv("RAY_ADDRESS", "a.cluster:6379")
    assert cluster.scaling_config(section(num_workers=4)).num_workers == 4, "it may grow"


def test_gpus_that_the_autoscaler_may_add_are_decided_on_once(
    monkeypatch: pytest.MonkeyPatch, ray_local: None, tmp_path: Path
) -> None:
    assert [node["CPU"] for node in cluster.cluster_nodes()] == [2]
    scaling = section(num_workers=2)
    with monkeypatch.context() as autoscaled:
        types = [({"CPU": 2.0}, 1), ({"CPU": 16.0, "GPU": 4.0}, 3)]  # the first one is up
        autoscaled.setattr(cluster.ray_internals, "autoscaler_node_types", lambda: types)
        capacity = cluster.training_capacity(scaling)
        assert (capacity.trainings, capacity.nodes, capacity.per_worker) == (6, 3, {"GPU": 1})
        assert cluster.scaling_config(scaling).use_gpu
    assert not cluster.scaling_config(scaling).use_gpu
    assert capacity.settings == {
        "scaling.use_gpu": True,
        "scaling.resources_per_worker": {"GPU": 1},
    }, "whatever a trial sees when it starts"
    file = tmp_path / "bootstrap.yaml"
    file.write_text(
        "head_node_type: head\nmax_workers: 8\n"
        "available_node_types:\n  head: {resources: {CPU: 2}}\n"
        "  gpu: {resources: {CPU: 8, GPU: 1}, max_workers: 2}\n"
    )
    monkeypatch.setattr(cluster.resources, "BOOTSTRAP", str(file))
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    assert cluster.cluster_nodes()[1:] == [{"CPU": 8, "GPU": 1}] * 2


def test_a_ray_that_does_not_start_is_named_with_the_way_out(tmp_path: Path) -> None:
    environment = {**os.environ, "RAY_TMPDIR": str(tmp_path / ("too_long" * 12))}
    environment.pop("RAY_ADDRESS", None)
    starting = "from ray_sql import cluster; cluster.start_ray()"
    ended = subprocess.run(
        [sys.executable, "-c", starting], env=environment, capture_output=True, text=True
    )
    last = ended.stderr.splitlines()[-1]
    assert "StoreError: Ray did not start on this machine (" in last
    assert last.endswith("finetune and evaluate take --scaling.num_workers 0")
