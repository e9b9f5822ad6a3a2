"""The pre-flight check: whatever would stop a run later, found in seconds and without a GPU.

Every check is a function that returns what it found, or raises a `RaySqlError` that says what to do; each becomes one line. `checks`
asks the settings, the data and the stores, `nodes` every machine that will train.
"""

from ray_sql.preflight.checks import replay, run
from ray_sql.preflight.memory import memory_estimate
