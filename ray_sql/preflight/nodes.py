"""What every machine that will train says of itself: what it sees of the runs' folder, its packages, its memory and its disks.

On a cluster `look` runs on each node as a task that takes no resources; without one it looks at this machine.
"""

from __future__ import annotations

import hashlib
import math
import shutil
import subprocess
import tempfile
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import ray_sql
from ray_sql import cluster, rows
from ray_sql.config import Config
from ray_sql.errors import ConfigError, RaySqlError, StoreError
from ray_sql.finetune.prepare import Prepared
from ray_sql.preflight.memory import adapter_weights, largest_pass, memory_estimate
from ray_sql.store import storage

GIB = 2**30
ANSWER_SECONDS = storage.PATIENCE + 60
"""How long a node may take to start a worker and look around."""
PACKAGES = (
    "ray",
    "torch",
    "transformers",
    "trl",
    "peft",
    "bitsandbytes",
    "accelerate",
    "tokenizers",
    "safetensors",
    "pyarrow",
)
"""Whose versions decide what is trained, or whether what one node writes another can read."""
KEPT = 4
"""Checkpoints that lie there at once: the best, the last two, and the one that is being written."""


@dataclass(frozen=True)
class Node:
    """One machine; memory and disks in bytes. `gpus` is the memory of each of its GPUs, `storage` what is free where the run's folder
    lies, None in a remote store; `sees` says whether it read what this machine wrote there, `problem` why it could not write."""

    name: str
    resources: Mapping[str, float]
    sees: bool
    problem: str
    packages: Mapping[str, str]
    memory: int
    gpus: tuple[int, ...]
    scratch: int
    storage: int | None


def survey(config: Config) -> list[Node]:
    """Every node of the cluster that training will run on, or this machine. Raises `ConfigError` naming those that did not answer."""
    probe = f"{config.run_dir}-probe-{uuid.uuid4().hex[:8]}"
    storage.write_text(f"{probe}/driver", "")
    try:
        if not on_cluster(config):
            return [
                look(
                    "this machine",
                    cluster.cluster_nodes()[0] if config.scaling.num_workers else {},
                    probe,
                )
            ]
        return _ask(probe)
    finally:
        storage.remove(probe)


def on_cluster(config: Config) -> bool:
    """Whether training will join a cluster that is there."""
    return config.scaling.num_workers != 0 and cluster.joins()


def _ask(probe: str) -> list[Node]:
    """What the nodes say, in Ray's order."""
    import ray
    from ray.exceptions import GetTimeoutError, RayError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    task = ray.remote(num_cpus=0, max_retries=0)(look)
    asked = {}
    for node in (each for each in ray.nodes() if each["Alive"]):
        name = (
            f"{node['NodeManagerAddress']}-{node['NodeID'][:6]}"  # several may run on one machine
        )
        pinned = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        asked[name] = task.options(scheduling_strategy=pinned).remote(
            name, node["Resources"], probe
        )
    ray.wait(list(asked.values()), num_returns=len(asked), timeout=ANSWER_SECONDS)
    found, silent = [], []
    for name, answer in asked.items():
        try:
            found.append(ray.get(answer, timeout=0))
        except GetTimeoutError:
            silent.append(f"{name} did not answer in {ANSWER_SECONDS:.0f} s")
        except RayError as error:
            silent.append(f"{name}: {' '.join(str(error).split())[-200:]}")
    if silent:
        raise ConfigError(
            f"{'; '.join(silent)}; correct those nodes (their logs are on the dashboard), or take them out"
        )
    return found


def look(name: str, resources: Mapping[str, float], probe: str) -> Node:
    """What the machine that this runs on has; the driver has put a file `driver` into the folder `probe`."""
    import psutil

    sees, problem, free = False, "", None
    try:
        sees = storage.exists(f"{probe}/driver")
        storage.write_text(f"{probe}/{name}", "x" * 4096)
        free = None if "://" in probe else shutil.disk_usage(probe).free
        if not sees:  # the driver will not find it to remove it
            storage.remove(probe)
    except RaySqlError as error:
        problem = str(error)
    return Node(
        name,
        dict(resources),
        sees,
        problem,
        packages(),
        psutil.virtual_memory().available,
        gpu_memory(),
        shutil.disk_usage(tempfile.gettempdir()).free,
        free,
    )


def packages() -> dict[str, str]:
    """Versions of what trains, and of this package with a digest of its code: an edited copy calls itself by the same version."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "none"
    code = hashlib.sha256()
    folder = Path(ray_sql.__file__).parent
    for file in sorted(folder.rglob("*.py")):
        code.update(f"{file.relative_to(folder)}\0".encode() + file.read_bytes())
    return found | {"ray_sql": f"{ray_sql.__version__} (code {code.hexdigest()[:8]})"}


def gpu_memory() -> tuple[int, ...]:
    """Bytes of each GPU; asked of the driver's own tool, because torch in a process that was given no GPU sees none."""
    try:
        asked = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
        said = subprocess.run(asked, capture_output=True, text=True, check=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError):
        return ()
    return tuple(int(line) * 2**20 for line in said.split() if line.isdigit())


# The checks


def reach(config: Config) -> str:
    """The cluster answers, takes this process's token, and says how many nodes it has."""
    import ray

    cluster.start_ray()
    alive = [node for node in ray.nodes() if node["Alive"]]
    return f"{ray.get_runtime_context().gcs_address} answers, {_count(alive, 'node')}"


def state(config: Config) -> str:
    """The State API answers: Ray frees what a killed run had reserved only if it can ask it."""
    import ray
    from ray.util.state import list_nodes

    try:
        list_nodes(address=ray.get_runtime_context().gcs_address, timeout=10)
    except (
        Exception
    ) as error:  # whatever the HTTP client raises, and Ray's own errors, which have no common base
        raise ConfigError(
            f"the dashboard does not answer ({' '.join(str(error).split())[:150]}): jobs cannot be submitted, and what a killed run had "
            "reserved stays so; install ray[default] on the head and start it with --include-dashboard=true"
        ) from None
    return "answers"


def room(config: Config) -> str:
    """There are as many workers' resources as a training asks for, now or by the autoscaler; and for how many trials at a time."""
    if config.scaling.num_workers == 0:
        return "trains in this process, without Ray"
    found = cluster.training_capacity(config.scaling)
    wanted = config.tune.max_concurrent_trials or 1
    each = ", ".join(f"{amount:g} {name}" for name, amount in found.per_worker.items())
    said = f"workers of {each}: {found.arithmetic}"
    if found.trainings < wanted:
        asked = (
            f"--tune.max_concurrent_trials {wanted}"
            if found.trainings
            else f"--scaling.num_workers {config.scaling.min_workers}"
        )
        raise ConfigError(
            f"{asked} asks for more than there is ({said}); lower it, or --scaling.resources_per_worker, or add nodes"
        )
    return f"{said} at a time"


def shared_storage(config: Config, nodes: Sequence[Node]) -> str:
    """Every node writes to the run's place and sees there what this machine wrote: a folder of the same name is not one folder."""
    blind = [node.name for node in nodes if not node.sees and not node.problem]
    if blind:
        raise StoreError(
            f"{config.run_dir} is another folder on {', '.join(blind)}: what this machine wrote is not seen there; give "
            "--scaling.storage_path a folder that all nodes share, or an s3:// or gs:// URI"
        )
    if refused := [f"{node.name}: {node.problem}" for node in nodes if node.problem]:
        raise StoreError("; ".join(refused))
    return f"{_count(nodes, 'node')} write to {config.run_dir} and see what is written there"


def packages_equal(config: Config, nodes: Sequence[Node]) -> str:
    """Every node has the versions that this process has."""
    here = packages()
    other = [
        f"{node.name} has {name} {node.packages[name]}, not {own}"
        for node in nodes
        for name, own in here.items()
        if node.packages[name] != own
    ]
    if other:
        raise ConfigError(
            f"{'; '.join(other)}; install the versions of constraints.txt on every node"
        )
    return f"{', '.join(f'{name} {own}' for name, own in here.items())} on {_count(nodes, 'node')}"


def memory(config: Config, prepared: Prepared, nodes: Sequence[Node]) -> str:
    """Estimated memory of one worker against what it has on the node that has least, and how much larger a pass may become."""
    data = rows.read(prepared.rows_file)
    count, length = rows.heaviest_pass(data, config.batching)
    tokens, longest = count * length, max(len(row.input_ids) for row in data)
    each = (
        cluster.worker_resources(config.scaling, cluster.cluster_nodes())
        if config.scaling.num_workers
        else {}
    )
    gpu = bool(each.get("GPU")) or (
        not each and bool(nodes[0].gpus) and config.scaling.use_gpu is not False
    )
    shares = [
        (share, node.name)
        for node in nodes
        if (share := _share(node, each, gpu, config)) is not None
    ]
    need = memory_estimate(config, prepared.model_folder, tokens, gpu, count)
    kind = "GPU" if gpu else "worker's share of memory"
    text = f"about {need / GIB:.1f} GiB needed for the largest pass, {tokens} tokens"
    text += f" in {count} rows" if count > 1 else ""
    if not shares:
        return f"{text}; no node with room for a worker is up yet to compare with"
    have, name = min(shares)
    text = f"{text}; {have / GIB:.1f} GiB on the {kind}{f' of {name}' if len(nodes) > 1 else ''}"
    if need > have:
        raise ConfigError(
            f"{text}; lower --train_batch_size, --rows.row_length or --rows.max_length, or use --train.gradient_checkpointing"
        )
    most = largest_pass(config, prepared.model_folder, have, gpu, count)
    if count > 1:
        return f"{text}, which holds one of {most}: --train_batch_size {config.train_batch_size * most // tokens}"
    return f"{text}, which holds one of {most}: --rows.row_length {most}, or --train_batch_size {most // longest} of unshared rows"


def _share(node: Node, each: Mapping[str, float], gpu: bool, config: Config) -> float | None:
    """Bytes that one worker has on a node; None where it would not run there."""
    if gpu:
        return min(node.gpus) * min(1.0, each.get("GPU", 1.0)) if node.gpus else None
    fit = cluster.worker_slots(node.resources, each) if each else 1
    return node.memory / min(fit, config.scaling.max_workers) if fit else None


def disk(config: Config, prepared: Prepared, nodes: Sequence[Node]) -> str:
    """There is room for the checkpoints that will lie side by side, where they are written and where they are kept."""
    # float32 weights, and two moments of the optimizer, in 8 bits each at least and in 32 at most
    need = KEPT * 12 * adapter_weights(config, prepared.model_folder)
    text = f"{KEPT} checkpoints take up to {need / GIB:.2g} GiB"
    least = min(nodes, key=lambda node: node.scratch)
    if least.scratch < need:
        raise StoreError(
            f"{text}, but {tempfile.gettempdir()} on {least.name} has {least.scratch / GIB:.2g}; make room, or set TMPDIR"
        )
    free = min((node.storage for node in nodes if node.storage is not None), default=math.inf)
    if free < need:
        raise StoreError(
            f"{text}, but {config.run_dir} has {free / GIB:.2g} GiB; make room, or choose another --scaling.storage_path"
        )
    there = f", {free / GIB:.0f} GiB free where they are kept" if math.isfinite(free) else ""
    return f"{text}; {least.scratch / GIB:.0f} GiB free in {tempfile.gettempdir()}{there}"


def _count(things: Sequence[Any], what: str) -> str:
    return f"{len(things)} {what}{'s' * (len(things) != 1)}"
