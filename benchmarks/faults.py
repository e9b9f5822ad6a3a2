"""Break a training run in every way at every moment, and compare it with the unbroken run.

    python -m benchmarks.faults out/faults

With --quick every fault happens once; --only WORD chooses trials that have it in their name.

Every trial is a fine-tuning run of its own on a Ray cluster of a head and two nodes, all on this
machine. It trains a Llama of random weights in 4-bit NF4 on the CPU, computed in float32 and
without dropout so that curves compare. The database and its questions are made here.

The faults are real. Processes are killed with SIGKILL. An allocation larger than any memory is
asked of torch in the worker. The storage becomes a link that leads to itself for a minute (the
kernel refuses every access to it), or a small file system of its own that is filled up (root may
mount one). A byte is changed in a file. `mlflow server` is killed and started again. Where a driver
ends, the same command is given again.

A run has survived when it ends with exit code 0, its losses are those of the unbroken run within
1e-4, and MLflow has each point of its curve once. Steps are repeated when the driver sees them
again. Trials are kept in the folder and are not run twice. The last line is one JSON object:
`survived` of `of`, and `largest_difference` of a loss, repeated steps included, from the unbroken
run's.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, closing, suppress
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from benchmarks.mlflow_server import Server
from benchmarks.ray_cluster import ray_cluster
from ray_sql import cli, finetune
from ray_sql.cluster.events import DriverLink, Event, TrainJob, TrainOutcome, TrainPoint
from ray_sql.config import Config, load
from ray_sql.report import progress
from ray_sql.store import checkpoints, storage
from ray_sql.store.run_folder import RunFolder
from ray_sql.train import driver

STEPS, SAVE = 16, 4
MOMENTS = {
    "before the first checkpoint": ("step", 2),
    "between two": ("step", 10),
    "during a save": ("save", 12),
    "at the last step": ("step", STEPS),
}
"""A step that the driver has seen, or a checkpoint whose folder is there and whose marker is
not."""
OUTAGE = 60.0
"""Seconds for which the storage still refuses every access once the run has noticed."""
TOLERANCE = 1e-4
"""How far a loss may be from the unbroken run's."""
PATIENCE = 180.0
"""Seconds that a run may take to come to its moment, and from there to its end."""
SETTINGS: dict[str, Any] = {
    "task_type": "sql",
    "data.split_by": "question",
    "data.validation_fraction": 0.0,
    "prompt.serializer": "compact",
    "lora.r": 64,
    "lora.lora_dropout": 0.0,
    "learning_rate": 1e-3,
    "grad_accum_steps": 16,
    "train.bf16": False,
    "train.max_steps": STEPS,
    "train.logging_steps": 1,
    "save_steps": SAVE,
    "scaling.num_workers": 1,
    "scaling.resources_per_worker": {"CPU": 1},
    "evaluate.select_examples": 0,
    "evaluate.limit": 1,
    "evaluate.max_new_tokens": 1,
    "evaluate.baseline": False,
    "evaluate.processes": 1,
}
SHOP = """
CREATE TABLE customer (id INTEGER PRIMARY KEY, name TEXT, city TEXT, born INTEGER);
CREATE TABLE product (id INTEGER PRIMARY KEY, title TEXT, colour TEXT, price REAL);
CREATE TABLE sale (
  customer_id INTEGER REFERENCES customer (id), product_id INTEGER REFERENCES product (id),
  day TEXT, amount INTEGER);
INSERT INTO customer VALUES (1, 'Ada', 'Lisbon', 1980), (2, 'Ben', 'Porto', 1991);
INSERT INTO product VALUES (1, 'Lamp', 'red', 20.5), (2, 'Desk', 'white', 120);
INSERT INTO sale VALUES (1, 1, '2024-01-02', 2), (2, 2, '2024-02-01', 1);
"""
COLUMNS = {
    "customer": ("id", "name", "city", "born"),
    "product": ("id", "title", "colour", "price"),
    "sale": ("day", "amount", "customer_id", "product_id"),
}


def main(argv: list[str] | None = None) -> None:
    """Run what the folder does not have yet, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where trials are kept")
    parser.add_argument(
        "--quick", action="store_true", help="every fault once, between two checkpoints"
    )
    parser.add_argument("--only", default="", help="trials with this in their name")
    parser.add_argument("--drive", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.drive:
        drive(**json.loads(arguments.drive.read_text()))
        return
    chosen = [
        (fault, moment)
        for fault, (_, moments) in FAULTS.items()
        for moment in moments
        if arguments.only in f"{fault} {moment}"
        and (not arguments.quick or moment == "between two")
    ]
    if os.geteuid():
        print("left out: disk full, whose file system of its own only root can mount")
        chosen = [(fault, moment) for fault, moment in chosen if fault != "disk full"]
    report(trials(arguments.folder.resolve(), chosen))


def trials(folder: Path, chosen: list[tuple[str, str]]) -> list[dict[str, Any]]:
    """Run the chosen trials that the folder does not have, and return the results of all."""
    make_data(folder / "data")
    make_model(folder / "model")
    names = [("nothing", ""), *chosen]
    if all((place(folder, *name) / "result.json").is_file() for name in names):
        return [kept(folder, *name) for name in chosen]
    with closing(Nodes()) as nodes:
        for number, (fault, moment) in enumerate(names):
            if not (place(folder, fault, moment) / "result.json").is_file():
                result = trial(folder, nodes, fault, moment)
                print(f"{number}/{len(chosen)} {fault}, {moment}: {json.dumps(result)}", flush=True)
                if not moment and not result["survived"]:
                    raise RuntimeError(
                        f"the unbroken run failed; see {place(folder, fault, moment) / 'log.txt'}"
                    )
    return [kept(folder, *name) for name in chosen]


def place(folder: Path, fault: str, moment: str) -> Path:
    """Return the folder of a trial."""
    return folder / f"{fault} {moment}".strip().replace(" ", "-")


def kept(folder: Path, fault: str, moment: str) -> dict[str, Any]:
    """Return the result of a trial that is over."""
    return dict(json.loads((place(folder, fault, moment) / "result.json").read_text()))


def trial(folder: Path, nodes: Nodes, fault: str, moment: str) -> dict[str, Any]:
    """Run one trial and keep what came of it."""
    started = time.monotonic()
    happens = FAULTS[fault][0] if moment else None
    nodes.complete()
    for _ in range(3):  # a save takes some milliseconds: what comes too late for it is tried again
        shutil.rmtree(place(folder, fault, moment), ignore_errors=True)
        with Run(place(folder, fault, moment), nodes, fault, moment) as run:
            run.start()
            hit = happens is None or run.comes_to(moment)
            if happens and hit:
                happens(run)
            code = run.end()
            result = outcome(folder, run, code)
        if hit:
            break
        started = time.monotonic()
    else:
        raise RuntimeError(f"{fault}, {moment}: the moment was missed three times")
    result |= {"fault": fault, "moment": moment, "seconds": round(time.monotonic() - started, 1)}
    storage.write_local_text(run.folder / "result.json", json.dumps(result, indent=1))
    return result


def outcome(folder: Path, run: Run, code: int | None) -> dict[str, Any]:
    """Compare a run's curve with the unbroken one, and say whether it survived."""
    seen = [point for point in run.points() if "loss" in point]
    unbroken = {
        point["step"]: point["loss"]
        for point in Run(place(folder, "nothing", ""), run.nodes).points()
    }
    steps = {point["step"] for point in seen}
    recorded = run.recorded() if code == 0 else []
    said = SAYS.get(run.fault, "") in run.log.read_text()
    largest = max((abs(point["loss"] - unbroken[point["step"]]) for point in seen), default=None)
    near = largest is not None and largest < TOLERANCE
    return {
        "survived": code == 0
        and steps == set(unbroken)
        and recorded == sorted(unbroken)
        and said
        and near,
        "exit_code": code,
        "starts": run.starts,
        "steps_repeated": len(seen) - len(steps),
        "largest_difference": largest,
        "recorded_once": recorded == sorted(unbroken),
        "said": said,
    }


def report(results: list[dict[str, Any]]) -> None:
    """Print the table and the sums."""
    print(
        "\n| fault | moment | survived | steps repeated | largest difference | seconds "
        "|\n|---|---|---|---|---|---|"
    )
    for one in results:
        print(
            f"| {one['fault']} | {one['moment']} | {'yes' if one['survived'] else '**no**'} | "
            f"{one['steps_repeated']} | "
            f"{'no point' if (far := one['largest_difference']) is None else format(far, '.1e')} | "
            f"{one['seconds']:.0f} |"
        )
    largest = max(
        (far for one in results if (far := one["largest_difference"]) is not None), default=None
    )
    survived = sum(one["survived"] for one in results)
    print(json.dumps({"survived": survived, "of": len(results), "largest_difference": largest}))


class Nodes:
    """Keep a head without CPUs, where drivers are, and two nodes of one CPU each."""

    def __init__(self) -> None:
        self._start()

    def _start(self) -> None:
        self._stack = ExitStack()
        self._cluster = self._stack.enter_context(ray_cluster(num_cpus=0, **SMALL))
        self.complete()

    @property
    def address(self) -> str:
        """Return the address of the head."""
        return str(self._cluster.address)

    def close(self) -> None:
        """End all nodes."""
        self._stack.close()

    def lose(self) -> None:
        """Send SIGKILL to all processes of all nodes, and put other machines in their place."""
        for node in (self._cluster.head_node, *self._cluster.worker_nodes):
            _kill(psutil.Process(_raylet(node).pid))
            node.kill_all_processes(check_alive=False, allow_graceful=False)
        self.close()
        self._start()

    def complete(self) -> None:
        """Replace the nodes that were killed."""
        for node in [
            node for node in self._cluster.worker_nodes if _raylet(node).poll() is not None
        ]:
            self._cluster.remove_node(node, allow_graceful=False)
        while len(self._cluster.worker_nodes) < 2:
            self._cluster.add_node(num_cpus=1, **SMALL)

    def workers(self) -> list[psutil.Process]:
        """Return the processes that train."""
        raylets = [_raylet(node) for node in self._cluster.worker_nodes]
        children = [
            one
            for raylet in raylets
            if raylet.poll() is None
            for one in psutil.Process(raylet.pid).children()
        ]
        return [process for process in children if "RayTrainWorker" in " ".join(process.cmdline())]


SMALL = {"object_store_memory": 80 * 2**20, "include_dashboard": False}


def _raylet(node: Any) -> subprocess.Popen[bytes]:
    (raylet,) = node.all_processes["raylet"]
    started: subprocess.Popen[bytes] = raylet.process
    return started


def _kill(parent: psutil.Process) -> None:
    """Send SIGKILL to a process and all that it started."""
    for process in (parent, *parent.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):
            process.kill()


class Run:
    """Keep one fine-tuning run, whose command may be given several times."""

    def __init__(self, folder: Path, nodes: Nodes, fault: str = "", moment: str = "") -> None:
        self.folder, self.nodes, self.fault, self.moment = folder, nodes, fault, moment
        self.log, self.store, self._points = (
            folder / "log.txt",
            folder / "store",
            folder / "points.jsonl",
        )
        self.starts = 0
        self.server: Server | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self.worker: psutil.Process | None = None

    def __enter__(self) -> Run:
        (self.folder / "behind").mkdir(parents=True)
        self.store.symlink_to(self.folder / "behind")
        if self.fault == "disk full":
            subprocess.run(
                ["mount", "-t", "tmpfs", "-o", "size=64m", "none", self.folder / "behind"],
                check=True,
            )
        uri = f"sqlite:///{self.folder.parent / 'mlflow.db'}"
        if self.fault == "MLflow killed":
            self.server = Server(self.folder)
            self.server.start()
            uri = self.server.uri
        given = {
            **SETTINGS,
            "model_name": str(self.folder.parent / "model"),
            "dataset_id": str(self.folder.parent / "data"),
            "output_name": self.folder.name,
            "scaling.storage_path": str(self.store),
            "cache_dir": str(self.folder.parent / "cache"),
            "tracking.uri": uri,
        }
        self.config = load(Config, [], **given)
        full = MOMENTS[self.moment] if self.fault == "out of memory" else None
        plan = {"settings": given, "points": str(self._points), "full": full}
        (self.folder / "plan.json").write_text(json.dumps(plan))
        return self

    def __exit__(self, *_: object) -> None:
        if self._process and self._process.poll() is None:
            self.kill()
        if self.server:
            self.server.kill()
        if self.fault == "disk full":
            subprocess.run(["umount", "--lazy", self.folder / "behind"], check=True)

    def start(self) -> None:
        """Give the command, again where it was given before."""
        self.starts += 1
        settings = {
            "RAY_ADDRESS": self.nodes.address,
            "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
            "PYTHONUNBUFFERED": "1",
            "HF_HUB_OFFLINE": "1",
        }
        command = [
            sys.executable,
            "-m",
            "benchmarks.faults",
            str(self.folder),
            "--drive",
            str(self.folder / "plan.json"),
        ]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, **settings}
            )

    def kill(self) -> None:
        """Send SIGKILL to the driver."""
        assert self._process
        self._process.kill()
        self._process.wait()

    def points(self) -> list[dict[str, Any]]:
        """Return the points that the driver has seen, in all starts.

        A line may have been cut off when the driver was killed.
        """
        text = self._points.read_text() if self._points.exists() else ""
        return [json.loads(line) for line in text.splitlines() if line.endswith("}")]

    def comes_to(self, moment: str) -> bool:
        """Wait for a moment; False if it is over already, or the run is."""
        kind, step = MOMENTS[moment]
        assert self._process
        if not self._waits(lambda: bool(self.points())):
            return False
        self.worker = self.nodes.workers()[0]
        if not self._waits(lambda: self.points()[-1]["step"] >= step):
            return False
        folder = Path(self.config.run_dir, f"checkpoint-{step}")
        while kind == "save" and not folder.exists() and self._process.poll() is None:
            pass  # it takes milliseconds: no time to sleep
        return kind == "step" or (folder.exists() and not (folder / checkpoints.MARKER).exists())

    def notices(self) -> None:
        """Wait until the run has said what happens to it, or is over."""
        self._waits(lambda: SAYS[self.fault] in self.log.read_text())

    def end(self) -> int | None:
        """Return the exit code; None where the run does not end."""
        assert self._process
        try:
            code = self._process.wait(PATIENCE)
            if code == 0 and finetune.spool(self.config).exists() and self.server:
                self.start()  # a finished run is shown, and what waits for MLflow is sent
                code = self._process.wait(PATIENCE)
            return code
        except subprocess.TimeoutExpired:
            return None

    def recorded(self) -> list[int]:
        """Return the steps of the curve in MLflow, sorted, repeated ones repeated.

        The list is empty where the run has not ended well.
        """
        from mlflow.tracking import MlflowClient

        client = MlflowClient(self.config.tracking.uri)
        known = RunFolder(self.config.run_dir).read_mlflow_run_id()
        if client.get_run(known).info.status != "FINISHED":
            return []
        return sorted(point.step for point in client.get_metric_history(known, "train/loss"))

    def _waits(self, there: Callable[[], bool]) -> bool:
        started = time.monotonic()
        assert self._process
        while not there():
            if self._process.poll() is not None or time.monotonic() - started > PATIENCE:
                return False
            time.sleep(0.01)
        return True


def worker_killed(run: Run) -> None:
    """Send SIGKILL to the process that trains."""
    assert run.worker
    run.worker.kill()


def node_killed(run: Run) -> None:
    """Send SIGKILL to all processes of the run's node, as when a machine is lost.

    The other node is free.
    """
    assert run.worker
    raylet = run.worker.parent()
    assert raylet
    run.worker.kill()
    _kill(raylet)


def driver_killed(run: Run) -> None:
    """Send SIGKILL to the driver, and give the same command again."""
    run.kill()
    run.start()


def head_killed(run: Run) -> None:
    """Lose the head with the driver on it and all nodes.

    The same command is given on a new cluster that sees the same folder.
    """
    run.kill()
    run.nodes.lose()
    run.start()


def disk_full(run: Run) -> None:
    """Fill the disk, and give the same command once the run has ended and there is room."""
    filler = run.folder / "behind" / "filler"
    with suppress(OSError), filler.open("wb", buffering=0) as stream:
        while True:
            stream.write(bytes(2**20))
    if run.end() == 2:  # for the user to fix
        filler.unlink()
        run.start()


def storage_fails(run: Run) -> None:
    """Let every access to the storage fail for a minute."""
    _lead(run.store, run.store)
    run.notices()
    time.sleep(OUTAGE)
    _lead(run.store, run.folder / "behind")


def checkpoint_damaged(run: Run) -> None:
    """Kill the driver, change a byte of the newest complete checkpoint, and start again."""
    run.kill()
    psutil.wait_procs(
        [run.worker] if run.worker else [], timeout=PATIENCE
    )  # it may still be saving
    file = Path(checkpoints.complete(RunFolder(run.config.run_dir))[-1].uri, "optimizer.pt")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    run.start()


def mlflow_killed(run: Run) -> None:
    """Send SIGKILL to the MLflow server, and start it again."""
    assert run.server
    run.server.kill()
    run.notices()
    run.server.start()


def _lead(link: Path, target: Path) -> None:
    new = link.with_name("new")
    new.symlink_to(target)
    new.replace(link)


FAULTS: dict[str, tuple[Callable[[Run], None], tuple[str, ...]]] = {
    "worker killed": (worker_killed, tuple(MOMENTS)),
    "node killed": (node_killed, tuple(MOMENTS)),
    "driver killed": (driver_killed, tuple(MOMENTS)),
    "head killed": (head_killed, tuple(MOMENTS)),
    "out of memory": (lambda run: None, tuple(MOMENTS)),  # see `without_memory`
    "storage fails": (storage_fails, tuple(MOMENTS)),
    "disk full": (disk_full, tuple(MOMENTS)),
    "checkpoint damaged": (checkpoint_damaged, tuple(MOMENTS)[1:]),
    "MLflow killed": (mlflow_killed, tuple(MOMENTS)),
}
"""What happens, and at which moments it can."""
SAYS = {
    "out of memory": "out of memory",
    "storage fails": "storage fails",
    "disk full": "No space left on device",
    "checkpoint damaged": "is damaged",
    "MLflow killed": "stopped answering",
}
"""What the run's log then has: a fault that nobody noticed did not happen."""


def drive(settings: dict[str, Any], points: str, full: tuple[str, int] | None) -> None:
    """Drive a run as `jobs.finetune` does, and write down every point of the curve."""

    receive = progress.Progress.__call__

    def note_and_receive(self: progress.Progress, event: Event) -> None:
        if isinstance(event, TrainPoint):
            point = {"step": event.step, "loss": event.values["loss"]}
            with open(points, "a") as stream:
                stream.write(json.dumps(point) + "\n")
        receive(self, event)

    progress.Progress.__call__ = note_and_receive  # type: ignore[method-assign]
    if full:
        driver.train_loop_per_worker = partial(without_memory, moment=full)
    file = Path(points).with_name("settings.json")
    file.write_text(json.dumps(settings))
    cli.main("finetune", ["--config", str(file)])


def without_memory(job: TrainJob, link: DriverLink, moment: tuple[str, int]) -> TrainOutcome:
    """Train where torch finds no memory at a moment, unless passes were halved."""
    import torch

    from ray_sql import train
    from ray_sql.store import storage
    from ray_sql.train import trainer

    kind, at = moment
    step, checksum = trainer.StepTrainer.training_step, storage.checksum

    def full(*_: Any) -> None:
        if job.microbatch_halvings == 0:
            torch.empty(2**55)

    def training_step(self: Any, *given: Any) -> Any:
        if kind == "step" and self.state.global_step + 1 == at:
            full()
        return step(self, *given)

    def while_saving(file: Path) -> Any:
        if kind == "save" and f"checkpoint-{at}" in str(file):
            full()
        return checksum(file)

    trainer.StepTrainer.training_step = training_step  # type: ignore[assignment, method-assign]
    storage.checksum = while_saving
    return train.train_loop_per_worker(job, link)


def make_data(folder: Path) -> None:
    """Write a folder in Spider's format: one database, questions on its columns."""
    if (folder / "dev.json").is_file():
        return
    (folder / "database" / "shop").mkdir(parents=True, exist_ok=True)
    (folder / "database" / "shop" / "shop.sqlite").unlink(missing_ok=True)
    connection = sqlite3.connect(folder / "database" / "shop" / "shop.sqlite")
    connection.executescript(SHOP)
    connection.close()
    pairs = [
        ("Show the {column} of every {table}.", "SELECT {column} FROM {table}"),
        (
            "How many different values has {column} of {table}?",
            "SELECT COUNT(DISTINCT {column}) FROM {table}",
        ),
        ("What is the largest {column} of a {table}?", "SELECT MAX({column}) FROM {table}"),
        ("List {table} by {column}.", "SELECT * FROM {table} ORDER BY {column}"),
    ]
    examples = []
    for table, columns in COLUMNS.items():
        for column in columns:
            names = {"table": table, "column": column}
            examples += [
                {"db_id": "shop", "question": q.format(**names), "query": sql.format(**names)}
                for q, sql in pairs
            ]
    (folder / "tables.json").write_text("[]")
    (folder / "train_spider.json").write_text(json.dumps(examples))
    (folder / "train_others.json").write_text("[]")
    (folder / "dev.json").write_text(json.dumps(examples[:1]))


def make_model(folder: Path) -> None:
    """Save a Llama of random weights, and a tokenizer of bytes."""
    import torch
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    if (folder / "config.json").is_file():
        return
    words = ["<|pad|>", "<|end|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    made = Tokenizer(BPE({word: number for number, word in enumerate(words)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<|pad|>", eos_token="<|end|>")
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    shape = {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    LlamaForCausalLM(
        LlamaConfig(vocab_size=len(fast), max_position_embeddings=4096, **shape)
    ).save_pretrained(folder)


if __name__ == "__main__":
    main()
