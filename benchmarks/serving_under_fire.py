"""Ask a service for minutes by 16 clients, most of them wrong or hostile, and count what it did.

    python -m benchmarks.serving_under_fire --output_name demo       (--quick: 20 seconds)

It starts `ray-sql serve` on a run in a process of its own, on a free port of this machine. First it
asks some of the run's questions one at a time; those answers are the right ones. Then each client
sends, in a mixture drawn from a seed:

- good: one of these questions, whose SQL and rows must be those from before;
- bad: a request that is wrong, which must be refused;
- hostile: a query that writes, reads files, loads code or does not end, or bytes that are no JSON;
- leaving: a question whose sender does not wait.

In bfloat16 an answer depends on the questions that are computed with it: its rounding does, and 85
to 90 % come out alike. So `--float32` computes in float32, where none may differ.

The last line is one JSON object. `wrong` counts good questions with another answer, `writes` what
was written: hostile queries with a result, files left behind, and databases whose bytes changed.
`server_errors` counts statuses from 500, but for 503, by which a full queue refuses. Memory is that
of the copy of the model and the processes that run its SQL, in MiB. Each page counts once. It is
told ten times from the first tenth on, and at most.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import psutil

from ray_sql.config import ServeConfig, load
from ray_sql.serve.databases import registered
from ray_sql.serve.recipe import find
from ray_sql.store.run_folder import RunFolder
from tests import fire
from tests.planted import computed_in_float32
from tests.serving import replica, running_job

CLIENTS = 16
KINDS = ("good", "good", "bad", "hostile", "leaving")
"""What clients send; two of five requests are good."""
QUERY_SECONDS = 2.0
"""Seconds that a query may take: hostile ones do not end."""
LOOK_SECONDS = 1.0
"""Seconds between two looks at the memory."""


@dataclass(frozen=True)
class Known:
    """A question about a database, and what the service answers when it is asked alone."""

    database: str
    question: str
    answer: dict[str, Any]


@dataclass
class Counted:
    """What the service did; clients add to it under the lock."""

    kinds: Counter[str] = field(default_factory=Counter)
    statuses: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    writes: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output_name", default="demo", help="a finished run for task sql")
    parser.add_argument("--output_dir", default="out")
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--questions", type=int, default=24, help="good questions to draw from")
    parser.add_argument("--quick", action="store_true", help="20 seconds, 8 questions")
    parser.add_argument("--float32", action="store_true", help="compute in float32")
    given = parser.parse_args(argv)
    seconds, questions = (20.0, 8) if given.quick else (given.seconds, given.questions)
    run = Path(given.output_dir).absolute() / given.output_name
    words = ["--evaluate.timeout", str(QUERY_SECONDS), "--serve.request_timeout_s", "300"]
    before = digests(run)
    with contextlib.ExitStack() as stack:
        scratch, copies = (
            Path(stack.enter_context(tempfile.TemporaryDirectory())) for _ in range(2)
        )
        if given.float32:
            words += ["--adapter", str(computed_in_float32(run, copies / "adapter"))]
        job, client = stack.enter_context(running_job(run, *words))
        places = [
            fire.Place(name, table["name"], table["columns"][0]["name"], scratch)
            for name in client.get("/v1/databases").json()["databases"]
            for table in client.get(f"/v1/databases/{name}").json()["tables"]
        ]
        known = asked_alone(client, RunFolder(str(run)), questions)
        counted = Counted()
        memory = under_fire(client, replica(job), counted, known, places, seconds)
        counted.writes += [str(file) for file in fire.left_behind(scratch)]
    counted.writes += [name for name, digest in digests(run).items() if digest != before[name]]
    for line in counted.wrong[:5] + counted.writes[:5]:
        print(line, file=sys.stderr)
    print(json.dumps(report(counted, memory, seconds)))


def asked_alone(client: httpx2.Client, run: RunFolder, count: int) -> list[Known]:
    """Return questions of the run with what the service answers them, one after the other."""
    rows = run.read_predictions()
    known = []
    for row in random.Random(14).sample(rows, k=min(count, len(rows))):
        body = {"database": row["db_id"], "question": row["question"]}
        answer = client.post("/v1/sql", json=body).raise_for_status().json()
        known.append(Known(row["db_id"], row["question"], told(answer)))
    return known


def told(answer: dict[str, Any]) -> dict[str, Any]:
    """Return the parts of an answer that must stay the same."""
    return {name: answer.get(name) for name in ("sql", "columns", "rows", "error")}


def under_fire(
    client: httpx2.Client,
    model: psutil.Process,
    counted: Counted,
    known: Sequence[Known],
    places: Sequence[fire.Place],
    seconds: float,
) -> list[float]:
    """Let clients send until the time is over; return the memory from its first tenth on, MiB."""
    end = time.monotonic() + seconds
    memory: list[float] = []

    def client_of(seed: int) -> None:
        chance = random.Random(seed)
        while time.monotonic() < end:
            send(client, chance, counted, known, places)

    with ThreadPoolExecutor(CLIENTS) as threads:
        clients = [threads.submit(client_of, seed) for seed in range(CLIENTS)]
        while time.monotonic() < end:
            if time.monotonic() > end - 0.9 * seconds:
                memory.append(mebibytes(model))
            time.sleep(LOOK_SECONDS)
        for one in clients:
            one.result()
    return [*memory, mebibytes(model)]


def send(
    client: httpx2.Client,
    chance: random.Random,
    counted: Counted,
    known: Sequence[Known],
    places: Sequence[fire.Place],
) -> None:
    """Send one request, and count what came of it."""
    kind, one = chance.choice(KINDS), chance.choice(known)
    asked = {"database": one.database, "question": one.question}
    wrong, writes, answer = [], [], None
    if kind == "good":
        answer = client.post("/v1/sql", json=asked)
        if answer.status_code == 200 and told(answer.json()) != one.answer:
            wrong = [f"{one.question}: {told(answer.json())}, alone {one.answer}"]
    elif kind == "bad":
        path, body = chance.choice(fire.BAD)
        answer = client.post(path, json=body)
        if answer.status_code not in fire.REFUSED:
            wrong = [f"{path} {str(body)[:200]}: {answer.status_code}"]
    elif kind == "leaving":
        fire.leave(client, asked)
    elif chance.random() < 0.5:
        answer = fire.post(client, chance.choice(fire.PATHS), chance.choice(fire.RAW))
    else:
        place = chance.choice(places)
        query = chance.choice([*fire.writing(place), *fire.endless(place)])
        answer = client.post("/v1/run", json={"database": place.database, "sql": query})
        if query in fire.writing(place) and "rows" in answer.json():
            writes = [f"{query}: {answer.text[:200]}"]
    with counted.lock:
        counted.kinds[kind] += 1
        if answer is not None:
            counted.statuses[str(answer.status_code)] += 1
        counted.wrong += wrong
        counted.writes += writes


def mebibytes(model: psutil.Process) -> float:
    """Return the memory of a process and of those that it began, each page counted once."""
    total = 0
    for process in [model, *model.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):  # a query's process, which ended
            total += process.memory_full_info().pss
    return total / 2**20


def digests(run: Path) -> dict[str, str]:
    """Return the SHA-256 of the files of a run's databases."""
    found = find(load(ServeConfig, [], output_name=run.name, output_dir=str(run.parent)))
    places = {name: one.place for name, one in registered({}, found.config).items()}
    return {
        name: hashlib.sha256(Path(place).read_bytes()).hexdigest()
        for name, place in places.items()
        if place and Path(place).is_file()
    }


def report(counted: Counted, memory: Sequence[float], seconds: float) -> dict[str, Any]:
    """Return the numbers."""
    errors = {
        status: count
        for status, count in counted.statuses.items()
        if int(status) >= 500 and status != "503"
    }
    return {
        "seconds": seconds,
        "clients": CLIENTS,
        "requests": sum(counted.kinds.values()),
        "kinds": dict(sorted(counted.kinds.items())),
        "statuses": dict(sorted(counted.statuses.items())),
        "wrong": len(counted.wrong),
        "writes": len(counted.writes),
        "server_errors": sum(errors.values()),
        "refused_for_room": counted.statuses["503"],
        "memory_mib": [round(part[-1]) for part in np.array_split(memory, 10) if len(part)],
        "memory_most_mib": round(max(memory)),
    }


if __name__ == "__main__":
    main()
