"""The cluster's resources, the share that a training takes, and how many trainings fit."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ray_sql.cluster import ray_internals
from ray_sql.cluster.device import count_gpus
from ray_sql.cluster.start import address, joins, start_ray
from ray_sql.config.sections import ScalingSection
from ray_sql.errors import ConfigError

if TYPE_CHECKING:
    from ray.train import ScalingConfig

BOOTSTRAP = "~/ray_bootstrap_config.yaml"
"""Where `ray up` leaves the cluster's description on its head, on which jobs run."""
UNLIMITED_NODES = 1000
"""Nodes to count of a type that has no limit."""
Resources = Mapping[str, float]
"""Amounts by Ray's resource names."""


@dataclass(frozen=True)
class Capacity:
    """The number of trainings of one kind that fit at a time, and the nodes that hold them."""

    trainings: int
    nodes: int
    per_worker: dict[str, float]
    per_training: dict[str, float]
    arithmetic: str

    @property
    def unit(self) -> tuple[str, float]:
        """The resource that use is counted in, and a training's amount: GPUs, else CPUs."""
        if self.per_training.get("GPU"):
            return "GPU", self.per_training["GPU"]
        return "CPU", self.per_training.get("CPU", 1.0)

    @property
    def settings(self) -> dict[str, object]:
        """Settings that say a worker's share in full, so that no trial decides it again."""
        return {
            "scaling.use_gpu": bool(self.per_worker.get("GPU")),
            "scaling.resources_per_worker": self.per_worker,
        }


def training_capacity(scaling: ScalingSection, called: str = "trial") -> Capacity:
    """Count how often a training with the fewest workers fits into the cluster, or this machine.

    Nodes that the autoscaler may add count as if they were there. `called` is the word for one.
    """
    nodes, least = cluster_nodes(), scaling.min_workers
    share = worker_resources(scaling, nodes)
    slots = [worker_slots(node, share) for node in nodes]
    scarce = min(share, key=lambda name: sum(worker_slots(n, {name: share[name]}) for n in nodes))
    amount = share[scarce]
    if len(nodes) > 1:
        largest = max(node.get(scarce, 0) for node in nodes)
        text = f"{sum(slots)} workers of {amount:g} {scarce} fit on {len(nodes)} nodes "
        text += f"(the largest has {largest:g}) / {least} a {called}"
    else:
        have = sum(node.get(scarce, 0) for node in nodes)
        text = f"{have:g} {scarce} here / {amount * least:g} a {called} ({least} x {amount:g})"
    trainings = sum(slots) // least
    return Capacity(
        trainings,
        sum(count > 0 for count in slots),
        share,
        {name: amount * least for name, amount in share.items()},
        f"{text} = {trainings}",
    )


def worker_resources(scaling: ScalingSection, nodes: Sequence[Resources]) -> dict[str, float]:
    """Return a worker's share: a GPU where a node has any, else as many CPUs as all can have."""
    gpu = scaling.use_gpu
    if gpu is None:
        gpu = any(node.get("GPU") for node in nodes)
    given = scaling.resources_per_worker or {}
    share = {name: amount for name, amount in given.items() if amount}
    if gpu:
        share.setdefault("GPU", 1)
    if share:
        return share
    cores = [int(node.get("CPU", 0)) for node in nodes]
    for count in range(max(cores, default=0), 1, -1):
        if sum(own // count for own in cores) >= scaling.max_workers:
            return {"CPU": count}
    return {"CPU": 1}


def worker_slots(node: Resources, share: Resources) -> int:
    """Return how many workers fit on a node. (1.0 // 0.2 would be 4.)"""
    return min(int(node.get(name, 0) / amount + 1e-9) for name, amount in share.items())


def cluster_nodes() -> list[dict[str, float]]:
    """Return the resources of every node that the cluster has or its autoscaler may add.

    Where no Ray runs and RAY_ADDRESS names none, that is this machine.
    """
    import ray

    if not joins():
        return [{"CPU": float(os.cpu_count() or 1), "GPU": float(count_gpus())}]
    start_ray()
    alive: list[dict[str, float]] = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    nodes = list(alive)
    for resources, limit in _node_types():
        nodes += [resources] * _addable(resources, limit, alive)
    return nodes


def _addable(resources: Resources, limit: int, alive: Sequence[Resources]) -> int:
    """Return how many nodes of a type may be added. Ray does not say of which type a node is."""
    present = sum(
        all(node.get(name, 0) == resources.get(name, 0) for name in ("CPU", "GPU"))
        for node in alive
    )
    return max(0, (UNLIMITED_NODES if limit < 0 else limit) - present)


def _node_types() -> list[tuple[dict[str, float], int]]:
    """Return the autoscaler's node types and their limits: as reported, else as `ray up` wrote."""
    reported = ray_internals.autoscaler_node_types()
    file = Path(BOOTSTRAP).expanduser()
    if reported or not address() or not file.is_file():
        return reported
    import yaml

    cluster = yaml.safe_load(file.read_text())
    types = dict(cluster.get("available_node_types", {}))
    types.pop(cluster.get("head_node_type"), None)
    limit = cluster.get("max_workers", 0)
    return [(kind.get("resources", {}), kind.get("max_workers", limit)) for kind in types.values()]


def scaling_config(scaling: ScalingSection, resizes: bool = False) -> ScalingConfig:
    """Return Ray's ScalingConfig. Raises `ConfigError` if this machine cannot hold the workers."""
    from ray.train import ScalingConfig

    nodes, least = cluster_nodes(), scaling.min_workers
    share = worker_resources(scaling, nodes)
    for name, amount in share.items():
        have = sum(node.get(name, 0) for node in nodes)
        # a cluster that we joined may grow; Ray would wait for ever for one that we started
        if amount * least > have and not address():
            raise ConfigError(
                f"--scaling.num_workers {least} needs {amount * least:g} {name}, but this machine "
                f"has {have:g}; use fewer workers, or --scaling.resources_per_worker"
            )
    interval = scaling.elastic_resize_monitor_interval_s if resizes else math.inf
    return ScalingConfig(
        num_workers=scaling.num_workers,
        elastic_resize_monitor_interval_s=interval,
        use_gpu=bool(share.get("GPU")),
        resources_per_worker=share,
    )
