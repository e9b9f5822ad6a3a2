"""One training run from end to end.

`finetune` is the door. `session` owns the needs of a recorded run, and `prepare` reads and checks
its data. `gold` finds gold queries that do not run, `plan` tells what will be done. `earlier` looks
at an earlier run of the same name, and `results` writes and records the scores.
"""

from ray_sql.finetune.earlier import finished_metrics, require_scored_alike
from ray_sql.finetune.finetune import dry_run, preview, run
from ray_sql.finetune.session import Session, require_start, spool
