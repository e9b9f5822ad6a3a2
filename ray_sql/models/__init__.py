"""The model: base, tokenizer and adapter (`load`), and the demo's weights (`demo`).

Our own torch kernels lie beside them and are imported by those who compute: `cpu_linear`,
`packed_attention` for training, `decode_attention` for answering, `recurrent` for both.
"""

from ray_sql.models.demo import DEMO_HUB_ID, DEMO_WHEEL, demo_model, demo_source
from ray_sql.models.load import (
    check_vocabulary,
    check_window,
    compute_dtype,
    cpu_speed,
    fetch_adapter,
    inner_size,
    load_adapter,
    load_base,
    load_tokenizer,
    on_this_node,
    read_shape,
    resolve,
    revision_of,
    window,
)
from ray_sql.models.logs import import_bitsandbytes, quiet
