"""Secrets: a token or a password that reaches a setting is in nothing that anybody reads."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import psutil
import pytest

from ray_sql import cli
from ray_sql.config import Config, PublishConfig, load, mask_secrets, names
from ray_sql.database import Executor, Limits
from ray_sql.errors import ConfigError, DataError
from ray_sql.publish import hub

KIND = "secrets"
TOKEN = "hf_" + "AbCdEfGh" * 4
PASSWORD = "Opensesame77"
RUN = {"model_name": "m", "output_name": "o", "task_type": "sql"}
TEXTS = [
    name
    for name, field in names(Config)
    if name not in ("config", "read_token", "write_token") and "str" in str(field.annotation)
]
"""Every setting that takes a text, or several."""
SECRETS = {
    "a token": TOKEN,
    "a token of a mounted file": f"{TOKEN}\n",
    "a password": f"https://me:{PASSWORD}@host/x",
    "a key": f"s3://KEY:{PASSWORD}@bucket/x",
}
MAY_HOLD_PASSWORD = {"data.databases", "tracking.uri"}


def said(capsys: Any, *words: str) -> tuple[int, str]:
    """Run a job as the command line does; return its exit code and all that it said."""
    code = 0
    try:
        cli.main("finetune", words)
    except SystemExit as stop:
        code = int(str(stop.code))
    out, err = capsys.readouterr()
    return code, out + err


def hides(text: str) -> bool:
    return TOKEN not in text and PASSWORD not in text


@pytest.mark.kind(KIND)
@pytest.mark.parametrize("secret", SECRETS)
@pytest.mark.parametrize("name", TEXTS)
def test_no_setting_repeats_a_secret(
    tmp_path: Path, capsys: Any, monkeypatch: Any, name: str, secret: str
) -> None:
    monkeypatch.chdir(tmp_path)
    value = SECRETS[secret]
    flags = [word for key, given in RUN.items() if key != name for word in (f"--{key}", given)]
    file = tmp_path / "settings.yaml"
    for given in (value, [value], {"a": value}):
        file.write_text(json.dumps({**RUN, name: given}))
        way = [*flags, "--config", str(file), "--dry_run"]
        code, text = said(capsys, *way)
        assert code == 2 and hides(text) and "Traceback" not in text
    code, text = said(capsys, *flags, f"--{name}", value, "--dry_run")
    assert code == 2 and hides(text) and "Traceback" not in text
    for written in tmp_path.rglob("*"):
        assert written == file or not written.is_file() or hides(written.read_text("latin-1"))
    if name not in MAY_HOLD_PASSWORD:
        with pytest.raises(ConfigError):
            load(Config, [], **{**RUN, name: value})


@pytest.mark.kind(KIND)
@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("s3://K:{}@b/x?endpoint_override=http://u:{}@h", "s3://K:***@b/x?"),
        ("http://h:80/?next=http://u:{}@h", "http://h:80/?next=http://u:***@h"),
        ("abfss://c@a.example/x?sig={}&sv=1", "abfss://c@a.example/x?sig=***&sv=1"),
        ("abfss://c@a.example/x?X-Amz-Credential={}", "X-Amz-Credential=***"),
        ("mysql://h/d?passwd={}", "mysql://h/d?passwd=***"),
        ("me:{}@mlflow.example/x", "me:***@mlflow.example/x"),
        ("me:{}@localhost:5000", "me:***@localhost:5000"),
        ("me:{}@gpu1:8000/v1", "me:***@gpu1:8000/v1"),
        ("me:x@/{}@mlflow.example/x", "me:***@mlflow.example/x"),
        ("mysql://me:x@/{}@h/d", "mysql://me:***@h/d"),
        ("mysql://me:x@h/{}@h/d?a=b@c", "mysql://me:***@h/d?a=b@c"),
        ("a://b:x@/{}@c,d://e:{}@f", "a://b:***@c,d://e:***@f"),
        ("git@host.example:me/x", "git@host.example:me/x"),
        ("/data/a:b/c@d.example", "/data/a:b/c@d.example"),
        ("a://b:" * 20_000, "a://b:"),
        ("(a:b@" * 20_000, "(a:b@"),
    ],
)
def test_an_address_in_an_address_is_shown_without_secrets(given: str, shown: str) -> None:
    masked = mask_secrets(given.replace("{}", PASSWORD))
    assert shown in masked and hides(masked)


@pytest.mark.kind(KIND)
@pytest.mark.parametrize("variable", ["HF_TOKEN", "MLFLOW_TRACKING_URI"])
@pytest.mark.parametrize("secret", SECRETS)
def test_the_environment_repeats_no_secret(
    tmp_path: Path, capsys: Any, monkeypatch: Any, variable: str, secret: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(variable, SECRETS[secret])
    flags = [word for key, given in RUN.items() for word in (f"--{key}", given)]
    if variable == "HF_TOKEN":
        flags.append("--dry_run")  # which has no use for the record
    code, text = said(capsys, *flags)
    assert code == 2 and hides(text) and "Traceback" not in text


@pytest.mark.kind(KIND)
@pytest.mark.parametrize(
    "line",
    [
        'read_token: "{}',
        "read_token: [{}]",
        "read_token: {{a: {}}}",
        "read_token: *{}",
        "read_token: !{} x",
        "read_token: {}: b",
        "hub: {}",
        "{}: 3",
        "unknown: {}",
        "split: [a, {}]",
        "seed: {}",
        "  bad: {}",
        "data.columns: {{question: {}}}",
    ],
)
def test_a_line_of_yaml_is_not_repeated(tmp_path: Path, capsys: Any, line: str) -> None:
    file = tmp_path / "settings.yaml"
    for secret in SECRETS.values():
        file.write_text("model_name: m\n" + line.format(secret) + "\n")
        code, text = said(capsys, "--config", str(file))
        assert code == 2 and hides(text) and "Traceback" not in text


@pytest.mark.kind(KIND)
@pytest.mark.parametrize("name", ["read_token", "write_token"])
def test_a_token_of_a_mounted_file_loses_its_line_break(name: str, monkeypatch: Any) -> None:
    config = load(Config, [], **RUN, **{name: f" {TOKEN}\r\n"})
    assert getattr(config, name).get_secret_value() == TOKEN
    monkeypatch.setenv("HF_TOKEN", f"{TOKEN}\n")
    token = load(PublishConfig, ["--output_name", "o"]).write_token
    assert token and token.get_secret_value() == TOKEN
    monkeypatch.setenv("HF_TOKEN", "\n")
    assert load(PublishConfig, ["--output_name", "o"]).write_token is None


@pytest.mark.kind(KIND)
@pytest.mark.parametrize("token", [f"{TOKEN} x", f"{TOKEN}\nx", "tökén", f"{TOKEN}\x00"])
def test_a_token_that_is_none_is_refused_unseen(token: str) -> None:
    with pytest.raises(ConfigError, match="a secret given; a token is one word") as caught:
        load(Config, [], **RUN, read_token=token)
    assert hides(str(caught.value)) and token not in str(caught.value)


@pytest.mark.kind(KIND)
@pytest.mark.parametrize(
    "text",
    [
        f"Illegal header value b'Bearer {TOKEN}\\n'",
        f"Illegal header value b'Bearer {PASSWORD}'",
        f"Invalid header 'Basic {PASSWORD}=='",
        f"GET https://host/x?token={PASSWORD}&a=1",
        f"postgresql://me:{PASSWORD}@host/db",
        f"s3://bucket/x?access_key={PASSWORD}&secret_key={PASSWORD}",
    ],
)
def test_an_error_of_a_library_is_shown_without_its_header(text: str) -> None:
    assert hides(mask_secrets(text))
    assert hides(hub.reason(RuntimeError(text)))
    record = logging.LogRecord("x", logging.WARNING, "f", 1, "%s", (text,), None)
    assert hides(cli.MaskingFormatter("%(message)s").format(record))


@pytest.mark.kind(KIND)
@pytest.mark.parametrize("flag", ["--read_tokn={}", "--read_token x {}", "{}", "--lora {}"])
def test_a_mistyped_flag_is_named_without_its_value(capsys: Any, flag: str) -> None:
    code, text = said(capsys, *flag.format(TOKEN).split())
    assert code == 2 and hides(text)


def test_words_and_names_are_no_secrets() -> None:
    names = ["hf_generate.py", "hf_llama3finetuned", "Qwen/Qwen2.5-0.5B", "sk-learn-models-of-ours"]
    for text in (*names, "s3://bucket/runs", "a key=b", "gho_st", "keys do not belong into it"):
        assert mask_secrets(text) == text
    assert re.search("://me@", mask_secrets("postgresql://me@host/db"))


@pytest.mark.kind(KIND)
@pytest.mark.parametrize("scheme", ["postgresql", "postgresql+psycopg"])
def test_no_child_has_a_password_on_its_command_line(scheme: str) -> None:
    pytest.importorskip("psycopg")
    with Executor(1, Limits(seconds=2)) as executor:
        url = f"{scheme}://me:{PASSWORD}@127.0.0.1:1/db"
        with pytest.raises(DataError, match="cannot connect") as caught:
            executor.run(url, "SELECT 1")
        assert hides(str(caught.value))
        children = psutil.Process().children(recursive=True)
        assert children and all(hides(" ".join(child.cmdline())) for child in children)
