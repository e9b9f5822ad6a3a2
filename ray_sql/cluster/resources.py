"""What the cluster has, what a training takes of it, and how often that fits."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ray_sql.cluster.start import address, joins, start_ray
from ray_sql.config import Config
from ray_sql.errors import ConfigError

if TYPE_CHECKING:
    from ray.train import ScalingConfig

BOOTSTRAP = "~/ray_bootstrap_config.yaml"
"""Where `ray up` leaves the cluster's description on its head, on which jobs run."""
MANY = 1000
"""Nodes of a type that has no limit."""


@dataclass(frozen=True)
class Room:
    """How many trainings of one kind the cluster holds at a time, on how many nodes. `each` is what one worker takes, by Ray's resource
    names, and `needs` what one training does."""

    at_once: int
    nodes: int
    each: dict[str, float]
    needs: dict[str, float]
    arithmetic: str

    @property
    def unit(self) -> tuple[str, float]:
        """What its use is counted in: GPUs, or CPUs where it has none, and how many."""
        return (
            ("GPU", self.needs["GPU"])
            if self.needs.get("GPU")
            else ("CPU", self.needs.get("CPU", 1.0))
        )

    def decided(self, config: Config) -> Config:
        """The same settings with what a worker takes said in full: decided once, and not again by every trial."""
        return config.changed(
            {
                "scaling.use_gpu": bool(self.each.get("GPU")),
                "scaling.resources_per_worker": self.each,
            }
        )


def room(config: Config) -> Room:
    """What a training takes at least, and how often that fits into the cluster (with all that its autoscaler may add), or this machine."""
    nodes = capacity()
    each = per_worker(config, nodes)
    holding = [node for node in nodes if holds(node, each)]
    workers = sum(holds(node, each) for node in holding)
    scarce = min(each, key=lambda name: sum(holds(node, {name: each[name]}) for node in nodes))
    have = f"{sum(node.get(scarce, 0) for node in nodes):g} {scarce} here"
    if len(nodes) > 1:
        largest = max(node.get(scarce, 0) for node in nodes)
        have = f"{workers} workers of {each[scarce]:g} {scarce} fit on {len(nodes)} nodes (the largest has {largest:g})"
        need = f"{config.fewest_workers} a trial"
    else:
        need = f"{each[scarce] * config.fewest_workers:g} a trial ({config.fewest_workers} x {each[scarce]:g})"
    at_once = workers // config.fewest_workers
    needs = {name: amount * config.fewest_workers for name, amount in each.items()}
    return Room(at_once, len(holding), each, needs, f"{have} / {need} = {at_once}")


def per_worker(config: Config, nodes: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """What one worker takes, by Ray's resource names: a GPU where a node has any, else as many CPUs as all workers can have."""
    gpu = config.scaling.use_gpu
    if gpu is None:
        gpu = any(node.get("GPU") for node in nodes)
    each = {
        name: amount
        for name, amount in (config.scaling.resources_per_worker or {}).items()
        if amount
    }
    if gpu:
        each.setdefault("GPU", 1)
    cores = [int(node.get("CPU", 0)) for node in nodes]
    return each or {
        "CPU": max(
            (
                n
                for n in range(1, max(cores, default=0) + 1)
                if sum(own // n for own in cores) >= config.workers
            ),
            default=1,
        )
    }


def holds(node: Mapping[str, float], each: Mapping[str, float]) -> int:
    """How many workers fit on a node; 1.0 // 0.2 is 4."""
    return min(int(node.get(name, 0) / amount + 1e-9) for name, amount in each.items())


def capacity() -> list[dict[str, float]]:
    """Ray's resources of every node that the cluster has or its autoscaler may add; of this machine where no Ray runs and none is named."""
    import ray

    if not joins():
        import torch

        return [{"CPU": float(os.cpu_count() or 1), "GPU": float(torch.cuda.device_count())}]
    start_ray()
    nodes: list[dict[str, float]] = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return nodes + [
        resources
        for resources, most in _node_types()
        for _ in range(_missing(resources, most, nodes))
    ]


def _missing(
    resources: Mapping[str, float], most: int, nodes: Sequence[Mapping[str, float]]
) -> int:
    """How many nodes of a type may be added to those that are there; Ray does not say of which type a node is."""
    there = sum(
        all(node.get(name, 0) == resources.get(name, 0) for name in ("CPU", "GPU"))
        for node in nodes
    )
    return max(0, (MANY if most < 0 else most) - there)


def _node_types() -> list[tuple[dict[str, float], int]]:
    """The autoscaler's node types and how many of each there may be: as it told the cluster, else as `ray up` left it on the head."""
    from ray._private.state import state  # the only place where the autoscaler's limits can be read

    told = state.get_cluster_config()
    if told is not None and told.node_group_configs:
        return [(dict(group.resources), group.max_count) for group in told.node_group_configs]
    file = Path(BOOTSTRAP).expanduser()
    if not (address() and file.is_file()):
        return []
    import yaml

    given = yaml.safe_load(file.read_text())
    types = given.get("available_node_types", {})
    head = given.get("head_node_type")
    return [
        (one.get("resources", {}), one.get("max_workers", given.get("max_workers", 0)))
        for name, one in types.items()
        if name != head
    ]


def scaling_config(config: Config, resizes: bool = False) -> ScalingConfig:
    """Ray's ScalingConfig: a GPU each where the cluster has or may get any, else an equal share of its CPUs."""
    from ray.train import ScalingConfig

    nodes = capacity()
    each = per_worker(config, nodes)
    for name, amount in each.items():
        have = sum(node.get(name, 0) for node in nodes)
        # a cluster that we joined may still grow; one that we started will not, and Ray would wait for ever
        least = config.fewest_workers
        if amount * least > have and not address():
            raise ConfigError(
                f"--scaling.num_workers {least} needs {amount * least:g} {name}, but this machine has {have:g}; use fewer workers, or "
                "--scaling.resources_per_worker"
            )
    return ScalingConfig(
        num_workers=config.scaling.num_workers,
        elastic_resize_monitor_interval_s=config.scaling.elastic_resize_monitor_interval_s
        if resizes
        else math.inf,
        use_gpu=bool(each.get("GPU")),
        resources_per_worker=each,
    )
