"""Tokenised training rows: one example each in the file that all workers read (`tokenise`), several on one database in what a
forward pass computes (`share`), where the model allows it (`probe`, `attention`: imported by those who compute, they load torch)."""

from ray_sql.rows.share import (
    AUTO,
    Pass,
    Shared,
    Step,
    Steps,
    collate,
    common_prefix,
    heaviest_pass,
    longest_row,
    model_inputs,
    passes,
    per_pass,
    plan,
    share,
    together,
    tokens,
)
from ray_sql.rows.tokenise import (
    FILE,
    IGNORED,
    VALIDATION_FILE,
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
