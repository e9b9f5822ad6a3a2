"""A flag or key that another tool has names the setting of ours that it means."""

from __future__ import annotations

from pathlib import Path

import pytest

from ray_sql.cli import JOBS
from ray_sql.config import names
from ray_sql.config.nearest import OTHER_NAMES
from tests.test_config import refusal

kind = pytest.mark.kind("flags and their neighbours")


@kind
@pytest.mark.parametrize(
    ("flag", "meant"),
    [
        ("--lr", "--learning_rate"),
        ("--lrr", "--learning_rate"),
        ("--train.lr", "--learning_rate"),
        ("--learning-rate", "--learning_rate"),
        ("--epochs", "--num_epochs"),
        ("--num_train_epochs", "--num_epochs"),
        ("--batch_size", "--train_batch_size"),
        ("--per_device_train_batch_size", "--train_batch_size"),
        ("--gradient_accumulation_steps", "--grad_accum_steps"),
        ("--lora_r", "--lora.r"),
        ("--lora-r", "--lora.r"),
        ("--lora.alpha", "--lora.lora_alpha"),
        ("--lora_alpha", "--lora.lora_alpha"),
        ("--max_seq_length", "--rows.max_length"),
        ("--output-dir", "--output_dir"),
        ("--out", "--output_dir"),
        ("--model", "--model_name"),
        ("--db", "--data.databases"),
        ("--num-workers", "--scaling.num_workers"),
        ("--resume_from_checkpoint", "--prev_checkpoint"),
        ("--push_to_hub", "--publish"),
        ("--limit", "--data.limit or --evaluate.limit"),
    ],
)
def test_a_flag_of_another_tool_names_ours(flag: str, meant: str) -> None:
    assert refusal(flag, "1") == f"{flag}: unknown flag; did you mean {meant}?"
    assert refusal(f"{flag}=1") == f"{flag}: unknown flag; did you mean {meant}?"


@kind
def test_other_tools_names_are_of_settings_and_of_none_twice() -> None:
    known = {name for job in JOBS.values() for name, _ in names(job.settings)}
    others = [other for text in OTHER_NAMES.values() for other in text.split()]
    assert set(OTHER_NAMES) <= known and len(others) == len(set(others))
    assert not set(others) & known


@kind
def test_a_key_of_another_tool_in_a_file_names_ours(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("lr: 1\nlora: {rank: 8}\n")
    message = refusal("--config", str(tmp_path / "a.yaml"))
    assert "lr: unknown setting; did you mean learning_rate?" in message
    assert "lora.rank: unknown setting; did you mean lora.r?" in message
