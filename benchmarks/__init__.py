"""Scripts that print measurements as JSON, and what several of them need."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ray_sql.config import Config
from ray_sql.database import Schema
from ray_sql.rows import Encoder
from ray_sql.tasks import TASKS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def make_encoder(
    tokenizer: PreTrainedTokenizerBase, config: Config, schemas: Mapping[str, Schema]
) -> Encoder:
    """Return the encoder of a run with these settings."""
    return Encoder(tokenizer, TASKS[config.task_type], config.prompt, schemas)
