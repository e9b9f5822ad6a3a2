"""Train an adapter on N workers: Ray Train around `trainer`, checkpoints, restarts, the best one.

`fit` runs on the driver, `train_loop_per_worker` on every worker. They meet in the run's folder:
rows and validation questions lie there before workers start, and checkpoints appear there while
they run. A restarted worker group goes on from the newest complete checkpoint, with as many
workers as there are then. At `evaluate.eval_steps` a checkpoint is saved, then all ranks answer
the validation questions and rank 0 judges them. A run that was cut off in between goes on with
that.

Ray's `ValidationConfig` would evaluate in a task of its own beside training. It is not used: its
verdicts go to Ray's own checkpoint manager (`store/checkpoints.py` says why that is not ours). A
crash would leave checkpoints that nobody evaluated. Each task would load the base model anew on a
device of its own; here every rank has it loaded.
"""

from ray_sql.train.driver import FitResult, fit, free_memory, keep_best, train_loop_per_worker
from ray_sql.train.resume import starting_point
