"""A sweep that may be given again: it passes over what is complete and goes on with what began."""

from __future__ import annotations

from typing import Any

from ray_sql.config import SweepConfig
from ray_sql.tune.sweep import run as tune


def run(config: SweepConfig) -> dict[str, dict[str, Any]]:
    """Sweep, resuming unless `overwrite` begins anew; returns the metrics of each task."""
    return tune(config if config.overwrite else config.changed({"resume": True}))
