"""Ways out of the project answer as it does: a client, vLLM's configuration, the merged folder."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from ray_sql import cli, models
from ray_sql.config import Config
from ray_sql.display import Display
from ray_sql.errors import ConfigError
from ray_sql.publish import merge
from ray_sql.serve import vllm
from ray_sql.serve.databases import registered
from ray_sql.serve.engine import Engine
from ray_sql.serve.prompter import Prompter
from ray_sql.serve.recipe import find
from ray_sql.store.run_folder import RunFolder
from tests.serving import serving, settings

PAGE = (Path(__file__).parent.parent / "docs" / "ways-out.md").read_text()


def prompter(run: Path, **given: Any) -> Prompter:
    """Return the prompts of a run on its databases."""
    found = find(settings(run, **given))
    return Prompter(found, registered({}, found.config))


def test_the_pages_client_asks(engine: Engine) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len([line for line in code.splitlines() if line]) <= 5
    with serving(engine) as client:
        asked = code.replace("http://127.0.0.1:8000/", f"{str(client.base_url).rstrip('/')}/")
        asked = asked.replace('"bookshop"', '"mall"').replace("books", "customers")
        with contextlib.redirect_stdout(io.StringIO()) as said:
            exec(asked, {})
    assert said.getvalue() == "SELECT COUNT(*) FROM customer ['COUNT(*)'] [[4]]\n"


def test_vllms_configuration_loads_the_adapter(
    tuned_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    named = ["--output_name", tuned_run.name, "--output_dir", str(tuned_run.parent)]
    cli.main("serve", [*named, "--serve.gpu", "vllm", "--serve.port", "8123"])
    text = capsys.readouterr().out
    values = yaml.safe_load(text)
    assert values["lora-modules"] == [f"tuned={tuned_run / 'adapter'}"]
    assert Path(values["model"], "config.json").is_file()
    assert (values["enable-lora"], values["max-lora-rank"], values["port"]) == (True, 64, 8123)
    assert (values["generation-config"], values["dtype"]) == ("vllm", "float32")
    assert "quantization" not in values
    assert "# vllm serve --config THIS_FILE" in text
    assert "http://127.0.0.1:8123/v1" in text


def test_a_rank_between_those_of_vllm_is_rounded_up(tuned_run: Path, tmp_path: Path) -> None:
    adapter = changed(tuned_run, tmp_path / "other", r=12, rank_pattern={"q_proj": 20})
    found = prompter(tuned_run, adapter=str(adapter))
    assert (
        yaml.safe_load(vllm.configuration(found, settings(tuned_run).serve))["max-lora-rank"] == 32
    )


@pytest.mark.parametrize(
    ("changes", "reason"),
    [({"use_dora": True}, "use_dora"), ({"modules_to_save": ["lm_head"]}, "modules_to_save")],
)
def test_an_adapter_that_vllm_cannot_load_is_refused(
    tuned_run: Path, tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    adapter = changed(tuned_run, tmp_path / "other", **changes)
    found = prompter(tuned_run, adapter=str(adapter))
    with pytest.raises(ConfigError, match=f"vLLM loads no adapter with {reason}; merge it"):
        vllm.configuration(found, settings(tuned_run).serve)


def changed(run: Path, folder: Path, **changes: Any) -> Path:
    """Return a copy of a run's adapter with another configuration of PEFT's."""
    shutil.copytree(run / "adapter", folder)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return folder


def test_the_merged_folder_answers_as_base_and_adapter_do(tuned_run: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    run = tmp_path / "tuned"
    shutil.copytree(tuned_run, run)
    config = Config(**(RunFolder(str(run)).read_settings() or {}))
    merge.merged(config.changed({"output_dir": str(tmp_path)}), RunFolder(str(run)), Display())
    asking = prompter(run)
    merged = AutoModelForCausalLM.from_pretrained(run / "merged", dtype=torch.float32)
    base = models.load_base(asking.model_folder, config.quantization, False, "cpu")
    tuned = models.load_adapter(base, str(run / "adapter"))
    rows = RunFolder(str(run)).read_predictions()
    asked = [(name, row["question"]) for name in asking.databases for row in rows]
    assert len(asked) == 32
    for name, question in asked:
        prompt = torch.tensor([asking.ask(question, name).question.input_ids])
        said = [
            model.generate(prompt, max_new_tokens=48, do_sample=False).tolist()
            for model in (merged, tuned)
        ]
        assert said[0] == said[1], question
