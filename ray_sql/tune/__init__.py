"""Sweeps: what is varied (`space`), where the next trial is (`search`), one trial (`trial`), what a study knows (`study`), the
driver's view of it (`watch`, `page`), its best adapter (`champion`), and all of it in one command (`sweep`)."""

from ray_sql.tune.sweep import dry_run, replay, run
