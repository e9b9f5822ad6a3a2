"""Ask a tuned model: prompts are those of its training, answers those that were measured."""

from __future__ import annotations

import io
import json
import os
import pty
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ray_sql import cli, data, rows
from ray_sql.config import AskConfig, Config, load
from ray_sql.database import render
from ray_sql.errors import ConfigError, ContractError, DataError, ModelError, RaySqlError
from ray_sql.generate.kept_prefixes import KeptPrefixes
from ray_sql.serve import databases, recipe
from ray_sql.serve.engine import Engine
from ray_sql.serve.opening import open_engine
from ray_sql.serve.prompter import Prompter
from ray_sql.store.run_folder import RunFolder
from tests.conftest import QUESTIONS, SHOP


def settings(run: Path, **given: Any) -> AskConfig:
    """Return the settings of a question to a run."""
    named = {"output_name": run.name, "output_dir": str(run.parent), "database": "mall"}
    return load(AskConfig, [], **(named | given))


def prompter(run: Path, **given: Any) -> Prompter:
    """Return the prompts of a run on one database."""
    config = settings(run, **given)
    found = recipe.find(config)
    database = databases.find(config.database, found.config)
    return Prompter(found, {database.name: database})


@pytest.fixture(scope="module")
def engine(tuned_run: Path) -> Iterator[Engine]:
    """Share an engine of the tuned run on the database mall."""
    with open_engine(prompter(tuned_run)) as engine:
        yield engine


@pytest.fixture
def ask(tuned_run: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run `ray-sql ask` here: `ask("words", …)` gives (code, out, err)."""

    def call(*words: str) -> tuple[int, str, str]:
        run = ["--output_name", tuned_run.name, "--output_dir", str(tuned_run.parent)]
        code = 0
        try:
            cli.main("ask", [*words, *run])
        except SystemExit as stop:
            code = int(stop.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    return call


def test_a_prompt_is_the_one_of_training_to_the_token(tuned_run: Path) -> None:
    config = Config(**(RunFolder(str(tuned_run)).read_settings() or {}))
    asking = prompter(tuned_run)
    trained = rows.Encoder(
        asking.tokenizer, asking.task, config.prompt, data.load_split(config, ["dev"]).schemas
    )
    for example in data.load_split(config, ["dev"]).splits["dev"]:
        asked = asking.ask(example.question, example.db_id).question
        assert asked.input_ids == trained.encode_question(example)
        assert asked.input_ids == trained.encode(example).input_ids[: len(asked.input_ids)]


def test_answers_are_the_measured_ones_alone_and_together(engine: Engine, tuned_run: Path) -> None:
    measured = RunFolder(str(tuned_run)).read_predictions()
    assert sum(row["verdict"] == "correct" for row in measured) > 3
    asked = [engine.prompter.ask(row["question"], "mall") for row in measured]
    together = [reply.raw for reply in engine.answer(asked)]
    alone = [engine.answer([one])[0].raw for one in asked]
    assert together == alone == [row["raw"] for row in measured]


def test_a_schema_is_computed_once(tuned_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ray_sql.generate.decoder import Decoder

    computed: list[int] = []
    prefill = Decoder.prefill

    def counted(self: Decoder, tokens: Any) -> Any:
        computed.append(len(tokens))
        return prefill(self, tokens)

    monkeypatch.setattr(Decoder, "prefill", counted)
    asking = prompter(tuned_run)
    with open_engine(asking) as engine:
        for question, _ in QUESTIONS[:3]:
            engine.answer([asking.ask(question, "mall")])
    assert computed.count(len(asking.begins["mall"])) == 1


def test_prefixes_are_kept_within_their_bytes() -> None:
    import torch

    from ray_sql.models.decode_attention import Prefix

    def compute(tokens: Any) -> Prefix:
        made.append(list(tokens))
        return Prefix({0: torch.zeros(1, len(tokens), 1)}, {0: torch.zeros(1, len(tokens), 1)}, 0)

    made: list[list[int]] = []
    kept = KeptPrefixes(most_bytes=80)  # ten tokens
    for tokens in ([1] * 4, [2] * 4, [1] * 4, [3] * 4, [1] * 4, [2] * 4, [4] * 20):
        kept.get(tokens, compute)
        assert kept.bytes <= 80
    assert made == [[1] * 4, [2] * 4, [3] * 4, [2] * 4, [4] * 20]


def test_sampled_answers_are_voted_on_and_names_mended(tuned_run: Path) -> None:
    asking = prompter(
        tuned_run,
        **{
            "evaluate.samples": 4,
            "evaluate.temperature": 0.05,
            "evaluate.choose": "vote",
            "evaluate.ground": "repair",
        },
    )
    with open_engine(asking) as engine:
        (reply,) = engine.answer([asking.ask(QUESTIONS[0][0], "mall")])
    assert (reply.chosen_by, len(reply.candidates)) == ("vote", 4)
    assert reply.predicted in reply.candidates


def test_a_question_shows_sql_rows_and_time(ask: Any, engine: Engine) -> None:
    question = QUESTIONS[6][0]
    (reply,) = engine.answer([engine.prompter.ask(question, "mall")])
    code, out, err = ask(*question.split(), "--database", "mall")
    assert (code, err) == (0, "starting: model\n")
    assert reply.predicted in out
    assert out.rstrip().endswith(" s")


def test_json_is_one_object_with_the_rows(ask: Any, tmp_path: Path) -> None:
    file = tmp_path / "shop.db"
    with sqlite3.connect(file) as connection:
        connection.executescript(SHOP)
    code, out, err = ask(QUESTIONS[6][0], "--database", str(file), "--json")
    answer = json.loads(out)
    assert (code, err, answer["database"], answer["model"]) == (0, "", "shop", "tuned")
    assert answer["sql"] == QUESTIONS[6][1]
    assert (answer["columns"], answer["rows"]) == (["COUNT(*)"], [[2]])
    assert set(answer["timings"]) == {"answer_seconds", "query_seconds"}


def test_lines_are_questions_and_commands(
    ask: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, spider_folder: Path
) -> None:
    kept = tmp_path / "kept.jsonl"
    typed = [
        "\\save",
        "How many customers are there?",
        "\\sql SELECT name -- all of them",
        "\\sql SELECT 'it''s' || name FROM customer",
        "\\save",
        "\\schema",
        "\\sql DELETE FROM customer",
        "\\what",
        "\\quit",
        "never asked",
    ]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(typed)))
    code, out, err = ask("--database", "mall", "--corrections", str(kept))
    assert (code, err) == (0, "starting: model\n")
    assert "error: nothing to save" in out
    assert "not run: no such column: name" in out
    assert "it'sAda" in out
    assert "customer(id int pk, name text, city text)" in out
    assert "not run: refused:" in out
    assert "\\sql QUERY" in out
    assert "never asked" not in out
    (example,) = data.load_split(
        load(
            Config,
            [],
            model_name="m",
            output_name="o",
            task_type="sql",
            dataset_id=str(kept),
            **{"data.databases": str(spider_folder / "database")},
        ),
        ["train"],
        undivided=True,
    ).splits["train"]
    assert (example.db_id, example.gold) == ("mall", "SELECT 'it''s' || name FROM customer")


def test_a_terminal_has_a_prompt_and_a_history(tuned_run: Path, tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "jobs.ask", "--output_name", tuned_run.name]
    command += ["--output_dir", str(tuned_run.parent), "--database", "mall"]
    command += ["--cache_dir", str(tmp_path)]
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    os.write(ours, b"How many?\n\\sql SELECT 40 + 2\n\\quit\n")
    shown = b""
    while process.poll() is None or b"42" not in shown:
        try:
            shown += os.read(ours, 1000)
        except OSError:  # the other end is closed
            break
    assert process.wait() == 0
    assert b"starting: model" in shown and b"? " in shown
    assert b"answering" in shown and b"42" in shown
    assert "SELECT 40 + 2" in (tmp_path / "ask_history").read_text()


def test_a_dry_run_shows_the_prompt(ask: Any) -> None:
    code, out, _ = ask("How", "many?", "--database", "mall", "--dry_run")
    assert code == 0
    assert "Question: How many?<|end|>" in out
    assert "would ask" in out


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"database": None}, "--database is missing; give a database file, a URL, or one of kiosk"),
        ({"database": "moon"}, "--database moon: no such file, and no such database of the run"),
        ({"database": __file__}, "not an SQLite database"),
        ({"output_name": "none"}, "no adapter of a ray_sql run (no ray_sql_config.json)"),
        ({"evaluate.choose": "vote"}, "evaluate.samples is 1: raise it"),
        ({"adapter": "nobody/nothing"}, "--adapter nobody/nothing: neither a local folder nor"),
    ],
)
def test_what_is_missing_is_named(tuned_run: Path, given: dict[str, Any], words: str) -> None:
    with pytest.raises(RaySqlError) as error:
        prompter(tuned_run, **given)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_an_adapter_folder_is_asked_as_a_run_is(tuned_run: Path) -> None:
    whole = prompter(tuned_run, output_name="", adapter=str(tuned_run))
    alone = prompter(tuned_run, output_name="", adapter=str(tuned_run / "adapter"))
    assert whole.adapter == alone.adapter == RunFolder(str(tuned_run)).adapter


def test_an_adapter_trained_for_another_prompt_is_refused(tuned_run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(tuned_run / "adapter", other)
    contract = json.loads((other / "contract.json").read_text())
    contract["template_hash"] = "0" * 12
    (other / "contract.json").write_text(json.dumps(contract))
    with pytest.raises(ContractError, match="template_hash"):
        prompter(tuned_run, adapter=str(other))


def test_databases_that_are_refused_leave_those_before(tuned_run: Path, tmp_path: Path) -> None:
    other = shutil.copytree(tuned_run / "adapter", tmp_path / "other")
    contract = json.loads((other / "contract.json").read_text())
    contract["described"] = {"mall": "0" * 12}
    (other / "contract.json").write_text(json.dumps(contract))
    asking = prompter(tuned_run, adapter=str(other), database="shop")
    mall = databases.find("mall", asking.config)
    with pytest.raises(ContractError, match="other descriptions of mall"):
        asking.take({"mall": mall})
    assert set(asking.databases) == set(asking.begins) == {"shop"}
    assert asking.ask("How many customers are there?", "shop").question.db_id == "shop"


def test_a_question_is_needed_nowhere_but_an_adapter_is() -> None:
    with pytest.raises(ConfigError, match="give --output_name of a run, or --adapter"):
        load(AskConfig, [])


def test_an_unknown_database_and_a_long_question_are_named(engine: Engine) -> None:
    with pytest.raises(DataError, match="'moon' is not registered; there are mall"):
        engine.prompter.ask("How many?", "moon")
    with pytest.raises(ModelError, match="reads up to 2,048 tokens"):
        engine.prompter.ask("why " * 3000, "mall")


def test_a_question_reads_no_file_of_the_model_where_one_as_long_did(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoConfig

    question = "How many customers are there in Lisbon?"
    engine.prompter.ask(question, "mall")
    read: list[str] = []
    load_config = AutoConfig.from_pretrained

    def noted(folder: str, **given: Any) -> Any:
        read.append(folder)
        return load_config(folder, **given)

    monkeypatch.setattr(AutoConfig, "from_pretrained", noted)
    engine.prompter.ask(question, "mall")
    assert read == []
    with pytest.raises(ModelError, match="reads up to 2,048 tokens"):
        engine.prompter.ask("why " * 3000, "mall")
    assert read


def test_the_schema_is_shown_as_prompts_have_it(engine: Engine) -> None:
    asked = engine.prompter.ask("How many?", "mall").question.input_ids
    text = engine.prompter.tokenizer.decode(asked)
    assert engine.prompter.schema_text("mall") in text
    assert render(engine.prompter.databases["mall"].schema, "ddl") not in text
