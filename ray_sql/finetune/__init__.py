"""One training run from end to end: prepare, record, train, measure, report (`finetune`)."""

from ray_sql.finetune.finetune import (
    begin,
    conclude,
    dry_run,
    evaluate,
    log_results,
    preview,
    run,
    show,
    spool,
)
