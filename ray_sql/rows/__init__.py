"""Training rows: tokenised examples in a file that all workers read, several of them in a row.

`tokenise` makes the examples once, `share` lays several on one database out in a row. Two modules
load torch and are imported by those who compute: `batch` makes tensors, `probe` asks a model.
"""

from ray_sql.rows.share import (
    SharedRow,
    common_prefix,
    count_tokens,
    heaviest_pass,
    longest_row,
    passes,
    share,
    step_order,
)
from ray_sql.rows.tokenise import (
    IGNORED,
    Audit,
    Encoder,
    TokenizedExample,
    build,
    cache_key,
    encode_prompt,
    largest_token,
    prepare,
    read,
    write,
)
