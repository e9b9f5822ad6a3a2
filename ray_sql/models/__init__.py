"""The model: tokenizer, base, adapter and the demo's weights (`load`), and the layers that compute it faster here (`cpu_linear`,
`packed_attention` for training, `decode_attention` for answering: these load torch)."""

from ray_sql.models.load import (
    DEMO_HUB_ID,
    DEMO_WHEEL,
    check_window,
    compute_dtype,
    demo_model,
    demo_source,
    here,
    load_adapter,
    load_base,
    load_here,
    load_tokenizer,
    quiet,
    resolve,
    revision_of,
)
