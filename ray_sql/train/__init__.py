"""Train an adapter on N workers: Ray Train around `trainer`, checkpoints, restarts, and the choice of the best checkpoint.

`fit` runs on the driver, `train_loop_per_worker` on every worker. They meet in the run's folder: rows and validation questions
lie there before workers start, checkpoints appear there while they run, and a restarted worker group goes on from the
newest complete one, with as many workers as there are then. At `evaluate.eval_steps` a checkpoint is saved, then the validation
questions are answered by all ranks and judged on rank 0; where a run was cut off in between, it goes on with that. Ray's
`ValidationConfig` would do that in a task of its own beside training; it is not used because its verdicts go to Ray's own checkpoint
manager (see `checkpoints` for why that is not ours), a crash would leave checkpoints that nobody measured, and each task loads the base
model anew on a device of its own, where here every rank has it loaded.
"""

from ray_sql.train.driver import FitResult, fit, free_memory, keep_best
from ray_sql.train.loop import train_loop_per_worker
from ray_sql.train.resume import check_resumable, starting_point
