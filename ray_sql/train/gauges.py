"""Metrics of Ray that say how far a run is: for its dashboard, Prometheus and Grafana.

`jobs/monitoring/` has a Grafana dashboard of them and rules for Prometheus.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

GAUGES = {
    "loss": "Training loss",
    "examples_per_second": "Examples trained on, all workers together",
    "tokens_per_second": "Tokens trained on, all workers together; a shared schema counts for each",
    "step": "Optimizer steps done",
    "steps": "Optimizer steps in all",
}
"""Values of a point that Ray shows as `ray_sql_<name>`: Ray puts `ray_` before every metric."""
VALIDATION = "validation"
"""The gauge of validation scores, which has one for each label `score`."""


class Gauges:
    """The metrics of a run, by the label `run`; none where Ray does not run."""

    def __init__(self, run_name: str) -> None:
        import ray
        from ray.util.metrics import Gauge

        self._gauges: dict[str, Any] = {}
        if not ray.is_initialized():
            return
        for name, text in GAUGES.items():
            self._gauges[name] = Gauge(f"sql_{name}", text, tag_keys=("run",))
        scores = "Scores of the newest checkpoint on validation questions"
        self._gauges[VALIDATION] = Gauge(f"sql_{VALIDATION}", scores, tag_keys=("run", "score"))
        for gauge in self._gauges.values():
            gauge.set_default_tags({"run": run_name})

    def point(self, step: int, steps: int, values: Mapping[str, float]) -> None:
        """Show the values of an optimizer step, of `steps` in all."""
        if self._gauges:
            known = {**values, "step": float(step), "steps": float(steps)}
            for name in GAUGES.keys() & known.keys():
                self._gauges[name].set(known[name])

    def validated(self, values: Mapping[str, float]) -> None:
        """Show a checkpoint's scores, `validation/loss` and its kin, without their group."""
        if self._gauges:
            for name, value in values.items():
                score = name.rpartition("/")[2]
                if score != "n":  # a count is no score
                    self._gauges[VALIDATION].set(value, {"score": score})
