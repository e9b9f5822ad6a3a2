"""Tokenised training rows: one example each in the file that all workers read (`tokenise`), several on one database in what a
forward pass computes (`share`), where the model allows it (`probe`)."""

from ray_sql.rows import attention
from ray_sql.rows.probe import why_not_share
from ray_sql.rows.share import (
    Pass,
    Shared,
    Step,
    Steps,
    collate,
    common_prefix,
    heaviest_pass,
    model_inputs,
    passes,
    plan,
    share,
    together,
    tokens,
)
from ray_sql.rows.tokenise import (
    FILE,
    IGNORED,
    Audit,
    Row,
    build,
    cache_key,
    encode,
    encode_prompt,
    prepare,
    read,
    write,
)

__all__ = [
    "FILE",
    "IGNORED",
    "Audit",
    "Pass",
    "Row",
    "Shared",
    "Step",
    "Steps",
    "attention",
    "build",
    "cache_key",
    "collate",
    "common_prefix",
    "encode",
    "encode_prompt",
    "heaviest_pass",
    "model_inputs",
    "passes",
    "plan",
    "prepare",
    "read",
    "share",
    "together",
    "tokens",
    "why_not_share",
    "write",
]
