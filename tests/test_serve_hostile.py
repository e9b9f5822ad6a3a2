"""Good, bad and hostile requests at once: right answers, nothing written, and no error of ours."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx2
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ray_sql.serve.engine import Engine
from tests.conftest import QUESTIONS
from tests.fire import PATHS, RAW, Place, endless, leave, post, writing
from tests.serving import make_engine, serving

GOOD = [(question, sql) for question, sql in QUESTIONS if "COUNT" in sql or "MAX" in sql]
HERE = Place("mall", "customer", "name", Path("/tmp/ray_sql-no-such-folder"))
PARTS: dict[str, Any] = {
    "question": st.text(max_size=80) | st.integers() | st.none(),
    "database": st.sampled_from(["mall", "moon", "../mall"]) | st.text(max_size=20) | st.none(),
    "sql": st.text(max_size=200) | st.sampled_from(writing(HERE)),
    "evidence": st.text(max_size=80),
    "execute": st.booleans() | st.text(max_size=5),
    "max_rows": st.integers() | st.floats(),
    "samples": st.integers(-1, 3) | st.just(1000),
    "temperature": st.floats(),
    "choose": st.sampled_from(["greedy", "vote", "likelihood", "first_executable", "x"]),
    "ground": st.sampled_from(["none", "repair", "constrain", "x"]),
    "max_tokens": st.integers(-1, 60) | st.just(10**9),
    "messages": st.lists(
        st.fixed_dictionaries(
            {
                "role": st.sampled_from(["user", "system", "assistant", "developer", "tool"]),
                "content": st.text(max_size=60) | st.lists(st.text(max_size=5), max_size=2),
            }
        ),
        max_size=4,
    ),
    "n": st.integers(),
    "stream": st.booleans(),
}
BODIES = st.fixed_dictionaries({}, optional=PARTS)


@pytest.fixture(scope="module")
def engine(tuned_run: Path) -> Iterator[Engine]:
    """Share an engine whose queries may take a second, and a megabyte."""
    limits = {"evaluate.timeout": 1.0, "evaluate.max_bytes": 2**20, "evaluate.processes": 2}
    with make_engine(tuned_run, **limits) as engine:
        yield engine


def digests(engine: Engine) -> dict[str, str]:
    """Return the SHA-256 of the files of all databases."""
    places = {name: one.place or "" for name, one in engine.prompter.databases.items()}
    return {name: hashlib.sha256(Path(p).read_bytes()).hexdigest() for name, p in places.items()}


def good(client: httpx2.Client, chance: random.Random) -> None:
    """Ask what the run knows; a refusal for want of room is right, another answer is not."""
    question, sql = chance.choice(GOOD)
    answer = client.post("/v1/sql", json={"question": question, "database": "mall"})
    assert answer.status_code in (200, 503)
    if answer.status_code == 200:
        assert answer.json()["sql"] == sql
        assert answer.json()["row_count"] == 1


def hostile(client: httpx2.Client, chance: random.Random) -> None:
    """Run what may not be run, and send what is no JSON."""
    if chance.random() < 0.5:
        sql = chance.choice([*writing(HERE), *endless(HERE)])
        answer = client.post("/v1/run", json={"database": HERE.database, "sql": sql})
        assert sql not in writing(HERE) or "rows" not in answer.json()
    else:
        answer = post(client, chance.choice(PATHS), chance.choice(RAW))
    assert answer.status_code in (200, 400, 422, 503), answer.text


def leaving(client: httpx2.Client, chance: random.Random) -> None:
    """Ask, and do not wait for the answer."""
    leave(client, {"question": chance.choice(GOOD)[0], "database": "mall"})


def test_16_clients_with_good_and_hostile_requests(engine: Engine) -> None:
    before = digests(engine)

    def client_of(seed: int) -> None:
        chance = random.Random(seed)
        for _ in range(12):
            chance.choice([good, good, hostile, leaving])(client, chance)

    with serving(engine, max_waiting=8) as client:
        with ThreadPoolExecutor(16) as threads:
            list(threads.map(client_of, range(16)))
        question, sql = GOOD[0]
        answer = client.post("/v1/sql", json={"question": question, "database": "mall"})
        assert answer.json()["sql"] == sql
        assert 'status="500"' not in client.get("/metrics").text
    assert digests(engine) == before
    assert not HERE.folder.exists()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("content", RAW, ids=range(len(RAW)))
def test_bytes_that_are_no_request_are_refused(engine: Engine, path: str, content: bytes) -> None:
    with serving(engine) as client:
        assert post(client, path, content).status_code in (200, 400, 422)


@pytest.fixture(scope="module")
def client(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx2.Client]:
    """Share a service that keeps corrections."""
    kept = tmp_path_factory.mktemp("kept") / "kept.jsonl"
    with serving(engine, corrections=str(kept)) as client:
        yield client


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(path=st.sampled_from(PATHS), body=BODIES)
def test_no_body_makes_the_service_fail(client: httpx2.Client, path: str, body: Any) -> None:
    answer = post(client, path, json.dumps(body).encode())
    assert answer.status_code in (200, 201, 400, 422), answer.text


@settings(max_examples=60, deadline=None)
@given(
    path=st.text(st.characters(codec="utf-8"), max_size=30),
    method=st.sampled_from(["GET", "POST", "PUT", "DELETE", "HEAD"]),
)
def test_no_path_makes_the_service_fail(client: httpx2.Client, path: str, method: str) -> None:
    for place in (path, f"v1/databases/{path}"):
        assert client.request(method, f"/{quote(place)}").status_code < 500
