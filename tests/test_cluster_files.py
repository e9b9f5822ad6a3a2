"""The files that start a cluster are what Ray takes.

Ray's own loader and schema read both `ray up` files, and the programs that they call read every
command in them. The RayJob is compared with KubeRay's field names, and Ray's own packaging says
what a submitted job leaves behind. No cloud is asked: the steps of `ray up` that need one (images,
prices, credentials) come after those that are tested here.
"""

from __future__ import annotations

import copy
import re
import shlex
import shutil
import subprocess
import tomllib
import zipfile
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import click
import jsonschema
import pytest
import yaml
from ray._private.authentication import authentication_token_setup
from ray._private.ray_constants import get_runtime_env_default_excludes
from ray._private.runtime_env.packaging import create_package
from ray.autoscaler._private import commands, docker, util
from ray.scripts.scripts import cli as ray

from ray_sql import __version__
from ray_sql.config import Config, load

ROOT = Path(__file__).parent.parent
FILES = ("cluster.yaml", "cluster.local.yaml")
RAY = re.search(r"^ray==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[1]
PAGE = "\n".join(
    (ROOT / "docs" / name).read_text() for name in ("cluster.md", "running.md", "secrets.md")
)


def read(file: str) -> dict[str, Any]:
    """A YAML file at the top of the project, as `ray up` reads it."""
    return dict(yaml.safe_load((ROOT / file).read_text()))


def prepared(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration as Ray completes it, after its own validation."""
    made = util.prepare_config(copy.deepcopy(config))
    util.validate_config(made)
    return dict(made)


def shell(config: dict[str, Any]) -> list[str]:
    """Every command that a node runs."""
    return [one for key, value in config.items() if key.endswith("_commands") for one in value]


def calls(program: str, text: str) -> list[list[str]]:
    """The arguments of every call of `program` in shell text, one list a call."""
    found = re.findall(
        rf"(?:^|[\s/(;])(?:{program}) ([^;|&()<>\n]+)", text.replace("\\\n", " "), re.MULTILINE
    )
    return [shlex.split(one, comments=True) for one in found]


def parse(command: click.Command, words: list[str]) -> dict[str, Any]:
    """Parse words as the program itself does, and run nothing.

    Raises `click.UsageError` for words that the program does not know.
    """
    words = list(words)
    while isinstance(command, click.Group):
        command = command.commands[words.pop(0)]
    return command.make_context(command.name or "", words).params


@pytest.mark.parametrize("file", FILES)
def test_ray_takes_the_cluster_files(file: str) -> None:
    config = read(file)
    assert {"head_setup_commands", "max_workers", "available_node_types"} <= set(prepared(config))
    with pytest.raises(jsonschema.ValidationError, match="idle_minutes"):
        prepared(
            {**config, "idle_minutes": 5}
        )  # the schema is strict: what is misspelt above would have been found


def test_the_local_file_passes_all_that_ray_up_does_before_it_logs_in() -> None:
    made = commands._bootstrap_config(read("cluster.local.yaml"), no_config_cache=True)
    assert made["max_workers"] == len(made["provider"]["worker_ips"]) == 2


def test_the_lines_for_gcp_make_a_valid_file() -> None:
    text = (ROOT / "cluster.yaml").read_text()
    lines = text.partition("# On GCP")[2].splitlines()[1:]
    changes = yaml.safe_load("\n".join(line.removeprefix("#").removeprefix(" ") for line in lines))
    assert changes["provider"]["type"] == "gcp"
    nodes = prepared({**read("cluster.yaml"), **changes})["available_node_types"]
    assert "scheduling" not in nodes["head"]["node_config"]
    assert {"preemptible": True} in nodes["gpu"]["node_config"]["scheduling"]


def test_the_head_stays_and_workers_come_from_none_on_spot() -> None:
    config = prepared(read("cluster.yaml"))
    nodes = config["available_node_types"]
    head, gpu = nodes[config["head_node_type"]], nodes["gpu"]
    assert "InstanceMarketOptions" not in head["node_config"] and head["resources"]["CPU"] == 0
    assert gpu["node_config"]["InstanceMarketOptions"]["MarketType"] == "spot"
    assert gpu["min_workers"] == 0 < gpu["max_workers"] <= config["max_workers"]
    assert config["idle_timeout_minutes"] > 0


@pytest.mark.parametrize("file", FILES)
def test_every_command_parses(file: str) -> None:
    for command in shell(prepared(read(file))):
        subprocess.run(["bash", "-n", "-c", command], check=True)


@pytest.mark.parametrize("file", FILES)
def test_ray_starts_with_what_ray_start_takes(file: str) -> None:
    config = read(file)
    starts = {kind: "\n".join(config[f"{kind}_start_ray_commands"]) for kind in ("head", "worker")}
    made = {
        kind: [parse(ray, words) for words in calls("ray", text)] for kind, text in starts.items()
    }
    head, worker = made["head"][-1], made["worker"][-1]  # after `ray stop`
    assert head["head"] and head["autoscaling_config"] == "~/ray_bootstrap_config.yaml"
    assert head["dashboard_host"] == "0.0.0.0", (
        "Ray Tune's clean-up asks the dashboard from other nodes"
    )
    assert worker["address"] == f"$RAY_HEAD_IP:{head['port']}"


@pytest.mark.parametrize("file", FILES)
def test_mlflow_keeps_its_records_on_the_shared_folder(file: str) -> None:
    from mlflow.cli import cli as mlflow

    [words] = calls("mlflow", "\n".join(read(file)["head_start_ray_commands"]))
    given = parse(mlflow, words)
    assert given["backend_store_uri"].startswith("sqlite:////shared/") and given["workers"] == "1"
    assert given["artifacts_destination"].startswith("/shared/")
    assert (
        f"MLFLOW_TRACKING_URI=http://{given['host']}:{given['port']}" in (ROOT / file).read_text()
    )


@pytest.mark.parametrize("file", FILES)
def test_nodes_install_this_package_with_the_tested_versions(file: str) -> None:
    config = read(file)
    [words] = calls("pip", "\n".join(config["setup_commands"]))
    assert words[words.index("--constraint") + 1] == "~/ray_sql/constraints.txt"
    assert fnmatch(f"~/ray_sql/ray_sql-{__version__}-py3-none-any.whl", words[-1])
    assert config["file_mounts"]["~/ray_sql"] == "dist"
    assert "--wheel-dir dist" in PAGE and "cp constraints.txt dist" in PAGE, (
        "the page says how dist/ is made"
    )


def test_the_token_reaches_every_node() -> None:
    token = f"~/{authentication_token_setup._get_default_token_path().relative_to(Path.home())}"
    for file in FILES:
        assert read(file)["file_mounts"][token] == token
    aws, local = prepared(read("cluster.yaml")), prepared(read("cluster.local.yaml"))
    container = aws["docker"]
    for kind in ("head", "worker"):
        options = container["run_options"] + container.get(f"{kind}_run_options", [])
        started = docker.docker_start_cmds(
            "ubuntu",
            container["image"],
            aws["file_mounts"],
            "c",
            options,
            "n",
            "/home/ray",
            "docker",
        )
        words = shlex.split(started)
        assert (
            "RAY_AUTH_MODE=token" in words
            and "/shared:/shared" in words
            and "HF_HOME=/shared/huggingface" in words
        )
        assert any(word.endswith(":/home/ray/.ray/auth_token") for word in words)
        [command] = [one for one in local[f"{kind}_start_ray_commands"] if "ray start" in one]
        assert {"RAY_AUTH_MODE=token", "HF_HOME=/shared/huggingface"} <= set(
            command.partition("ray start")[0].split()
        )


def test_images_have_the_tested_ray_and_python() -> None:
    python = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "requires-python"
    ].removeprefix(">=3.")
    image = f"rayproject/ray:{RAY}-py3{python}-gpu"
    assert read("cluster.yaml")["docker"]["image"] == image
    assert f"\nFROM {image}\n" in (ROOT / "Dockerfile").read_text()


def test_the_dockerfile_copies_what_the_package_is_made_of() -> None:
    text = (ROOT / "Dockerfile").read_text()
    copied = [
        word
        for line in re.findall(r"^COPY --chown=ray (.+)$", text, re.MULTILINE)
        for word in line.split()[:-1]
    ]
    assert {"pyproject.toml", "constraints.txt", "ray_sql", "jobs"} <= set(copied)
    assert all((ROOT / word).exists() for word in copied)
    assert (
        ROOT / tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["readme"]
    ).name in copied


JOB = {
    *("activeDeadlineSeconds", "backoffLimit", "clusterSelector", "deletionStrategy", "entrypoint"),
    *("entrypointNumCpus", "jobId", "metadata", "rayClusterSpec", "runtimeEnvYAML"),
    *("shutdownAfterJobFinishes", "submissionMode", "submitterConfig", "submitterPodTemplate"),
    *("suspend", "ttlSecondsAfterFinished"),
}
"""Fields of RayJobSpec in KubeRay's API reference (ray.io/v1)."""
CLUSTER = {
    *(
        "authOptions",
        "autoscalerOptions",
        "enableInTreeAutoscaling",
        "headGroupSpec",
        "rayVersion",
        "workerGroupSpecs",
    )
}
GROUP = {"groupName", "maxReplicas", "minReplicas", "rayStartParams", "replicas", "template"}


def test_the_rayjob_is_one_and_runs_a_command_that_parses() -> None:
    job = yaml.safe_load((ROOT / "jobs" / "rayjob.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    spec, cluster = job["spec"], job["spec"]["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    assert (
        set(spec) <= JOB
        and set(cluster) <= CLUSTER
        and all(set(group) <= GROUP for group in groups)
    )
    assert cluster["rayVersion"] == RAY and cluster["authOptions"] == {"mode": "token"}
    assert spec["backoffLimit"] == 0 and spec["activeDeadlineSeconds"], (
        "a failed run is not repeated, and none for ever"
    )
    assert spec["submissionMode"] == "HTTPMode", "no submitter whose death would count as the run's"
    workdir = re.search(r"^WORKDIR (\S+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)[1]
    command, job_name, *flags = shlex.split(spec["entrypoint"])
    assert (command, job_name) == ("ray-sql", "finetune")
    config = load(Config, [flag.replace(workdir, str(ROOT)) for flag in flags])
    assert (
        config.scaling.use_gpu
        and config.scaling.max_workers <= cluster["workerGroupSpecs"][0]["maxReplicas"]
    )
    for place in (config.run_dir, config.dataset_id, config.cache_dir):
        assert place.startswith("/shared/"), (
            "what must outlive the pods lies where all of them see it"
        )


def test_every_pod_of_the_rayjob_has_image_token_and_shared_folder() -> None:
    cluster = yaml.safe_load((ROOT / "jobs" / "rayjob.yaml").read_text())["spec"]["rayClusterSpec"]
    pods = [
        group["template"]["spec"]
        for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])
    ]
    assert len({pod["containers"][0]["image"] for pod in pods}) == 1
    for pod in pods:
        [container] = pod["containers"]
        environment = {one["name"]: one for one in container["env"]}
        assert (
            "secretKeyRef" in environment["HF_TOKEN"]["valueFrom"]
            and "value" not in environment["HF_TOKEN"]
        )
        assert environment["HF_HOME"]["value"].startswith("/shared/")
        mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        assert mounted == {"shared": "/shared"} and {
            volume["name"] for volume in pod["volumes"]
        } == set(mounted)


LEFT = (
    *(
        "out/run/adapter/adapter_model.safetensors",
        "mlflow.db",
        "mlflow.db-wal",
        "mlruns/0/meta.yaml",
        "notes/out/adapter.bin",
        "notes/mlflow.db",
        "old/pytorch_model.bin",
        "old/model.pt",
        "old/last.ckpt",
        "mlartifacts/a/x",
    ),
    *(
        "data/spider/dev.json",
        "model/model.safetensors",
        "model/model.gguf",
        ".git/config",
        ".venv/bin/python",
    ),
    *(
        "ray_sql/__pycache__/x.pyc",
        ".pytest_cache/x",
        ".mypy_cache/x",
        ".ruff_cache/x",
        ".hypothesis/x",
        "build/x",
        "dist/x.whl",
    ),
    *(
        "ray_sql.egg-info/PKG-INFO",
        ".env",
        "jobs/.env.local",
        ".netrc",
        ".envrc",
        ".git-credentials",
        ".pypirc",
        ".mlflow/credentials",
        ".kube/config",
        ".config/gcloud/application_default_credentials.json",
        ".huggingface/token",
        "credentials.json",
        "service-account.json",
        "jobs/id_ecdsa",
        "jobs/me.p12",
        ".pgpass",
        ".ray/auth_token",
        ".ssh/id_ed25519",
    ),
    *(".aws/credentials", "keys/server.pem", "keys/server.key", "id_rsa", "auth_token", "hf_token"),
)
"""What lies about in a folder that jobs are submitted from, and must stay there."""


@pytest.mark.parametrize("with_gitignore", [True, False], ids=["gitignore too", "rayignore alone"])
def test_nothing_big_or_secret_travels_with_a_job(tmp_path: Path, with_gitignore: bool) -> None:
    folder = tmp_path / "project"
    left = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("ray_sql", "jobs", "benchmarks"):
        shutil.copytree(ROOT / name, folder / name, ignore=left)
    for name in (".rayignore", ".gitignore", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    code = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    for name in LEFT:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")
    package = tmp_path / "package.zip"
    create_package(
        str(folder),
        package,
        include_gitignore=with_gitignore,
        excludes=get_runtime_env_default_excludes(),
    )  # as ray job submit does
    with zipfile.ZipFile(package) as archive:
        travels = {name for name in archive.namelist() if not name.endswith("/")}
    assert travels == code
    assert {"ray_sql/data/read.py", "jobs/configs/spider-sql.yaml"} <= travels, (
        "a pattern for the user's data takes none of the code"
    )


def test_rays_commands_in_the_page_parse() -> None:
    shown = "\n".join(re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL))
    found = calls("ray", shown)
    assert {"up", "down", "dashboard", "job", "get-auth-token"} <= {words[0] for words in found}
    for words in found:
        given = parse(ray, words)
        file = given.get("cluster_config_file")
        assert file is None or file in FILES
