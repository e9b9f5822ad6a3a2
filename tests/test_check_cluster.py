"""The pre-flight check on a cluster: what each node says, and what a cluster that is wrong costs:
one line, within seconds."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.mlflow_server import free_port
from benchmarks.ray_cluster import ray_cluster
from ray_sql import preflight
from ray_sql.errors import ConfigError, StoreError
from ray_sql.finetune import prepare
from ray_sql.preflight import nodes
from ray_sql.store.run_folder import RunFolder
from tests.waiting import HANGS

ROOT = Path(__file__).parent.parent


def job(flags: dict[str, str], folder: Path = ROOT, **environment: str) -> tuple[int, str, str]:
    """`python -m jobs.check` as a user runs it: exit code, output and errors."""
    words = [word for name, value in flags.items() for word in (f"--{name}", value)]
    done = subprocess.run(
        [sys.executable, "-m", "jobs.check", *words, "--no-tracking.enabled"],
        capture_output=True,
        text=True,
        cwd=folder,
        env=os.environ | {"COLUMNS": "200", "PYTHONPATH": str(ROOT)} | environment,
        timeout=HANGS,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def flags(tiny_model: Path, spider_folder: Path, tmp_path: Path) -> dict[str, str]:
    """The flags of a run of seconds with one worker."""
    given = {
        "model_name": tiny_model,
        "output_name": "run",
        "task_type": "sql",
        "dataset_id": spider_folder,
    }
    places = {"output_dir": tmp_path / "out", "cache_dir": tmp_path / "cache"}
    return {name: str(value) for name, value in (given | places).items()} | {"lora.r": "4"}


@pytest.mark.slow
@pytest.mark.cluster
def test_an_address_where_no_cluster_is_costs_one_line(flags: dict[str, str]) -> None:
    code, out, err = job(flags, RAY_ADDRESS=f"127.0.0.1:{free_port()}")
    assert code == 2, out + err
    (line,) = (line for line in out.splitlines() if line.startswith("FAIL"))
    assert (
        line.startswith("FAIL  cluster: RAY_ADDRESS 127.0.0.1:")
        and "no Ray cluster answers there" in line
    )
    assert "ok    lengths" in out, "what needs no cluster is checked all the same"
    assert "1 of 7 checks failed" in err and "Traceback" not in err
    code, out, err = job(flags)
    assert code == 0, out + err


def machine(name: str, **own: Any) -> nodes.Node:
    given = {
        "resources": {"CPU": 8.0, "GPU": 1.0},
        "sees": True,
        "problem": "",
        "packages": {},
        "memory": 2**34,
    }
    return nodes.Node(
        name, **(given | {"gpus": (2**34,), "scratch": 2**40, "storage": 2**40} | own)
    )


def test_the_smallest_gpu_and_the_fullest_disk_decide(make_config: Any) -> None:
    config = make_config(**{"scaling.num_workers": 2, "scaling.use_gpu": True})
    prepared = prepare.prepare(config)
    found = [machine("head", gpus=()), machine("a"), machine("b", gpus=(2**35, 2**33))]
    text = nodes.require_memory(config, prepared, found)
    assert "8.0 GiB on the GPU of b, room for " in text
    most = int(text.split("room for ")[1].split(" tokens")[0])
    estimate = functools.partial(preflight.memory_estimate, config, prepared.model_folder, gpu=True)
    assert estimate(tokens=most) <= 2**33 < estimate(tokens=most + 1)
    assert "no node with room for a worker is up yet" in nodes.require_memory(
        config, prepared, found[:1]
    )
    with pytest.raises(
        ConfigError, match=r"GiB needed .*; 0\.0 GiB on the GPU of b; lower --train_batch_size"
    ):
        nodes.require_memory(config, prepared, [*found[:2], machine("b", gpus=(2**18,))])
    assert "4 checkpoints take up to" in nodes.require_disk(
        config.lora.r, RunFolder(config.run_dir), prepared, found
    )
    with pytest.raises(StoreError, match=r"on b has 9.5e-07; make room, or set TMPDIR"):
        nodes.require_disk(
            config.lora.r,
            RunFolder(config.run_dir),
            prepared,
            [*found, machine("b", scratch=2**10)],
        )
    with pytest.raises(
        StoreError,
        match=r"run has 9.5e-07 GiB; make room, or choose another --scaling.storage_path",
    ):
        nodes.require_disk(
            config.lora.r,
            RunFolder(config.run_dir),
            prepared,
            [*found, machine("b", storage=2**10)],
        )
    assert "where they are kept" not in nodes.require_disk(
        config.lora.r, RunFolder(config.run_dir), prepared, [machine("a", storage=None)]
    )


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A head and one more node on this machine, with a dashboard; jobs join it."""
    dashboard = {
        "include_dashboard": True,
        "dashboard_port": free_port(),
        "dashboard_agent_listen_port": free_port(),
    }
    with pytest.MonkeyPatch.context() as environment:
        environment.chdir(tmp_path_factory.mktemp("nodes"))
        with ray_cluster(num_cpus=1, **dashboard) as found:
            found.add_node(num_cpus=1)
            environment.setenv("RAY_ADDRESS", found.address)
            yield found


@pytest.mark.slow
@pytest.mark.cluster
def test_every_node_is_asked(cluster: Any, flags: dict[str, str]) -> None:
    code, out, err = job(flags | {"scaling.num_workers": "2"})
    assert code == 0, out + err
    said = dict(
        line.removeprefix("ok    ").split(": ", 1)
        for line in out.splitlines()
        if line.startswith("ok ")
    )
    assert said["cluster"].endswith(f":{cluster.address.rpartition(':')[2]} answers, 2 nodes")
    assert said["state API"] == "answers"
    assert said["resources"].startswith("workers of 1 CPU: 2 workers of 1 CPU fit on 2 nodes")
    assert said["storage"].startswith("2 nodes can write to ") and said["packages"].endswith(
        " on 2 nodes"
    )
    assert (
        "GiB on the worker's share of memory of " in said["memory"]
        and "4 checkpoints take up to" in said["disk"]
    )
    assert not list(Path(flags["output_dir"]).iterdir()), "no probe is left behind"


@pytest.mark.slow
@pytest.mark.cluster
def test_a_token_that_the_cluster_refuses_costs_one_line(
    cluster: Any, flags: dict[str, str]
) -> None:
    code, out, _ = job(flags, RAY_AUTH_TOKEN="f" * 32)
    assert code == 2
    assert (
        f"FAIL  cluster: RAY_ADDRESS {cluster.address}: the cluster refuses this process's token; "
        "set RAY_AUTH_" in out
    )


@pytest.mark.slow
@pytest.mark.cluster
def test_a_node_that_differs_is_named(cluster: Any, flags: dict[str, str], tmp_path: Path) -> None:
    metadata = tmp_path / "packages" / "peft-0.0.1.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True)
    metadata.write_text("Metadata-Version: 2.1\nName: peft\nVersion: 0.0.1\n")
    other = cluster.add_node(num_cpus=1, env_vars={"PYTHONPATH": f"{tmp_path / 'packages'}:{ROOT}"})
    # /proc/self/cwd is another folder to every process that was started elsewhere, as a local disk
    # is to every node
    places = {"scaling.storage_path": "/proc/self/cwd/runs", "scaling.num_workers": "7"}
    code, out, err = job(flags | places, folder=tmp_path)
    assert code == 2
    failed = dict(
        line.removeprefix("FAIL  ").split(": ", 1)
        for line in out.splitlines()
        if line.startswith("FAIL")
    )
    assert set(failed) == {"resources", "storage", "packages"}, out + err
    node = f"-{other.node_id[:6]}"
    assert (
        failed["packages"].count(" has ") == 1
        and f"{node} has peft 0.0.1, not " in failed["packages"]
    )
    assert "--scaling.num_workers 7 asks for more than there is" in failed["resources"]
    assert (
        node in failed["storage"]
        and "give --scaling.storage_path a folder that all nodes share" in failed["storage"]
    )
