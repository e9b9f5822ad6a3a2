"""Share a tiny random Llama with its own tokenizer, a shop database, and a Spider folder.

All of it is made here, in seconds, with no network. The whole suite runs with the Hub switched off.
"""

from __future__ import annotations

import atexit
import json
import os
import sqlite3
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")  # a pull request must not fail by the luck of another's draw

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
os.environ |= {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "RAY_USAGE_STATS_ENABLED": "0",
}
for variable in ("HF_TOKEN", "MLFLOW_TRACKING_URI", "RAY_ADDRESS"):
    os.environ.pop(variable, None)


def keep_to_own_cores(worker: int, workers: int) -> None:
    """Let one of several test processes, and all that it starts, use its share of the cores.

    The threads of a computation wait for each other, so two on one core take more than twice as
    long.
    """
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cores[worker::workers] or {cores[worker % len(cores)]})


if "PYTEST_XDIST_WORKER" in os.environ and hasattr(os, "sched_setaffinity"):
    keep_to_own_cores(
        int(os.environ["PYTEST_XDIST_WORKER"].removeprefix("gw")),
        int(os.environ["PYTEST_XDIST_WORKER_COUNT"]),
    )

# the environment above is read while libraries are imported
from ray_sql.config import Config, load  # noqa: E402

ENDED: list[int] = []
"""The exit code with which the tests have ended, once they have."""


def pytest_sessionfinish(exitstatus: int) -> None:
    """Note the exit code, which is known now."""
    ENDED.append(int(exitstatus))


@pytest.hookimpl(trylast=True)
def pytest_unconfigure() -> None:
    """Leave without the destructors of native libraries.

    Threads of Ray's core, gRPC, Arrow and torch run on beside them: once the suite ended with "1202
    passed" and a segmentation fault. Ray's own workers leave like this.
    """
    if ENDED:
        # Python's own ending is left to run: old temporary folders are removed there
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(ENDED[-1])


CHAT_TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)

SHOP = """
CREATE TABLE customer (id INTEGER PRIMARY KEY, name TEXT, city TEXT);
CREATE TABLE product (id INTEGER PRIMARY KEY, title TEXT, price REAL);
CREATE TABLE sale (
  customer_id INTEGER REFERENCES customer (id), product_id INTEGER REFERENCES product (id), \
day TEXT, amount INTEGER,
  PRIMARY KEY (customer_id, product_id, day));
INSERT INTO customer VALUES (1, 'Ada', 'Lisbon'), (2, 'Ben', 'Porto'), \
(3, 'Cleo', 'Lisbon'), (4, 'Dan', NULL);
INSERT INTO product VALUES (1, 'Lamp', 20.5), (2, 'Desk', 120), (3, 'Chair', 60);
INSERT INTO sale VALUES (1, 1, '2024-01-02', 2), (1, 2, '2024-02-01', 1), \
(2, 3, '2024-02-03', 4), (3, 1, '2024-03-05', 1);
"""

QUESTIONS = [
    ("How many customers are there?", "SELECT COUNT(*) FROM customer"),
    ("Which customers live in Lisbon?", "SELECT name FROM customer WHERE city = 'Lisbon'"),
    ("List the titles of all products.", "SELECT title FROM product"),
    ("What is the highest price?", "SELECT MAX(price) FROM product"),
    ("What is the lowest price?", "SELECT MIN(price) FROM product"),
    ("Show the cities of the customers.", "SELECT city FROM customer"),
    ("How many products cost more than 50?", "SELECT COUNT(*) FROM product WHERE price > 50"),
    (
        "Who bought a desk?",
        "SELECT T1.name FROM customer AS T1 JOIN sale AS T2 ON T1.id = T2.customer_id WHERE "
        "T2.product_id = 2",
    ),
]


@pytest.fixture(scope="session")
def shared() -> Path:
    """Return the reference data, for developers and CI only.

    Tests that need it are skipped elsewhere.
    """
    place = os.environ.get("RAY_SQL_SHARED")
    if not place:
        pytest.skip("RAY_SQL_SHARED is not set")
    return Path(place)


def make_spider_folder(
    folder: Path, databases: tuple[str, ...] = ("shop", "store", "kiosk")
) -> Path:
    """Write a folder in Spider's format.

    Three databases of one make have their questions in train, and one more has its own in dev.
    """
    for db_id in (*databases, "mall"):
        place = folder / "database" / db_id
        place.mkdir(parents=True)
        connection = sqlite3.connect(place / f"{db_id}.sqlite")
        connection.executescript(SHOP)
        connection.close()
    (folder / "tables.json").write_text("[]")
    rows = [
        {"db_id": db_id, "question": q, "query": sql} for db_id in databases for q, sql in QUESTIONS
    ]
    (folder / "train_spider.json").write_text(json.dumps(rows[:-2]))
    (folder / "train_others.json").write_text(json.dumps(rows[-2:]))
    (folder / "dev.json").write_text(
        json.dumps([{"db_id": "mall", "question": q, "query": sql} for q, sql in QUESTIONS])
    )
    return folder


@pytest.fixture(scope="session")
def spider_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Share one folder of `make_spider_folder` among all tests, so that none may change it."""
    return make_spider_folder(tmp_path_factory.mktemp("spider"))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a random two-layer Llama, about 150k parameters, as a model folder.

    It has a byte-level BPE tokenizer with a chat template.
    """
    return make_model(tmp_path_factory.mktemp("tiny_model"))


def make_model(folder: Path, seed: int = 0, **shape: Any) -> Path:
    """Save a random Llama of the given shape, with a tokenizer trained on the questions above."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|start|>", "<|end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(
        [SHOP, *(f"{q}\n```sql\n{sql}\n```" for q, sql in QUESTIONS)] * 4, trainer
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|end|>"
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)
    torch.manual_seed(seed)
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    } | shape
    LlamaForCausalLM(
        LlamaConfig(vocab_size=len(fast), max_position_embeddings=2048, **sizes)
    ).save_pretrained(folder)
    return folder


def make_encoder(tokenizer: Any, config: Config, schemas: Any) -> Any:
    """Return the encoder of a run with these settings."""
    from ray_sql import rows
    from ray_sql.tasks import TASKS

    return rows.Encoder(tokenizer, TASKS[config.task_type], config.prompt, schemas)


def load_base(folder: Path, config: Config, device: str = "cpu") -> Any:
    """Load the base model of a folder as a run with these settings does."""
    from ray_sql import models

    return models.load_base(str(folder), config.quantization, config.train.bf16, device)


def removal_cut_off(run_dir: str, after: int) -> bool:
    """Remove a run's folder, killed after `after` deletions; False where there were no more."""
    from ray_sql.store import storage
    from ray_sql.store.run_folder import RunFolder

    left, remove = after, storage.remove

    def killed(uri: str) -> None:
        nonlocal left
        if not left:
            raise KeyboardInterrupt
        left -= 1
        remove(uri)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage, "remove", killed)
        try:
            RunFolder(run_dir).remove()
        except KeyboardInterrupt:
            return True
    return False


@pytest.fixture(scope="session")
def empty_mlflow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a database of MLflow's once, to be copied: its tables take seconds to lay out."""
    from mlflow.tracking import MlflowClient

    file = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    MlflowClient(f"sqlite:///{file}").search_experiments(max_results=1)
    return file


@pytest.fixture
def ray_local() -> Iterator[None]:
    """Start a Ray of the test's own, never one that something else on this machine runs."""
    import ray

    ray.init(address="local", num_cpus=2, include_dashboard=False, logging_level="ERROR")
    yield
    ray.shutdown()


@pytest.fixture
def ray_with_metrics() -> Iterator[str]:
    """A Ray of the test's own that shows its metrics at once; where they are read."""
    import ray

    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        _system_config={"metrics_report_interval_ms": 200},
    )
    (node,) = ray.nodes()
    yield f"http://127.0.0.1:{node['MetricsExportPort']}"
    ray.shutdown()


@pytest.fixture
def make_config(tiny_model: Path, spider_folder: Path, tmp_path: Path) -> Iterator[Any]:
    """Make settings of a run of seconds: `make_config(**dotted settings)`.

    It trains in process, in a folder of the test's own.
    """
    defaults = {
        "model_name": str(tiny_model),
        "output_name": "run",
        "task_type": "sql",
        "dataset_id": str(spider_folder),
        "output_dir": str(tmp_path / "out"),
        "cache_dir": str(tmp_path / "cache"),
        "prompt.serializer": "compact",
        "lora.r": 4,
        "lora.lora_alpha": 8,
        "grad_accum_steps": 2,
        "rows.examples_per_row": 8,
        "train.logging_steps": 1,
        "train.bf16": False,
        "data.split_by": "question",
        "data.validation_fraction": 0.1,
        "scaling.num_workers": 0,
        "evaluate.max_new_tokens": 8,
        "evaluate.limit": 4,
        "evaluate.processes": 1,
        "eval_batch_size": 4,
        "tracking.enabled": False,
    }

    def make(kind: type[Config] = Config, **changes: Any) -> Config:
        return load(kind, [], **(defaults | changes))

    yield make


@pytest.fixture(scope="session")
def tuned_run(
    tiny_model: Path, spider_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Share a finished run whose adapter knows the answers to most of the questions above.

    Its folder is `<output_dir>/tuned`, and no test may change it.
    """
    from ray_sql import finetune

    root = tmp_path_factory.mktemp("tuned")
    settings = {
        "model_name": str(tiny_model),
        "output_name": "tuned",
        "task_type": "sql",
        "dataset_id": str(spider_folder),
        "output_dir": str(root / "out"),
        "cache_dir": str(root / "cache"),
        "prompt.serializer": "compact",
        "lora.r": 64,
        "lora.lora_alpha": 64,
        "lora.lora_dropout": 0,
        "quantization.load_in_4bit": False,
        "learning_rate": 6e-3,
        "grad_accum_steps": 8,
        "rows.examples_per_row": 8,
        "train.max_steps": 80,
        "train.bf16": False,
        "train.lr_scheduler_type": "constant",
        "data.split_by": "question",
        "data.validation_fraction": 0,
        "evaluate.max_new_tokens": 48,
        "evaluate.processes": 1,
        "evaluate.select_examples": 0,
        "scaling.num_workers": 0,
        "tracking.enabled": False,
    }
    finetune.run(load(Config, [], **settings))
    return root / "out" / "tuned"


@pytest.fixture(scope="module")
def engine(tuned_run: Path) -> Iterator[Any]:
    """Share an engine on all databases of the tuned run."""
    from tests.serving import make_engine

    with make_engine(tuned_run) as engine:
        yield engine


@pytest.fixture
def held(engine: Any) -> Iterator[Any]:
    """Let the engine wait with every batch until it is released."""
    from tests.serving import holding

    with holding(engine) as held:
        yield held
