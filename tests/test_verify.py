"""Is an endpoint the measured model? Asked of real services, with and without planted faults."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import pytest
from starlette.responses import PlainTextResponse

from ray_sql import cli
from ray_sql.config import VerifyConfig, load
from ray_sql.config.sections import AnswersSection
from ray_sql.errors import ConfigError, StoreError
from ray_sql.evaluate.endpoint import BUSY, MOST_TRIES, Endpoint
from ray_sql.serve.app import Service
from ray_sql.serve.diagnosis import Compared, diagnose
from ray_sql.serve.engine import Engine, Joinable, completed
from ray_sql.store.run_folder import RunFolder
from tests.planted import half_the_rank, over_another_base, over_other_bits, weakened
from tests.serving import make_engine, serving

Verify = Callable[..., tuple[int, dict[str, Any], str]]


@pytest.fixture
def verify(tuned_run: Path, capsys: pytest.CaptureFixture[str]) -> Verify:
    """Run `ray-sql verify` on a service: returns the code, the JSON, and what is shown."""

    def call(client: httpx2.Client, *words: str) -> tuple[int, dict[str, Any], str]:
        code = 0
        try:
            cli.main("verify", [*named(tuned_run), "--evaluate.url", address(client), *words])
        except SystemExit as stop:
            code = int(stop.code or 0)
        out = capsys.readouterr().out
        return code, json.loads(out.splitlines()[-1]), out

    return call


def named(run: Path) -> list[str]:
    """Return the flags that name a run."""
    return ["--output_name", run.name, "--output_dir", str(run.parent)]


def address(client: httpx2.Client) -> str:
    """Return the address below which OpenAI's paths are."""
    return f"{str(client.base_url).rstrip('/')}/v1"


@pytest.mark.parametrize(
    ("plant", "verdict"),
    [
        (weakened, "another adapter"),
        (half_the_rank, "another rank"),
        (over_other_bits, "another quantization"),
        (over_another_base, "another base"),
    ],
)
def test_what_a_service_of_ours_is_made_of_is_compared(
    tuned_run: Path, verify: Verify, tmp_path: Path, plant: Any, verdict: str
) -> None:
    adapter = plant(tuned_run, tmp_path / "planted")
    with make_engine(tuned_run, adapter=str(adapter)) as engine, serving(engine) as client:
        code, found, out = verify(client)
    assert (code, found["verdict"]) == (3, verdict)
    assert "the endpoint says that its" in out


def test_an_adapter_that_says_whose_it_is_but_is_not_applied_is_named_so(
    tuned_run: Path, verify: Verify, tmp_path: Path, engine: Engine
) -> None:
    adapter = weakened(tuned_run, tmp_path / "none", 0.0)
    with make_engine(tuned_run, adapter=str(adapter)) as other:
        other.described = engine.described
        with serving(other) as client:
            assert verify(client)[1]["verdict"] == "no adapter"


def test_our_own_service_is_the_measured_model(engine: Engine, verify: Verify) -> None:
    with serving(engine) as client:
        code, found, out = verify(client)
    assert (code, found["verdict"]) == (0, "equal")
    assert found["same"] == found["questions"] == 8
    assert "8 of 8 answers are the measured ones" in out


def test_a_run_that_was_measured_with_beams_is_verified_by_its_greedy_answers(
    tuned_run: Path, engine: Engine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = RunFolder(str(shutil.copytree(tuned_run, tmp_path / "beams")))
    settings = folder.read_settings() or {}
    settings["evaluate"] = settings.get("evaluate", {}) | {"num_beams": 4}
    folder.write_settings(settings)
    named = ["--output_dir", str(tmp_path), "--adapter", folder.adapter.uri]
    with serving(engine) as client, pytest.raises(SystemExit) as ended:
        url = ["--evaluate.url", address(client)]
        cli.main("verify", ["--output_name", "beams", *named, *url])
    told = capsys.readouterr().err
    assert (ended.value.code, "measured with 4 beams, and endpoints" in told) == (2, True)
    words = [*told.split("evaluate it once more with ")[1].split(" and another")[0].split()]
    cli.main("evaluate", [*words, "--output_dir", str(tmp_path), "--output_name", "greedy"])
    with serving(engine) as client:
        url = ["--evaluate.url", address(client)]
        cli.main("verify", ["--output_name", "greedy", *named, *url])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["verdict"] == "equal"


def test_an_adapter_that_is_not_applied_is_named(
    tuned_run: Path, verify: Verify, tmp_path: Path
) -> None:
    adapter = weakened(tuned_run, tmp_path / "none", 0.0)
    with make_engine(tuned_run, adapter=str(adapter)) as engine, serving(engine) as client:
        code, found, out = verify(client)
    assert (code, found["verdict"]) == (3, "no adapter")
    assert "answers are the base's" in out
    assert "    measured SELECT" in out


def test_another_template_is_named(
    engine: Engine, verify: Verify, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = engine.prompter.ask_turns
    monkeypatch.setattr(
        engine.prompter, "ask_turns", lambda turns, settings: ask(turns[1:], settings)
    )
    with serving(engine) as client:
        code, found, _ = verify(client)
    assert (code, found["verdict"]) == (3, "another template")


def test_a_truncated_prompt_is_named(
    engine: Engine, verify: Verify, monkeypatch: pytest.MonkeyPatch, tuned_run: Path
) -> None:
    rows = RunFolder(str(tuned_run)).read_predictions()
    most = sorted(row["prompt_tokens"] for row in rows)[len(rows) // 2] - 1
    ask = engine.prompter.ask_turns

    def cut(turns: Any, settings: Any) -> Any:
        asked = ask(turns, settings)
        tokens = asked.question.input_ids[:most]
        return replace(asked, question=replace(asked.question, input_ids=tokens))

    monkeypatch.setattr(engine.prompter, "ask_turns", cut)
    with serving(engine) as client:
        code, found, out = verify(client)
    assert (code, found["verdict"]) == (3, "truncated prompt")
    assert f"are longer than {most} tokens" in out


def test_answers_that_are_drawn_are_named(
    engine: Engine, verify: Verify, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = iter(range(1000))

    def draw(batch: Joinable) -> None:
        for index, one in enumerate(engine.answer(batch.asked)):
            batch.tell(index, completed(replace(one, raw=f"SELECT {next(drawn)}")))

    monkeypatch.setattr(engine, "answer_joinable", draw)
    with serving(engine) as client:
        code, found, _ = verify(client)
    assert (code, found["verdict"]) == (3, "sampling is on")


def test_an_evaluation_may_ask_an_endpoint(
    engine: Engine, tuned_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(engine) as client:
        words = ["--config", str(tuned_run / "config.json"), "--output_name", "served"]
        words += ["--output_dir", str(tmp_path), "--adapter", str(tuned_run / "adapter")]
        words += ["--evaluate.backend", "openai", "--evaluate.url", address(client)]
        cli.main("evaluate", words)
    served = RunFolder(str(tmp_path / "served")).read_predictions()
    measured = RunFolder(str(tuned_run)).read_predictions()
    for name in ("id", "raw", "predicted", "verdict", "prompt_tokens", "new_tokens"):
        assert [row[name] for row in served] == [row[name] for row in measured]


def test_a_dry_run_asks_nobody(tuned_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main("verify", [*named(tuned_run), "--evaluate.url", "http://127.0.0.1:1/v1", "--dry_run"])
    out = capsys.readouterr().out
    assert "--- user ---\nSchema:\ncustomer(" in out
    assert "would send 8 questions to http://127.0.0.1:1/v1" in out


def test_an_endpoint_that_does_not_answer_is_named_with_the_way_out(engine: Engine) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{closed.getsockname()[1]}/v1"
    with pytest.raises(StoreError, match="does not answer") as refused:
        Endpoint.find(AnswersSection(url=nobody.replace("://", "://me:sesame@")))
    assert "me:***@" in str(refused.value) and "sesame" not in str(refused.value)
    with serving(engine) as client:
        with pytest.raises(StoreError, match="HTTP 404"):
            Endpoint.find(AnswersSection(url=str(client.base_url)))
        with pytest.raises(ConfigError, match="has no such model; it has tuned"):
            Endpoint.find(AnswersSection(url=address(client), served_model="other"))
    with serving(engine, token="sesame") as client, pytest.raises(StoreError, match="HTTP 401"):
        Endpoint.find(AnswersSection(url=address(client)))


def test_a_model_that_is_served_and_not_listed_is_asked(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    for listed in ('{"data": []}', '{"data": [{"id": "another"}]}', "no list"):
        monkeypatch.setattr(Service, "models", answering(listed))
        with serving(engine) as client:
            found = Endpoint.find(AnswersSection(url=address(client), served_model="tuned"))
            assert (found.model, found.described) == ("tuned", {})
            with pytest.raises((ConfigError, StoreError)):
                Endpoint.find(AnswersSection(url=address(client), served_model="other"))


@pytest.mark.parametrize("status", sorted(BUSY))
def test_an_endpoint_without_room_or_time_is_asked_again(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    left = ["", ""]

    async def models(_: Service) -> PlainTextResponse:
        if left:
            return PlainTextResponse(left.pop(), status, {"Retry-After": "0"})
        return PlainTextResponse('{"data": [{"id": "tuned"}]}')

    monkeypatch.setattr(Service, "models", models)
    with serving(engine) as client:
        assert Endpoint.find(AnswersSection(url=address(client))).model == "tuned"
        left += [""] * MOST_TRIES
        with pytest.raises(StoreError, match=f"stays busy .HTTP {status}.; try again later"):
            Endpoint.find(AnswersSection(url=address(client)))


def answering(text: str) -> Any:
    """Return a path that answers with a text."""

    async def answer(_: Service) -> PlainTextResponse:
        return PlainTextResponse(text)

    return answer


def test_a_key_is_sent_from_the_environment(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sesame")
    with serving(engine, token="sesame") as client:
        assert Endpoint.find(AnswersSection(url=f"{address(client)}/")).model == "tuned"


def test_a_run_and_an_address_are_needed() -> None:
    with pytest.raises(ConfigError, match="give the run whose answers are compared"):
        load(VerifyConfig, ["--output_name", "run"])


def one(served: str, **changes: Any) -> Compared:
    """Return a question that the base answers with `base`, and the adapter with `tuned`."""
    right = served == "tuned"
    plain = Compared("0", "q", "tuned", "base", served, served, None, True, right, 100, 100)
    return replace(plain, **changes)


@pytest.mark.parametrize(
    ("compared", "verdict"),
    [
        ([one("tuned")] * 64, "equal"),
        ([one("tuned")] * 60 + [one("near", served_right=True)] * 4, "within rounding"),
        (
            [one("tuned")] * 60 + [one("tuned", again="near")] * 2 + [one("near")] * 2,
            "within rounding",
        ),
        ([one("base")] * 60 + [one("tuned")] * 4, "no adapter"),
        (  # in bfloat16 a base's long answers change with what is computed beside them
            [one("base", again="near", alone=("base", "base"))] * 8 + [one("base")] * 56,
            "no adapter",
        ),
        ([one("tuned")] * 40 + [one("older")] * 24, "other weights"),
        ([one("tuned")] * 58 + [one("wrong")] * 6, "other weights"),
        (
            [one("tuned", again="drawn", alone=("tuned", "drawn"))] * 8 + [one("tuned")] * 56,
            "sampling is on",
        ),
        ([one("wrong", served_prompt=101)] * 64, "another template"),
        ([one("wrong", served_prompt=90 + n) for n in range(9)], "another template"),
        ([one("tuned")] * 32 + [one("wrong", measured_prompt=200)] * 32, "truncated prompt"),
    ],
)
def test_what_all_answers_say_together(compared: list[Compared], verdict: str) -> None:
    found = diagnose(compared)
    assert (found.verdict, found.is_fine) == (verdict, verdict in ("equal", "within rounding"))


@pytest.mark.parametrize(
    ("compute_type", "near", "verdict"),
    [
        ("float32", 6, "within rounding"),
        ("float32", 7, "other weights"),
        ("bfloat16", 16, "within rounding"),
        ("bfloat16", 17, "other weights"),
    ],
)
def test_bfloat16_may_round_more_answers_otherwise(
    compute_type: str, near: int, verdict: str
) -> None:
    compared = [one("tuned")] * (64 - near) + [one("near", served_right=True)] * near
    assert diagnose(compared, compute_type=compute_type).verdict == verdict
