"""Training rows: tokenised examples in a file that all workers read, several of them in a row.

`encoder` writes an example or a question as tokens, and `tokenise` makes the examples once. `share`
lays several on one database out in a row. Two modules load torch and are imported by those who
compute: `batch` makes tensors, `probe` asks a model.
"""

from ray_sql.rows.encoder import IGNORED, Encoder, TokenizedExample, encode_prompt
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
from ray_sql.rows.tokenise import Audit, build, cache_key, largest_token, prepare, read, write
