"""Publishing, with the real Hub client against a stand-in that speaks its protocol.

Each push is one commit of what was measured. Nothing in it names this machine, and the token is in
nothing we write. Some runs are refused, and a Hub that fails loses nothing.
"""

from __future__ import annotations

import io
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from ray_sql import finetune, models, publish
from ray_sql.config import Config, EvaluateConfig, PublishConfig, load
from ray_sql.config.sections import QuantizationSection
from ray_sql.data import chat, prompts
from ray_sql.display import Display
from ray_sql.errors import ConfigError, ContractError, ModelError, RaySqlError, StoreError
from ray_sql.evaluate import results
from ray_sql.evaluate.models import check_adapter
from ray_sql.models import load_tokenizer
from ray_sql.publish import background, bundle, hub
from ray_sql.publish.card import on_hub
from ray_sql.store import retry
from ray_sql.store.run_folder import RunFolder
from ray_sql.tasks import SQL, TASKS
from tests import hub as stand_ins
from tests.hub import FINE, FINE_ELSEWHERE, READER, WRITER
from tests.waiting import wait_until

ROOT = Path(__file__).parent.parent
RAY_SQL = [sys.executable, "-c", "from ray_sql import cli; cli.main()"]
"""The command `ray-sql`, installed or not."""
FILES = [
    "README.md",
    "adapter_config.json",
    "adapter_model.safetensors",
    "contract.json",
    "metrics.json",
    "ray_sql_config.json",
]
RUN_ID = "0123456789abcdef0123456789abcdef"


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[stand_ins.Hub]:
    """The stand-in, taken for the Hub by this process; waiting between tries takes no time."""
    from huggingface_hub import constants
    from huggingface_hub.utils import _http, close_session

    hasty = SimpleNamespace(**vars(time) | {"sleep": lambda seconds: None})
    with stand_ins.running() as running:
        for name, value in {
            "ENDPOINT": running.endpoint,
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
            "HF_TOKEN_PATH": str(tmp_path / "no-token"),
        }.items():
            monkeypatch.setattr(constants, name, value)
        for module in (retry, _http):
            monkeypatch.setattr(module, "time", hasty)
        close_session()
        yield running
        close_session()


@pytest.fixture(scope="module")
def trained(
    tiny_model: Path, spider_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A finished run of a random model over two steps, whose adapter is no better than its base."""
    place = tmp_path_factory.mktemp("trained")
    finetune.run(load(Config, [], **settings(tiny_model, spider_folder, place)))
    return place / "out" / "run"


def settings(tiny_model: Path, spider_folder: Path, place: Path) -> dict[str, Any]:
    return {
        "model_name": str(tiny_model),
        "output_name": "run",
        "task_type": "sql",
        "dataset_id": str(spider_folder),
        "output_dir": str(place / "out"),
        "cache_dir": str(place / "cache"),
        "prompt.serializer": "compact",
        "lora.r": 4,
        "lora.lora_alpha": 8,
        "train.max_steps": 2,
        "train.logging_steps": 1,
        "train.bf16": False,
        "scaling.num_workers": 0,
        "evaluate.max_new_tokens": 8,
        "evaluate.select_examples": 0,
        "evaluate.processes": 1,
        "tracking.enabled": False,
        "hub.base_model": "tests/tiny",
    }


@pytest.fixture
def unproven(trained: Path, tmp_path: Path) -> Path:
    """A copy of the run, of the test's own."""
    return shutil.copytree(trained, tmp_path / "out" / "run")


@pytest.fixture
def run_dir(unproven: Path) -> Path:
    """The same run, had its adapter answered all eight questions, which its base does not."""
    rows = [json.loads(line) for line in (unproven / "predictions.jsonl").read_text().splitlines()]
    base = [
        json.loads(line) for line in (unproven / "base_predictions.jsonl").read_text().splitlines()
    ]
    measured = {
        "base": base,
        "tuned": [row | {"verdict": "correct", "predicted": row["gold"]} for row in rows],
    }
    config = Config(**json.loads((unproven / "config.json").read_text()))
    tracked = {"mlflow_run_id": RUN_ID, "tracking_uri": f"sqlite:///{unproven}/mlflow.db"}
    metrics = json.loads((unproven / "metrics.json").read_text()) | tracked
    results.write(
        RunFolder(str(unproven)),
        measured,
        metrics | results.summarise(measured, TASKS[config.task_type], config.evaluate),
    )
    return unproven


@pytest.fixture
def publication(tmp_path: Path) -> Callable[..., PublishConfig]:
    """Make settings of `jobs.publish` for the run in this test's folder."""

    def make(**changes: Any) -> PublishConfig:
        given = {
            "output_name": "run",
            "output_dir": str(tmp_path / "out"),
            "cache_dir": str(tmp_path / "cache"),
        }
        return load(PublishConfig, [], **given | {"write_token": WRITER} | changes)

    return make


def push(config: PublishConfig) -> tuple[str, str]:
    """(address, what was said) of a publication."""
    text = io.StringIO()
    url = publish.publish(config, Display(Console(file=text, width=300)))
    return url, text.getvalue()


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_a_push_is_one_private_commit_of_what_was_measured(
    stand_in: stand_ins.Hub, run_dir: Path, publication: Any
) -> None:
    url, said = push(publication())
    assert url == f"{stand_in.endpoint}/me/run" and url in said
    repo = stand_in.repos["me/run"]
    (commit,) = repo.pushed()
    assert repo.private and repo.tags == {RUN_ID: commit.oid}
    assert "run: execution accuracy 100.0 % of 8 dev" in commit.message
    assert sorted(repo.files) == [".gitattributes", *FILES]
    local = run_dir / "adapter"
    assert (
        repo.files["adapter_model.safetensors"]
        == (local / "adapter_model.safetensors").read_bytes()
    )
    for name, own in (
        ("contract.json", local / "contract.json"),
        ("metrics.json", run_dir / "metrics.json"),
    ):
        pushed, saved = json.loads(repo.files[name]), json.loads(own.read_text())
        changed = {key for key in saved if pushed.get(key) != saved[key]}
        assert changed <= {"model_name", "dataset_id", "tracking_uri"}
    assert json.loads(repo.files["adapter_config.json"])["base_model_name_or_path"] == "tests/tiny"


def test_pushing_again_changes_nothing_and_says_so(
    stand_in: stand_ins.Hub, run_dir: Path, publication: Any
) -> None:
    push(publication())
    before = stand_in.repos["me/run"].pushed()
    _, said = push(publication())
    assert "was there already" in said
    assert stand_in.repos["me/run"].pushed() == before and stand_in.count("PUT") == 1


def test_a_later_push_of_the_same_run_moves_its_tag(
    stand_in: stand_ins.Hub, run_dir: Path, publication: Any
) -> None:
    push(publication())
    push(publication(**{"hub.license": "apache-2.0"}))
    repo = stand_in.repos["me/run"]
    assert len(repo.pushed()) == 2 and repo.tags == {RUN_ID: repo.pushed()[-1].oid}
    assert b"license: apache-2.0" in repo.files["README.md"]


def test_nothing_that_is_pushed_names_this_machine(
    stand_in: stand_ins.Hub,
    run_dir: Path,
    publication: Any,
    trained: Path,
    tiny_model: Path,
    spider_folder: Path,
) -> None:
    push(publication())
    for name, data in stand_in.repos["me/run"].files.items():
        for place in (run_dir, trained, tiny_model, spider_folder, Path.home()):
            assert str(place).encode() not in data, f"{name} names {place}"
            assert str(place.parent).encode() not in data or place.parent == Path("/"), name


def test_the_published_settings_and_contract_fit_each_other(
    stand_in: stand_ins.Hub, run_dir: Path, publication: Any, tmp_path: Path, tiny_model: Path
) -> None:
    push(publication())
    folder = tmp_path / "downloaded"
    folder.mkdir()
    for name in FILES:
        (folder / name).write_bytes(stand_in.repos["me/run"].files[name])
    given = [
        "--config",
        str(folder / "ray_sql_config.json"),
        "--adapter",
        str(folder),
        "--output_name",
        "again",
    ]
    config = load(EvaluateConfig, given)
    assert config.model_name == "tests/tiny"
    tokenizer = load_tokenizer(str(tiny_model))
    check_adapter(str(folder), config, tokenizer, None)  # raises where they differ


def test_the_card_says_what_was_measured_in_words_that_the_hub_reads(
    stand_in: stand_ins.Hub, run_dir: Path, publication: Any
) -> None:
    from huggingface_hub import ModelCard

    push(publication(**{"hub.license": "mit"}))
    card = ModelCard(stand_in.repos["me/run"].files["README.md"].decode())
    metrics = json.loads((run_dir / "metrics.json").read_text())
    data = card.data
    assert (data.base_model, data.license, data.library_name) == ("tests/tiny", "mit", "peft")
    (result,) = data.eval_results
    scores = metrics["tuned"]["dev"]
    assert (result.metric_type, result.metric_value, result.dataset_split) == (
        "execution_accuracy",
        1.0,
        "dev",
    )
    assert (
        result.metric_args["n"] == scores["n"] == 8 and result.metric_args["semantics"] == "spider"
    )
    assert result.metric_args["interval_95"] == [round(end, 4) for end in scores["interval"]]
    assert (
        "| dev | **execution accuracy** | 8 | 0.0 % [0.0, 32.4] | 100.0 % [67.6, 100.0] |"
        in card.text
    )
    assert f"fingerprint `{metrics['data_fingerprint']}`" in card.text and RUN_ID in card.text
    assert (
        "alone is right on 8 questions, the base model alone on 0" in card.text
        and "p = 0.0078" in card.text
    )
    assert not re.search(r"\{[{%]|[%}]\}", card.text), "nothing of the template is left"


def test_the_card_says_of_training_only_what_is_known(
    stand_in: stand_ins.Hub, run_dir: Path, publication: Any
) -> None:
    def card() -> str:
        push(publication())
        return stand_in.repos["me/run"].files["README.md"].decode()

    edit(run_dir / "metrics.json", also_trained={"dev": 0})
    assert "None of these questions was trained on." in card()
    assert "| steps | 2, 8 examples each |" in card(), "nothing was validated"
    edit(run_dir / "metrics.json", objective=0.5, best_step=1)
    assert "| steps | 1 (the best of 2), 8 examples each |" in card()
    RunFolder(str(run_dir)).write_start("checkpoint-1")
    assert "None of these questions was trained on." in card()
    RunFolder(str(run_dir)).write_start("/others/out/run/checkpoint-8")
    assert "None of these questions" not in card()
    assert "Training began from an earlier adapter, whose data are not recorded here." in card()


def test_the_card_says_how_answers_were_chosen_and_whose_links_they_needed(
    stand_in: stand_ins.Hub, run_dir: Path, publication: Any
) -> None:
    from huggingface_hub import ModelCard

    def card(**changes: Any) -> ModelCard:
        saved = json.loads((run_dir / "config.json").read_text())
        edit(run_dir / "config.json", evaluate=saved["evaluate"] | changes)
        push(publication())
        return ModelCard(stand_in.repos["me/run"].files["README.md"].decode())

    plain = card()
    assert "Answers are greedy, at most 8 tokens" in plain.text and "these links" not in plain.text
    assert plain.data.eval_results[0].metric_args["answers"] == "greedy"
    voted = card(samples=4, choose="vote")
    assert "Each answer is chosen by vote, of the greedy one and 4 samples, at most" in voted.text
    assert voted.data.eval_results[0].metric_args["answers"] == "vote"
    mended = card(samples=1, choose="repaired", ground="repair")
    assert "Answers are greedy, and names that the schema lacks are mended, at most" in mended.text

    prompt = json.loads((run_dir / "config.json").read_text())["prompt"]
    edit(run_dir / "config.json", prompt=prompt | {"links": "/home/me/out/my-linker"})
    edit(run_dir / "metrics.json", links="predicted")
    linked = card()
    assert "the tables and columns that `my-linker` found for each question" in linked.text
    assert linked.data.eval_results[0].metric_args["links"] == "my-linker"


def test_a_folder_is_not_taken_for_a_dataset_of_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert on_hub("data/spider") and not on_hub("spider.jsonl") and not on_hub("/data/spider")
    (tmp_path / "data" / "spider").mkdir(parents=True)
    assert not on_hub("data/spider")


def test_the_card_of_schema_linking(
    stand_in: stand_ins.Hub, tiny_model: Path, spider_folder: Path, publication: Any, tmp_path: Path
) -> None:
    from huggingface_hub import ModelCard

    given = settings(tiny_model, spider_folder, tmp_path) | {
        "task_type": "schema",
        "train.max_steps": 1,
    }
    metrics = finetune.run(load(Config, [], **given))
    push(publication(**{"hub.force": True}))
    card = ModelCard(stand_in.repos["me/run"].files["README.md"].decode())
    (result,) = card.data.eval_results
    assert (result.metric_type, result.metric_value) == (
        "strict_recall",
        metrics["tuned"]["dev"]["strict_recall"],
    )
    assert "schema-linking" in card.data.tags and "| dev | **strict recall** | 8 |" in card.text
    assert (
        "The answer comes in a fenced `json` block." in card.text
        and "semantics" not in result.metric_args
    )


def test_the_licence_is_that_of_the_base_model_unless_given(
    stand_in: stand_ins.Hub, run_dir: Path, publication: Any
) -> None:
    from huggingface_hub import ModelCard

    stand_in.add(
        "tests/tiny", {"README.md": b"---\nlicense: other\nlicense_name: tiny-license\n---\n"}
    )
    push(publication())
    card = ModelCard(stand_in.repos["me/run"].files["README.md"].decode())
    assert (card.data.license, card.data.license_name) == (
        "other",
        "tiny-license",
    ) and "\ntiny-license. It" in card.text
    push(publication(**{"hub.license": "mit"}))
    card = ModelCard(stand_in.repos["me/run"].files["README.md"].decode())
    assert (card.data.license, card.data.license_name) == ("mit", None) and "\nmit. It" in card.text


def test_the_cards_code_asks_as_training_did(
    stand_in: stand_ins.Hub, run_dir: Path, publication: Any, tiny_model: Path, tmp_path: Path
) -> None:
    stand_in.add("tests/tiny", {file.name: file.read_bytes() for file in tiny_model.iterdir()})
    push(publication())
    asked = run_card(stand_in, "me/run", tmp_path)
    assert asked["prompt"] == trained_prompt(asked, run_dir, tiny_model)


def run_card(stand_in: stand_ins.Hub, repo_id: str, place: Path) -> Any:
    """Run the code of a repository's card in a process of its own.

    Returns what it asked with: schema, question, and the prompt's tokens.
    """
    code = re.search(
        r"```python\n(.*?)```", stand_in.repos[repo_id].files["README.md"].decode(), re.DOTALL
    )
    assert code
    report = (
        "\nprint('\\n' + json.dumps({'schema': schema, 'question': question, "
        "'prompt': inputs['input_ids'][0].tolist()}))"
    )
    environment = (
        os.environ | stand_in.environment(place / "home") | {"HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    )
    done = subprocess.run(
        [sys.executable, "-c", code.group(1) + report],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def trained_prompt(asked: Any, run_dir: Path, tiny_model: Path) -> list[int]:
    """The tokens that training would have shown for the same schema and question."""
    from ray_sql.models import load_tokenizer
    from ray_sql.rows import encode_prompt

    tokenizer = load_tokenizer(str(tiny_model))
    turns = prompts.messages(SQL, asked["schema"], asked["question"])
    return encode_prompt(tokenizer, chat.Chat(tokenizer).prompt(turns))


@pytest.mark.kind("thinking models")
@pytest.mark.parametrize("thinking", ["off", "on"])
def test_the_cards_code_asks_with_thinking_as_it_was_trained(
    stand_in: stand_ins.Hub, run_dir: Path, publication: Any, thinking: str
) -> None:
    told = {"prompt_end": "<think></think>", "way": "in parts"}
    for file in (run_dir / "contract.json", run_dir / "adapter" / "contract.json"):
        template = json.loads(file.read_text())["template"] | told
        edit(file, thinking=thinking, template=template)
    push(publication())
    readme = stand_in.repos["me/run"].files["README.md"].decode()
    code = readme.split("```python")[1].split("```")[0]
    compile(code, thinking, "exec")
    assert f"thinking = {thinking == 'on'} " in code and '"enable_thinking": thinking' in code
    assert 'prompt += template["prompt_end"]' in code and '{"type": "text"' in code


@pytest.mark.parametrize("dated", [{}, {"date": "2024-07-26"}], ids=["", "dated"])
@pytest.mark.parametrize("turns", ["system and user", "user", "plain"])
def test_the_cards_code_follows_the_models_template(
    stand_in: stand_ins.Hub, run_dir: Path, publication: Any, turns: str, dated: dict[str, str]
) -> None:
    for file in (run_dir / "contract.json", run_dir / "adapter" / "contract.json"):
        edit(file, template=json.loads(file.read_text())["template"] | {"turns": turns, **dated})
    push(publication())
    code = (
        stand_in.repos["me/run"].files["README.md"].decode().split("```python")[1].split("```")[0]
    )
    compile(code, turns, "exec")
    assert ("import re\n" in code and "strftime_now" in code) == (bool(dated) and turns != "plain")
    assert ('"role": "system"' in code, "Answer:" in code) == (
        turns == "system and user",
        turns == "plain",
    )


@pytest.mark.parametrize("token", [WRITER, FINE])
@pytest.mark.parametrize("repo_id", ["me/own", "own", None])
def test_a_token_that_may_write_is_taken(
    stand_in: stand_ins.Hub, run_dir: Path, publication: Any, token: str, repo_id: str | None
) -> None:
    push(publication(write_token=token, **{"hub.repo_id": repo_id}))
    assert list(stand_in.repos) == ["me/own" if repo_id else "me/run"]


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"write_token": None}, "publishing needs a Hub token that may write"),
        ({"write_token": READER}, "the Hub token of me may only read"),
        ({"write_token": FINE_ELSEWHERE}, "has no right to write me/run"),
        ({"write_token": "hf_nobody"}, "the token is not accepted"),
        ({"hub.repo_id": "stranger/run"}, "me may not write there; use me/run"),
        ({"hub.repo_id": "watched/run"}, "me may not write there; use me/run"),
        (
            {"hub.repo_id": "me/other-base"},
            "holds a model over somebody/llama, this run is over tests/tiny",
        ),
        ({"hub.repo_id": "me/no-base"}, "holds a model that names no base model"),
        ({"hub.base_model": None}, "give its name on the Hub with --hub.base_model"),
    ],
)
def test_what_cannot_be_published_is_refused_before_and_after_training(
    stand_in: stand_ins.Hub, run_dir: Path, publication: Any, changes: dict[str, Any], message: str
) -> None:
    stand_in.add(
        "me/other-base",
        {"model.safetensors": b"", "README.md": b"---\nbase_model: somebody/llama\n---\n"},
    )
    stand_in.add("me/no-base", {"model.safetensors": b""})
    if "hub.base_model" in changes:
        saved = json.loads((run_dir / "config.json").read_text())
        edit(run_dir / "config.json", hub=saved["hub"] | {"base_model": None})
    before = json.loads((run_dir / "config.json").read_text())
    config = publication(**changes)
    as_trained = load(
        Config,
        [],
        **before | changes | ({"write_token": WRITER} if "write_token" not in changes else {}),
    )
    for refusal in (
        lambda: push(config),
        lambda: publish.require_publishable(as_trained),
        lambda: finetune.run(as_trained.changed({"publish": True})),
    ):
        with pytest.raises(ConfigError, match=re.escape(message)) as caught:
            refusal()
        assert "\n" not in str(caught.value) and "hf_" not in str(caught.value)
    assert stand_in.count("POST|PUT|DELETE") == 0


def _unfinished(run: Path) -> None:
    (run / "inputs" / "finished").unlink()


def _no_baseline(run: Path) -> None:
    metrics = json.loads((run / "metrics.json").read_text())
    (run / "metrics.json").write_text(
        json.dumps({k: v for k, v in metrics.items() if k not in ("base", "compared")})
    )


def _lucky(run: Path) -> None:
    edit(
        run / "metrics.json",
        compared={"dev": {"only_base": 1, "only_tuned": 4, "mcnemar_p": 0.375}},
    )


def _worse_somewhere(run: Path) -> None:
    worse = {"only_base": 9, "only_tuned": 0, "mcnemar_p": 0.0039}
    edit(
        run / "metrics.json",
        compared={"seen": {"only_base": 0, "only_tuned": 90, "mcnemar_p": 0.0}, "dev": worse},
    )


def _other_adapter(run: Path) -> None:
    edit(run / "adapter" / "contract.json", template_hash="another")


def _other_settings(run: Path) -> None:
    saved = json.loads((run / "config.json").read_text())
    edit(run / "config.json", prompt=saved["prompt"] | {"serializer": "ddl"})


def _other_metrics(run: Path) -> None:
    edit(run / "metrics.json", identity="000000000000")


def _other_rank(run: Path) -> None:
    edit(run / "adapter" / "adapter_config.json", r=64)


def _no_contract(run: Path) -> None:
    (run / "adapter" / "contract.json").unlink()


@pytest.mark.parametrize(
    "spoil,kind,message",
    [
        (_unfinished, ConfigError, "the run is not finished"),
        (_no_baseline, ModelError, "the base model was not measured"),
        (
            _lucky,
            ModelError,
            "not shown to beat its base model (it alone is right on 4 questions, the base model "
            "alone on 1",
        ),
        (_worse_somewhere, ModelError, "worse than its base model on dev"),
        (_other_adapter, ContractError, "the adapter was trained with template_hash 'another'"),
        (_other_settings, ContractError, "the files are not of one run"),
        (_other_metrics, ContractError, "metrics.json: identity is '000000000000'"),
        (
            _other_rank,
            ContractError,
            "adapter_config.json: r is 64, but the run's config.json says 4",
        ),
        (_no_contract, ContractError, "adapter/contract.json is missing"),
    ],
)
def test_a_run_that_is_not_to_be_published_is_refused_without_asking_the_hub(
    stand_in: stand_ins.Hub,
    run_dir: Path,
    publication: Any,
    spoil: Callable[[Path], None],
    kind: type[RaySqlError],
    message: str,
) -> None:
    spoil(run_dir)
    with pytest.raises(kind, match=re.escape(message)) as caught:
        push(publication())
    assert "\n" not in str(caught.value) and not stand_in.requests
    if kind is ModelError:
        assert "--hub.force" in str(caught.value)
        push(publication(**{"hub.force": True}))
        assert len(stand_in.repos["me/run"].pushed()) == 1


CALLS = [
    "GET /api/whoami",
    "GET /api/models/me/run",
    "POST /api/repos/create",
    "POST /api/validate-yaml",
    "POST .*/preupload/",
]
CALLS += [
    "POST .*/objects/batch",
    "PUT /storage/",
    "POST .*/verify",
    "POST .*/commit/",
    "GET .*/refs",
    "POST .*/tag/",
]


def test_a_winner_that_its_sweep_did_not_crown_is_refused(
    stand_in: stand_ins.Hub, run_dir: Path, publication: Any
) -> None:
    verdict = "not crowned: right on 8; against the default settings 0 to 6 (p = 0.031)"
    edit(run_dir / "metrics.json", sweep={"champion": False, "verdict": verdict})
    with pytest.raises(ModelError, match=r"winner was not crowned: right on 8.*--hub\.force"):
        push(publication())
    assert not stand_in.repos
    push(publication(**{"hub.force": True}))
    assert stand_in.repos["me/run"].pushed()
    edit(run_dir / "metrics.json", sweep={"champion": True, "verdict": "right on 8"})
    push(publication())


@pytest.mark.parametrize("what", [500, 429, "before", "after"])
@pytest.mark.parametrize("call", CALLS)
def test_an_accident_that_passes_costs_nothing_but_time(
    stand_in: stand_ins.Hub, run_dir: Path, publication: Any, call: str, what: Any
) -> None:
    stand_in.fail(call, what, times=2)
    push(publication())
    repo = stand_in.repos["me/run"]
    (commit,) = repo.pushed()
    assert repo.tags == {RUN_ID: commit.oid} and set(FILES) < set(repo.files)
    # work whose answer was lost may be found done, so that it is not asked for again
    assert stand_in.count(call) >= (1 if what == "after" else 3)


@pytest.mark.parametrize("what", [500, 429, "before"])
@pytest.mark.parametrize(
    "call", ["GET /api/whoami", "PUT /storage/", "POST .*/commit/", "POST .*/tag/"]
)
def test_a_hub_that_stays_down_leaves_the_adapter_and_the_command_that_pushes_it(
    stand_in: stand_ins.Hub, run_dir: Path, publication: Any, call: str, what: Any, tmp_path: Path
) -> None:
    stand_in.fail(call, what)
    files = sorted(run_dir.rglob("*"))
    with pytest.raises(StoreError) as caught:
        push(publication(**{"hub.repo_id": "me/later", "hub.private": False}))
    message = str(caught.value)
    assert "\n" not in message and f"{run_dir}/adapter" in message and WRITER not in message
    assert sorted(run_dir.rglob("*")) == files
    assert stand_in.count(call) <= 40, "a bounded number of tries"
    stand_in.heal()
    command = shlex.split(message.partition("push it later with: ")[2])
    environment = os.environ | stand_in.environment(tmp_path / "home")
    done = subprocess.run(
        [*RAY_SQL, *command[1:]],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    repo = stand_in.repos["me/later"]
    assert len(repo.pushed()) == 1 and not repo.private and RUN_ID in repo.tags


def test_the_hub_is_waited_for_as_long_as_it_asks(
    stand_in: stand_ins.Hub, run_dir: Path, publication: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[float] = []
    monkeypatch.setattr(retry, "time", SimpleNamespace(sleep=waited.append))
    stand_in.fail("POST /api/repos/create", 429, times=1, retry_after="30")
    stand_in.fail("POST .*/commit/", 429, times=2, retry_after="86400")
    push(publication())
    assert waited == [30.0, hub.LONGEST_WAIT, hub.LONGEST_WAIT]


@pytest.mark.parametrize("what", ["silent", 1.5], ids=["answer lost", "carried out late"])
def test_a_connection_that_falls_silent_counts_as_cut_and_nothing_is_committed_twice(
    stand_in: stand_ins.Hub,
    run_dir: Path,
    publication: Any,
    monkeypatch: pytest.MonkeyPatch,
    what: Any,
) -> None:
    monkeypatch.setattr(hub, "TIMEOUT", 0.5)
    stand_in.fail("POST .*/commit/", what, times=1)
    push(publication())
    asked = stand_in.count("POST .*/commit/")
    assert asked >= (1 if what == "silent" else 2)
    wait_until(lambda: sum("/commit/" in request for request in stand_in.settled) >= asked)
    repo = stand_in.repos["me/run"]
    (commit,) = repo.pushed()
    assert repo.tags == {RUN_ID: commit.oid} and set(FILES) < set(commit.files)


def test_a_commit_that_comes_between_is_built_upon(
    stand_in: stand_ins.Hub, run_dir: Path, publication: Any
) -> None:
    repo = stand_in.add("me/run", {"notes.md": b"first"})
    committed = threading.Event()
    stand_in.fail("POST .*/preupload/", committed, times=1)

    def meanwhile() -> None:
        wait_until(lambda: stand_in.count("POST .*/preupload/"))
        with stand_in.lock:
            repo.commit("main", "somebody else's", {"notes.md": b"second"})
        committed.set()

    other = threading.Thread(target=meanwhile, daemon=True)
    other.start()
    push(publication())
    other.join()
    assert [commit.message.split(":")[0] for commit in repo.commits] == [
        "initial commit",
        "somebody else's",
        "main",
    ]
    assert repo.files["notes.md"] == b"second" and stand_in.count("POST .*/commit/") == 2


def test_a_hub_that_says_nothing_is_given_up(
    stand_in: stand_ins.Hub, run_dir: Path, publication: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "TIMEOUT", 0.3)
    with pytest.raises(StoreError, match="ReadTimeout"):
        stand_in.fail("GET /api/whoami", 1.0)
        push(publication())


def test_a_failure_of_xet_is_one_of_the_hub(
    stand_in: stand_ins.Hub, run_dir: Path, publication: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With hf_xet installed, the client sends large files through it. The stand-in has no Xet."""
    from huggingface_hub import constants

    pytest.importorskip("hf_xet")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    with pytest.raises(
        StoreError,
        match=r"the commit failed 5 times, at last with .*xet-write-token.*; nothing is lost",
    ) as said:
        push(publication())
    assert "\n" not in str(said.value) and WRITER not in str(said.value)
    assert not stand_in.repos["me/run"].pushed() and stand_in.count("xet-write-token") >= 5


def test_a_refusal_is_not_tried_again(
    stand_in: stand_ins.Hub, run_dir: Path, publication: Any
) -> None:
    stand_in.fail("POST .*/commit/", 403)
    with pytest.raises(ConfigError, match=r"the token may not write there \(HTTP 403\)"):
        push(publication())
    assert stand_in.count("POST .*/commit/") == 1


@pytest.mark.parametrize(("dtype", "rounded"), [("bfloat16", 0.02), ("float32", 1e-5)])
def test_the_merged_model_is_measured_and_pushed_to_a_repository_of_its_own(
    dtype: str,
    rounded: float,
    stand_in: stand_ins.Hub,
    unproven: Path,
    publication: Any,
    tiny_model: Path,
    tmp_path: Path,
) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    _, said = push(publication(**{"hub.merge": True, "hub.merged_dtype": dtype, "hub.force": True}))
    assert "it alone is right on 0 questions, the adapter alone on 0" in said
    stages = set(re.findall(r"^((?:answering|executing).*): \d+/8", said, re.M))
    assert stages == {"answering with the merged model", "executing the merged model's SQL"}
    repo = stand_in.repos["me/run-merged"]
    assert len(repo.pushed()) == 1 and repo.private
    assert {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "contract.json",
        "metrics.json",
    } < set(repo.files)
    assert json.loads(repo.files["config.json"])["dtype"] == dtype
    merged = AutoModelForCausalLM.from_pretrained(unproven / "merged", dtype=torch.float32)
    base = models.load_base(str(tiny_model), QuantizationSection(), bf16=False)
    tuned = PeftModel.from_pretrained(base, str(unproven / "adapter"))
    tokens = torch.arange(40)[None]
    with torch.no_grad():
        difference = (merged(tokens).logits - tuned(tokens).logits).abs().max() / tuned(
            tokens
        ).logits.abs().max()
    assert difference < rounded, "the same model over 4 bits, up to its type's rounding"
    card = repo.files["README.md"].decode()
    assert (
        "On 8 questions the merged model alone is right on 0, the adapter over its base alone on "
        "0 (p = 1)." in card
    )
    assert f"merged into it, in {dtype}" in card
    asked = run_card(stand_in, "me/run-merged", tmp_path)
    assert asked["prompt"] == trained_prompt(asked, unproven, tiny_model)


def test_a_merged_model_that_falls_behind_its_adapter_is_not_pushed(
    stand_in: stand_ins.Hub, run_dir: Path, publication: Any
) -> None:
    with pytest.raises(
        ModelError, match=r"merged, the model is worse than with its adapter \(McNemar p = 0.0078\)"
    ):
        push(publication(**{"hub.merge": True}))
    assert list(stand_in.repos) == ["me/run"], "the adapter is published, the merged model is not"


@pytest.fixture
def job(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[..., tuple[int, str, str]]:
    """Run `python -m jobs.JOB` here: `job("publish", "--flag", …)` gives (code, out, err)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def call(name: str, *arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [f"jobs/{name}.py", *arguments])
        code = 0
        try:
            runpy.run_module(f"jobs.{name}", run_name="__main__")
        except SystemExit as stop:
            code = int(stop.code or 0)
        return (code, *capfd.readouterr())

    return call


@pytest.fixture
def flags(tiny_model: Path, spider_folder: Path, tmp_path: Path) -> list[str]:
    """The flags of a run of seconds that saves three checkpoints."""
    given = settings(tiny_model, spider_folder, tmp_path) | {
        "train.max_steps": 3,
        "save_steps": 1,
        "evaluate.limit": 2,
    }
    del given["tracking.enabled"]
    return [word for name, value in given.items() for word in (f"--{name}", str(value))]


def test_the_token_is_in_nothing_that_a_published_run_writes(
    stand_in: stand_ins.Hub, job: Any, flags: list[str], tmp_path: Path
) -> None:
    from mlflow.tracking import MlflowClient

    given = [
        *flags,
        "--write_token",
        WRITER,
        "--publish",
        "--hub.force",
        "--hub.push_checkpoints",
        "all",
    ]
    code, out, err = job("finetune", *given, "--tracking.uri", f"sqlite:///{tmp_path}/mlflow.db")
    assert code == 0, err
    run_id = json.loads((tmp_path / "out" / "run" / "run.json").read_text())["mlflow_run_id"]
    assert (
        MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
        .get_run(run_id)
        .data.tags["hub_url"]
        .endswith("/me/run")
    )
    repo = stand_in.repos["me/run"]
    assert run_id in repo.tags and len(repo.pushed()) == 1
    written = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    assert len(written) > 20
    for name, data in {
        **written,
        "stdout": out.encode(),
        "stderr": err.encode(),
        **repo.files,
    }.items():
        assert WRITER.encode() not in data, name
    assert sorted(
        path for path in repo.at("checkpoints").files if path.endswith(".safetensors")
    ) == [f"checkpoint-{step}/adapter_model.safetensors" for step in (1, 2, 3)]


def test_a_run_whose_push_fails_is_finished_and_pushed_by_the_same_command(
    stand_in: stand_ins.Hub, job: Any, flags: list[str], tmp_path: Path
) -> None:
    given = [*flags, "--no-tracking.enabled", "--write_token", WRITER, "--publish", "--hub.force"]
    stand_in.fail("POST .*/commit/", 503)
    code, out, err = job("finetune", *given)
    assert code == 2 and "execution accuracy" in out
    assert err.count("error: ") == 1 and "nothing is lost" in err and "Traceback" not in err
    assert (tmp_path / "out" / "run" / "inputs" / "finished").exists()
    stand_in.heal()
    code, out, err = job("finetune", *given)
    assert code == 0, err
    assert "holds a finished run" in out and len(stand_in.repos["me/run"].pushed()) == 1


@pytest.mark.slow
@pytest.mark.cluster
def test_the_pipeline_publishes_both_tasks_and_goes_on_where_it_stopped(
    stand_in: stand_ins.Hub, job: Any, flags: list[str], tmp_path: Path
) -> None:
    space = '{"learning_rate": {"choice": [1e-4, 1e-3]}}'
    given = [
        *flags,
        "--task_type",
        "sql,schema",
        "--no-tracking.enabled",
        "--tune.num_samples",
        "2",
        "--tune.space",
        space,
    ]
    given += [
        "--tune.objective",
        "eval_loss",
        "--evaluate.select_examples",
        "2",
        "--data.split_by",
        "question",
    ]
    given += [
        "--publish",
        "--hub.force",
        "--hub.repo_id",
        "me/both",
        "--data.validation_fraction",
        "0.2",
    ]
    code, _, err = job("pipeline", *given, "--write_token", READER)
    assert code == 2 and "may only read" in err and not (tmp_path / "out").exists(), (
        "known before the first trial"
    )
    stand_in.fail("POST .*/commit/", 503)
    code, out, err = job("pipeline", *given, "--write_token", WRITER)
    assert code == 2 and err.count("error: ") == 1
    for task in ("sql", "schema"):
        assert f"--output_name run-{task}" in err, (
            "one task's failure does not keep the other's champion back"
        )
        study = json.loads((tmp_path / "out" / f"run-{task}" / "study.json").read_text())
        assert study["finished"] and len(study["trials"]) == 2
    stand_in.heal()
    code, out, err = job("pipeline", *given, "--write_token", WRITER)
    assert code == 0, err
    assert out.count("holds a finished study") == 2
    assert [len(stand_in.repos[f"me/both-{task}"].pushed()) for task in ("sql", "schema")] == [1, 1]


def test_check_says_whether_a_run_could_be_published(
    stand_in: stand_ins.Hub, job: Any, flags: list[str]
) -> None:
    code, out, err = job(
        "check", *flags, "--no-tracking.enabled", "--publish", "--write_token", WRITER
    )
    assert code == 0, out + err
    assert (
        "ok    hub: me/run, if there is none, a private one is created, base model tests/tiny"
        in out
    )
    stand_in.add("me/run", {"README.md": b"soon"}, False)
    _, out, _ = job("check", *flags, "--no-tracking.enabled", "--publish", "--write_token", WRITER)
    assert "which holds no model yet; it is public: everybody can read what is pushed there" in out
    code, out, _ = job(
        "check", *flags, "--no-tracking.enabled", "--publish", "--write_token", READER
    )
    assert code == 2 and "FAIL  hub: the Hub token of me may only read" in out


def test_a_dry_run_shows_the_card_and_sends_nothing(
    stand_in: stand_ins.Hub, run_dir: Path, job: Any, tmp_path: Path
) -> None:
    code, out, err = job("publish", "--output_name", "run", "--write_token", WRITER, "--dry_run")
    assert code == 0, err
    assert "me/run, if there is none, a private one is created" in out and "## How to use it" in out
    assert stand_in.count("POST|PUT|DELETE") == 0


@pytest.mark.parametrize("fault", ["no token", "no Hub"])
def test_a_dry_run_needs_neither_token_nor_hub(
    stand_in: stand_ins.Hub, run_dir: Path, job: Any, fault: str
) -> None:
    given = ["--output_name", "run", "--dry_run"]
    if fault == "no Hub":
        given += ["--write_token", WRITER]
        stand_in.fail("GET /api/whoami", 503)
    code, out, err = job("publish", *given)
    assert code == 0, err
    assert "Hub       YOU/run, which was not asked: " in out
    assert "adapter_model.safetensors" in out and "ray_sql_config.json" in out
    assert '"YOU/run"' in out and "## How to use it" in out


@pytest.mark.slow
@pytest.mark.cluster
def test_checkpoints_of_ray_workers_are_pushed_by_the_driver(
    stand_in: stand_ins.Hub, ray_local: None, job: Any, flags: list[str]
) -> None:
    flags[flags.index("--scaling.num_workers") + 1] = "1"
    given = [
        "--no-tracking.enabled",
        "--no-evaluate.baseline",
        "--write_token",
        WRITER,
        "--hub.push_checkpoints",
        "all",
    ]
    code, _, err = job("finetune", *flags, *given)
    assert code == 0, err
    messages = [commit.message for commit in stand_in.repos["me/run"].pushed("checkpoints")]
    assert messages == [f"checkpoints: run: checkpoint-{step}" for step in (1, 2, 3)]


@pytest.mark.parametrize("which,pushed", [("all", {1, 2, 3}), ("best", {2})])
def test_checkpoints_are_pushed_beside_training_without_holding_it_up(
    stand_in: stand_ins.Hub, run_dir: Path, tmp_path: Path, which: str, pushed: set[int]
) -> None:
    config = as_trained(run_dir, **{"hub.push_checkpoints": which})
    (last,) = run_dir.glob("checkpoint-*")
    last.rename(tmp_path / "whole")
    answers = threading.Event()
    stand_in.fail(".*/commit/", answers)
    with publish.beside_training(config) as on_checkpoint:
        assert on_checkpoint is not None
        for step, objective in ((1, None), (2, 0.5), (3, 0.25)):
            save_checkpoint(tmp_path / "whole", run_dir, step, objective)
            on_checkpoint(step)
            wait_until(lambda: stand_in.count("/commit/"))  # checkpoint-1 is copied and under way
            if step == 1 and which == "best":
                shutil.rmtree(run_dir / "checkpoint-1")
        assert stand_in.repos["me/run"].pushed("checkpoints") == [], "training waited for no push"
        answers.set()
    there = stand_in.repos["me/run"].at("checkpoints")
    assert there
    found = {
        int(path.split("-")[1].split("/")[0])
        for path in there.files
        if path.startswith("checkpoint-")
    }
    assert found >= pushed and (which == "all" or 3 not in found)
    assert stand_in.repos["me/run"].files.keys() == {".gitattributes"}, (
        "main is for what was measured"
    )
    config_file = json.loads(there.files["checkpoint-2/adapter_config.json"])
    assert config_file["base_model_name_or_path"] == "tests/tiny"


def as_trained(run_dir: Path, **changes: Any) -> Config:
    saved = json.loads((run_dir / "config.json").read_text())
    return load(
        Config, [], **saved | {"output_dir": str(run_dir.parent), "write_token": WRITER} | changes
    )


def save_checkpoint(whole: Path, run_dir: Path, step: int, objective: float | None) -> None:
    folder = shutil.copytree(whole, run_dir / f"checkpoint-{step}")
    marker = json.loads((folder / "checkpoint.json").read_text())
    (folder / "checkpoint.json").write_text(
        json.dumps(marker | {"step": step, "objective": objective})
    )


def test_checkpoints_that_cannot_be_pushed_are_a_warning(
    stand_in: stand_ins.Hub, run_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (checkpoint,) = run_dir.glob("checkpoint-*")
    for fault in ("GET /api/whoami", "POST .*/commit/"):
        stand_in.fail(fault, 503)
        with publish.beside_training(as_trained(run_dir, **{"hub.push_checkpoints": "all"})):
            pass
        stand_in.heal()
        assert (
            f"{checkpoint.name} was not pushed" in caplog.messages[-1] and WRITER not in caplog.text
        )
    with publish.beside_training(as_trained(run_dir, **{"hub.push_checkpoints": "all"})):
        pass  # another attempt of the run: what an earlier one saved is pushed
    assert [commit.message for commit in stand_in.repos["me/run"].pushed("checkpoints")] == [
        f"checkpoints: run: {checkpoint.name}"
    ]


def test_a_run_that_is_stopped_does_not_wait_for_queued_checkpoints(
    stand_in: stand_ins.Hub, run_dir: Path, tmp_path: Path
) -> None:
    (whole,) = run_dir.glob("checkpoint-*")
    answers = threading.Event()
    stand_in.fail(".*/commit/", answers)
    with (
        pytest.raises(KeyboardInterrupt),
        publish.beside_training(as_trained(run_dir, **{"hub.push_checkpoints": "all"})) as pushed,
    ):
        for step in range(10, 20):
            save_checkpoint(whole, run_dir, step, None)
            assert pushed
            pushed(step)
        wait_until(lambda: stand_in.count("/commit/"))
        threading.Timer(0.5, answers.set).start()  # while the run waits for the push under way
        raise KeyboardInterrupt
    assert 1 <= len(stand_in.repos["me/run"].pushed(background.BRANCH)) < 10


def test_a_run_that_is_stopped_does_not_wait_long_for_a_hub_that_does_not_answer(
    stand_in: stand_ins.Hub, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(background, "LAST_PUSH", 0.5)
    (whole,) = run_dir.glob("checkpoint-*")
    answers = threading.Event()
    stand_in.fail(".*/commit/", answers)
    with (
        pytest.raises(KeyboardInterrupt),
        publish.beside_training(as_trained(run_dir, **{"hub.push_checkpoints": "all"})) as pushed,
    ):
        save_checkpoint(whole, run_dir, 10, None)
        assert pushed
        pushed(10)
        wait_until(lambda: stand_in.count("/commit/"))
        raise KeyboardInterrupt
    assert not any("/commit/" in request for request in stand_in.settled), (
        "it still does not answer"
    )
    answers.set()


def test_the_pages_commands_publish(stand_in: stand_ins.Hub, run_dir: Path, tmp_path: Path) -> None:
    run_dir.rename(run_dir.parent / "demo")
    page = (ROOT / "docs" / "publish.md").read_text().replace("\\\n", " ")
    commands = [line for line in page.splitlines() if line.startswith("ray-sql publish")]
    assert commands
    environment = os.environ | stand_in.environment(tmp_path / "home") | {"PYTHONPATH": str(ROOT)}
    for command in commands:
        words = [*RAY_SQL, *shlex.split(command)[1:]]
        done = subprocess.run(
            words, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False
        )
        if "--hub.merge" in command:  # this adapter only pretends to be good
            assert done.returncode == 2 and "merged, the model is worse" in done.stderr
        else:
            assert done.returncode == 0, done.stderr
    assert {"me/demo-sql"} <= set(stand_in.repos)


def test_a_dataset_is_called_by_its_name() -> None:
    assert bundle.public_name("demo") == "demo"
    assert bundle.public_name("owner/questions") == "owner/questions"
    assert bundle.public_name("/data/private/spider/") == "spider"
    assert bundle.public_name("s3://bucket/path/questions.jsonl") == "questions.jsonl"
    assert bundle.public_name(str(ROOT / "tests")) == "tests"
