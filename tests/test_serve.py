"""The service over real HTTP: its answers, who may ask, and what happens when too many do."""

from __future__ import annotations

import asyncio
import http.client
import json
import logging
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import pytest
import yaml

from ray_sql import cli
from ray_sql.config import ServeConfig, load
from ray_sql.config.ports import require_free_port
from ray_sql.data import prompts
from ray_sql.database import QueryResult
from ray_sql.errors import ConfigError
from ray_sql.serve import app, deployment, wire
from ray_sql.serve.access import TOKEN, token_for
from ray_sql.serve.batcher import Batch, Batcher, Full
from ray_sql.serve.engine import Engine, completed
from ray_sql.serve.queries import Queries
from ray_sql.serve.requests import MOST_ROWS
from ray_sql.store.run_folder import RunFolder
from tests.conftest import QUESTIONS
from tests.serving import (
    Held,
    always_answering,
    count_waiting,
    make_engine,
    own_address,
    running_job,
    serving,
)
from tests.waiting import HANGS, wait_until

COUNTED = QUESTIONS[6]
"""A question whose answer the tuned run knows."""


@pytest.fixture(scope="module")
def client(engine: Engine) -> Iterator[httpx2.Client]:
    """Share a service with the default settings."""
    with serving(engine) as client:
        yield client


def sql(client: httpx2.Client, question: str = COUNTED[0], **body: Any) -> httpx2.Response:
    """Ask about the database mall."""
    return client.post("/v1/sql", json={"question": question, "database": "mall"} | body)


def turns(engine: Engine, question: str) -> list[dict[str, str]]:
    """Return the turns of the contract's prompt."""
    return prompts.messages(engine.prompter.task, engine.prompter.schema_text("mall"), question)


def test_a_question_gets_sql_rows_and_times(client: httpx2.Client) -> None:
    answer = sql(client).json()
    assert answer["sql"] == COUNTED[1]
    assert (answer["columns"], answer["rows"]) == (["COUNT(*)"], [[2]])
    assert (answer["database"], answer["model"], answer["warnings"]) == ("mall", "tuned", [])
    assert set(answer["timings"]) == {"answer_seconds", "query_seconds"}
    unexecuted = sql(client, execute=False).json()
    assert unexecuted["sql"] == COUNTED[1]
    assert "rows" not in unexecuted


def test_candidates_are_voted_on_and_shown(client: httpx2.Client) -> None:
    answer = sql(client, samples=3, temperature=0.05, choose="vote", ground="repair").json()
    assert (answer["chosen_by"], len(answer["candidates"])) == ("vote", 3)
    assert answer["sql"] == COUNTED[1]


def test_names_of_one_answer_are_mended_if_it_is_chosen_so(
    client: httpx2.Client, engine: Engine
) -> None:
    with always_answering(engine, "SELECT nam FROM customer"):
        written = sql(client, ground="repair").json()
        mended = sql(client, ground="repair", choose="repaired").json()
    assert (written["sql"], "rows" in written) == ("SELECT nam FROM customer", False)
    assert (mended["sql"], mended["row_count"]) == ("SELECT name FROM customer", 4)


def test_answers_of_a_conversation_are_the_measured_ones(
    client: httpx2.Client, engine: Engine, tuned_run: Path
) -> None:
    for row in RunFolder(str(tuned_run)).read_predictions():
        messages = turns(engine, row["question"])
        body = {"model": "tuned", "messages": messages, "temperature": 0, "user": "somebody"}
        answer = client.post("/v1/chat/completions", json=body).json()
        (choice,) = answer["choices"]
        assert choice["message"] == {"role": "assistant", "content": row["raw"]}
        assert answer["usage"]["prompt_tokens"] == row["prompt_tokens"]
    short = client.post("/v1/chat/completions", json=body | {"max_tokens": 2}).json()
    assert short["choices"][0]["finish_reason"] == "length"


def test_other_conversations_are_answered_too(client: httpx2.Client) -> None:
    body = {"messages": [{"role": "user", "content": [{"type": "text", "text": "hello"}]}]}
    assert client.post("/v1/chat/completions", json=body).status_code == 200


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        ("sql", {"question": "How many?"}, 400, "database is missing; give one of kiosk, mall"),
        ("sql", {"question": "How many?", "database": "moon"}, 400, "'moon' is not registered"),
        ("sql", {"question": " \n", "database": "mall"}, 400, "the question is empty"),
        ("sql", {"question": "why " * 3000, "database": "mall"}, 400, "reads up to 2,048 tokens"),
        ("sql", {"question": "How many?", "choose": "vote"}, 400, "evaluate.samples is 1"),
        ("sql", {"question": "How many?", "limit": 1}, 422, "Extra inputs are not permitted"),
        ("sql", {"question": ""}, 422, "at least 1 character"),
        ("sql", {"question": "q" * 70_000}, 413, "at most 65536 bytes"),
        ("chat/completions", {"messages": []}, 422, "at least 1 item"),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": "a"}], "model": "other"},
            404,
            "model 'other' is not served; tuned is",
        ),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": "a"}], "stream": True},
            422,
            "Input should be False",
        ),
    ],
)
def test_a_bad_request_is_named(
    client: httpx2.Client, path: str, body: dict[str, Any], status: int, words: str
) -> None:
    answer = client.post(f"/v1/{path}", json=body)
    assert (answer.status_code, words in answer.text) == (status, True), answer.text


def test_models_health_metrics_and_openapi(client: httpx2.Client) -> None:
    sql(client)
    (model,) = client.get("/v1/models").json()["data"]
    assert (model["id"], model["object"]) == ("tuned", "model")
    assert "mall" in model["databases"]
    assert client.get("/healthz").json() == {"status": "ok"}
    assert 'ray_sql_requests_total{route="/v1/sql",status="200"}' in client.get("/metrics").text
    paths = client.get("/openapi.json").json()["paths"]
    ours = {"sql", "run", "corrections", "databases", "databases/{name}"}
    openai = {"chat/completions", "models"}
    assert {f"/v1/{path}" for path in ours | openai} | {"/healthz", "/metrics"} == set(paths)
    assert client.get("/docs").status_code == 404


def test_refusals_and_errors_of_ours_are_counted(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(batch: Batch) -> None:
        raise ArithmeticError

    monkeypatch.setattr(engine, "answer_joinable", fail)
    with serving(engine, token="sesame") as client:
        assert client.get("/v1/models").status_code == 401
        client.headers["Authorization"] = "Bearer sesame"
        assert sql(client, "q" * 70_000).status_code == 413
        assert sql(client).status_code == 500
        # uvicorn closes the connection of an error
        counted = httpx2.get(
            client.base_url.join("/metrics"), headers=client.headers, timeout=HANGS
        ).text
    for route, status in (("other", 401), ("other", 413), ("/v1/sql", 500)):
        labels = f'{{route="{route}",status="{status}"}}'
        assert f"ray_sql_requests_total{labels} 1.0" in counted


def test_databases_show_their_schemas(client: httpx2.Client) -> None:
    listed = client.get("/v1/databases").json()
    names = ["kiosk", "mall", "shop", "store"]
    assert listed == {"model": "tuned", "task": "sql", "saves": False, "databases": names}
    mall = client.get("/v1/databases/mall").json()
    told = {name: mall[name] for name in ("name", "dialect", "runs", "left_out")}
    assert told == {"name": "mall", "dialect": "sqlite", "runs": True, "left_out": []}
    *_, sale = mall["tables"]
    assert (sale["name"], sale["is_view"]) == ("sale", False)
    assert sale["columns"][1] == {
        "name": "product_id",
        "type": "INTEGER",
        "primary_key": True,
        "references": ["product.id"],
    }
    unknown = client.get("/v1/databases/..%2F..%2Fetc")
    assert (unknown.status_code, "is not registered" in unknown.text) == (400, True)


def run(client: httpx2.Client, sql: str, **body: Any) -> httpx2.Response:
    """Run a query on the database mall."""
    return client.post("/v1/run", json={"database": "mall", "sql": sql} | body)


def test_a_query_is_run_and_its_links_are_told(client: httpx2.Client) -> None:
    answer = run(client, "SELECT name FROM customer ORDER BY id", max_rows=2).json()
    assert (answer["rows"], answer["row_count"]) == ([["Ada"], ["Ben"]], 4)
    assert answer["links"] == {"customer": ["id", "name"]}
    assert set(answer["timings"]) == {"query_seconds"}
    assert sql(client, max_rows=0).json()["rows"] == []


def test_results_are_bounded(client: httpx2.Client, engine: Engine) -> None:
    numbers = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n LIMIT 1500) "
    unsaid = run(client, f"{numbers} SELECT i FROM n").json()
    all_rows = run(client, f"{numbers} SELECT i FROM n", max_rows=10_000).json()
    assert (len(unsaid["rows"]), unsaid["row_count"]) == (MOST_ROWS, 1500)
    assert (len(all_rows["rows"]), all_rows["row_count"]) == (1500, 1500)
    assert "too large" in run(client, "SELECT randomblob(9000000)").json()["error"]
    with (
        serving(engine, max_result_bytes=1000) as small,
        always_answering(engine, "SELECT randomblob(2000)"),
    ):
        assert "too large" in run(small, "SELECT randomblob(2000)").json()["error"]
        assert "too large" in sql(small).json()["error"]
        assert run(small, "SELECT randomblob(90)").json()["row_count"] == 1


def test_rows_are_written_beside_the_event_loop(
    client: httpx2.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_the_loop: list[bool] = []

    def cell(value: Any) -> Any:
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            in_the_loop.append(False)
        else:
            in_the_loop.append(True)
        return value

    monkeypatch.setattr(wire, "cell", cell)
    assert sql(client).json()["rows"] == run(client, "SELECT 2").json()["rows"] == [[2]]
    assert in_the_loop == [False, False]


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ("DELETE FROM customer", "refused:"),
        ("ATTACH 'x.db' AS x", "refused:"),
        ("SELECT 1; SELECT 2", "refused:"),
        ("SELECT readfile('/etc/passwd')", "no such function"),
        ("SELECT '\x00'", "null character"),
        ("PRAGMA writable_schema = 1", "refused:"),
        ("SELECT town FROM customer", "no such column"),
    ],
)
def test_a_query_that_may_not_run_is_refused(client: httpx2.Client, query: str, words: str) -> None:
    answer = run(client, query)
    assert (answer.status_code, words in answer.json()["error"]) == (200, True), answer.text
    assert "rows" not in answer.json()


@pytest.mark.parametrize("body", [{"sql": ""}, {"database": "/etc/passwd"}, {"place": "x"}])
def test_a_query_elsewhere_is_refused(client: httpx2.Client, body: dict[str, Any]) -> None:
    answer = client.post("/v1/run", json={"database": "mall", "sql": "SELECT 1"} | body)
    assert answer.status_code in (400, 422)


def test_queries_beyond_those_that_may_wait_are_refused(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    released = threading.Event()
    execute = engine.run

    def wait(*query: Any) -> Any:
        released.wait(HANGS)
        return execute(*query)

    monkeypatch.setattr(engine, "run", wait)
    with serving(engine, max_waiting=2) as client, ThreadPoolExecutor(5) as threads:
        asked = [threads.submit(run, client, "SELECT 1") for _ in range(5)]
        wait_until(lambda: sum(one.done() for one in asked) == 3)
        released.set()
        codes = sorted(one.result().status_code for one in asked)
    assert codes == [200, 200, 503, 503, 503]


def test_corrections_are_kept_where_there_is_a_file(engine: Engine, tmp_path: Path) -> None:
    pair = {"database": "mall", "question": "How\nmany “é”?", "sql": "SELECT 1"}
    with serving(engine) as client:
        refused = client.post("/v1/corrections", json=pair)
        assert (refused.status_code, "--serve.corrections" in refused.text) == (400, True)
    file = tmp_path / "kept.jsonl"
    with serving(engine, corrections=str(file)) as client, ThreadPoolExecutor(8) as threads:
        assert client.get("/v1/databases").json()["saves"] is True
        saved = list(
            threads.map(lambda _: client.post("/v1/corrections", json=pair).status_code, range(20))
        )
    assert saved == [201] * 20
    kept = {"db_id": "mall", "question": pair["question"], "query": "SELECT 1"}
    assert [json.loads(line) for line in file.read_text().splitlines()] == [kept] * 20
    with serving(engine, corrections=str(file)) as client:
        hinted = client.post("/v1/corrections", json=pair | {"evidence": "many means over 9"})
        assert hinted.status_code == 201
    last = json.loads(file.read_text().splitlines()[-1])
    assert last == kept | {"evidence": "many means over 9"}
    with serving(engine, corrections=str(tmp_path)) as client:
        failed = client.post("/v1/corrections", json=pair)
        assert failed.status_code == 400
        assert "cannot be written (Is a directory)" in failed.text


def test_the_page_is_for_anybody_and_runs_nothing_but_its_own(engine: Engine) -> None:
    with serving(engine, token="sesame") as client:
        for path in ("/", "/page.css", "/page.js"):
            answer = client.get(path)
            assert answer.status_code == 200
            policy = answer.headers["Content-Security-Policy"]
            assert "default-src 'none'" in policy and "unsafe" not in policy
            assert "http:" not in answer.text.replace("http://www.w3.org/2000/svg", "")
            assert "https:" not in answer.text and "innerHTML" not in answer.text
        for path in ("/v1/databases", "/v1/databases/mall"):
            assert client.get(path).status_code == 401
        for path in ("/v1/run", "/v1/corrections"):
            assert client.post(path, json={}).status_code == 401


def test_requests_that_arrive_together_are_answered_together(engine: Engine, held: Held) -> None:
    questions = [question for question, _ in QUESTIONS]
    with serving(engine) as client, ThreadPoolExecutor(8) as threads:
        asked = [threads.submit(sql, client, question) for question in questions]
        wait_until(lambda: count_waiting(client) == 7)
        held.release()
        together = [one.result().json() for one in asked]
        assert 'ray_sql_answered_together_bucket{le="1.0"} 1.0' in client.get("/metrics").text
        alone = [sql(client, question).json() for question in questions]
    assert [one["sql"] for one in together] == [one["sql"] for one in alone]


def test_a_question_joins_those_that_are_being_answered(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that comes while another is being written is answered by the same passes."""
    from ray_sql.generate.decoder import Decoder

    passes: list[int] = []
    second = threading.Event()
    forward = Decoder.forward

    def counted(self: Decoder, slots: Any, *arguments: Any, every_token: bool = False) -> Any:
        if every_token:  # a step of all that are on their way
            passes.append(len(slots))
        if len(passes) == 2 and not second.is_set():
            second.set()
            wait_until(lambda: count_waiting(client) == 1)
        return forward(self, slots, *arguments, every_token=every_token)

    monkeypatch.setattr(Decoder, "forward", counted)
    (first, _), (other, _) = QUESTIONS[:2]
    with serving(engine) as client, ThreadPoolExecutor(2) as threads:
        one = threads.submit(sql, client, first)
        assert second.wait(HANGS)
        joined = threads.submit(sql, client, other)
        answers = [one.result().json()["sql"], joined.result().json()["sql"]]
        assert passes[:2] == [1, 1]
        assert max(passes) == 2
        alone = [sql(client, question).json()["sql"] for question in (first, other)]
    assert answers == alone


def test_where_too_many_wait_a_request_is_refused_and_may_come_again(
    engine: Engine, held: Held
) -> None:
    with serving(engine, max_waiting=1) as client, ThreadPoolExecutor(8) as threads:
        asked = [threads.submit(sql, client)]
        held.wait_begun()
        asked += [threads.submit(sql, client) for _ in range(4)]
        wait_until(lambda: sum(one.done() for one in asked) == 3)
        held.release()
        answers = [one.result() for one in asked]
    assert sorted(answer.status_code for answer in answers) == [200, 200, 503, 503, 503]
    refused = next(answer for answer in answers if answer.status_code == 503)
    assert int(refused.headers["Retry-After"]) > 0
    assert "ask again later" in refused.json()["error"]["message"]


def test_a_question_whose_query_would_find_no_room_is_refused_before_it_is_answered(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, released, run = threading.Event(), threading.Event(), engine.run

    def wait(*query: Any) -> QueryResult:
        begun.set()
        released.wait(HANGS)
        return run(*query)

    monkeypatch.setattr(engine, "run", wait)
    body = {"database": "mall", "sql": "SELECT 1"}
    with serving(engine, max_waiting=1) as client, ThreadPoolExecutor(1) as threads:
        first = threads.submit(client.post, "/v1/run", json=body)
        assert begun.wait(HANGS)
        assert sql(client).status_code == 503
        assert sql(client, execute=False).status_code == 200
        assert "ray_sql_answered_together_count 1.0" in client.get("/metrics").text
        released.set()
        assert first.result().status_code == 200


def test_a_request_that_is_left_frees_its_place(engine: Engine, held: Held) -> None:
    with serving(engine, max_waiting=1) as client, ThreadPoolExecutor(1) as threads:
        first = threads.submit(sql, client)
        held.wait_begun()
        with pytest.raises(httpx2.TimeoutException):
            sql_within(client, 0.3)
        wait_until(lambda: count_waiting(client) == 0)
        held.release()
        assert first.result().status_code == 200


def test_an_answer_whose_sender_left_is_not_written_on(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray_sql.generate.decoder import Decoder

    passes: list[tuple[Decoder, set[int]]] = []
    begun, left = threading.Event(), threading.Event()
    forward = Decoder.forward

    def held(self: Decoder, slots: Any, *arguments: Any, every_token: bool = False) -> Any:
        if every_token:  # a step of all that are on their way
            passes.append((self, {slot.question for slot in slots}))
            begun.set()
            left.wait(HANGS)
        return forward(self, slots, *arguments, every_token=every_token)

    monkeypatch.setattr(Decoder, "forward", held)
    body = json.dumps({"question": QUESTIONS[0][0], "database": "mall"})
    with serving(engine) as client:
        place = client.base_url
        leaving = http.client.HTTPConnection(place.host, place.port, timeout=HANGS)
        leaving.request("POST", "/v1/sql", body, {"Content-Type": "application/json"})
        assert begun.wait(HANGS)
        leaving.close()
        wait_until(lambda: 'status="499"' in client.get("/metrics").text)
        left.set()
        assert sql(client).json()["sql"] == COUNTED[1]
    first = passes[0][0]
    assert sum(decoder is first and 0 in questions for decoder, questions in passes) == 1


def test_no_conversation_gets_longer_answers_than_the_service_writes(
    client: httpx2.Client, engine: Engine
) -> None:
    body = {"messages": turns(engine, COUNTED[0]), "max_tokens": 30_000}
    answer = client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"][0]["finish_reason"] == "stop"


def test_a_query_that_waits_and_is_left_is_not_run(tuned_run: Path) -> None:
    ran: list[str] = []
    begun, released = threading.Event(), threading.Event()

    async def work(queries: Queries) -> None:
        first = queries.submit("mall", "SELECT 1")
        assert await asyncio.to_thread(begun.wait, HANGS)
        second = queries.submit("mall", "SELECT 2")
        await asyncio.sleep(0.1)  # time in which a thread too many would take it
        second.cancel()
        released.set()
        assert (await first).result.rows == ((1,),)
        assert (await queries.submit("mall", "SELECT 3")).result.rows == ((3,),)

    with make_engine(tuned_run, **{"evaluate.processes": 1}) as engine:
        run = engine.run

        def wait(database: str, query: str, most_bytes: int) -> QueryResult:
            ran.append(query)
            begun.set()
            released.wait(HANGS)
            return run(database, query, most_bytes)

        engine.run = wait  # type: ignore[method-assign]
        asyncio.run(work(Queries(engine, 8, 1000)))
    assert ran == ["SELECT 1", "SELECT 3"]


def sql_within(client: httpx2.Client, seconds: float) -> None:
    """Ask, and go away after some seconds."""
    body = {"question": COUNTED[0], "database": "mall"}
    client.post("/v1/sql", json=body, timeout=seconds)


def test_a_port_that_another_service_would_share_is_refused() -> None:
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)  # as Ray Serve does
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ConfigError, match=f"--serve.port {port}: cannot be listened on"):
            require_free_port("--serve.port", "127.0.0.1", port)
    with pytest.raises(ConfigError, match=r"at 256\.0\.0\.1"):
        require_free_port("--serve.port", "256.0.0.1", port)


def test_a_question_that_waits_too_long_is_given_up(engine: Engine, held: Held) -> None:
    with serving(engine, request_timeout_s=0.2) as client:
        one, several = sql(client), sql(client, samples=3, temperature=0.05)
        turn = {"role": "user", "content": "hello"}
        said = client.post("/v1/chat/completions", json={"messages": [turn]})
    assert late(one) == late(said) == "not answered in time; ask again later"
    assert late(several).endswith("ask again later, or ask for fewer samples")


def late(answer: httpx2.Response) -> str:
    """Return what a request that was given up is told."""
    assert answer.status_code == 504
    return str(answer.json()["error"]["message"])


@pytest.fixture
def held_query(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let every query wait until the test is over."""
    over, run = threading.Event(), engine.run

    def wait(*query: Any) -> QueryResult:
        over.wait(HANGS)
        return run(*query)

    monkeypatch.setattr(engine, "run", wait)
    yield
    over.set()


def test_a_query_that_takes_too_long_is_given_up(engine: Engine, held_query: None) -> None:
    with serving(engine, request_timeout_s=0.2) as client:
        answer = client.post("/v1/run", json={"database": "mall", "sql": "SELECT 1"})
    assert late(answer).startswith("the query did not end in time")


def test_the_answer_and_its_query_have_one_deadline(
    engine: Engine, held_query: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, answer, most = Clock(), engine.answer_joinable, HANGS

    def slowly(batch: Batch) -> None:
        clock.passed += most
        answer(batch)

    monkeypatch.setattr(app, "time", clock)
    monkeypatch.setattr(engine, "answer_joinable", slowly)
    with serving(engine, request_timeout_s=most) as client:
        told = late(sql(client))
    assert told.startswith("the SQL was written, but did not end in time")
    with serving(engine, request_timeout_s=most) as client:
        assert sql(client, execute=False).json()["sql"] == COUNTED[1]


class Clock:
    """A clock that a test moves on."""

    passed = 0.0

    def monotonic(self) -> float:
        return time.monotonic() + self.passed


def test_a_token_is_asked_for_where_there_is_one(engine: Engine) -> None:
    with serving(engine, token="open sesame") as client:
        assert client.get("/healthz").status_code == 200
        for headers in ({}, {"Authorization": "Bearer other"}, {"Authorization": "open sesame"}):
            answer = client.get("/v1/models", headers=headers)
            assert answer.status_code == 401
            assert "Bearer" in answer.json()["error"]["message"]
        right = {"Authorization": "Bearer open sesame"}
        assert client.get("/v1/models", headers=right).status_code == 200


def test_an_address_that_others_reach_needs_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TOKEN, raising=False)
    assert [token_for(host) for host in ("127.0.0.1", "::1", "localhost")] == [None] * 3
    for host in ("0.0.0.0", "::", "db.example.org", "10.0.0.7"):
        with pytest.raises(ConfigError, match=f"{host}: others reach it, so set RAY_SQL_TOKEN"):
            token_for(host)
    with pytest.raises(ConfigError, match="RAY_SQL_TOKEN is set where the service"):
        token_for("127.0.0.1", needed=True)
    monkeypatch.setenv(TOKEN, "secret\n")
    assert token_for("0.0.0.0") == token_for("127.0.0.1", needed=True) == "secret"


def test_without_a_token_only_this_machine_may_ask_wherever_the_service_listens(
    engine: Engine,
) -> None:
    with serving(engine, listen="0.0.0.0") as client:
        assert sql(client).status_code == 200
        elsewhere = client.base_url.copy_with(host=own_address())
        for path in ("/v1/models", "/healthz", "/"):
            answer = client.get(elsewhere.join(path), headers={"Host": "127.0.0.1"})
            assert (answer.status_code, "RAY_SQL_TOKEN" in answer.text) == (403, True)
    with serving(engine, token="sesame", listen="0.0.0.0") as client:
        elsewhere = client.base_url.copy_with(host=own_address())
        given = {"Authorization": "Bearer sesame"}
        assert client.get(elsewhere.join("/v1/models"), headers=given).status_code == 200


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("LOCALHOST:8000", 200),
        ("127.0.0.2:8000", 200),
        ("[::1]:8000", 200),
        ("evil.example", 400),
        ("127.0.0.1.evil.example:8000", 400),
        ("[::2]:8000", 400),
        ("[", 400),
    ],
)
def test_this_machine_is_asked_by_its_own_names(
    client: httpx2.Client, host: str, status: int
) -> None:
    assert client.get("/v1/models", headers={"Host": host}).status_code == status


def test_pages_of_others_may_not_ask(client: httpx2.Client) -> None:
    asked = {"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}
    preflight = client.options("/v1/sql", headers=asked)
    assert preflight.status_code == 405
    assert "access-control-allow-origin" not in preflight.headers
    plain = client.post(
        "/v1/sql", content=json.dumps({"question": "q"}), headers={"Content-Type": "text/plain"}
    )
    assert plain.status_code == 422
    led_here = client.get("/v1/models", headers={"Host": "evil.example"})
    assert led_here.status_code == 400


def test_a_body_of_unknown_size_is_refused(client: httpx2.Client) -> None:
    place = client.base_url
    connection = http.client.HTTPConnection(place.host, place.port, timeout=HANGS)
    connection.request("POST", "/v1/sql", iter([b"{}"]), encode_chunked=True)
    assert connection.getresponse().status == 411


def test_questions_and_sql_are_in_no_log(
    client: httpx2.Client, engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    question = "How many products cost more than 987654321?"
    with caplog.at_level(logging.DEBUG):
        answer = sql(client, question).json()
        sql(client, question, choose="vote")
        assert question not in caplog.text
        assert "SELECT" not in caplog.text
        with serving(engine, log_questions=True) as speaking:
            sql(speaking, question)
    assert f"mall: {question}: {answer['sql']}" in caplog.text


def batched(answer: Callable[[Batch], None], most_waiting: int, work: Any, most: int = 4) -> Any:
    """Run `work(batcher)` beside a batcher."""

    async def run() -> Any:
        batcher = Batcher(answer, most, most_waiting)
        answering = asyncio.create_task(batcher.run())
        try:
            return await work(batcher)
        finally:
            answering.cancel()

    return asyncio.run(run())


def test_one_question_that_fails_fails_alone() -> None:
    def answer(batch: Batch) -> None:
        batch.more(lambda one: True)
        if "bad" in batch.asked:
            raise ValueError("bad")
        for index, one in enumerate(batch.asked):
            batch.tell(index, completed(one.upper()))  # type: ignore[attr-defined]

    async def work(batcher: Batcher) -> list[Any]:
        replies = [batcher.submit(word) for word in ("a", "bad", "b")]  # type: ignore[arg-type]
        return await asyncio.gather(*replies, return_exceptions=True)

    first, bad, last = batched(answer, 8, work)
    assert (first, str(bad), last) == ("A", "bad", "B")


def test_no_question_overtakes_another_and_no_more_are_on_their_way_than_may() -> None:
    batches: list[list[Any]] = []

    def answer(batch: Batch) -> None:
        first = batch.asked[0]
        batch.more(lambda one: isinstance(one, type(first)))
        batches.append(list(batch.asked))
        for index, one in enumerate(batches[-1]):
            batch.tell(index, completed(one))  # type: ignore[arg-type]

    async def work(batcher: Batcher) -> list[Any]:
        words = [1, 2, "a", 3, 4, 5, 6, 7]
        return await asyncio.gather(*(batcher.submit(word) for word in words))  # type: ignore[arg-type]

    assert batched(answer, 8, work) == [1, 2, "a", 3, 4, 5, 6, 7]
    assert batches == [[1, 2], ["a"], [3, 4, 5, 6], [7]]


def test_a_cancelled_question_frees_its_place_and_is_not_answered() -> None:
    answered: list[Any] = []

    def answer(batch: Batch) -> None:
        answered.extend(batch.asked)
        batch.tell(0, completed(batch.asked[0]))  # type: ignore[arg-type]

    async def work(batcher: Batcher) -> int:
        first = batcher.submit("first")  # type: ignore[arg-type]
        with pytest.raises(Full):
            batcher.submit("refused")  # type: ignore[arg-type]
        first.cancel()
        await asyncio.sleep(0)
        await batcher.submit("second")  # type: ignore[arg-type]
        return batcher.waiting

    assert batched(answer, 1, work) == 0
    assert answered == ["second"]


def test_a_question_that_is_left_while_it_is_answered_frees_its_place() -> None:
    begun, left = threading.Event(), threading.Event()
    joined: list[Any] = []

    def answer(batch: Batch) -> None:
        begun.set()
        left.wait(HANGS)
        joined.append(batch.more(lambda one: True))
        for index, one in enumerate(batch.asked):
            if batch.needs(index):
                batch.tell(index, completed(one))  # type: ignore[arg-type]

    async def work(batcher: Batcher) -> Any:
        first = batcher.submit("first")  # type: ignore[arg-type]
        assert await asyncio.to_thread(begun.wait, HANGS)
        first.cancel()
        second = batcher.submit("second")  # type: ignore[arg-type]
        left.set()
        return await second

    assert batched(answer, 8, work, most=1) == "second"
    assert joined == [["second"]]


def test_the_file_for_serve_deploy_is_valid() -> None:
    from ray.serve.schema import ServeDeploySchema

    values = yaml.safe_load((Path(__file__).parent.parent / "jobs" / "serve.yaml").read_text())
    (application,) = ServeDeploySchema(**values).applications
    section = load(ServeConfig, [], **application.args).serve
    assert (section.host, section.port) == tuple(values["http_options"].values())
    assert application.import_path == f"{deployment.__name__}:application"
    assert [one.name for one in application.deployments] == [deployment.Service.name]


def test_a_package_that_is_missing_is_named(
    tuned_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "fastapi", None)
    for name in ("job", "deployment", "app"):
        monkeypatch.delitem(sys.modules, f"ray_sql.serve.{name}", raising=False)
    with pytest.raises(SystemExit) as ended:
        cli.main("serve", ["--output_name", tuned_run.name])
    assert ended.value.code == 2
    assert "fastapi is not installed; pip install -e '.[serve]'" in capsys.readouterr().err


def test_the_address_of_a_service_may_be_of_ipv6(
    tuned_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ["--output_name", tuned_run.name, "--output_dir", str(tuned_run.parent)]
    cli.main("serve", [*run, "--serve.host", "::1", "--dry_run"])
    assert capsys.readouterr().out.rstrip().endswith("at http://[::1]:8000")


@pytest.mark.cluster
def test_the_job_serves_until_it_is_stopped(
    tuned_run: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with running_job(tuned_run) as (_, client):
        told = capfd.readouterr().err.splitlines()  # and nothing by a library
        assert told == [f"starting: {wait}" for wait in ("libraries", "Ray", "model")]
        assert sql(client).json()["rows"] == [[2]]
        assert client.get("/v1/models", headers={"Host": "evil"}).status_code == 400
