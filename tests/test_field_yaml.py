"""YAML: settings are given once and known, and nothing that a terminal obeys reaches it."""

from __future__ import annotations

import io
import json
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from ray_sql import cli
from ray_sql.config import Config, EvaluateConfig, load
from ray_sql.display import Display, printable
from ray_sql.errors import ConfigError
from ray_sql.evaluate import run as evaluate

KIND = "YAML"
ALIASES = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n"
    for old, new in zip("abcdefg", "bcdefgh", strict=True)
)
"""A list of lists of lists: nine times as many values with each line."""
RUN = "model_name: m\noutput_name: o\ntask_type: sql\n"


def refusal(tmp_path: Path, text: str | bytes) -> str:
    file = tmp_path / "settings.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError) as caught:
        load(Config, ["--config", str(file)])
    message = str(caught.value)
    assert "settings.yaml" in message or "control" in message or "printed" in message
    assert max(map(len, message.splitlines())) < 1000
    return message


@pytest.mark.kind(KIND)
@pytest.mark.parametrize("value", ["other.yaml", "[a.yaml, b.yaml]", "null", "{a: b}"])
def test_a_file_of_settings_names_no_other(tmp_path: Path, value: str) -> None:
    assert "config: a file of settings reads no others" in refusal(tmp_path, f"config: {value}\n")


@pytest.mark.kind(KIND)
@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("seed: 1\nseed: 2\n", "seed"),
        ("lora:\n  r: 8\nlora:\n  lora_alpha: 3\n", "lora"),
        ("lora:\n  r: 8\nlora.r: 16\n", r"lora\.r"),
        (
            "tune:\n  space: {lora.r: {choice: [1]}, lora.r: {choice: [2]}}\n",
            r"tune\.space\.lora\.r",
        ),
        ('{"seed": 1, "seed": 2}\n', "seed"),
    ],
)
def test_a_setting_that_is_given_twice_is_refused(tmp_path: Path, text: str, name: str) -> None:
    before = "" if text.startswith("{") else RUN
    with pytest.raises(ConfigError, match=rf", line \d+: not valid YAML \({name} is given twice"):
        file = tmp_path / "settings.yaml"
        file.write_text(before + text)
        load(Config, ["--config", str(file)])


@pytest.mark.kind(KIND)
@pytest.mark.parametrize(
    "name", ["_cli_parse_args", "_env_file", "_secrets_dir", "__init__", "_case_sensitive"]
)
def test_words_of_the_library_are_unknown_settings(tmp_path: Path, name: str) -> None:
    text = f'{RUN}{name}: ["--seed", "7"]\n'
    assert f"{name}: unknown setting" in refusal(tmp_path, text)
    with pytest.raises(ValueError, match=name):
        Config(**{"model_name": "m", "output_name": "o", "task_type": "sql", name: [1]})


@pytest.mark.kind(KIND)
@pytest.mark.parametrize(
    "text",
    [
        f"{RUN}seed: {'x' * 100_000}\n",
        f"{RUN}{'k' * 5000}: 3\n",
        f"{RUN}split: [{'a, ' * 40_000}]\nseed: z\n",
        f"{RUN}seed: {list(range(5000))}\n",
        "x" * 600_000,
    ],
)
def test_an_error_is_no_longer_than_a_few_lines(tmp_path: Path, capsys: Any, text: str) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text(text)
    with pytest.raises(SystemExit, match="2"):
        cli.main("finetune", ["--config", str(file)])
    said = capsys.readouterr().err
    assert said.startswith("error: ") and len(said) < 2000


@pytest.mark.kind(KIND)
@pytest.mark.parametrize(
    "text",
    [
        "split: " + "[" * 5000 + "]" * 5000,
        "lora: " + "{a: " * 100,
        "a: &a [x, x, x, x, x, x, x, x, x]\n"
        + "".join(
            f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n"
            for old, new in zip("abcdefg", "bcdefgh", strict=True)
        ),
        "lora: &a {r: *a}\n",
        "seed: " + "9" * 5000,
        "seed: 2024-99-99\n",
        "? [1, 2]\n: 3\n",
        "seed: !!python/object:os.system x\n",
        "a: b: c\n",
    ],
)
def test_hostile_yaml_is_one_line(tmp_path: Path, text: str) -> None:
    assert "\n" not in refusal(tmp_path, RUN + text)


@pytest.mark.kind(KIND)
@pytest.mark.parametrize(
    "text",
    [
        RUN + 'dataset_id: "\\e[31mred"\n',
        RUN + 'dataset_id: "a\\0b"\n',
        RUN + 'dataset_id: "a\\nb"\n',
        RUN + 'split: ["\\x9b2J"]\n',
        RUN + 'dataset_id: "caf\\ud83d"\n',
        RUN.encode() + b"dataset_id: a\x1b[2J\n",
        RUN.encode() + b"dataset_id: caf\xe9\n",
    ],
)
def test_what_cannot_be_printed_is_no_value(tmp_path: Path, text: str | bytes) -> None:
    assert "\x1b" not in refusal(tmp_path, text)


@pytest.mark.kind(KIND)
@pytest.mark.parametrize(
    "name", ["[/red]", "[bold]x", "[link=file:///x]", ":boom:", "\x1b[2J", "a\rb"]
)
def test_markup_and_commands_of_a_terminal_are_text(tmp_path: Path, name: str) -> None:
    """A split, a question and a database may have any name."""
    folder = tmp_path / "d" / "databases" / "shop"
    folder.mkdir(parents=True)
    connection = sqlite3.connect(folder / "shop.sqlite")
    connection.executescript("CREATE TABLE item (id INTEGER); INSERT INTO item VALUES (1);")
    connection.close()
    row = {"id": "1", "db_id": "shop", "question": name, "query": "SELECT id FROM item"}
    for split in ("train", "dev"):
        (tmp_path / "d" / f"{split}.jsonl").write_text(json.dumps(row))
    judged = {"id": "9", "predicted": "SELECT 1", "db_id": "shop", "gold": "SELECT 1"}
    file = tmp_path / "p.jsonl"
    file.write_text(json.dumps(judged | {"split": name}))
    given = {"dataset_id": str(tmp_path / "d"), "output_name": "e", "evaluate.processes": 1}
    config = load(
        EvaluateConfig, [], **given, output_dir=str(tmp_path / "o"), predictions_file=str(file)
    )
    assert evaluate(config)["file"][name]["n"] == 1


@pytest.mark.kind(KIND)
@pytest.mark.parametrize("text", ["\x1b[31m", "\x9b2J", "a\rb", "\u202eevil", "\x07", "caf\ud83d"])
def test_the_display_shows_commands_and_never_obeys_them(text: str) -> None:
    output = io.StringIO()
    display = Display(Console(file=output, force_terminal=False, width=200))
    display.line(text)
    display.update(f"{text}[/red]", 1, 1, text)
    said = output.getvalue()
    assert text not in said and printable(text) in said and "[/red]" in said


@pytest.mark.kind(KIND)
@pytest.mark.parametrize(
    "text,name,value",
    [
        ("prompt: {thinking: off}", "prompt.thinking", "off"),
        ("output_name: 2024-01-31", "output_name", "2024-01-31"),
        ("output_name: no", "output_name", "no"),
        ("split: test", "split", ("test",)),
        ("split: seen,unseen", "split", ("seen", "unseen")),
        ("learning_rate: 2e-4", "learning_rate", 2e-4),
        ("tracking: {enabled: off}", "tracking.enabled", False),
        ("overwrite: yes", "overwrite", True),
        ("overwrite: true", "overwrite", True),
        ("train: {bf16: no}", "train.bf16", False),
    ],
)
def test_words_of_yaml_are_read_as_they_stand(
    tmp_path: Path, text: str, name: str, value: Any
) -> None:
    file = tmp_path / "settings.yaml"
    others = "".join(line for line in RUN.splitlines(True) if not text.startswith(line[:8]))
    file.write_text(f"{others}{text}\n")
    assert load(Config, ["--config", str(file)]).setting(name) == value


@pytest.mark.kind(KIND)
def test_a_number_for_a_name_is_refused_with_the_way_out(tmp_path: Path) -> None:
    message = refusal(tmp_path, RUN.replace("output_name: o", "output_name: 007"))
    assert message.endswith("output_name: 7 given; input should be a text; write it in quotes")
