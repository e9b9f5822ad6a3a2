"""Damaged models and stores: named in one line, without a question, their code not run."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ray_sql import models, tracking
from ray_sql.config import load
from ray_sql.config.sections import QuantizationSection, TrackingSection
from ray_sql.config.settings import Config
from ray_sql.errors import ModelError, RaySqlError, StoreError

KIND = "damaged files"
PLAIN = QuantizationSection(load_in_4bit=False)


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model, of the test's own."""
    return shutil.copytree(tiny_model, tmp_path / "model")


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def own_code(folder: Path) -> None:
    """A model whose type only its own code knows; running it would leave a file."""
    (folder / "code.py").write_text("open('ran', 'w')\nclass X: pass\n")
    edit(folder / "config.json", model_type="mine", auto_map={"AutoConfig": "code.X"})


def without_a_weight(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    weights.pop("model.layers.0.mlp.up_proj.weight")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


class Planted:
    """What runs a program where it is unpickled."""

    def __reduce__(self) -> Any:
        return (open, ("ran", "w"))


def planted(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Planted(), protocol=2))


def of_another_size(folder: Path) -> None:
    edit(folder / "config.json", intermediate_size=96)


def shards(folder: Path, listed: object) -> None:
    """Weights that lie outside of the model's folder, by the list of its files."""
    (folder / "model.safetensors").rename(folder.parent / "secret.safetensors")
    weights = {"model.embed_tokens.weight": listed}
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weights})
    )


DAMAGES: dict[str, Callable[[Path], object]] = {
    "an unknown type": lambda folder: edit(folder / "config.json", model_type="qwen99"),
    "no type": lambda folder: edit(folder / "config.json", model_type=None, architectures=None),
    "code of its own": own_code,
    "cut weights": lambda folder: os.truncate(folder / "model.safetensors", 40_000),
    "empty weights": lambda folder: (folder / "model.safetensors").write_bytes(b""),
    "pickled weights": lambda folder: (folder / "model.safetensors").write_bytes(b"\x80\x04K\x01."),
    "a program in place of weights": planted,
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "a weight less": without_a_weight,
    "other sizes": of_another_size,
    "attention of the Hub": lambda folder: edit(
        folder / "config.json", attn_implementation="kernels-community/evil"
    ),
    "attention of somebody": lambda folder: edit(
        folder / "config.json", _attn_implementation="evil/attention"
    ),
    "a billion layers": lambda folder: edit(folder / "config.json", num_hidden_layers=10**9),
    "shards outside": lambda folder: shards(folder, "../secret.safetensors"),
    "shards from the root": lambda folder: shards(folder, "/etc/passwd"),
    "shards as a list": lambda folder: shards(folder, ["a"]),
    "a shard that is its list": lambda folder: shards(folder, "model.safetensors.index.json"),
    "ends as texts": lambda folder: edit(folder / "generation_config.json", eos_token_id=["x"]),
    "an end as text": lambda folder: edit(folder / "generation_config.json", eos_token_id="</s>"),
    "an end as a list": lambda folder: edit(folder / "generation_config.json", eos_token_id=[[2]]),
    "an end as an object": lambda folder: edit(
        folder / "generation_config.json", eos_token_id={"a": 1.5}
    ),
    "sizes of text": lambda folder: edit(folder / "config.json", hidden_size="many"),
}


@pytest.mark.kind(KIND)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_model_is_named(
    model: Path, monkeypatch: Any, tmp_path: Path, damage: str
) -> None:
    monkeypatch.chdir(tmp_path)
    DAMAGES[damage](model)
    with pytest.raises(ModelError, match=f"^--model_name {model}: ") as caught:
        models.read_shape(str(model))
        models.load_base(str(model), PLAIN, bf16=False)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600
    assert not (tmp_path / "ran").exists() and "weights_only" not in str(caught.value)
    if damage == "code of its own":
        assert "needs code of its own, which is not run" in str(caught.value)


@pytest.mark.kind(KIND)
@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer.json", "{}"),
        ("tokenizer.json", '{"model": {"type": "BPE", "vocab": {"a": -1}, "merges": [1]}}'),
        ("tokenizer.json", "[" * 50_000),
        ("tokenizer_config.json", '{"tokenizer_class": 5}'),
        ("tokenizer_config.json", '{"auto_map": {"AutoTokenizer": ["code.X", null]}}'),
        ("tokenizer_config.json", '{"eos_token": {"a": []}}'),
    ],
)
def test_a_damaged_tokenizer_is_named(model: Path, file: str, content: str) -> None:
    (model / file).write_text(content)
    try:
        models.load_tokenizer(str(model))  # what transformers can do without is no fault
    except ModelError as error:
        assert f"--model_name {model}: its tokenizer cannot be loaded: " in str(error)
        assert "\n" not in str(error) and len(str(error)) < 600


@pytest.mark.kind(KIND)
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_pipe_or_a_broken_link_is_named(model: Path, tmp_path: Path, name: str) -> None:
    (model / name).unlink()
    os.mkfifo(model / name)
    with pytest.raises(ModelError, match="no"):
        models.resolve(str(model), tmp_path)
    (model / name).unlink()
    (model / name).symlink_to("nowhere")
    with pytest.raises(ModelError, match="no"):
        models.resolve(str(model), tmp_path)


@pytest.mark.kind(KIND)
@pytest.mark.parametrize(
    "content", ["", "[]", "{", '{"a": ' + "[" * 9000, '{"peft_type": "X"}', '{"r": 1}']
)
def test_a_damaged_adapter_is_named(model: Path, tmp_path: Path, content: str) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(content)
    base = models.load_base(str(model), PLAIN, bf16=False)
    with pytest.raises(RaySqlError, match=f"^{adapter}.*: ") as caught:
        models.load_adapter(base, adapter)
    assert "\n" not in str(caught.value)


@pytest.mark.kind(KIND)
@pytest.mark.parametrize(
    "address",
    [
        "http://localhost:99999",
        "http://localhost:port",
        "http://[::1",
        f"http://{'x' * 300}.example",
        "gopher://host",
        f"sqlite:////tmp/{'x' * 300}",
        "sqlite:////nowhere/at/all.db",
    ],
)
def test_an_address_of_mlflow_that_is_none_is_named(address: str) -> None:
    with pytest.raises(StoreError, match=r"^--tracking\.uri ") as caught:
        tracking.require_store(TrackingSection(uri=address))
    assert "\n" not in str(caught.value)


@pytest.mark.kind(KIND)
@pytest.mark.parametrize("content", ["revision", "text", "bytes"])
def test_a_database_of_mlflow_that_is_none_is_named(tmp_path: Path, content: str) -> None:
    import sqlite3

    file = tmp_path / "m.db"
    if content == "revision":  # of a version of MLflow that is not there yet
        connection = sqlite3.connect(file)
        connection.executescript(
            "CREATE TABLE alembic_version (version_num TEXT); CREATE TABLE experiments (x);"
            "INSERT INTO alembic_version VALUES ('feed0000cafe');"
        )
        connection.close()
    elif content == "text":
        file.write_text("no database\n" * 400)
    else:
        file.write_bytes(os.urandom(8192))
    with pytest.raises(StoreError, match=rf"^--tracking\.uri sqlite:///{file}: MLflow cannot use"):
        tracking.require_store(TrackingSection(uri=f"sqlite:///{file}"))


@pytest.mark.kind(KIND)
def test_a_server_that_is_no_mlflow_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(RaySqlError, match="no MLflow server answers there"):
        tracking.require_store(TrackingSection(uri=f"http://127.0.0.1:{port}"))


@pytest.mark.kind("secrets")
def test_addresses_with_passwords_are_saved_without_them() -> None:
    password = "Opensesame77"
    config = load(
        Config,
        [],
        **{"output_name": "o", "model_name": "m", "task_type": "sql"},
        **{"data.databases": f"postgresql://me:{password}@host/db"},
        **{"tracking.uri": f"https://me:{password}@host"},
        read_token="hf_" + "AbCdEfGh" * 4,
    )
    for saved in (config.public(), config.for_workers()):
        assert password not in json.dumps(saved) and "AbCdEfGh" not in json.dumps(saved)


@pytest.mark.kind("chat templates")
@pytest.mark.parametrize("begins", [True, False])
def test_a_prompt_of_plain_text_does_not_end_the_text(model: Path, begins: bool) -> None:
    """A tokenizer may end all that it reads, and the answer would follow the end of the text."""
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    from ray_sql.rows.encoder import encode_prompt

    tokenizer = PreTrainedTokenizerFast.from_pretrained(model)
    tokenizer.chat_template = None
    start, end = ("<|start|>", 1), ("<|end|>", 2)
    form = f"{start[0]} $A {end[0]}" if begins else f"$A {end[0]}"
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=form, special_tokens=[start, end]
    )
    ids = encode_prompt(tokenizer, "Question: how many?\n\nAnswer:\n")
    assert ids[-1] != tokenizer.eos_token_id and (ids[0] == 1) is begins
    # an end that the text itself has stays
    assert encode_prompt(tokenizer, "one<|end|>")[-1] == tokenizer.eos_token_id


@pytest.mark.kind("tokenizers of another model")
@pytest.mark.parametrize("token", ["many customers are", "Schema:", "```sql"])
def test_a_token_without_an_embedding_is_refused(model: Path, make_config: Any, token: str) -> None:
    """The first pass over it ended in IndexError, on a GPU in an assertion of the device."""
    from transformers import AutoTokenizer

    from ray_sql.finetune import prepare

    tokenizer = AutoTokenizer.from_pretrained(model)
    size = len(tokenizer)
    tokenizer.add_tokens([token])
    tokenizer.save_pretrained(model)
    with pytest.raises(ModelError, match=rf"writes token {size}, but the model has embeddings for"):
        prepare.prepare(make_config(model_name=str(model)))


@pytest.mark.kind("tokenizers of another model")
def test_a_token_that_no_text_has_is_no_hindrance(model: Path, make_config: Any) -> None:
    from transformers import AutoTokenizer

    from ray_sql.finetune import prepare

    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens(["<image>"])
    tokenizer.save_pretrained(model)
    prepared = prepare.prepare(make_config(model_name=str(model)))
    assert prepared.questions()


@pytest.mark.kind(KIND)
def test_a_file_is_no_model(tmp_path: Path, make_config: Any) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match=r"m\.gguf: is a file; give the folder of a Hugging Face"):
        models.resolve(str(tmp_path / "m.gguf"), tmp_path, None)
