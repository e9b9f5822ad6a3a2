"""Ask every machine that will train for its view of the run's folder, packages, memory and disks.

On a cluster `look` runs on each node as a task that takes no resources. Without one it looks at
this machine.
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
from ray_sql.config.sections import ScalingSection
from ray_sql.errors import ConfigError, RaySqlError, StoreError
from ray_sql.finetune.prepare import Prepared
from ray_sql.preflight.memory import adapter_weights, largest_pass, memory_estimate
from ray_sql.store import storage
from ray_sql.store.run_folder import RunFolder

GIB = 2**30
ANSWER_SECONDS = storage.PATIENCE + 60
"""Seconds that a node may take to start a worker and look around."""
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
"""Packages whose versions decide what is trained, or whether nodes can read each other's files."""
CHECKPOINTS_AT_ONCE = 4
"""The best checkpoint, the last two, and the one that is being written."""


@dataclass(frozen=True)
class Node:
    """One machine, with memory and disks in bytes.

    `gpus` is the memory of each GPU. `storage` is the free space where the run's folder lies, None
    in a remote store. `sees` is True if the node read what this machine wrote there. `problem` says
    why it could not write.
    """

    name: str
    resources: Mapping[str, float]
    sees: bool
    problem: str
    packages: Mapping[str, str]
    memory: int
    gpus: tuple[int, ...]
    scratch: int
    storage: int | None


def survey(folder: RunFolder, scaling: ScalingSection) -> list[Node]:
    """Return the nodes that training will run on: the cluster's, or this machine.

    Raises `ConfigError` naming those that did not answer.
    """
    probe = probe_folder(folder)
    storage.write_text(f"{probe}/driver", "")
    try:
        if joins_cluster(scaling):
            return _survey_cluster(probe)
        resources = cluster.cluster_nodes()[0] if scaling.num_workers else {}
        return [look("this machine", resources, probe)]
    finally:
        storage.remove(probe)


def probe_folder(folder: RunFolder) -> str:
    """Return a new name beside the run's folder."""
    return f"{folder}-probe-{uuid.uuid4().hex[:8]}"


def joins_cluster(scaling: ScalingSection) -> bool:
    """Tell whether training will join a cluster that exists."""
    return scaling.num_workers != 0 and cluster.joins()


def _survey_cluster(probe: str) -> list[Node]:
    """Return the nodes' answers, in Ray's order."""
    import ray
    from ray.exceptions import GetTimeoutError, RayError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    task = ray.remote(num_cpus=0, max_retries=0)(look)
    answers = {}
    for node in ray.nodes():
        if node["Alive"]:
            # with a part of the id: several nodes may run on one machine
            name = f"{node['NodeManagerAddress']}-{node['NodeID'][:6]}"
            pinned = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            pinned_look = task.options(scheduling_strategy=pinned)
            answers[name] = pinned_look.remote(name, node["Resources"], probe)
    ray.wait(list(answers.values()), num_returns=len(answers), timeout=ANSWER_SECONDS)
    nodes, silent = [], []
    for name, answer in answers.items():
        try:
            nodes.append(ray.get(answer, timeout=0))
        except GetTimeoutError:
            silent.append(f"{name} did not answer in {ANSWER_SECONDS:.0f} s")
        except RayError as error:
            silent.append(f"{name}: {' '.join(str(error).split())[-200:]}")
    if silent:
        raise ConfigError(
            f"{'; '.join(silent)}; correct those nodes (their logs are on the dashboard), or take "
            "them out"
        )
    return nodes


def look(name: str, resources: Mapping[str, float], probe: str) -> Node:
    """Look at the machine that this runs on. The driver has put a file `driver` into `probe`."""
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
    """Return the versions of the packages that train, and of this one.

    This one's has a digest of its code: an edited copy calls itself by the same version.
    """
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "none"
    code = hashlib.sha256()
    folder = Path(ray_sql.__file__).parent
    for file in sorted(folder.rglob("*.py")):
        code.update(f"{file.relative_to(folder)}\0".encode() + file.read_bytes())
    return versions | {"ray_sql": f"{ray_sql.__version__} (code {code.hexdigest()[:8]})"}


def gpu_memory() -> tuple[int, ...]:
    """Return the bytes of each GPU, from the driver's own tool.

    In a process that was given no GPU, torch sees none.
    """
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return ()
    return tuple(int(line) * 2**20 for line in done.stdout.split() if line.isdigit())


# The checks


def require_cluster() -> str:
    """Require that the cluster answers and takes this process's token."""
    import ray

    cluster.start_ray()
    alive = [node for node in ray.nodes() if node["Alive"]]
    return f"{ray.get_runtime_context().gcs_address} answers, {_count(alive, 'node')}"


def require_state_api() -> str:
    """Require the State API, without which Ray frees nothing that a killed run had reserved."""
    import ray
    from ray.util.state import list_nodes

    try:
        list_nodes(address=ray.get_runtime_context().gcs_address, timeout=10)
    except Exception as error:  # the HTTP client's and Ray's own errors have no common base
        raise ConfigError(
            f"the dashboard does not answer ({' '.join(str(error).split())[:150]}): jobs cannot be "
            "submitted, and what a killed run had reserved stays so; install ray[default] on the "
            "head and start it with --include-dashboard=true"
        ) from None
    return "answers"


def check_capacity(scaling: ScalingSection, max_concurrent_trials: int | None) -> str:
    """Require the resources of one training, and of the trials at a time that were asked for.

    Nodes that the autoscaler may add count.
    """
    if scaling.num_workers == 0:
        return "trains in this process, without Ray"
    called = "training" if max_concurrent_trials is None else "trial"
    capacity = cluster.training_capacity(scaling, called)
    each = ", ".join(f"{amount:g} {name}" for name, amount in capacity.per_worker.items())
    text = f"workers of {each}: {capacity.arithmetic}"
    wanted = max_concurrent_trials or 1
    if capacity.trainings < wanted:
        flag = f"--scaling.num_workers {scaling.min_workers}"
        if capacity.trainings:
            flag = f"--tune.max_concurrent_trials {wanted}"
        raise ConfigError(
            f"{flag} asks for more than there is ({text}); lower it, or "
            "--scaling.resources_per_worker, or add nodes"
        )
    return f"{text} at a time"


def require_shared_storage(folder: RunFolder, nodes: Sequence[Node]) -> str:
    """Require that every node writes to the run's place and sees there what this machine wrote.

    A folder of the same name is not one folder.
    """
    blind = [node.name for node in nodes if not node.sees and not node.problem]
    if blind:
        raise StoreError(
            f"{folder} is another folder on {', '.join(blind)}: what this machine wrote is not "
            "seen there; give --scaling.storage_path a folder that all nodes share, or an s3:// "
            "or gs:// URI"
        )
    if refused := [f"{node.name}: {node.problem}" for node in nodes if node.problem]:
        raise StoreError("; ".join(refused))
    return f"{_count(nodes, 'node')} can write to {folder} and see what is written there"


def require_equal_packages(nodes: Sequence[Node]) -> str:
    """Require that every node has the versions that this process has."""
    own = packages()
    different = [
        f"{node.name} has {name} {node.packages[name]}, not {version}"
        for node in nodes
        for name, version in own.items()
        if node.packages[name] != version
    ]
    if different:
        raise ConfigError(
            f"{'; '.join(different)}; install the versions of constraints.txt on every node"
        )
    versions = ", ".join(f"{name} {version}" for name, version in own.items())
    return f"{versions} on {_count(nodes, 'node')}"


def require_memory(config: Config, prepared: Prepared, nodes: Sequence[Node]) -> str:
    """Compare a worker's estimated memory with that of the node that has least.

    The line says how much larger a pass may become.
    """
    examples = rows.read(prepared.rows_file)
    batching = config.batching_of(example.db_id for example in examples)
    count, length = rows.heaviest_pass(examples, batching)
    tokens, longest = count * length, max(len(example.input_ids) for example in examples)
    per_worker: Mapping[str, float] = {}
    gpu = bool(nodes[0].gpus) and config.scaling.use_gpu is not False
    if config.scaling.num_workers:
        per_worker = cluster.worker_resources(config.scaling, cluster.cluster_nodes())
        gpu = bool(per_worker.get("GPU"))
    workers = config.scaling.max_workers
    have_by_node = [(_share(node, per_worker, gpu, workers), node.name) for node in nodes]
    shares = [(share, name) for share, name in have_by_node if share is not None]
    need = memory_estimate(config, prepared.model_folder, tokens, gpu, count)
    text = f"about {need / GIB:.1f} GiB needed for the largest pass, {tokens} tokens"
    if count > 1:
        text += f" in {count} rows"
    if not shares:
        return f"{text}; no node with room for a worker is up yet to compare with"
    have, name = min(shares)
    text += f"; {have / GIB:.1f} GiB on the "
    text += "GPU" if gpu else "worker's share of memory"
    if len(nodes) > 1:
        text += f" of {name}"
    if need > have:
        raise ConfigError(
            f"{text}; lower --train_batch_size, --rows.row_length or --rows.max_length, or use "
            "--train.gradient_checkpointing"
        )
    most = largest_pass(config, prepared.model_folder, have, gpu, count)
    text += f", room for {most} tokens: "
    if count > 1:
        return f"{text}--train_batch_size up to {config.train_batch_size * most // tokens}"
    return (
        f"{text}--rows.row_length up to {most}, or, with --rows.examples_per_row 1, "
        f"--train_batch_size up to {most // longest}"
    )


def _share(
    node: Node, per_worker: Mapping[str, float], gpu: bool, max_workers: int
) -> float | None:
    """Return the bytes that one worker has on a node; None if it would not run there."""
    if gpu and not node.gpus:
        return None
    if gpu:
        return min(node.gpus) * min(1.0, per_worker.get("GPU", 1.0))
    slots = cluster.worker_slots(node.resources, per_worker) if per_worker else 1
    return node.memory / min(slots, max_workers) if slots else None


def require_disk(r: int, folder: RunFolder, prepared: Prepared, nodes: Sequence[Node]) -> str:
    """Require room for the checkpoints of an adapter of rank `r` that lie side by side.

    They need it where they are written and where they are kept.
    """
    # float32 weights, and two moments of the optimizer, in 8 bits each at least and in 32 at most
    need = CHECKPOINTS_AT_ONCE * 12 * adapter_weights(r, prepared.model_folder)
    text = f"{CHECKPOINTS_AT_ONCE} checkpoints take up to {need / GIB:.2g} GiB"
    least = min(nodes, key=lambda node: node.scratch)
    scratch = tempfile.gettempdir()
    if least.scratch < need:
        raise StoreError(
            f"{text}, but {scratch} on {least.name} has {least.scratch / GIB:.2g}; make room, or "
            "set TMPDIR"
        )
    free = min((node.storage for node in nodes if node.storage is not None), default=math.inf)
    if free < need:
        raise StoreError(
            f"{text}, but {folder} has {free / GIB:.2g} GiB; make room, or choose another "
            "--scaling.storage_path"
        )
    text += f"; {least.scratch / GIB:.0f} GiB free in {scratch}"
    if math.isfinite(free):
        text += f", {free / GIB:.0f} GiB free where they are kept"
    return text


def _count(things: Sequence[Any], name: str) -> str:
    return f"{len(things)} {name}{'s' * (len(things) != 1)}"
