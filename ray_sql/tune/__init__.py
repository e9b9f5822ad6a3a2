"""Sweeps: trials over axes of settings, the best one measured where no trial looked.

`sweep` is the door. `space` has the axes, `search` chooses the next trial, `trial` runs one.
`study` keeps the results, `session` and `callback` are the driver's side. `champion` measures the
best adapter, `objective` and `sweep_report` are for people.
"""

from ray_sql.tune.sweep import dry_run, replay, run
