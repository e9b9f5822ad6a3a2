"""A linker before the generator, and the generator behind an endpoint: the same answers."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from ray_sql import finetune, models
from ray_sql.config import Config, ServeConfig, load
from ray_sql.database import complete
from ray_sql.errors import ConfigError, StoreError
from ray_sql.serve.engine import Engine
from ray_sql.serve.recipe import find_linker
from ray_sql.store.run_folder import RunFolder
from tests.conftest import QUESTIONS
from tests.planted import over_other_bits
from tests.serving import count_waiting, holding, make_engine, serving, settings
from tests.waiting import wait_until

COUNTED, COUNT = QUESTIONS[6]
"""A question whose answer the tuned run knows, and its SQL."""


@pytest.fixture(scope="module")
def linker_run(tuned_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Share a finished run for links, trained as the tuned one is."""
    saved = RunFolder(str(tuned_run)).read_settings() or {}
    root = tmp_path_factory.mktemp("linker")
    own = {"output_name": "linker", "task_type": "schema", "output_dir": str(root)}
    finetune.run(load(Config, [], **(saved | own)))
    return root / "linker"


def sql(client: Any, question: str = COUNTED, **body: Any) -> Any:
    """Return the answer about the database mall."""
    return client.post("/v1/sql", json={"question": question, "database": "mall"} | body)


def test_a_linker_makes_the_schema_smaller(tuned_run: Path, linker_run: Path) -> None:
    measured = {row["question"]: row for row in RunFolder(str(linker_run)).read_predictions()}
    smaller = 0
    with make_engine(tuned_run, linker=str(linker_run)) as engine, serving(engine) as client:
        schema = engine.prompter.database("mall").schema
        for question, _ in QUESTIONS:
            answer = sql(client, question).json()
            asked = engine.prompter.ask(question, "mall")
            (narrowed,) = engine.answer([asked])
            predicted = measured[question]["predicted"]
            if predicted is None:
                assert "the prompt shows the full schema: the linker's" in answer["warnings"][0]
                assert narrowed.prompt_tokens == len(asked.question.input_ids)
                continue
            assert answer["shown"] == narrowed.shown == complete(json.loads(predicted), schema)
            smaller += narrowed.prompt_tokens < len(asked.question.input_ids)
        hello = {"messages": [{"role": "user", "content": "hello"}]}
        assert client.post("/v1/chat/completions", json=hello).status_code == 200
    assert smaller > 3


@pytest.mark.parametrize("over_one", [True, False])
def test_a_linker_over_the_same_base_shares_it(
    tuned_run: Path, linker_run: Path, tmp_path: Path, over_one: bool, caplog: Any, monkeypatch: Any
) -> None:
    loaded = []
    load_base = models.load_base

    def counted(folder: str, *given: Any) -> Any:
        loaded.append(folder)
        return load_base(folder, *given)

    monkeypatch.setattr(models, "load_base", counted)
    linker = linker_run if over_one else over_other_bits(linker_run, tmp_path / "other")
    with make_engine(tuned_run, linker=str(linker)) as engine:
        assert len(loaded) == (1 if over_one else 2)
        assert ("the linker's has another quantization" in caplog.text) is not over_one
        measured = RunFolder(str(tuned_run)).read_predictions()
        settings = engine.config.evaluate.greedy()
        for row in measured[:4]:  # as conversations, which the linker does not see
            turns = engine.prompter.ask(row["question"], "mall").turns
            (reply,) = engine.answer([engine.prompter.ask_turns(turns, settings)])
            assert reply.raw == row["raw"]


def test_links_that_are_served_are_those_that_were_measured(linker_run: Path) -> None:
    rows = [one for one in RunFolder(str(linker_run)).read_predictions() if one["predicted"]]
    with make_engine(linker_run) as engine, serving(engine) as client:
        listed = client.get("/v1/databases").json()
        assert (listed["task"], listed["saves"]) == ("schema", False)
        answer = sql(client, rows[0]["question"]).json()
        assert answer["links"] == json.loads(rows[0]["predicted"])
        assert not {"sql", "rows"} & set(answer)


def test_an_adapter_that_writes_sql_is_no_linker(tuned_run: Path) -> None:
    with pytest.raises(ConfigError, match="is no adapter that finds links"):
        find_linker(settings(tuned_run, linker=str(tuned_run)))


def test_the_generator_may_be_behind_an_endpoint(engine: Engine, tuned_run: Path) -> None:
    with serving(engine) as behind:
        url = f"{str(behind.base_url).rstrip('/')}/v1"
        remote = {"evaluate.backend": "openai", "evaluate.url": url}
        with make_engine(tuned_run, **remote) as front, serving(front) as client:
            assert front.described == engine.described
            for question, _ in QUESTIONS:
                answer, same = sql(client, question).json(), sql(behind, question).json()
                assert {name: answer.get(name) for name in ("sql", "rows", "links")} == {
                    name: same.get(name) for name in ("sql", "rows", "links")
                }
            drawn = sql(client, samples=3, choose="vote")
            assert (drawn.status_code, "one greedy answer" in drawn.text) == (400, True)


def test_an_endpoint_is_asked_each_question_once(engine: Engine, tuned_run: Path) -> None:
    questions = [question for question, _ in QUESTIONS[:3]]
    with serving(engine) as behind:
        url = f"{str(behind.base_url).rstrip('/')}/v1"
        remote = {"evaluate.backend": "openai", "evaluate.url": url}
        with (
            make_engine(tuned_run, **remote) as front,
            holding(front) as held,
            serving(front) as client,
            ThreadPoolExecutor(3) as threads,
        ):
            asked = [threads.submit(sql, client, question) for question in questions]
            wait_until(lambda: count_waiting(client) == 2)
            held.release()
            answers = [one.result().json()["sql"] for one in asked]
        counts = behind.get("/metrics").text
        assert answers == [sql(behind, question).json()["sql"] for question in questions]
    assert 'requests_total{route="/v1/chat/completions",status="200"} 3.0' in counts


def test_an_endpoint_that_went_away_is_no_mistake_of_who_asks(
    engine: Engine, tuned_run: Path
) -> None:
    with serving(engine) as behind:
        url = f"{str(behind.base_url).rstrip('/')}/v1"
        remote = {"evaluate.backend": "openai", "evaluate.url": url}
        front = make_engine(tuned_run, **remote)
    with front, serving(front) as client:
        answer = sql(client)
    assert (answer.status_code, "does not answer" in answer.text) == (502, True)
    with pytest.raises(StoreError, match="does not answer"):
        make_engine(tuned_run, **remote)


def test_settings_for_replicas_have_absolute_places(
    tuned_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tuned_run.parent)
    databases = {"shop": "shop.db", "mall": "sqlite:///mall.db", "crm": "postgresql://db/crm"}
    own = {"serve.corrections": "kept.jsonl", "serve.databases": databases}
    given = load(ServeConfig, [], output_name="tuned", linker="tuned", **own).for_replicas()
    assert given["linker"] == str(tuned_run)
    assert given["serve"]["corrections"] == str(tuned_run.parent / "kept.jsonl")
    files = {"shop": f"{tuned_run.parent}/shop.db", "mall": f"sqlite:///{tuned_run.parent}/mall.db"}
    assert given["serve"]["databases"] == databases | files
