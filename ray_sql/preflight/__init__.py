"""Pre-flight checks: find in seconds, and without a GPU, whatever would stop a run later.

A check is a function that returns one line, or raises a `RaySqlError` that says what to do.
`checks` asks the settings, the data and the stores, `nodes` every machine that will train.
"""

from ray_sql.preflight.checks import replay, run
from ray_sql.preflight.memory import memory_estimate
