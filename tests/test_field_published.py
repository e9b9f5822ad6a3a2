"""Published weights are those that were measured, and a model card holds no code of others."""

from __future__ import annotations

import ast
import json
import os
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from ray_sql import publish
from ray_sql.config import Config, EvaluateConfig, load
from ray_sql.errors import RaySqlError
from ray_sql.evaluate.models import check_adapter
from ray_sql.models import load_tokenizer
from ray_sql.publish import bundle, hub
from ray_sql.publish.card import card
from ray_sql.store.storage import sha256
from tests import hub as stand_ins
from tests import test_publish
from tests.test_publish import edit, push

stand_in, trained = test_publish.stand_in, test_publish.trained
unproven, run_dir = test_publish.unproven, test_publish.run_dir
publication = test_publish.publication
KIND = "published weights"
WEIGHTS = "adapter_model.safetensors"


def other_values(file: Path) -> None:
    """Change a bit of the last weight."""
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def not_lora(file: Path) -> None:
    import torch
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(2)}, file)


def link(file: Path) -> None:
    file.rename(file.with_name("elsewhere"))
    file.symlink_to("elsewhere")


def pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "garbage": lambda file: file.write_bytes(os.urandom(5000)),
    "cut": lambda file: os.truncate(file, file.stat().st_size - 100),
    "longer": lambda file: os.truncate(file, file.stat().st_size + 8),
    "empty": lambda file: file.write_bytes(b""),
    "pickled": lambda file: file.write_bytes(pickle.dumps({"lora_A": 1})),
    "other weights": other_values,
    "no weights of LoRA": not_lora,
    "missing": lambda file: file.unlink(),
    "a pipe": pipe,
    "a link": link,
}


def test_the_checksum_stands_beside_what_was_measured(run_dir: Path) -> None:
    digest = sha256(run_dir / "adapter" / WEIGHTS)
    for file in ("metrics.json", "adapter/contract.json"):
        assert json.loads((run_dir / file).read_text())["weights_sha256"] == digest


@pytest.mark.kind(KIND)
@pytest.mark.parametrize("damage", DAMAGES)
def test_other_weights_are_not_published(
    stand_in: Any, run_dir: Path, publication: Any, damage: str
) -> None:
    file = run_dir / "adapter" / WEIGHTS
    DAMAGES[damage](file)
    for attempt in (publish.publish, publish.dry_run):
        with pytest.raises(RaySqlError, match=f"{file}: .*; (restore it|give)") as caught:
            attempt(publication())
        assert "\n" not in str(caught.value)
    assert not stand_in.repos


OTHERWISE = {
    "lora_alpha": 800,
    "use_rslora": True,
    "use_dora": True,
    "bias": "all",
    "rank_pattern": {"q_proj": 2},
    "alpha_pattern": {"q_proj": 800},
}
"""Settings with which the same weights give other answers."""


@pytest.mark.kind(KIND)
@pytest.mark.parametrize("name", OTHERWISE)
def test_weights_are_not_published_with_other_settings(
    stand_in: Any, run_dir: Path, publication: Any, name: str
) -> None:
    edit(run_dir / "adapter" / "adapter_config.json", **{name: OTHERWISE[name]})
    with pytest.raises(RaySqlError, match=rf"adapter_config.json: {name} is .*; the files are not"):
        publish.dry_run(publication())
    assert not stand_in.repos


@pytest.mark.kind(KIND)
@pytest.mark.parametrize(
    "ranks",
    [
        {"r": 10**9},
        {"r": 2000},
        {"rank_pattern": {".*q_proj": 10**8}},
        {"rank_pattern": {"a": 4, "b": 10**12}},
    ],
)
def test_ranks_that_no_weight_has_take_no_memory(
    run_dir: Path, tiny_model: Path, ranks: dict[str, Any]
) -> None:
    adapter = run_dir / "adapter"
    edit(adapter / "adapter_config.json", **ranks)
    config = Config(**json.loads((run_dir / "config.json").read_text()))
    with pytest.raises(RaySqlError, match=rf"{adapter}/adapter_config.json: .*which no weight has"):
        check_adapter(str(adapter), config, load_tokenizer(str(tiny_model)), None)


@pytest.mark.kind(KIND)
@pytest.mark.parametrize("damage", [name for name in DAMAGES if name != "a link"])
def test_other_weights_are_not_measured(run_dir: Path, tiny_model: Path, damage: str) -> None:
    adapter = run_dir / "adapter"
    DAMAGES[damage](adapter / WEIGHTS)
    config = Config(**json.loads((run_dir / "config.json").read_text()))
    with pytest.raises(RaySqlError, match=f"{adapter / WEIGHTS}: .*; (restore it|give)"):
        check_adapter(str(adapter), config, load_tokenizer(str(tiny_model)), None)


def test_a_copy_of_links_as_the_hubs_cache_keeps_it_is_measured(
    run_dir: Path, tiny_model: Path
) -> None:
    adapter = run_dir / "adapter"
    for file in list(adapter.iterdir()):
        link(file) if file.name == WEIGHTS else None
    config = Config(**json.loads((run_dir / "config.json").read_text()))
    check_adapter(str(adapter), config, load_tokenizer(str(tiny_model)), None)


@pytest.mark.kind(KIND)
@pytest.mark.parametrize("file", ["metrics.json", "adapter/contract.json"])
@pytest.mark.parametrize("value", ["0" * 64, None])
def test_a_checksum_that_is_not_both_files_is_refused(
    stand_in: Any, run_dir: Path, publication: Any, file: str, value: str | None
) -> None:
    saved = json.loads((run_dir / file).read_text())
    del saved["weights_sha256"]
    (run_dir / file).write_text(json.dumps(saved | ({"weights_sha256": value} if value else {})))
    with pytest.raises(RaySqlError, match="weights_sha256 differs"):
        publish.publish(publication())


def test_a_run_of_an_earlier_version_is_published_without_a_checksum(
    stand_in: Any, run_dir: Path, publication: Any
) -> None:
    for file in (run_dir / "metrics.json", run_dir / "adapter" / "contract.json"):
        saved = json.loads(file.read_text())
        del saved["weights_sha256"]
        file.write_text(json.dumps(saved))
    push(publication())
    assert WEIGHTS in stand_in.repos["me/run"].files


HOSTILE = {
    "a script": "<script>alert(1)</script>",
    "a link": "[x](javascript:alert(1))",
    "a cell": "dev | 100 | **best**",
    "a line": "dev\n\n# Heading\n\n```python\nimport os\n```",
    "a picture": "![x](https://host/x.png)",
    "quotes": '", "x": __import__("os").system("id"), "y": "',
    "a tick": "`` `x` <b>bold</b>",
    "a template": "{{ config }}{% for x in y %}",
    "YAML": "dev: [1]\n---\nlicense: mit",
    "a command": "\x1b[2Jdev",
}


def shown(text: str) -> tuple[str, ast.Module]:
    """Return a card's body as HTML, and its code."""
    from markdown_it import MarkdownIt

    body = text.split("\n---\n", 1)[1]
    code = body.split("```python\n")[1].split("```")[0]
    return MarkdownIt("commonmark").enable("table").render(body), ast.parse(code)


def names_used(code: ast.Module) -> set[str]:
    """Return the functions and attributes that code uses."""
    attributes = {node.attr for node in ast.walk(code) if isinstance(node, ast.Attribute)}
    return attributes | {node.id for node in ast.walk(code) if isinstance(node, ast.Name)}


@pytest.mark.kind(KIND)
@pytest.mark.parametrize("where", ["split", "license", "dataset", "run id", "version", "revision"])
@pytest.mark.parametrize("kind", HOSTILE)
def test_a_card_shows_every_value_as_text(
    run_dir: Path, publication: Any, kind: str, where: str
) -> None:
    text = HOSTILE[kind]
    whole = bundle.read(publication())
    plain = card(whole, "me/run", {"license": "mit"})
    metrics, contract = dict(whole.metrics), dict(whole.contract)
    license = {"license": "mit"}
    if where == "split":
        for model in ("base", "tuned", "compared"):
            metrics[model] = {text: metrics[model]["dev"]}
    elif where == "license":
        license = {"license": "other", "license_name": text}
    elif where == "dataset":
        metrics |= {"dataset_id": text, "data_fingerprint": text}
    elif where == "run id":
        metrics["mlflow_run_id"] = text
    elif where == "version":
        contract["packages"] = {text: text}
    else:
        contract["model_revision"] = text
    found = card(replace(whole, metrics=metrics, contract=contract), "me/run", license)
    before, code_before = shown(plain)
    after, code_after = shown(found)
    for tag in ("<script", "<b>", "<img", "<h1", "<h2", "<tr", "<pre", "<a "):
        assert after.count(tag) == before.count(tag), tag
    assert 'href="javascript' not in after and "\x1b" not in found
    assert names_used(code_after) == names_used(code_before)
    assert found.count("\n---\n") == plain.count("\n---\n")


@pytest.mark.kind(KIND)
@pytest.mark.parametrize("kind", HOSTILE)
def test_a_revision_that_is_none_is_refused(
    stand_in: Any, run_dir: Path, publication: Any, kind: str
) -> None:
    for file in (run_dir / "contract.json", run_dir / "adapter" / "contract.json"):
        edit(file, model_revision=HOSTILE[kind])
    with pytest.raises(RaySqlError, match=r"contract\.json: 'model_revision.*restore it"):
        publish.publish(publication())


@pytest.mark.kind("damaged files")
@pytest.mark.parametrize(
    "answer",
    [
        [],
        "me",
        {},
        {"name": "me", "auth": []},
        {"name": "me", "orgs": 5},
        {"name": "me", "orgs": [5]},
        {"name": "me", "auth": {"accessToken": {"fineGrained": [], "role": "fineGrained"}}},
    ],
)
def test_an_answer_that_is_no_hubs_is_named(
    stand_in: Any, publication: Any, monkeypatch: pytest.MonkeyPatch, answer: Any
) -> None:
    monkeypatch.setitem(stand_ins.ACCOUNTS, stand_ins.WRITER, answer)
    with pytest.raises(RaySqlError, match=r"^the Hub at http\S+: .*whoami") as caught:
        hub.login(publication().hub, "run", SecretStr(stand_ins.WRITER))
    assert stand_ins.WRITER not in str(caught.value)


def test_a_licence_with_a_line_break_is_no_setting() -> None:
    with pytest.raises(RaySqlError, match=r"hub\.license: holds a line break"):
        load(EvaluateConfig, [], output_name="o", model_name="m", **{"hub.license": "mit\nx: 1"})
