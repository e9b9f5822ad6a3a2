"""Adapter and merged model open with everybody's tools, and answer alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ray_sql import models
from ray_sql.config import Config
from ray_sql.display import Display
from ray_sql.publish import merge
from ray_sql.serve.prompter import Prompter
from ray_sql.serve.recipe import Recipe
from ray_sql.store.run_folder import ADAPTER_SETTINGS, RunFolder


@pytest.fixture(scope="module")
def prompts(tuned_run: Path) -> list[list[int]]:
    """The prompts of the run's scored questions, as tokens."""
    from ray_sql.serve import databases

    config = Config(**(RunFolder(str(tuned_run)).read_settings() or {}))
    recipe = Recipe(config, RunFolder(str(tuned_run)).adapter, "tuned")
    mall = databases.find("mall", config)
    prompter = Prompter(recipe, {"mall": mall})
    rows = RunFolder(str(tuned_run)).read_predictions()
    return [prompter.ask(row["question"], "mall").question.input_ids for row in rows]


@pytest.fixture(scope="module")
def merged(tuned_run: Path) -> Path:
    config = Config(**(RunFolder(str(tuned_run)).read_settings() or {}))
    merge.merged(config, RunFolder(str(tuned_run)), Display())
    return tuned_run / "merged"


def answers(model: Any, prompts: list[list[int]], tokenizer: Any) -> list[str]:
    """Return greedy answers, by transformers' own generate."""
    import torch

    texts = []
    for prompt in prompts:
        tokens = torch.tensor([prompt])
        with torch.no_grad():
            output = model.generate(
                input_ids=tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=48,
                do_sample=False,
            )
        texts.append(tokenizer.decode(output[0, len(prompt) :], skip_special_tokens=True))
    return texts


@pytest.mark.slow
def test_three_loaders_open_the_adapter_and_answer_as_it_was_measured(
    tuned_run: Path, tiny_model: Path, prompts: list[list[int]]
) -> None:
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM, pipeline

    folder, tokenizer = str(tuned_run / "adapter"), models.load_tokenizer(str(tiny_model))
    assert (tuned_run / "adapter" / ADAPTER_SETTINGS).is_file()
    assert not (tuned_run / "adapter" / "config.json").exists(), "it would be taken for a model's"
    measured = [row["raw"].strip() for row in RunFolder(str(tuned_run)).read_predictions()]
    for model in (
        AutoPeftModelForCausalLM.from_pretrained(folder),
        AutoModelForCausalLM.from_pretrained(folder),
        pipeline("text-generation", model=folder, tokenizer=tokenizer).model,
    ):
        for text, known in zip(answers(model, prompts, tokenizer), measured, strict=True):
            assert text.strip().startswith(known), "generate goes on behind the answer's end"


@pytest.mark.slow
def test_the_merged_model_opens_alike(
    merged: Path, tuned_run: Path, prompts: list[list[int]]
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

    tokenizer = AutoTokenizer.from_pretrained(merged)
    alone = answers(AutoModelForCausalLM.from_pretrained(merged), prompts, tokenizer)
    piped = answers(pipeline("text-generation", model=str(merged)).model, prompts, tokenizer)
    measured = [row["raw"].strip() for row in RunFolder(str(tuned_run)).read_predictions()]
    pairs = zip(alone, measured, strict=True)
    same = sum(one.strip().startswith(known) for one, known in pairs)
    assert alone == piped and same >= len(measured) - 2, "bfloat16 rounds what is added"
